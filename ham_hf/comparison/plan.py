"""``compare.yaml`` -> every run of a comparison, with its configuration checked and its command line written.

    recipe: ham.yaml                    # base of every run, relative to this file
    output_dir: outputs/digits-comparison
    seeds: [0, 1, 2]
    baseline: pgd_at                    # row that rho is relative to; optional
    settings: {num_train_epochs: 20}    # for every run, win over the recipe; optional
    runs:                               # label: settings of that run, which win over both
      pgd_at: {method: pgd_at}
      ham: {}
      trades: {method: trades, seeds: [0]}                    # with fewer seeds than the others
      pgd_at-fair: {calibrated_from: pgd_at, fairness: 0.5}   # that row's weights of the same seed, no second training

Settings of a run act as flags on the command line do: one that names another method drops the recipe's options of its
own method.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import yaml

from ham_hf.config import CalibrationConfig, ConfigError, TrainConfig, config_to_dict
from ham_hf.config.assembly import build_config
from ham_hf.config.yaml_file import Entry, read_yaml, setting_words, show_node, text_node
from ham_hf.invocation import command
from ham_hf.settings import settings_of

T = TypeVar("T")
KEYS = ("recipe", "output_dir", "seeds", "baseline", "settings", "runs")
REQUIRED = ("recipe", "output_dir", "seeds", "runs")
LABEL = re.compile(r"(?!comparison)[A-Za-z0-9][A-Za-z0-9._+-]{0,63}(?<!\.)(?<!\.log)")
CALIBRATED_FROM = "calibrated_from"
"""Key of a row that takes its weights from another row."""
OURS = {
    "seed": "give seeds to the comparison",
    "output_dir": "give output_dir to the comparison; each run has a folder of its own in it",
    "resume_from_checkpoint": "an unfinished run is continued anyway",
    "run_name": "each run is called by its row and seed",
    "overwrite_output_dir": "delete a run's folder to run it again",
    "push_to_hub": f"all runs would go to one repository; push the folder of a chosen run with {command('push')}",
}
"""Settings that no run may have, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of row ``label``.

    Attributes:
        words: the command line that says its ``config``, without the training recipe's own name.
        weights_from: folder of the run whose weights it takes instead of training; None: it trains.
    """

    label: str
    seed: int
    config: TrainConfig
    words: tuple[str, ...]
    weights_from: Path | None = None

    @property
    def folder(self) -> Path:
        """Its output folder, ``<output_dir>/<label>/seed<seed>``."""
        return Path(self.config.training.output_dir)

    @property
    def log(self) -> Path:
        """Where its output goes, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of a comparison, seed by seed, and the label that rho is relative to."""

    runs: tuple[PlannedRun, ...]
    baseline: str | None
    output_dir: Path

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the file."""
        return tuple(dict.fromkeys(run.label for run in self.runs))


