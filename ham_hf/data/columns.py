"""Which splits, columns and classes of a dataset are used.

Everything here is cheap: no image is decoded. Every choice follows a rule and can be overridden by a setting that the
error messages name.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import datasets
import torch
from torch import Tensor

from ham_hf.data.declarations import Declarations, FileClasses

TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
LABEL_DTYPES = re.compile(r"u?int\d+|(large_)?string|bool")


def choose_splits(
    names: Sequence[str],
    train_split: str | None,
    test_split: str | None,
    has_labels: Callable[[str], bool] = lambda split: True,
) -> tuple[str, str | None]:
    """Names of the split to train on and of the one to test on.

    Train is ``train``, or the only split. Test is the first labeled one there is of test, validation, valid, val and
    dev; None means that it has to be held out of train. Where there is both a test and a validation split with labels,
    validation is not used: selection has its own part of train. Benchmarks such as ImageNet-1k keep the labels of
    their test split to themselves; there the test is on validation.

    Args:
        names: of the splits there are.
        train_split: as asked for; None = by the rule.
        test_split: likewise.
        has_labels: whether a split has any labels; asked only where there is a choice.

    Raises:
        ValueError: if a named split does not exist, the rule does not apply, or both are the same.
    """
    if train_split is None:
        if "train" not in names and len(names) > 1:
            raise ValueError(f"no split is called 'train': choose one of {_listed(names)} with --train_split")
        train_split = "train" if "train" in names else names[0]
    if train_split not in names:
        raise ValueError(_unknown("--train_split", train_split, names))
    if test_split is None:
        candidates = [name for name in TEST_SPLITS if name in names and name != train_split]
        if len(candidates) > 1:
            # Where none has labels, the first one says so when it is read.
            candidates = [name for name in candidates if has_labels(name)] or candidates
        return train_split, candidates[0] if candidates else None
    if test_split not in names:
        raise ValueError(_unknown("--test_split", test_split, names))
    if test_split == train_split:
        raise ValueError(
            f"--test_split {test_split} is the training split: the test would be on images seen in training. "
            "Leave it out to hold a part out of train (--test_fraction)"
        )
    return train_split, test_split


def choose_image_column(features: datasets.Features, image_column: str | None) -> str:
    """The image column: the only ``Image`` feature, else the only column of encoded bytes.

    Raises:
        ValueError: if the named column does not exist or holds no images, or the rule does not apply.
    """
    if image_column is not None:
        if image_column not in features:
            raise ValueError(_unknown("--image_column", image_column, features))
        if not _is_image(features[image_column]) and not _is_encoded(features[image_column]):
            raise ValueError(
                f"--image_column {image_column}: expected images or encoded bytes, got {features[image_column]}"
            )
        return image_column
    candidates: list[str] = [name for name, feature in features.items() if _is_image(feature)]
    candidates = candidates or [name for name, feature in features.items() if _is_encoded(feature)]
    if len(candidates) != 1:
        found = f"several image columns, {_listed(candidates)}" if candidates else "no image column"
        raise ValueError(f"the dataset has {found}; name one of its columns {_listed(features)} with --image_column")
    return candidates[0]


def _is_image(feature: object) -> bool:
    return isinstance(feature, datasets.Image)


def _is_encoded(feature: object) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"} and _is_encoded(feature["bytes"])
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def choose_label_column(features: datasets.Features, label_column: str | None) -> str:
    """The label column: the only ``ClassLabel``, else the first name of ``LABEL_COLUMNS`` that there is.

    Raises:
        ValueError: if the named column does not exist or holds no labels, or the rule does not apply.
    """
    if label_column is None:
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        usable = classes or [name for name, feature in features.items() if _is_label(feature)]
        named = classes if len(classes) == 1 else [name for name in LABEL_COLUMNS if name in usable]
        if not named:
            found = f"several label columns, {_listed(classes)}" if classes else "no label column"
            unusable = [name for name in LABEL_COLUMNS if name in features and name not in usable]
            if unusable and not classes:
                # A pandas column of integers with a gap becomes floats, so this is how labels often arrive.
                kind = getattr(features[unusable[0]], "dtype", features[unusable[0]])
                found += f" ({unusable[0]!r} is {kind}, and labels are integers, strings or booleans: convert it)"
            raise ValueError(
                f"the dataset has {found}; name one of its columns {_listed(features)} with --label_column"
            )
        return named[0]
    if label_column not in features:
        raise ValueError(_unknown("--label_column", label_column, features))
    if not _is_label(features[label_column]):
        raise ValueError(
            f"--label_column {label_column}: expected one class label, integer, string or boolean per image, got "
            f"{features[label_column]}"
        )
    return label_column


def choose_group_column(features: datasets.Features, group_column: str) -> str:
    """The named column of groups, if there is one of class labels, integers, strings or booleans.

    Raises:
        ValueError: listing the columns, or saying of what kind it is.
    """
    if group_column not in features:
        raise ValueError(_unknown("--group_column", group_column, features))
    if not _is_label(features[group_column]):
        raise ValueError(
            f"--group_column {group_column}: expected one class label, integer, string or boolean per image, got "
            f"{features[group_column]}"
        )
    return group_column


def label_column_of(features: datasets.Features, label_column: str | None) -> str | None:
    """What `choose_label_column` chooses; None where it would raise."""
    try:
        return choose_label_column(features, label_column)
    except ValueError:
        return None


def _is_label(feature: object) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and LABEL_DTYPES.fullmatch(feature.dtype) is not None


def encoded_column(splits: datasets.DatasetDict, split: str, column: str) -> datasets.Dataset:
    """The image column of a split alone, named ``image`` and left encoded: ``{"bytes": ..., "path": ...}``.

    Raises:
        ValueError: if the split does not have the column.
    """
    _check_column(splits, split, column, "--image_column")
    encoded = splits[split].select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return encoded if column == "image" else encoded.rename_column(column, "image")


def read_labels(
    splits: datasets.DatasetDict,
    column: str,
    train_split: str,
    test_split: str | None,
    declared: Declarations | None = None,
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Labels of train and test as 0..C-1, and the names of the classes.

    The classes are those that a ``ClassLabel`` declares, whether or not each has an example; for integers, strings
    and booleans they are the sorted distinct values in train. Where ``declared`` has the declarations of the single
    files, each file's labels count that file's names.

    Returns:
        (N,) int64 labels of train, (M,) int64 labels of test or None, C class names.

    Raises:
        ValueError: if an example has no label or one that train does not have, or there are fewer than 2 classes.
    """
    declared = declared or Declarations()
    train = _label_values(splits, column, train_split, declared.row_names(column, train_split, train_split))
    feature = splits[train_split].features[column]
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(train))
    classes = declared.class_names(column, train_split) or classes
    if len(classes) < 2:
        raise ValueError(
            f"--label_column {column}: split {train_split!r} has {len(classes)} class, at least 2 are needed"
        )
    index_of = {value: index for index, value in enumerate(classes)}
    train_labels = torch.tensor([index_of[value] for value in train])
    if test_split is None:
        return train_labels, None, tuple(map(str, classes))
    of_test = declared.row_names(column, test_split, train_split)
    test = _label_values(splits, column, test_split, of_test)
    row = next((row for row, value in enumerate(test) if value not in index_of), None)
    if row is not None:
        ends = list(accumulate(file.num_rows for file, _ in of_test))
        lists = ""
        if of_test:
            file, names = of_test[bisect_right(ends, row)]
            train_files = declared.files.get(train_split) or ()
            lists = f" ({train_files[0].file} declares {_listed(classes)}, {file.file} {_listed(names)})"
        raise ValueError(
            f"split {test_split!r}, row {row}: label {test[row]!r} does not occur in split {train_split!r}{lists}; "
            "choose other splits with --train_split and --test_split, or another --label_column"
        )
    return train_labels, torch.tensor([index_of[value] for value in test]), tuple(map(str, classes))


