"""Runs that exist: in folders, in the folders of earlier comparisons, and on the Hub."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ham_hf.comparison.differences import run_settings, setting_text
from ham_hf.comparison.pairs import verdicts_beside
from ham_hf.comparison.row_names import public_word
from ham_hf.comparison.table import MissingRun, Run
from ham_hf.hub_ids import split_revision
from ham_hf.reporting.report import REPORT_NAME, RunReport, plain_text, read_report
from ham_hf.training.run_folder import is_locked

NOT_THERE = "(none)"
SEED_FOLDER = re.compile(r"seed(\d+)")


@dataclass(frozen=True, kw_only=True)
class ExistingRuns:
    """What was found where runs exist.

    Attributes:
        found: (folder or Hub id, label or None, report) of every finished run; the label is the name of the folder
            above where the folder is called ``seed<seed of the report>``, as in a comparison.
        missing: what a comparison's folder holds of runs without a report.
        baseline: that of the comparisons among the sources; None if there is none, or not one.
    """

    found: tuple[tuple[str, str | None, RunReport], ...]
    missing: tuple[MissingRun, ...]
    baseline: str | None


def read_runs(sources: Sequence[str], download: Callable[[str, str | None], Path]) -> ExistingRuns:
    """Read the reports of runs that exist; a source given twice counts once.

    Args:
        sources: folders with a ``report.json``, folders of comparisons, and Hub ids ``OWNER/NAME[@REVISION]``.
        download: fetches the report of a Hub id and revision, and returns its path.

    Raises:
        ValueError: naming every source that is none of these, or has no report that can be read. A run in the folder
            of a comparison that has none is listed as missing instead.
    """
    found, missing, problems = list[tuple[str, str | None, RunReport]](), list[MissingRun](), list[str]()
    baselines, seen = set[str](), set[Path | str]()
    for source in sources:
        path, hub_id = Path(source), split_revision(source)
        try:
            if path.is_dir():
                places = [path]
                if not (path / REPORT_NAME).is_file():
                    places, baseline = _comparison_places(path)
                    baselines |= {baseline} if baseline is not None else set()
                for place in places:
                    if place.resolve() not in seen:
                        seen.add(place.resolve())
                        _read_place(place, found, missing)
            elif hub_id is not None and not path.exists():
                if source not in seen:
                    seen.add(source)
                    found.append((source, None, _read_hub(source, hub_id, download)))
            else:
                raise ValueError(f"{source}: expected a folder with {REPORT_NAME}, or OWNER/NAME on the Hub")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    baseline = baselines.pop() if len(baselines) == 1 else None
    return ExistingRuns(found=tuple(found), missing=tuple(missing), baseline=baseline)


def label_runs(found: Sequence[tuple[str, str | None, RunReport]]) -> list[Run]:
    """Find out which of the given runs are repetitions of one another, and what to call them.

    Runs with equal settings but for seed and folder are one row. It is called what the folder says or, where that
    says nothing, by its method (a model that was only evaluated: by its name). Rows that would have the same name
    also get the settings in which they differ.

    Args:
        found: (folder or Hub id, label that the folder says or None, report) of every run. Predictions are read where
            the folder has them; of a run on the Hub they are not fetched.

    Raises:
        ValueError: naming the file, if the predictions of a run cannot be read.
    """
    groups: dict[tuple[str, str], list[tuple[str, RunReport]]] = {}
    for source, folder_label, report in found:
        name = plain_text(folder_label or report.config.get("method") or public_word(report.model.name), 200)
        settings = json.dumps(run_settings(report.config, without={"seed"}), sort_keys=True)
        groups.setdefault((name, settings), []).append((source, report))
    same_name: defaultdict[str, list[dict[str, object]]] = defaultdict(list)
    for name, settings in groups:
        same_name[name].append(json.loads(settings))
    runs: list[Run] = []
    for (name, settings), members in groups.items():
        label = name
        if len(same_name[name]) > 1:
            own = json.loads(settings)
            keys = dict.fromkeys(key for other in same_name[name] for key in other)
            different = [
                key for key in keys if any(other.get(key, ...) != own.get(key, ...) for other in same_name[name])
            ]
            label = f"{name} ({', '.join(f'{key} {setting_text(own.get(key, NOT_THERE))}' for key in different)})"
        if label in {run.label for run in runs}:
            label = f"{label} #{len(runs)}"  # long settings, cut alike
        runs += [
            Run(
                label=label,
                seed=_seed(source, report),
                report=report,
                source=source,
                verdicts=verdicts_beside(source),
            )
            for source, report in members
        ]
    return runs


def _seed(source: str, report: RunReport) -> int:
    if "seed" not in report.seeds:
        raise ValueError(f"{source}: its report names no seed; expected one that this package wrote")
    return report.seeds["seed"]


def running_elsewhere(label: str, seed: int) -> MissingRun:
    """A run that another process is running."""
    return MissingRun(label=label, seed=seed, reason="another process is at it", state="running")


def _read_hub(source: str, hub_id: tuple[str, str | None], download: Callable[[str, str | None], Path]) -> RunReport:
    try:
        return read_report(download(*hub_id))
    except ValueError as error:
        raise ValueError(f"there is no folder {source}, and {error}") from error


def _read_place(folder: Path, found: list[tuple[str, str | None, RunReport]], missing: list[MissingRun]) -> None:
    """Read the run of one folder into ``found`` or, if it is LABEL/seedN without a report, into ``missing``.

    Raises:
        ValueError: if the report of a folder with another name cannot be read.
    """
    place = folder.resolve()
    label, numbered = place.parent.name, SEED_FOLDER.fullmatch(place.name)
    if (folder / REPORT_NAME).is_file():
        try:
            report = read_report(folder)
        except ValueError as error:
            if numbered is None:
                raise
            missing.append(MissingRun(label=label, seed=int(numbered[1]), reason=str(error), state="failed"))
        else:
            own_label = label if place.name == f"seed{report.seeds.get('seed')}" else None
            found.append((str(folder), own_label, report))
    elif numbered is not None:
        seed = int(numbered[1])
        log = place.with_name(f"{place.name}.log")
        reason = f"no {REPORT_NAME}: it failed or was stopped, see {label}/{log.name}"
        unfinished = MissingRun(label=label, seed=seed, reason=reason, state="not finished")
        missing.append(running_elsewhere(label, seed) if is_locked(place) else unfinished)


def _comparison_places(path: Path) -> tuple[list[Path], str | None]:
    """Every LABEL/seedN of a comparison, finished or not, in the order of its rows, and its baseline.

    Raises:
        ValueError: if there is none with a report, or ``comparison.json`` cannot be read.
    """
    begun = {
        entry.with_suffix("") if entry.suffix == ".log" else entry
        for pattern in ("seed*", "*/seed*")
        for entry in path.glob(pattern)
        if entry.is_dir() or entry.suffix == ".log"
    }
    places = [place for place in begun if SEED_FOLDER.fullmatch(place.name)]
    if not any((place / REPORT_NAME).is_file() for place in places):
        raise ValueError(f"{path} has no {REPORT_NAME}, and no folder LABEL/seedN with one: has the run finished?")
    labels, baseline = list[str](), None
    written = path / "comparison.json"
    if written.is_file():
        try:
            values = json.loads(written.read_text(encoding="utf-8"))
            labels, baseline = [str(row["label"]) for row in values["rows"]], values["baseline"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{written} is not a comparison ({error!r}): delete it to go on without") from error

    def order(place: Path) -> tuple[int, str, int]:
        label = place.resolve().parent.name
        return labels.index(label) if label in labels else len(labels), label, int(place.name.removeprefix("seed"))

    return sorted(places, key=order), baseline