def read_plan(path: Path, *, output_dir: str | None = None, seeds: Sequence[int] | None = None) -> Plan:
    """Read a ``compare.yaml`` and build the configuration of each of its runs.

    ``output_dir`` wins over the file's; ``seeds`` are planned too, after the file's.

    Raises:
        ConfigError: naming everything that is wrong, with the label of the run that it is wrong in.
    """
    entries = {entry.name: entry for entry in read_yaml(path)}
    if "dataset_name" in entries and "runs" not in entries:
        raise ConfigError(f"{path} trains one model: {command('train')} --config {path}")
    given = {name for name, value in (("output_dir", output_dir), ("seeds", seeds)) if value is not None}
    problems = [
        f"{entry.origin}there is no {name!r} in a comparison{_nearest(name)}; expected {', '.join(KEYS)}"
        for name, entry in entries.items()
        if name not in KEYS
    ]
    problems += [f"{path}: {name} is missing" for name in REQUIRED if name not in {*entries, *given}]
    if problems:
        raise ConfigError(problems)
    folder = output_dir if output_dir is not None else _word(entries["output_dir"])
    more = _checked_seeds("--seeds", seeds) if seeds is not None else []
    own = _read_seeds(entries["seeds"]) if "seeds" in entries else []
    seeds = list(dict.fromkeys([*own, *more]))
    common = (
        _settings(entries["settings"].node, f"{entries['settings'].origin}settings") if "settings" in entries else []
    )
    rows, own_seeds = dict[str, list[Entry]](), dict[str, list[int]]()
    for label, settings in _rows(entries["runs"]):
        rows[label] = [entry for entry in settings if entry.name != "seeds"]
        for entry in settings:
            if entry.name == "seeds":
                own_seeds[label] = _read_seeds(entry._replace(origin=f"run {label}: "))
    rows, bases = _with_bases(rows)
    baseline = _word(entries["baseline"]) if "baseline" in entries else None
    if baseline is not None and baseline not in rows:
        origin = entries["baseline"].origin
        raise ConfigError(f"{origin}baseline {baseline}: expected the label of a run, one of {', '.join(rows)}")
    recipe = path.parent / _word(entries["recipe"])
    if not recipe.is_file():
        raise ConfigError(f"{entries['recipe'].origin}recipe {recipe}: there is no such file")
    written = read_yaml(recipe)
    runs: list[PlannedRun] = []
    # All rows with the first seed come first: a comparison that is stopped early still compares.
    for seed in dict.fromkeys([*seeds, *chain(*own_seeds.values())]):
        for label, settings in rows.items():
            # A calibrated row has no seed that the row of its weights has not.
            if any(seed not in own_seeds.get(one, seeds) for one in (label, bases.get(label, label))):
                continue
            try:
                run = _planned_run(label, seed, Path(folder), recipe, written, [*common, *settings])
                base = bases.get(label)
                runs.append(run if base is None else replace(run, weights_from=_folder(Path(folder), base, seed)))
            except ConfigError as error:
                found = [f"run {label}: {problem}" for problem in error.problems]
                problems += [problem for problem in found if problem not in problems]
    if problems:
        raise ConfigError(problems)
    return Plan(runs=tuple(runs), baseline=baseline, output_dir=Path(folder))


def _planned_run(
    label: str, seed: int, output_dir: Path, recipe: Path, written: Sequence[Entry], own: Sequence[Entry]
) -> PlannedRun:
    problems = [f"{entry.name} is not for a run: {OURS[entry.name]}" for entry in own if entry.name in OURS]
    if problems:
        raise ConfigError(problems)
    place = {"seed": str(seed), "output_dir": str(_folder(output_dir, label, seed))}
    flags = [*own, *(Entry(name, text_node(value), "") for name, value in place.items())]
    config = build_config(TrainConfig, [*written, *flags])
    if config.training.report_to:
        flags.append(Entry("run_name", text_node(f"{label}/seed{seed}"), ""))
        config = build_config(TrainConfig, [*written, *flags])
    for name in ("resume_from_checkpoint", "overwrite_output_dir"):
        if getattr(config.training, name):
            raise ConfigError(f"leave {name} out of {recipe}: {OURS[name]}")
    if config.hub.push_to_hub:
        raise ConfigError(f"leave push_to_hub out of {recipe}: {OURS['push_to_hub']}")
    resolved = config_to_dict(config)
    names = dict.fromkeys(entry.name for entry in flags)
    words = ["--config", str(recipe), *setting_words({name: resolved[name] for name in names}), "--disable_tqdm"]
    return PlannedRun(label=label, seed=seed, config=config, words=tuple(words))


def _folder(output_dir: Path, label: str, seed: int) -> Path:
    return output_dir / label / f"seed{seed}"


