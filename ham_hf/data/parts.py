"""Which examples make up train, validation and test."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import datasets
import torch
from torch import Tensor

from ham_hf.data.columns import (
    choose_image_column,
    choose_label_column,
    choose_splits,
    encoded_column,
    is_unlabeled,
    label_column_of,
    read_labels,
)
from ham_hf.data.decoding import EncodedImages
from ham_hf.data.provenance import Fingerprint, fingerprint_of
from ham_hf.data.shards import Shards, SplitFiles, count_rows, held_out_rows, read_whole
from ham_hf.data.sources import open_source, open_streamed_source
from ham_hf.data.splits import TEST_SEED, stratified_split, stratified_subset

logger = logging.getLogger(__name__)

SAMPLED_FILES = 8


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """A dataset and what to read of it; what is None is found by the rules of `ham_hf.data.columns`.

    Attributes:
        name: Hub id, local folder or ``digits``.
        config_name: configuration of a Hub dataset that has several.
        revision: branch, tag or commit of a Hub dataset.
        train_split: split to train on.
        test_split: split to test on.
        image_column: column of images.
        label_column: column of labels.
        in_chans: channels to decode to, 1 or 3.
        group_column: column of groups to evaluate beside the classes; None for none.
    """

    name: str
    config_name: str | None
    revision: str | None
    train_split: str | None
    test_split: str | None
    image_column: str | None
    label_column: str | None
    in_chans: int
    group_column: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a dataset, not decoded.

    Attributes:
        encoded: ``test``, ``validation`` if there is one, and ``train`` or, of a stream, ``sample``: some training
            images for statistics.
        shards: the training split, if it is read as a stream.
        class_names: C names, in label order.
        test_split_origin: name of the test split, or how it was held out of train.
        config_name: configuration that was opened; as given for local data.
        revision: commit of the Hub dataset if known, else as given.
        train_split: split that train and validation are of.
        test_split: split of test; None if it was held out of ``train_split``.
        image_column: column of the images.
        label_column: column of the labels.
        num_images: examples of ``train_split``.
        fingerprint: of ``train_split``; None for a stream, whose labels are not read.
        notes: what of the dataset is not read, each with its number and an example.
    """

    encoded: dict[str, EncodedImages]
    shards: Shards | None
    class_names: tuple[str, ...]
    test_split_origin: str
    config_name: str | None
    revision: str | None
    train_split: str
    test_split: str | None
    image_column: str
    label_column: str
    num_images: int
    fingerprint: Fingerprint | None
    notes: tuple[str, ...] = ()


