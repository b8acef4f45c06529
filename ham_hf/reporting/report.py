"""RunReport: the run, its data, and the results; write and read ``report.json``.

A report holds everything that the figures and the model card need, so both can be made again from ``report.json``
alone. It holds no secret: tokens never enter it, and of the environment only the variables that change numbers do.
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ham_hf.artifacts import REPORT_NAME
from ham_hf.evaluation.calibration import Calibration, FrontierPoint
from ham_hf.files import atomic_write, parse_json
from ham_hf.intervals import FairnessIntervals
from ham_hf.methods.rule_method import as_recorded
from ham_hf.metrics import FairnessSummary
from ham_hf.reporting.breakdowns import CorruptionReport, GroupReport
from ham_hf.reporting.formats import evaluation_title, plain_text

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """The evaluated network and its preprocessing.

    Attributes:
        name: model as the user named it (timm name, Hub id or folder).
        architecture: timm architecture of the export, the one in ``config.json``.
        base_model: Hub id of the weights that training started from; None if it started from scratch.
        needs_ham_hf: True if timm knows the architecture only after ``import ham_hf``.
        num_parameters: of the exported network.
        image_size, in_chans: side in pixels and channels of the images that were attacked.
        upsample: factor by which the exported network's input is larger than ``image_size`` (nearest neighbor).
        interpolation, crop_pct, mean, std, crop_mode: see `ham_hf.models.Preprocessing`.
    """

    name: str
    architecture: str
    base_model: str | None
    needs_ham_hf: bool
    num_parameters: int
    image_size: int
    in_chans: int
    upsample: int
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """The dataset and its splits.

    Attributes:
        name: dataset as the user named it.
        hub_id: id on the Hub; None for local data.
        config_name: configuration of the Hub dataset, if any.
        revision: resolved revision, if known.
        class_names: names of the C classes in label order.
        num_train, num_validation, num_test: images for training, held out of them for selection, and for the test.
        test_split_origin: where the test images come from.
        num_skipped: corrupt images that were skipped.
        augmentation: augmentation during training.
        trained_on: training images and validation part, as in ``config.json`` (`ham_hf.data.provenance.Provenance`);
            None if unknown.
        num_test_in_train: test images that are also training or validation images, pixel for pixel; None: unchecked.
        notes: images and files of the dataset that were not read, each kind with its number and an example.
        class_order: how the model's classes were matched with the dataset's: ``by name``, ``assumed`` (same order, no
            common names), or ``subset`` (by name, only the classes that the dataset has); None if unknown.
        num_model_classes: classes of the model; None if unknown.
    """

    name: str
    hub_id: str | None
    config_name: str | None
    revision: str | None
    class_names: tuple[str, ...]
    num_train: int
    num_validation: int
    num_test: int
    test_split_origin: str
    num_skipped: int
    augmentation: str
    trained_on: Mapping[str, object] | None = None
    num_test_in_train: int | None = None
    notes: tuple[str, ...] = ()
    class_order: str | None = None
    num_model_classes: int | None = None

    @property
    def title(self) -> str:
        """The Hub id, or the last part of a local path: paths stay private."""
        return self.hub_id or plain_text(Path(self.name).name)


@dataclass(frozen=True, kw_only=True)
class ThreatModelReport:
    """Norm ("linf" or "l2") and radius, in units of pixels in [0, 1], of training and evaluation."""

    norm: str
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class AttackReport:
    """Result of one evaluation.

    Attributes:
        name: "clean", "pgd-20", "cw-20", "autoattack", ..., or "verdict".
        settings: of the attack, JSON values only; of the verdict, which attacks it is of.
        summary: per-class accuracy and fairness numbers.
        confusion: (C, C) counts, row = true class, without images whose logits are not finite; None with more than
            200 classes, and of the verdict, which is of several attacks.
        seconds: duration.
        intervals: of the fairness numbers; None in reports from before there were any.
    """

    name: str
    settings: Mapping[str, object]
    summary: FairnessSummary
    confusion: tuple[tuple[int, ...], ...] | None
    seconds: float
    intervals: FairnessIntervals | None = None

    def __post_init__(self) -> None:
        # It names files of figures.
        if not re.fullmatch(r"\w[\w.+-]{0,60}", self.name, flags=re.ASCII):
            raise ValueError(
                f"an evaluation is called by letters, digits and -, such as pgd-20, not {self.name[:80]!r}"
            )
        object.__setattr__(self, "settings", _json_values(self.settings, f"settings of {self.name}"))

    @property
    def title(self) -> str:
        """See `evaluation_title`."""
        return evaluation_title(self.name)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """How the weights were trained.

    Attributes:
        num_train_epochs: epochs trained, one that ``max_steps`` cut short included.
        steps: optimizer steps.
        skipped_updates: steps without any hard example, which change nothing.
        seconds: duration.
        selection_metric: held-out number by which the weights were selected ("last": the final ones).
        selected_step, selected_epoch: of the selected weights, the epoch from 0; None if unknown.
        history: the validation lines of ``metrics.jsonl``, JSON values only.
        peak_memory_bytes: most memory that the main process held up to the end of training, on the accelerator or,
            without one, of the machine (`ham_hf.training.launch.peak_memory_bytes`); None if unknown.
        passes: passes over the network of the whole run, validation and calibration included, in forwards of one image
            (`ham_hf.training.train_step.PassCounter`); None if unknown.
        changes: one sentence per resumption with other settings; empty if the report's settings repeat the run.
    """

    num_train_epochs: int
    steps: int
    skipped_updates: int
    seconds: float
    selection_metric: str
    selected_step: int | None
    selected_epoch: int | None
    history: tuple[Mapping[str, object], ...]
    peak_memory_bytes: int | None = None
    passes: float | None = None
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "history", tuple(_json_values(line, "history") for line in self.history))


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(Calibration):
    """Class shifts that were folded into a model, and their cost.

    Attributes:
        max_average_drop: the drop that F was chosen by; None if F was given.
        images: the images that the shifts were found on, in words that follow "found on".
        seen_in_training: whether the model was trained on them.
        seconds: duration.
        tags: of the calibrated model's card.
    """

    max_average_drop: float | None
    images: str
    seen_in_training: bool
    seconds: float
    tags: tuple[str, ...] = ()

    def point(self, fairness: float) -> FrontierPoint:
        """The frontier's point at F.

        Raises:
            ValueError: if it was not measured.
        """
        for point in self.frontier:
            if point.fairness == fairness:
                return point
        raise ValueError(f"the frontier has no point at {fairness}")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Software and hardware of the run.

    Attributes:
        python, platform: version of Python; operating system and processor.
        versions: of packages, by name.
        device: what computed, with ``num_threads`` in each of ``num_processes``.
        commit: of the source checkout, None outside of one.
        variables: ``NAME=value`` of the environment variables that were set and may change numbers; see
            `ham_hf.training.environment`.
    """

    python: str
    platform: str
    versions: Mapping[str, str]
    device: str
    num_processes: int
    num_threads: int
    commit: str | None
    variables: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that is known about one run.

    Attributes:
        config: resolved settings, flat, JSON values only; completed by `ham_hf.methods.rule_method.as_recorded`.
        results: one entry per evaluation, by name, in the order they were run.
        training: None if the run only evaluated.
        seeds: every seed by name.
        created: UTC time, ISO 8601.
        notes: sentences that a reader of the numbers must know (what was assumed, left out or changed); the card lists
            them.
        verdict: the headline: right on the clean image and under every attack, of the images that all attacks saw;
            None without an attack, and in older reports.
        calibration: class shifts folded into the evaluated model, if any.
        groups: accuracy by the groups of a column, if one was named.
        corruptions: accuracy on corrupted images, if measured.

    Raises:
        ValueError: if there is no result, or a free-form value is not JSON (NaN and infinity are not).
    """

    model: ModelReport
    dataset: DatasetReport
    config: Mapping[str, object]
    threat_model: ThreatModelReport
    results: Mapping[str, AttackReport]
    training: TrainingReport | None
    environment: Environment
    seeds: Mapping[str, int]
    created: str
    notes: tuple[str, ...] = ()
    verdict: AttackReport | None = None
    calibration: CalibrationReport | None = None
    groups: GroupReport | None = None
    corruptions: CorruptionReport | None = None

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("a report needs at least one evaluation, got none")
        for attack in self.entries():
            _check_classes(attack, len(self.dataset.class_names))
        if self.corruptions is not None and len(self.corruptions.counts) != len(self.dataset.class_names):
            raise ValueError("the numbers on corrupted images are not of the classes of the dataset")
        object.__setattr__(self, "config", as_recorded(_json_values(self.config, "config")))

    def entries(self) -> tuple[AttackReport, ...]:
        """The verdict, where there is one, and every evaluation, in the order in which tables show them."""
        return (*([] if self.verdict is None else [self.verdict]), *self.results.values())

    def reference_attack(self) -> AttackReport | None:
        """Of figures and, without a verdict, the headline: the lowest average on all test images, else on any."""
        attacks = [attack for attack in self.results.values() if attack.name != "clean"]
        full = [attack for attack in attacks if not self.is_subset(attack)]
        return min(full or attacks, key=lambda attack: attack.summary.average, default=None)

    def ordering_entry(self) -> AttackReport:
        """The entry that classes are ordered by: the verdict, else the reference attack, else the first evaluation."""
        return self.verdict or self.reference_attack() or next(iter(self.results.values()))

    def worst_first(self) -> list[int]:
        """Class indices in the order of tables and figures, by `ordering_entry`; classes without images are last."""
        entries = self.ordering_entry().summary.per_class
        return sorted(
            range(len(entries)), key=lambda index: (not entries[index].count, entries[index].accuracy or 0.0)
        )

    def passed_gate(self) -> bool:
        """Whether any epoch up to the selected one passed the gate of a fairness-gated average of weights."""
        training = self.training
        if training is None:
            return False
        last = training.selected_epoch
        return any(
            bool(record.get("averaged"))
            for record in training.history
            if last is None or (isinstance(epoch := record.get("epoch"), int) and epoch <= last)
        )

    def is_subset(self, attack: AttackReport) -> bool:
        """True if ``attack`` saw only a part of the test images."""
        return attack.summary.num_examples < self.dataset.num_test


def write_report(report: RunReport, folder: str | Path) -> Path:
    """Write ``report.json`` into ``folder`` (made if needed) in one step, and return its path."""
    path = Path(folder) / REPORT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(report)}, indent=1, allow_nan=False)
    # One line per list of plain values (a row of the confusion matrix). "[" and a line break never meet inside a
    # JSON string, and a list that holds a quote or a bracket is left alone.
    text = re.sub(r'\[\n[^\[\]{}"]*\]', lambda match: " ".join(match.group().split()), text)
    atomic_write(path, text + "\n")
    return path


def read_report(path: str | Path) -> RunReport:
    """Read a ``report.json``, or the one in a folder, back to the equal RunReport.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a report, or was written by a newer version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT_NAME
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a report of ham_hf: {error}") from error
    schema = values.pop("schema_version", None) if isinstance(values, dict) else None
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {schema!r}, expected {SCHEMA_VERSION}; read it with the version of ham_hf "
            "that wrote it, or install a newer one"
        )
    try:
        report: RunReport = _decode(RunReport, values, "report")
    except ValueError as error:
        raise ValueError(f"{path} is not a report of ham_hf: {error}") from error
    return report


