"""Group images by a column other than the label, to measure whether robustness is fair over these groups too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor

from ham_hf.data.columns import categories, is_unlabeled, names_of_rows
from ham_hf.data.declarations import FileClasses

logger = logging.getLogger(__name__)

MAX_GROUPS = 1000
MISSING = "(missing)"
"""Name of the group of images without a value."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageGroups:
    """Which group each of N images belongs to.

    Attributes:
        column: name of the column.
        names: of the G groups; the last one is of images without a value, where there are any.
        of_image: (N,) int64 in [0, G).
        num_missing: images without a value.
    """

    column: str
    names: tuple[str, ...]
    of_image: Tensor
    num_missing: int

    @property
    def given_names(self) -> tuple[str, ...]:
        """Names of the groups with a value."""
        return self.names[:-1] if self.num_missing else self.names

    def values(self) -> list[str | None]:
        """Name of the group of each image; None where it has none."""
        named = [*self.given_names, None]
        return [named[group] for group in self.of_image.tolist()]

    def only(self, keep: Tensor) -> ImageGroups:
        """The groups of the images where the (N,) bool ``keep`` is True."""
        kept = [value for value, wanted in zip(self.values(), keep.tolist(), strict=True) if wanted]
        return make_groups(self.column, kept, self.given_names)


def read_groups(
    split: datasets.Dataset, column: str, rows: Tensor, of_files: Sequence[tuple[FileClasses, tuple[str, ...]]] = ()
) -> ImageGroups:
    """The groups of some rows (N,) of a split, by a column of class labels, strings, integers or booleans.

    Groups are the names that a ``ClassLabel``, or each file in ``of_files``, declares, else the sorted values.
    ValueError if there is no such column, it is not of such a kind, or it has more than `MAX_GROUPS` values.
    """
    feature = split.features[categories("--group_column", column, split.features)]
    stored = split[column][:]
    values = [stored[row] for row in rows.tolist()]
    if isinstance(feature, datasets.ClassLabel):
        counted = names_of_rows(f"--group_column {column}: the split", feature, len(stored), of_files)
        named = [
            None if is_unlabeled(value) or value >= len(counted[row]) else counted[row][value]
            for row, value in zip(rows.tolist(), values, strict=True)
        ]
        names = dict.fromkeys([*feature.names, *(name for _, others in of_files for name in others)])
        groups = make_groups(column, named, list(names))
    else:
        groups = make_groups(column, values)
    if groups.num_missing:
        logger.warning(
            "--group_column %s: %d of %d images have no value; they are a group of their own, %s",
            column,
            groups.num_missing,
            len(values),
            groups.names[-1],
        )
    return groups


def make_groups(
    column: str, values: Sequence[str | int | bool | None], names: Sequence[str] | None = None
) -> ImageGroups:
    """Groups of images by their values, one per image; None is a missing one.

    ``names`` are those of the groups in order; None takes the sorted values that occur. ``column`` is for messages.
    ValueError if there are more than `MAX_GROUPS` groups.
    """
    order: Sequence[str | int | bool]
    if names is not None:
        order = names
    else:
        present = {value for value in values if value is not None}
        order = sorted(present, key=lambda value: (isinstance(value, str), value))
    if len(order) > MAX_GROUPS:
        raise ValueError(
            f"--group_column {column}: {len(order)} different values, at most {MAX_GROUPS} can be groups; "
            "name a column of categories"
        )
    index_of = {value: index for index, value in enumerate(order)}
    shown = [str(value) for value in order]
    num_missing = sum(value is None for value in values)
    if num_missing:
        missing = MISSING
        while missing in shown:
            missing = f"({missing})"
        shown.append(missing)
    of_image = [len(order) if value is None else index_of[value] for value in values]
    return ImageGroups(
        column=column, names=tuple(shown), of_image=torch.tensor(of_image, dtype=torch.int64), num_missing=num_missing
    )