def split_dataset(
    choice: DatasetChoice,
    *,
    validation_fraction: float,
    test_fraction: float,
    limit_train_examples: int | None,
    limit_test_examples: int | None,
    seed: int,
) -> Parts:
    """Hold a test part out of train if there is no test split, apply the limits, hold out the validation part.

    See `ham_hf.data.load_image_data` for the arguments.

    Raises:
        ValueError: for anything that does not fit; the message names the setting.
    """
    source = open_source(choice.name, choice.config_name, choice.revision)

    def has_labels(split: str) -> bool:
        column = label_column_of(source.splits[split].features, choice.label_column)
        # A split without the column is not passed over in silence: reading it says so.
        return column is None or not all(map(is_unlabeled, source.splits[split][column][:]))

    train_name, test_name = choose_splits(list(source.splits), choice.train_split, choice.test_split, has_labels)
    features = source.splits[train_name].features
    images = choose_image_column(features, choice.image_column)
    label_column = choose_label_column(features, choice.label_column)
    labels, test_labels, class_names = read_labels(source.splits, label_column, train_name, test_name, source.declared)

    def encoded(split: str, rows: Tensor, split_labels: Tensor) -> EncodedImages:
        column = encoded_column(source.splits, split, images)
        return EncodedImages(
            images=column, split=split, rows=rows, labels=split_labels[rows], in_chans=choice.in_chans
        )

    train_rows = torch.arange(len(labels))
    fingerprint, test_split = fingerprint_of(encoded(train_name, train_rows, labels), class_names), test_name
    if test_name is None or test_labels is None:
        train_rows, test_rows = _hold_out(labels, train_rows, "--test_fraction", test_fraction, TEST_SEED)
        origin = f"held out of {train_name} ({100 * test_fraction:g} %, stratified, seed {TEST_SEED})"
        test_name, test_labels = train_name, labels
    else:
        test_rows, origin = torch.arange(len(test_labels)), test_name
    train_rows = limit_rows(labels, train_rows, "--limit_train_examples", limit_train_examples, seed)
    test_rows = limit_rows(test_labels, test_rows, "--limit_test_examples", limit_test_examples, TEST_SEED)
    parts = {"test": encoded(test_name, test_rows, test_labels)}
    if validation_fraction != 0:
        train_rows, rows = _hold_out(labels, train_rows, "--validation_fraction", validation_fraction, seed)
        parts["validation"] = encoded(train_name, rows, labels)
    parts["train"] = encoded(train_name, train_rows, labels)
    return Parts(
        encoded=parts,
        shards=None,
        class_names=class_names,
        test_split_origin=origin,
        config_name=source.config_name,
        revision=source.revision,
        train_split=train_name,
        test_split=test_split,
        image_column=images,
        label_column=label_column,
        num_images=len(labels),
        fingerprint=fingerprint,
        notes=source.notes,
    )


