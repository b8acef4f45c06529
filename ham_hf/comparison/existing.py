"""Runs that exist: in folders, in the folders of earlier comparisons, and on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ham_hf.artifacts import PREDICTIONS_NAME, REPORT_NAME
from ham_hf.comparison.differences import run_settings, setting_text
from ham_hf.comparison.pairs import FinishedRun
from ham_hf.comparison.table import MissingRun, different_settings
from ham_hf.evaluation.verdicts import read_verdicts
from ham_hf.hub_config import split_revision
from ham_hf.reporting.formats import plain_text, public_word
from ham_hf.reporting.report import RunReport, read_report
from ham_hf.training.run_folder import is_locked

NOT_THERE = "(none)"
SEED_FOLDER = re.compile(r"seed(\d+)")


@dataclass(frozen=True, kw_only=True)
class ExistingRuns:
    """Runs found in folders and on the Hub, and those missing.

    Attributes:
        found: every finished run; its label is what the user calls it, or the name of the folder above where its own
            is called ``seed<seed of the report>``, as in a comparison; empty if neither.
        missing: runs without a report in a comparison's folder, and entries of a list that could not be read.
        baseline: that of the comparisons among the sources; None if they have none, or several.
    """

    found: tuple[FinishedRun, ...]
    missing: tuple[MissingRun, ...]
    baseline: str | None


def read_runs(
    sources: Sequence[str], download: Callable[[str, str | None], Path], *, listed: Collection[str] = ()
) -> ExistingRuns:
    """Read the reports of runs that exist; a source given twice counts once.

    Args:
        sources: folders with a ``report.json``, folders of comparisons, and Hub ids ``OWNER/NAME[@REVISION]``; each
            may have ``LABEL=`` before it, which is then what its row is called.
        download: fetches the results of a Hub id and revision, and returns the folder that they are in.
        listed: sources that become missing runs, with the reason, if they cannot be read.

    Raises:
        ValueError: naming every other source that is none of these, or has no report that can be read. A run in the
            folder of a comparison that has none is listed as missing instead.
    """
    runs, problems = list[FinishedRun | MissingRun](), list[str]()
    baselines, seen = set[str](), set[Path | str]()
    for given in sources:
        label, source = split_label(given)
        try:
            if Path(source).is_dir():
                places, baseline = _places(Path(source), label)
                baselines |= {baseline} if baseline is not None else set()
                for place in places:
                    if place.resolve() not in seen:
                        seen.add(place.resolve())
                        runs += _read_place(place, label)
            elif (hub_id := split_revision(source)) is not None and not Path(source).exists():
                if source not in seen:
                    seen.add(source)
                    runs.append(_read_hub(source, hub_id, label, download))
            else:
                raise ValueError(f"{given}: expected a folder with {REPORT_NAME}, or OWNER/NAME on the Hub")
        except ValueError as error:
            if given in listed:
                runs.append(MissingRun(label=label or source, seed=None, reason=str(error), state="failed"))
            else:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return ExistingRuns(
        found=tuple(run for run in runs if isinstance(run, FinishedRun)),
        missing=tuple(run for run in runs if isinstance(run, MissingRun)),
        baseline=baselines.pop() if len(baselines) == 1 else None,
    )


def split_label(source: str) -> tuple[str | None, str]:
    """Label and rest of ``LABEL=SOURCE``; a path that exists is a source as it is, whatever its name.

    Raises:
        ValueError: if there is nothing on one side of the sign.
    """
    label, sign, rest = source.partition("=")
    if not sign or Path(source).exists():
        return None, source
    if not (label.strip() and rest):
        raise ValueError(f"{source}: expected LABEL=FOLDER or LABEL=OWNER/NAME, with something on both sides")
    return label.strip(), rest


def read_list(path: str | Path) -> list[str]:
    """Sources in a text file, one a line; "- " before it is fine (a list in YAML), # begins a comment.

    Raises:
        ValueError: naming the file, if it is no text, or lists nothing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: expected one Hub id or folder a line") from error
    words = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("- ").strip().strip("'\"") for line in lines]
    sources = [word for word in words if word not in ("", "---")]
    if not sources:
        raise ValueError(f"{path} lists nothing: expected one Hub id or folder a line")
    return list(dict.fromkeys(sources))