def _with_bases(rows: dict[str, list[Entry]]) -> tuple[dict[str, list[Entry]], dict[str, str]]:
    """Rows with the settings of the row that they take their weights from before their own, and the label of that."""
    allowed = {known.name for known in settings_of(CalibrationConfig)}
    whole, bases, problems = dict(rows), dict[str, str](), list[str]()
    for label, settings in rows.items():
        named = [entry for entry in settings if entry.name == CALIBRATED_FROM]
        if not named:
            continue
        own = [entry for entry in settings if entry.name != CALIBRATED_FROM]
        base = named[0].node.value if isinstance(named[0].node, yaml.ScalarNode) else show_node(named[0].node)
        taken = rows.get(base)
        others = ", ".join(sorted({entry.name for entry in own} - allowed))
        if taken is None or base == label or any(entry.name == CALIBRATED_FROM for entry in taken):
            trained = ", ".join(other for other in rows if other != label) or "of which there is none"
            problems.append(
                f"run {label}: {CALIBRATED_FROM} {base}: expected the label of a row that trains, {trained}"
            )
        elif others or not {"fairness", "max_average_drop"} & {entry.name for entry in own}:
            problems.append(
                f"run {label}: a row that is {CALIBRATED_FROM} another one has fairness or max_average_drop, and of "
                f"other settings only those of the calibration ({', '.join(sorted(allowed))})"
                + (f"; not {others}" if others else "")
            )
        else:
            bases[label], whole[label] = base, [*(entry for entry in taken if entry.name not in allowed), *own]
    if problems:
        raise ConfigError(problems)
    return whole, bases


def _rows(entry: Entry) -> Iterator[tuple[str, list[Entry]]]:
    rows = _pairs(entry.node, f"{entry.origin}runs", "label: {setting: value}")
    if not rows:
        raise ConfigError(f"{entry.origin}runs is empty: expected at least one 'label: {{setting: value}}'")
    for label, node in rows:
        if not LABEL.fullmatch(label):
            raise ConfigError(
                f"{entry.origin}runs: label {label!r} becomes a folder: expected at most 64 letters, digits and . _ + "
                "- that begin with a letter or digit, do not end in '.' or '.log', and do not begin with 'comparison'"
            )
        yield label, _settings(node, f"{entry.origin}run {label}")


def _settings(node: yaml.Node, where: str) -> list[Entry]:
    """Settings as if they were flags: an entry without an origin wins over the recipe, and replaces its method."""
    return [Entry(name, value, "") for name, value in _pairs(node, where, "{setting: value}")]


def _pairs(node: yaml.Node, where: str, expected: str) -> list[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.ScalarNode) and node.value == "":
        return []
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise ConfigError(f"{where}: expected {expected}, got {show_node(node)}")
    pairs = [(str(key.value), value) for key, value in node.value]
    repeated = _repeated([name for name, _ in pairs])
    if repeated:
        raise ConfigError(f"{where}: {repeated[0]} is set a second time")
    return pairs


def _read_seeds(entry: Entry) -> list[int]:
    items = entry.node.value if isinstance(entry.node, yaml.SequenceNode) else []
    texts = [item.value if isinstance(item, yaml.ScalarNode) else show_node(item) for item in items]
    if not items or not all(re.fullmatch(r"\d{1,10}", text) for text in texts):
        raise ConfigError(
            f"{entry.origin}seeds {show_node(entry.node)}: expected a list of whole numbers, as [0, 1, 2]"
        )
    return _checked_seeds(f"{entry.origin}seeds", [int(text) for text in texts])


def _checked_seeds(where: str, seeds: Sequence[int]) -> list[int]:
    if any(seed < 0 for seed in seeds):
        raise ConfigError(f"{where} {' '.join(map(str, seeds))}: expected whole numbers of at least 0, as 0 1 2")
    if _repeated(seeds):
        raise ConfigError(f"{where} {' '.join(map(str, seeds))}: {_repeated(seeds)[0]} is given twice")
    return list(seeds)


def _repeated(values: Sequence[T]) -> list[T]:
    return [value for at, value in enumerate(values) if value in values[:at]]


def _word(entry: Entry) -> str:
    if not isinstance(entry.node, yaml.ScalarNode) or not entry.node.value:
        raise ConfigError(f"{entry.origin}{entry.name} {show_node(entry.node)}: expected one word")
    return str(entry.node.value)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), KEYS, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
