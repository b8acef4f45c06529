"""Choose splits, columns and classes of a dataset by rules; error messages name the setting that overrides each.

No image is decoded here.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from ham_hf.data.declarations import Declarations, FileClasses
from ham_hf.data.decoding import EncodedImages
from ham_hf.data.shards import SplitFiles

logger = logging.getLogger(__name__)

TEST_SPLITS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
LABEL_DTYPES = re.compile(r"u?int\d+|(large_)?string|bool")


def choose_splits(
    names: Sequence[str],
    train_split: str | None,
    test_split: str | None,
    has_labels: Callable[[str], bool] = lambda split: True,
) -> tuple[str, str | None]:
    """Names of the split to train on and of the one to test on; None: the test part is held out of train.

    Train is ``train``, or the only split. Test is the first one of ``TEST_SPLITS`` that has labels; ImageNet-1k, for
    example, has none for its test split. Selection takes its own part of train, so a validation split beside a test
    split is not used.

    Args:
        names: of the splits there are.
        train_split: as asked for; None = by the rule.
        test_split: likewise.
        has_labels: whether a split has any labels; called only where there is a choice.

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
        others = [name for name in names if name != train_split]
        found = find_test_split(others, has_labels)
        if others and found is None:
            what = (
                "none of the splits %s is for testing by its name, so they are not used: choose one with --test_split"
            )
            logger.warning(what, _listed(others))
        return train_split, found
    if test_split not in names:
        raise ValueError(_unknown("--test_split", test_split, names))
    if test_split == train_split:
        raise ValueError(
            f"--test_split {test_split} is the training split: the test would be on images seen in training. "
            "Leave it out to hold a part out of train (--test_fraction)"
        )
    return train_split, test_split


def find_test_split(names: Sequence[str], has_labels: Callable[[str], bool]) -> str | None:
    """The first split of ``TEST_SPLITS`` that has labels, or where none has, the first; None where there is none."""
    candidates = [name for name in TEST_SPLITS if name in names]
    if len(candidates) > 1:
        # If none has labels, reading the first one raises.
        candidates = [name for name in candidates if has_labels(name)] or candidates
    return candidates[0] if candidates else None


def choose_image_column(features: datasets.Features, image_column: str | None) -> str:
    """The image column: the one asked for, else the only ``Image`` feature, else the only column of encoded bytes.

    ValueError if the named column does not exist or holds no images, or the rule does not apply.
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
        if not candidates and "image" in features:
            found += (
                f" ('image' is {features['image']}, and images are files or their bytes: cast it to datasets.Image)"
            )
        raise ValueError(f"the dataset has {found}; name one of its columns {_listed(features)} with --image_column")
    return candidates[0]


def _is_image(feature: object) -> bool:
    return isinstance(feature, datasets.Image)


def _is_encoded(feature: object) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"} and _is_encoded(feature["bytes"])
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def choose_label_column(features: datasets.Features, label_column: str | None) -> str:
    """The label column: the one asked for, else the only ``ClassLabel``, else the first of ``LABEL_COLUMNS`` there is.

    ValueError if the named column does not exist or holds no labels, or the rule does not apply.
    """
    if label_column is None:
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        usable = classes or [name for name, feature in features.items() if _is_label(feature)]
        named = classes if len(classes) == 1 else [name for name in LABEL_COLUMNS if name in usable]
        if not named:
            found = f"several label columns, {_listed(classes)}" if classes else "no label column"
            unusable = [name for name in LABEL_COLUMNS if name in features and name not in usable]
            if unusable and not classes:
                # A pandas column of integers with a gap becomes floats.
                kind = getattr(features[unusable[0]], "dtype", features[unusable[0]])
                found += f" ({unusable[0]!r} is {kind}, and labels are integers, strings or booleans: convert it)"
            raise ValueError(
                f"the dataset has {found}; name one of its columns {_listed(features)} with --label_column"
            )
        return named[0]
    return categories("--label_column", label_column, features)


def categories(flag: str, column: str, features: datasets.Features) -> str:
    """The column that ``flag`` names; ValueError unless it holds class labels, integers, strings or booleans."""
    if column not in features:
        raise ValueError(_unknown(flag, column, features))
    if not _is_label(features[column]):
        raise ValueError(
            f"{flag} {column}: expected one class label, integer, string or boolean per image, got {features[column]}"
        )
    return column


def labeled(
    splits: Mapping[str, datasets.Dataset] | Mapping[str, SplitFiles], label_column: str | None
) -> Callable[[str], bool]:
    """Return a function that tells whether any example of a split has a label; of a stream it looks at the first.

    A split without the column counts as labeled, so that an error names it.
    """

    def has_labels(split: str) -> bool:
        rows = splits[split]
        try:
            column = choose_label_column(rows.features, label_column)
        except ValueError:
            return True
        if isinstance(rows, SplitFiles):
            first = next(rows.rows([column], 0, 0, 1), None)
            return first is None or not is_unlabeled(first[column])
        return not all(map(is_unlabeled, rows[column][:]))

    return has_labels


def _is_label(feature: object) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and LABEL_DTYPES.fullmatch(feature.dtype) is not None


def encoded_images(
    splits: Mapping[str, datasets.Dataset], column: str, in_chans: int, split: str, rows: Tensor, labels: Tensor
) -> EncodedImages:
    """The images at these (M,) rows of a split whose labels are ``labels`` (N,), not decoded."""
    _check_column(splits, split, column, "--image_column")
    images = splits[split].select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if column != "image":
        images = images.rename_column(column, "image")
    return EncodedImages(images=images, split=split, rows=rows, labels=labels[rows], in_chans=in_chans)


def read_labels(
    splits: Mapping[str, datasets.Dataset],
    column: str,
    train_split: str,
    test_split: str | None,
    declared: Declarations | None = None,
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Labels of train and test as 0..C-1, and the names of the classes.

    The classes are all that a ``ClassLabel`` declares; for integers, strings and booleans, the sorted distinct values
    in train. Labels of files with their own declarations in ``declared`` are matched by name.

    Returns:
        (N,) int64 labels of train, (M,) int64 labels of test or None, C class names.

    Raises:
        ValueError: if an example has no label or one that train does not have, or there are fewer than 2 classes.
    """
    declared = declared or Declarations()
    train = _label_values(splits, column, train_split, declared.row_names(column, train_split, train_split))
    feature = splits[train_split].features[column]
    own = map(str, feature.names) if isinstance(feature, datasets.ClassLabel) else sorted(set(train))
    classes: Sequence[Any] = declared.class_names(column, train_split) or list(own)
    if len(classes) < 2:
        raise ValueError(
            f"--label_column {column}: split {train_split!r} has {len(classes)} class, at least 2 are needed"
        )
    _warn_of_like_names(list(map(str, classes)))
    index_of = {value: index for index, value in enumerate(classes)}
    train_labels = torch.tensor([index_of[value] for value in train])
    if test_split is None:
        return train_labels, None, tuple(map(str, classes))
    of_test = declared.row_names(column, test_split, train_split)
    test = _label_values(splits, column, test_split, of_test)
    row = next((row for row, value in enumerate(test) if value not in index_of), None)
    if row is not None:
        lists = ""
        if of_test:
            file, names = [pair for pair in of_test for _ in range(pair[0].num_rows)][row]
            first = declared.files[train_split][0].file
            lists = f" ({first} declares {_listed(classes)}, {file.file} {_listed(names)})"
        raise ValueError(
            f"split {test_split!r}, row {row}: label {test[row]!r} does not occur in split {train_split!r}{lists}; "
            "choose other splits with --train_split and --test_split, or another --label_column"
        )
    return train_labels, torch.tensor([index_of[value] for value in test]), tuple(map(str, classes))