def split_stream(
    choice: DatasetChoice,
    *,
    validation_fraction: float,
    limit_test_examples: int | None,
    num_train_examples: int | None,
    num_sampled: int,
) -> Parts:
    """Leave train where it is; read test and the held-out part of train into the cache of ``datasets``.

    Held out is the first part of every file, so that only that has to be read. It is not stratified, and the same for
    every seed.

    Args:
        choice: the dataset.
        validation_fraction: as in `ham_hf.data.load_image_data`.
        limit_test_examples: likewise.
        num_train_examples: examples of the training split, where its files do not say it.
        num_sampled: training images for statistics, at most, from the beginnings of a few files; not used if there
            is a validation part, which serves for that.

    Raises:
        ValueError: for anything that does not fit; the message names the setting.
    """
    source = open_streamed_source(choice.name, choice.config_name, choice.revision)
    splits = {
        split: SplitFiles(split=split, files=source.files[split], version=source.versions[split], stream=stream)
        for split, stream in source.splits.items()
    }

    def has_labels(split: str) -> bool:
        column = label_column_of(source.splits[split].features, choice.label_column)
        first = None if column is None else next(iter(splits[split].rows([column], 0, 0, 1)), None)
        return first is None or not is_unlabeled(first[str(column)])

    train_name, test_name = choose_splits(list(source.splits), choice.train_split, choice.test_split, has_labels)
    features = source.splits[train_name].features
    images, labels = (
        choose_image_column(features, choice.image_column),
        choose_label_column(features, choice.label_column),
    )
    names = source.declared.class_names(labels, train_name)
    classes = _declared_classes(features, labels) if names is None else datasets.ClassLabel(names=list(names))
    if test_name is None:
        raise ValueError(
            f"--dataset_streaming: split {train_name!r} is the only one, and a test part is not held out of a stream; "
            "choose a dataset with a test or validation split, or leave --dataset_streaming out"
        )
    for split in (train_name, test_name):
        of_files = source.declared.row_names(labels, split, train_name)
        if of_files:
            splits[split] = replace(
                splits[split],
                label_column=labels,
                class_names=tuple(classes.names),
                file_names=tuple(names for _, names in of_files),
            )
    train = splits[train_name]
    num_rows = count_rows(train, num_train_examples)
    num_held_out = _held_out_of_files(num_rows, validation_fraction)

    def whole(split: str, first_rows: Mapping[int, int] | None = None) -> datasets.Dataset:
        logger.info("reading %s of split %r", "all" if first_rows is None else "the held-out part", split)
        return read_whole(splits[split], datasets.Features({images: datasets.Image(), labels: classes}), first_rows)

    read = {test_name: whole(test_name)}
    held_out = dict(enumerate(num_held_out))
    if validation_fraction == 0:
        sampled = range(0, len(num_rows), max(1, len(num_rows) // SAMPLED_FILES))
        held_out = {file: min(num_rows[file], -(-num_sampled // len(sampled))) for file in sampled}
    read[train_name] = whole(train_name, held_out)
    dataset = datasets.DatasetDict(read)
    first_labels, test_labels, class_names = read_labels(dataset, labels, train_name, test_name)
    assert test_labels is not None  # noqa: S101 (there is a test split)
    test_rows = limit_rows(
        test_labels, torch.arange(len(test_labels)), "--limit_test_examples", limit_test_examples, TEST_SEED
    )

    def encoded(split: str, rows: Tensor, split_labels: Tensor) -> EncodedImages:
        column = encoded_column(dataset, split, images)
        return EncodedImages(
            images=column, split=split, rows=rows, labels=split_labels[rows], in_chans=choice.in_chans
        )

    part = "sample" if validation_fraction == 0 else "validation"
    shards = Shards(
        source=train,
        image_column=images,
        label_column=labels,
        num_rows=num_rows,
        num_held_out=num_held_out,
        num_classes=len(class_names),
    )
    return Parts(
        encoded={
            "test": encoded(test_name, test_rows, test_labels),
            part: encoded(train_name, torch.arange(len(first_labels)), first_labels),
        },
        shards=shards,
        class_names=class_names,
        test_split_origin=test_name,
        config_name=source.config_name,
        revision=source.revision,
        train_split=train_name,
        test_split=test_name,
        image_column=images,
        label_column=labels,
        num_images=sum(num_rows),
        fingerprint=None,
    )


def _declared_classes(features: datasets.Features, column: str) -> datasets.ClassLabel:
    classes = features[column]
    if not isinstance(classes, datasets.ClassLabel):
        raise ValueError(
            f"--dataset_streaming: column {column!r} is {classes.dtype}, and the classes have to be known before all "
            "examples are read: declare it as class_label with its names in the dataset's README.md "
            "(dataset_info, features), or name a ClassLabel column with --label_column"
        )
    return classes


def _held_out_of_files(num_rows: Sequence[int], fraction: float) -> tuple[int, ...]:
    found = held_out_rows(num_rows, fraction)
    if fraction != 0 and not any(found):
        raise ValueError(
            f"--validation_fraction {fraction:g} of {sum(num_rows)} examples in {len(num_rows)} files leaves none to "
            "hold out: use a larger fraction"
        )
    return found


def _hold_out(labels: Tensor, rows: Tensor, flag: str, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    try:
        kept, held_out = stratified_split(labels[rows], fraction, seed)
    except ValueError as error:
        raise ValueError(f"{flag} {fraction:g}: {error}") from error
    return rows[kept], rows[held_out]


def named_labels(labels: Tensor, class_names: Sequence[str], order: Sequence[str] | None) -> Tensor:
    """The (N,) labels as places in another order of the same class names; as they are if the names differ."""
    if order is None or not set(class_names) <= set(order):
        return labels
    return torch.tensor([order.index(name) for name in class_names])[labels]


def limit_rows(labels: Tensor, rows: Tensor, flag: str, limit: int | None, seed: int) -> Tensor:
    """A stratified part of the (M,) ``rows`` of a split, at most ``limit``; the message of an error names ``flag``."""
    if limit is None:
        return rows
    try:
        return rows[stratified_subset(labels[rows], limit, seed)]
    except ValueError as error:
        raise ValueError(f"{flag} {limit}: {error}") from error