def label_runs(found: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Group runs into rows, and name the rows.

    Runs whose settings differ only in seed and folder are one row, named by its label or, without one, by its method
    (a model that was only evaluated: by its name). Rows of equal name also show the settings in which they differ.
    """
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in found:
        name = plain_text(run.label or run.report.config.get("method") or public_word(run.report.model.name), 200)
        settings = json.dumps(run_settings(run.report.config, without={"seed"}), sort_keys=True)
        groups.setdefault((name, settings), []).append(run)
    runs: list[FinishedRun] = []
    for (name, settings), members in groups.items():
        label, own = name, json.loads(settings)
        different = different_settings([json.loads(others) for known, others in groups if known == name])
        if different:
            label = f"{name} ({', '.join(f'{key} {setting_text(own.get(key, NOT_THERE))}' for key in different)})"
        if label in {run.label for run in runs}:
            label = f"{label} #{len(runs)}"  # long settings, cut alike
        runs += [replace(member, label=label) for member in members]
    return runs


def finished_run(report: RunReport, folder: Path, *, source: str, label: str | None) -> FinishedRun:
    """A finished run with the predictions in its folder.

    Raises:
        ValueError: if the report names no seed, or the predictions cannot be read.
    """
    if "seed" not in report.seeds:
        raise ValueError(f"{source}: its report names no seed; expected one that this package wrote")
    verdicts = read_verdicts(folder) if (folder / PREDICTIONS_NAME).is_file() else None
    return FinishedRun(label=label or "", seed=report.seeds["seed"], report=report, source=source, verdicts=verdicts)


def running_elsewhere(label: str, seed: int) -> MissingRun:
    """The entry of a run that another process is running."""
    return MissingRun(label=label, seed=seed, reason="another process is running it", state="running")


def _read_hub(
    source: str, hub_id: tuple[str, str | None], label: str | None, download: Callable[[str, str | None], Path]
) -> FinishedRun:
    try:
        folder = download(*hub_id)
        return finished_run(read_report(folder), folder, source=source, label=label)
    except ValueError as error:
        raise ValueError(f"there is no folder {source}, and {error}") from error


def _places(path: Path, label: str | None) -> tuple[list[Path], str | None]:
    """Folders of a run, or of all runs of a comparison, with its baseline; rows that are given a label have none."""
    places, baseline = ([path], None) if (path / REPORT_NAME).is_file() else _comparison_places(path)
    rows = {place.resolve().parent.name for place in places}
    if label is not None and len(rows) > 1:
        raise ValueError(f"{label}={path}: {path} has several rows ({', '.join(sorted(rows))}); label folders in it")
    return places, baseline if label is None else None


def _read_place(folder: Path, given: str | None) -> list[FinishedRun | MissingRun]:
    """The run of one folder; of one that is LABEL/seedN without a report, why it is missing."""
    place = folder.resolve()
    label, numbered = given or place.parent.name, SEED_FOLDER.fullmatch(place.name)
    if (folder / REPORT_NAME).is_file():
        try:
            report = read_report(folder)
        except ValueError as error:
            if numbered is None:
                raise
            return [MissingRun(label=label, seed=int(numbered[1]), reason=str(error), state="failed")]
        own = given or (label if place.name == f"seed{report.seeds.get('seed')}" else None)
        return [finished_run(report, folder, source=str(folder), label=own)]
    if numbered is None:
        return []
    if is_locked(place):
        return [running_elsewhere(label, int(numbered[1]))]
    reason = f"no {REPORT_NAME}: it failed or was stopped, see {place.parent.name}/{place.name}.log"
    return [MissingRun(label=label, seed=int(numbered[1]), reason=reason, state="not finished")]


def _comparison_places(path: Path) -> tuple[list[Path], str | None]:
    """Every LABEL/seedN of a comparison, finished or not, in the order of its rows, and its baseline."""
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
            raise ValueError(f"{written} is not a comparison ({error!r}): delete it to continue without it") from error

    def order(place: Path) -> tuple[int, str, int]:
        label = place.resolve().parent.name
        return labels.index(label) if label in labels else len(labels), label, int(place.name.removeprefix("seed"))

    return sorted(places, key=order), baseline