def _check_classes(attack: AttackReport, num_classes: int) -> None:
    """Raise ValueError unless the numbers are of the dataset's classes; reports come from anywhere."""
    summary = attack.summary
    if attack.intervals is not None:
        values = (getattr(attack.intervals, field.name) for field in fields(attack.intervals))
        if any(len(ends) != 2 for ends in values if ends is not None):
            raise ValueError(f"{attack.name}: an interval has two ends")
    indices = (*summary.missing_classes, summary.worst_class_index)
    sizes = {len(summary.per_class)}
    if attack.confusion is not None:
        sizes |= {len(attack.confusion), *map(len, attack.confusion)}
    if sizes != {num_classes} or not all(0 <= index < num_classes for index in indices):
        raise ValueError(f"{attack.name}: the numbers are not of the {num_classes} classes of the dataset")


def _json_values(values: Mapping[str, object], where: str) -> dict[str, object]:
    """``values`` as they read back from JSON, so that a report equals the one read from its file."""
    try:
        plain: dict[str, object] = json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the report's {where} must be finite JSON values: {error}") from error
    return plain


def _decode(kind: Any, value: Any, where: str) -> Any:  # noqa: ANN401 (the type is what ``kind`` says)
    """Turn JSON ``value`` into ``kind``: a dataclass, tuple, Mapping, union with None, or plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is object:
        return value
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(inner, value, where)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        names = {field.name for field in fields(kind)}
        # A field with a default was added later: reports written before do not have it.
        required = {field.name for field in fields(kind) if field.default is MISSING}
        if not required <= value.keys() <= names:
            raise ValueError(f"{where} should have the keys {sorted(names)}, got {sorted(value)}")
        return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in value})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where} should be {getattr(kind, '__name__', kind)}, got {value!r}")
