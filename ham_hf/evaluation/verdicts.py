"""Verdicts on disk: ``predictions.parquet``, the predictions for each image, clean and under each attack.

One row per image: ``position`` in the test split as it was loaded, ``label``, ``prediction_clean`` and
``prediction_NAME`` of each attack (null where it did not see the image; -1 where the logits are not finite),
``margin_clean`` and ``margin_attacked`` (the logit of the true class minus the largest other one, the latter the
smallest over the attacks; null where it is not a number) and ``verdict``: right on the clean image and never broken by
any attack; null, and in no average, where some attack did not see the image. With groups (``--group_column``) there is
one more column, ``group``: the name of the image's group, null where it has none. Class names, attacks with their
settings and the column of the groups stand in the metadata of the file, with a schema version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ham_hf.artifacts import PREDICTIONS_NAME
from ham_hf.data.image_groups import ImageGroups, make_groups
from ham_hf.evaluation.robustness import AttackResult
from ham_hf.files import replacing

SCHEMA_VERSION = 1
UNSEEN = -2
"""Stands for the prediction of an image that an attack did not see."""
_METADATA = "ham_hf.predictions"
_NOT_COMPARED = ("seed", "num_examples", "subset")


@dataclass(frozen=True, eq=False, kw_only=True)
class Verdicts:
    """Predictions of a model for each of N images.

    Attributes:
        class_names: names of the C classes in label order.
        attacks: settings of each attack by its name, in the order in which they were run.
        positions: (N,) int64, in the test split as it was loaded.
        labels: (N,) int64.
        clean: (N,) int64, predicted class of the clean image; -1 where the logits are not finite.
        attacked: by name of the attack, (N,) int64 likewise of the attacked image, ``UNSEEN`` where there is none.
        margins_clean: (N,) float32, logit of the true class minus the largest other one; may be NaN.
        margins_attacked: (N,) float32, the smallest such margin over the attacks; NaN where there is none.
        groups: of the N images by a column other than the label; None if there is none.
    """

    class_names: tuple[str, ...]
    attacks: Mapping[str, Mapping[str, object]]
    positions: Tensor
    labels: Tensor
    clean: Tensor
    attacked: Mapping[str, Tensor]
    margins_clean: Tensor
    margins_attacked: Tensor
    groups: ImageGroups | None = None

    @property
    def judged(self) -> Tensor:
        """(N,) bool, images that every attack saw; none where there was no attack."""
        seen = [predictions != UNSEEN for predictions in self.attacked.values()]
        return torch.stack(seen).all(0) if seen else torch.zeros_like(self.labels, dtype=torch.bool)

    @property
    def withstood(self) -> Tensor:
        """(N,) bool, right on the clean image and never broken by any attack that saw it: the verdict."""
        right = self.clean == self.labels
        for predictions in self.attacked.values():
            right = right & ((predictions == self.labels) | (predictions == UNSEEN))
        return right

    def seen(self, name: str) -> Tensor:
        """(N,) bool, images that "verdict", "clean" or the attack of this name is about."""
        if name in ("verdict", "clean"):
            return self.judged if name == "verdict" else torch.ones_like(self.judged)
        return self.attacked[name] != UNSEEN

    def right(self, name: str) -> Tensor:
        """(N,) bool, right by "verdict", when "clean", or clean and under this attack; count it where `seen` only."""
        if name == "verdict":
            return self.withstood
        clean = self.clean == self.labels
        return clean if name == "clean" else clean & (self.attacked[name] == self.labels)


def verdicts_of(
    results: Mapping[str, AttackResult], class_names: Sequence[str], groups: ImageGroups | None = None
) -> Verdicts:
    """The predictions in the results of one evaluation; "clean" covers every attack's images, indices ascending."""
    clean = results["clean"]
    attacked, smallest = dict[str, Tensor](), torch.full_like(clean.margins, float("inf"))
    for name, result in results.items():
        if name != "clean":
            rows = torch.searchsorted(clean.indices, result.indices)
            attacked[name] = torch.full_like(clean.labels, UNSEEN)
            attacked[name][rows] = result.predictions
            smallest[rows] = torch.minimum(smallest[rows], result.margins)
    seen = torch.stack([values != UNSEEN for values in attacked.values()]).any(0) if attacked else smallest < 0
    return Verdicts(
        class_names=tuple(class_names),
        attacks={name: result.settings for name, result in results.items() if name != "clean"},
        positions=clean.indices,
        labels=clean.labels,
        clean=clean.predictions,
        attacked=attacked,
        margins_clean=clean.margins,
        margins_attacked=smallest.where(seen, torch.nan),
        groups=groups,
    )


