"""Where the examples come from: the digits, a local folder or the Hub; which splits, columns and classes.

Everything here is cheap: no image is decoded. Every choice follows a rule and can be overridden by a setting that the
error messages name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

DIGITS = "digits"
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LABEL_DTYPES = re.compile(r"u?int\d+|(large_)?string|bool")


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened dataset.

    Attributes:
        splits: every split, by name.
        config_name: the configuration that was opened; as given for local data.
        revision: its commit, if known, else the revision asked for; None for local data.
    """

    splits: datasets.DatasetDict
    config_name: str | None
    revision: str | None


def open_source(name: str, config_name: str | None, revision: str | None) -> Source:
    """Open ``digits``, a local folder (parquet, class folders, ``save_to_disk``) or a dataset of the Hub.

    An existing folder goes before a dataset of the Hub with the same name.

    Raises:
        ValueError: if it cannot be opened; the message names the setting and the way out, the cause is kept.
    """
    folder = Path(name).expanduser()
    local = name == DIGITS or folder.exists()
    if local and revision is not None:
        raise ValueError(f"--dataset_revision {revision}: only datasets of the Hub have revisions, {name!r} is local")
    if name == DIGITS:
        if config_name is not None:
            raise ValueError(f"--dataset_config_name {config_name}: 'digits' has no configurations; leave it out")
        return Source(splits=_digits(), config_name=None, revision=None)
    if folder.is_file():
        raise ValueError(f"--dataset_name {name}: is a file; give the folder that contains it")
    if not local and not HUB_ID.fullmatch(name):
        raise ValueError(
            f"--dataset_name {name}: there is no such folder, and it is not a Hub id either (expected 'owner/name')"
        )
    try:
        if local and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(folder))
            splits = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
            return Source(splits=splits, config_name=config_name, revision=None)
        # The two halves of load_dataset; the builder knows which commit of the Hub it reads.
        path = str(folder.resolve()) if local else name
        builder = datasets.load_dataset_builder(path, config_name, revision=revision)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as error:
        # Network, Hub, file format: dozens of exception types, and all of them end the run.
        raise ValueError(_explain(error, name, config_name, revision, local=local)) from error
    if local:
        return Source(splits=splits, config_name=config_name, revision=None)
    commit = builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else revision
    return Source(splits=splits, config_name=builder.config.name, revision=commit)


def _explain(error: Exception, name: str, config_name: str | None, revision: str | None, *, local: bool) -> str:
    # A DatasetGenerationError says that generating failed; its cause says why.
    failed = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
    text = str(failed or error).split("\nExample of usage")[0]
    # datasets raises a plain ValueError if the configuration is missing or unknown, and lists those there are.
    if type(error) is ValueError and "config" in text.lower():
        return f"--dataset_config_name {config_name or '(not given)'}, of --dataset_name {name}: {text}"
    if local:
        return f"--dataset_name {name}: this folder cannot be read as parquet files or class folders: {text}"
    if isinstance(error, ConnectionError):
        return (
            f"--dataset_name {name}: there is no such local folder, the Hub cannot be reached and its cache has no "
            f"copy; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder ({text})"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"--dataset_name {name}, --dataset_revision {revision or 'main'}: {text} Check the id; a private or gated "
            "dataset needs `hf auth login` or HF_TOKEN; there is no local folder of that name either"
        )
    return f"--dataset_name {name} cannot be loaded: {type(error).__name__}: {text}"


def _digits() -> datasets.DatasetDict:
    """scikit-learn's handwritten digits: 1,797 gray 8x8 images with values 0..16, one split."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {"image": list(pixels), "label": scans.target}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features))


def choose_splits(names: Sequence[str], train_split: str | None, test_split: str | None) -> tuple[str, str | None]:
    """Names of the split to train on and of the one to test on.

    Train is ``train``, or the only split. Test is the first there is of test, validation, valid, val and dev; None
    means that it has to be held out of train. Where there is both a test and a validation split, validation is not
    used: selection has its own part of train.

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
        return train_split, next((name for name in TEST_SPLITS if name in names and name != train_split), None)
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
    splits: datasets.DatasetDict, column: str, train_split: str, test_split: str | None
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Labels of train and test as 0..C-1, and the names of the classes.

    The classes are those that a ``ClassLabel`` declares, whether or not each has an example; for integers, strings
    and booleans they are the sorted distinct values in train.

    Returns:
        (N,) int64 labels of train, (M,) int64 labels of test or None, C class names.

    Raises:
        ValueError: if an example has no label or one that train does not have, or there are fewer than 2 classes.
    """
    train = _label_values(splits, column, train_split)
    feature = splits[train_split].features[column]
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(train))
    if len(classes) < 2:
        raise ValueError(
            f"--label_column {column}: split {train_split!r} has {len(classes)} class, at least 2 are needed"
        )
    index_of = {value: index for index, value in enumerate(classes)}
    train_labels = torch.tensor([index_of[value] for value in train])
    if test_split is None:
        return train_labels, None, tuple(map(str, classes))
    test = _label_values(splits, column, test_split)
    row = next((row for row, value in enumerate(test) if value not in index_of), None)
    if row is not None:
        raise ValueError(
            f"split {test_split!r}, row {row}: label {test[row]!r} does not occur in split {train_split!r}; "
            "choose other splits with --train_split and --test_split, or another --label_column"
        )
    return train_labels, torch.tensor([index_of[value] for value in test]), tuple(map(str, classes))


def _label_values(splits: datasets.DatasetDict, column: str, split: str) -> list[Any]:
    """Labels of a split as they are in the data; class names for a ``ClassLabel``."""
    _check_column(splits, split, column, "--label_column")
    values = splits[split][column][:]
    if not values:
        raise ValueError(f"split {split!r} is empty: choose another with --train_split or --test_split")
    unlabeled = [row for row, value in enumerate(values) if value is None or (isinstance(value, int) and value < 0)]
    if unlabeled:
        raise ValueError(
            f"split {split!r}, column {column!r}: {len(unlabeled)} of {len(values)} examples have no label "
            f"(first: row {unlabeled[0]}, value {values[unlabeled[0]]}); choose a labeled split with --train_split or "
            f"--test_split, there are {_listed(splits)}, or another --label_column"
        )
    feature = splits[split].features[column]
    return [feature.names[value] for value in values] if isinstance(feature, datasets.ClassLabel) else values


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
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{flag} {value}: the dataset has no such name; {hint}There are {_listed(names)}"