def is_unlabeled(value: object) -> bool:
    """Whether a label stands for none: missing, or -1 as benchmarks have it that keep their labels secret."""
    return value is None or (isinstance(value, int) and value < 0)


def _label_values(
    splits: datasets.DatasetDict,
    column: str,
    split: str,
    of_files: Sequence[tuple[FileClasses, tuple[str, ...]]],
) -> list[Any]:
    """Labels of a split as they are in the data; class names for a ``ClassLabel``, each file's own."""
    _check_column(splits, split, column, "--label_column")
    values = splits[split][column][:]
    if not values:
        raise ValueError(f"split {split!r} is empty: choose another with --train_split or --test_split")
    unlabeled = [row for row, value in enumerate(values) if is_unlabeled(value)]
    if unlabeled:
        raise ValueError(
            f"split {split!r}, column {column!r}: {len(unlabeled)} of {len(values)} examples have no label "
            f"(first: row {unlabeled[0]}, value {values[unlabeled[0]]}); choose a labeled split with --train_split or "
            f"--test_split, there are {_listed(splits)}, or another --label_column"
        )
    feature = splits[split].features[column]
    if not isinstance(feature, datasets.ClassLabel):
        if of_files and not isinstance(values[0], int):
            raise ValueError(
                f"split {split!r}, column {column!r}: {of_files[0][0].file} or another file declares class names, and "
                f"the labels are {getattr(feature, 'dtype', feature)} in others; store them in one way"
            )
        if not of_files:
            return list(values)
    sections = [(file.num_rows, names) for file, names in of_files] or [(len(values), tuple(feature.names))]
    if sum(rows for rows, _ in sections) != len(values):
        raise ValueError(
            f"split {split!r} has {len(values)} examples and its files have {sum(rows for rows, _ in sections)}: "
            "files changed since they were prepared; delete the copy in the cache of datasets (HF_DATASETS_CACHE)"
        )
    named: list[Any] = []
    for rows, names in sections:
        part = values[len(named) : len(named) + rows]
        outside = next((row for row, value in enumerate(part) if value >= len(names)), None)
        if outside is not None:
            raise ValueError(
                f"split {split!r}, row {len(named) + outside}: label {part[outside]}, and column {column!r} declares "
                f"{len(names)} classes (0 to {len(names) - 1}); repair it or choose another --label_column"
            )
        named += [names[value] for value in part]
    return named


def _check_column(splits: datasets.DatasetDict, split: str, column: str, flag: str) -> None:
    if column not in splits[split].features:
        raise ValueError(
            f"split {split!r} has no column {column!r}, only {_listed(splits[split].features)}; choose other splits "
            f"with --train_split and --test_split, or another {flag}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _unknown(flag: str, value: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(value, list(names), n=1)
    kind = "split" if flag.endswith("split") else "column"
    hint = f"did you mean {nearest[0]!r}? There" if nearest else "there"
    return f"{flag} {value}: the dataset has no such {kind}; {hint} are {_listed(names)}"