def write_verdicts(verdicts: Verdicts, folder: str | Path) -> Path:
    """Write ``predictions.parquet`` into ``folder`` (made if needed) in one step, and return its path."""
    path = Path(folder) / PREDICTIONS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, pa.Array] = {
        "position": _integers(verdicts.positions, pa.int64()),
        "label": _integers(verdicts.labels, pa.int32()),
        "prediction_clean": _integers(verdicts.clean, pa.int32()),
    }
    for name, predictions in verdicts.attacked.items():
        columns[f"prediction_{name}"] = _integers(predictions, pa.int32(), missing=predictions == UNSEEN)
    for title, margins in (("clean", verdicts.margins_clean), ("attacked", verdicts.margins_attacked)):
        columns[f"margin_{title}"] = pa.array(margins.numpy(), pa.float32(), mask=margins.isnan().numpy())
    columns["verdict"] = pa.array(verdicts.withstood.numpy(), pa.bool_(), mask=(~verdicts.judged).numpy())
    about: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "class_names": list(verdicts.class_names),
        "attacks": {name: dict(settings) for name, settings in verdicts.attacks.items()},
    }
    groups = verdicts.groups
    if groups is not None:
        columns["group"] = pa.array(groups.values(), pa.string())
        about["groups"] = {"column": groups.column, "names": list(groups.given_names)}
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about)})
    with replacing(path) as part:
        pq.write_table(table, part)
    return path