def _warn_of_like_names(classes: Sequence[str]) -> None:
    """Warn of names that differ in case, spaces or the form of their Unicode alone."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFKC", name).strip().casefold(), []).append(ascii(name))
    for names in (names for names in alike.values() if len(names) > 1):
        what = "the classes %s differ in case, spaces or the form of their Unicode alone, and are separate classes"
        logger.warning(what, " and ".join(names))


def is_unlabeled(value: object) -> bool:
    """Whether a label is missing, or negative as in benchmarks that keep their labels secret."""
    return value is None or (isinstance(value, int) and value < 0)


def _label_values(
    splits: Mapping[str, datasets.Dataset],
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
            f"(first: row {unlabeled[0]}, value {values[unlabeled[0]]}; negative means none); choose a labeled split "
            f"with --train_split or --test_split, there are {_listed(splits)}, or another --label_column"
        )
    feature = splits[split].features[column]
    if not isinstance(feature, datasets.ClassLabel):
        if not of_files:
            return list(values)
        if not isinstance(values[0], int):
            raise ValueError(
                f"split {split!r}, column {column!r}: {of_files[0][0].file} or another file declares class names, and "
                f"the labels are {getattr(feature, 'dtype', feature)} in others; store them in one way"
            )
    names = names_of_rows(f"split {split!r}", feature, len(values), of_files)
    for row, value in enumerate(values):
        if value >= len(names[row]):
            raise ValueError(
                f"split {split!r}, row {row}: label {value}, and column {column!r} declares {len(names[row])} classes "
                f"(0 to {len(names[row]) - 1}); repair it or choose another --label_column"
            )
    return [names[row][value] for row, value in enumerate(values)]


def names_of_rows(
    where: str, feature: datasets.ClassLabel, num_rows: int, of_files: Sequence[tuple[FileClasses, tuple[str, ...]]]
) -> Sequence[tuple[str, ...]]:
    """The names that the label of each row of a split indexes: those of its file, else the feature's.

    ValueError, beginning with ``where``, if the files have a different number of rows.
    """
    if not of_files:
        return [tuple(map(str, feature.names))] * num_rows
    names = [names for file, names in of_files for _ in range(file.num_rows)]
    if len(names) != num_rows:
        raise ValueError(
            f"{where} has {num_rows} examples and its files have {len(names)}: files changed since they were "
            "prepared; delete the copy in the cache of datasets (HF_DATASETS_CACHE)"
        )
    return names


def _check_column(splits: Mapping[str, datasets.Dataset], split: str, column: str, flag: str) -> None:
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