def read_verdicts(path: str | Path) -> Verdicts:
    """Read a ``predictions.parquet``, or the one in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is not ours, has another schema version, or contradicts itself.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PREDICTIONS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        table = pq.read_table(path, partitioning=None)
        about = json.loads((table.schema.metadata or {})[_METADATA.encode()])
        version = about["schema_version"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a table of predictions that ham_hf wrote: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version!r}, expected {SCHEMA_VERSION}; read it with the version of ham_hf "
            "that wrote it, or install a newer one"
        )
    try:
        return _decode(table, about)
    except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of predictions that ham_hf wrote: {error}") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class MatchedVerdicts:
    """Two models on the same n images: positions and labels (n,), and whether each model was right (n,) bool."""

    positions: Tensor
    labels: Tensor
    reference: Tensor
    other: Tensor

    def at(self, positions: Tensor) -> MatchedVerdicts:
        """The part of them that is at these positions."""
        rows = torch.isin(self.positions, positions)
        return MatchedVerdicts(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})


def match_verdicts(reference: Verdicts, other: Verdicts, name: str = "verdict") -> MatchedVerdicts:
    """The images that two models were both judged on, by position and label, and whether each was right.

    ``name`` is "verdict", "clean", or that of an attack.

    Raises:
        ValueError: if classes, attacks (seed and number of images aside), positions or labels differ, or no image was
            seen by both: a paired test is for the same images under the same attacks.
    """
    attacks = [_comparable(one.attacks, name) for one in (reference, other)]
    for title, ours, theirs in (("classes", reference.class_names, other.class_names), ("attacks", *attacks)):
        if ours != theirs:
            raise ValueError(f"the two have different {title} ({ours} and {theirs}): they cannot be paired")
    for title, first, second in (
        ("images", reference.positions, other.positions),
        ("labels", reference.labels, other.labels),
    ):
        if not torch.equal(first, second):
            raise ValueError(f"the two have different {title}: they cannot be paired; evaluate both on one split")
    seen = reference.seen(name) & other.seen(name)
    if not bool(seen.any()):
        raise ValueError("the two have no judged image in common: they cannot be paired")
    return MatchedVerdicts(
        positions=reference.positions[seen],
        labels=reference.labels[seen],
        reference=reference.right(name)[seen],
        other=other.right(name)[seen],
    )


def _comparable(attacks: Mapping[str, Mapping[str, object]], name: str) -> dict[str, dict[str, object]]:
    """Settings of the attacks that an evaluation is of; ``name`` as in `match_verdicts`."""
    return {
        attack: {key: value for key, value in settings.items() if key not in _NOT_COMPARED}
        for attack, settings in attacks.items()
        if name in ("verdict", attack)
    }


def _integers(values: Tensor, kind: pa.DataType, *, missing: Tensor | None = None) -> pa.Array:
    return pa.array(values.numpy(), mask=None if missing is None else missing.numpy()).cast(kind)


def _decode(table: pa.Table, about: Mapping[str, Any]) -> Verdicts:
    """The table as tensors, checked against itself."""
    names, attacks = about["class_names"], about["attacks"]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("its metadata does not list the class names")
    if not all(isinstance(settings, dict) for settings in attacks.values()):
        raise ValueError("its metadata does not describe the attacks")
    verdicts = Verdicts(
        class_names=tuple(names),
        attacks=attacks,
        positions=_column(table, "position"),
        labels=_column(table, "label"),
        clean=_column(table, "prediction_clean"),
        attacked={name: _column(table, f"prediction_{name}", missing=UNSEEN) for name in attacks},
        margins_clean=_column(table, "margin_clean", missing=float("nan")),
        margins_attacked=_column(table, "margin_attacked", missing=float("nan")),
        groups=_groups(table, about.get("groups")),
    )
    if not len(verdicts.labels):
        raise ValueError("it has no row")
    bounds = [("position", verdicts.positions, 0, None), ("label", verdicts.labels, 0, len(names))]
    bounds += [("prediction_clean", verdicts.clean, -1, len(names))]
    bounds += [(f"prediction_{name}", values, UNSEEN, len(names)) for name, values in verdicts.attacked.items()]
    for title, values, low, high in bounds:
        if int(values.min()) < low or (high is not None and int(values.max()) >= high):
            raise ValueError(f"{title} has values outside of the {len(names)} classes")
    if len(set(verdicts.positions.tolist())) != len(verdicts.positions):
        raise ValueError("a position occurs twice")
    stored = table.column("verdict")
    written = torch.tensor([-1 if value is None else int(value) for value in stored.to_pylist()])
    if not torch.equal(written, verdicts.withstood.long().where(verdicts.judged, -1)):
        raise ValueError("the column verdict contradicts the predictions")
    return verdicts


def _groups(table: pa.Table, about: Mapping[str, Any] | None) -> ImageGroups | None:
    """The groups of the images; files from before there were any have none."""
    if about is None:
        return None
    names = about["names"]
    if not (isinstance(about["column"], str) and all(isinstance(name, str) for name in names)):
        raise ValueError("its metadata does not name the groups")
    return make_groups(about["column"], table.column("group").cast(pa.string()).to_pylist(), names)


def _column(table: pa.Table, name: str, *, missing: float | None = None) -> Tensor:
    column = table.column(name)
    if column.null_count and missing is None:
        raise ValueError(f"{name} has empty cells")
    if isinstance(missing, float):
        return torch.tensor(column.cast(pa.float32()).fill_null(missing).to_numpy())
    column = column.cast(pa.int64())
    return torch.tensor((column if missing is None else column.fill_null(missing)).to_numpy())
