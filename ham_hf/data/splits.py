"""Which examples make up train, validation and test: stratified, seeded held-out parts and subsets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

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
from ham_hf.data.config import DataConfig
from ham_hf.data.decoding import EncodedImages
from ham_hf.data.provenance import Fingerprint, fingerprint_of
from ham_hf.data.shards import Shards, SplitFiles, count_rows, held_out_rows, read_whole
from ham_hf.data.sources import Source, StreamedSource, open_source, open_streamed_source

TEST_SEED = 0
"""Seed of everything that is tested on. It is not a run's own: none may be tested on what another was trained on, and
runs of several seeds are compared on the same images."""


def stratified_subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Positions of ``size`` examples in which every class has its share, to within one example.

    Shares are rounded by largest remainder, so they add up to ``size``; a class with a share below one example may
    be left out. For one seed, the examples drawn of a class are the first of a fixed order: a larger draw from a
    class contains every smaller one.

    Args:
        labels: (N,) int64 classes, >= 0.
        size: number of examples, at least 1; N or more selects all.
        seed: of the draw; the result depends on nothing else.

    Returns:
        (min(size, N),) int64 positions, ascending.

    Raises:
        ValueError: if ``size`` is less than 1.
    """
    if size < 1:
        raise ValueError(f"a subset needs at least 1 example, got size={size}")
    if size >= len(labels):
        return torch.arange(len(labels))
    quota = _proportional_counts(torch.bincount(labels), size)
    return torch.nonzero(_rank_in_class(labels, seed) < quota[labels]).flatten()


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split examples into a kept and a held-out part; every class gives its share, to within one example.

    The held-out part has ``round(fraction * N)`` examples, at least one. No class is starved: the last example of
    a class is always kept, so a class with a single example is never held out and the held-out part may be smaller
    by the number of such classes.

    Args:
        labels: (N,) int64 classes, >= 0.
        fraction: share of the examples to hold out, in (0, 1).
        seed: of the draw; the result depends on nothing else.

    Returns:
        Positions of the kept and of the held-out examples, int64, each ascending; together all N, without overlap.

    Raises:
        ValueError: if ``fraction`` is outside (0, 1), or no class has an example to spare.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie in (0, 1), got {fraction}")
    class_counts = torch.bincount(labels)
    size = max(1, round(fraction * len(labels)))
    quota = torch.minimum(_proportional_counts(class_counts, size), (class_counts - 1).clamp(min=0))
    if not quota.any():
        raise ValueError(
            f"{fraction:g} of {len(labels)} examples leaves none to hold out, because the last example of a class "
            "is always kept: use a larger fraction or more examples"
        )
    held_out = _rank_in_class(labels, seed) < quota[labels]
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()


def _proportional_counts(class_counts: Tensor, size: int) -> Tensor:
    """(C,) int64 that sum to ``size`` and are proportional to ``class_counts``, by largest remainder."""
    total = int(class_counts.sum())
    # Integers throughout: the same on every platform, whatever a float quota would round to.
    counts = class_counts * size // max(total, 1)
    remainders = class_counts * size % max(total, 1)
    missing = size - int(counts.sum())
    largest = torch.argsort(remainders, descending=True, stable=True)[:missing]
    counts[largest] += 1
    return counts


def _rank_in_class(labels: Tensor, seed: int) -> Tensor:
    """(N,) int64: place of each example in a random order of the examples of its class, from 0."""
    keys = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = torch.argsort(labels * len(labels) + keys)
    class_counts = torch.bincount(labels)
    first = torch.cumsum(class_counts, 0) - class_counts
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - first[labels[order]]
    return rank


logger = logging.getLogger(__name__)

SAMPLED_FILES = 8
STATISTICS_EXAMPLES = 2_000
"""Training images at most that the mean and the standard deviation of the channels are of."""


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


def stored_labels(source: Source, label_column: str | None) -> Callable[[str], bool]:
    """Tells of a split, by its name, whether its examples have labels; one without the column is not passed over."""

    def has_labels(split: str) -> bool:
        column = label_column_of(source.splits[split].features, label_column)
        return column is None or not all(map(is_unlabeled, source.splits[split][column][:]))

    return has_labels


def streamed_labels(splits: Mapping[str, SplitFiles], label_column: str | None) -> Callable[[str], bool]:
    """`stored_labels` of a stream, by the first example of a split."""

    def has_labels(split: str) -> bool:
        column = label_column_of(splits[split].stream.features, label_column)
        first = None if column is None else next(iter(splits[split].rows([column], 0, 0, 1)), None)
        return first is None or not is_unlabeled(first[str(column)])

    return has_labels


def split_files(source: StreamedSource) -> dict[str, SplitFiles]:
    """The files of each split of a stream."""
    return {
        split: SplitFiles(split=split, files=source.files[split], version=source.versions[split], stream=stream)
        for split, stream in source.splits.items()
    }


def encoded_images(
    splits: datasets.DatasetDict, column: str, in_chans: int, split: str, rows: Tensor, labels: Tensor
) -> EncodedImages:
    """The images at these (M,) rows of a split whose labels are ``labels`` (N,), not decoded."""
    images = encoded_column(splits, split, column)
    return EncodedImages(images=images, split=split, rows=rows, labels=labels[rows], in_chans=in_chans)


def split_dataset(config: DataConfig, in_chans: int, seed: int) -> Parts:
    """Hold a test part out of train if there is no test split, apply the limits, hold out the validation part.

    Args:
        config: says which data, and what is held out of it.
        in_chans: channels to decode to, 1 or 3.
        seed: of the validation part and of the limited training set.

    Raises:
        ValueError: for anything that does not fit; the message names the setting.
    """
    source = open_source(config.dataset_name, config.dataset_config_name, config.dataset_revision)
    has_labels = stored_labels(source, config.label_column)
    train_name, test_name = choose_splits(list(source.splits), config.train_split, config.test_split, has_labels)
    features = source.splits[train_name].features
    images = choose_image_column(features, config.image_column)
    label_column = choose_label_column(features, config.label_column)
    labels, test_labels, class_names = read_labels(source.splits, label_column, train_name, test_name, source.declared)

    encoded = partial(encoded_images, source.splits, images, in_chans)
    train_rows = torch.arange(len(labels))
    fingerprint, test_split = fingerprint_of(encoded(train_name, train_rows, labels), class_names), test_name
    if test_name is None or test_labels is None:
        train_rows, test_rows = _hold_out(labels, train_rows, "--test_fraction", config.test_fraction, TEST_SEED)
        origin = f"held out of {train_name} ({100 * config.test_fraction:g} %, stratified, seed {TEST_SEED})"
        test_name, test_labels = train_name, labels
    else:
        test_rows, origin = torch.arange(len(test_labels)), test_name
    train_rows = limit_rows(labels, train_rows, "--limit_train_examples", config.limit_train_examples, seed)
    test_rows = limit_rows(test_labels, test_rows, "--limit_test_examples", config.limit_test_examples, TEST_SEED)
    parts = {"test": encoded(test_name, test_rows, test_labels)}
    if config.validation_fraction != 0:
        train_rows, rows = _hold_out(labels, train_rows, "--validation_fraction", config.validation_fraction, seed)
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


def split_stream(config: DataConfig, in_chans: int) -> Parts:
    """Leave train where it is; read test and the held-out part of train into the cache of ``datasets``.

    Held out is the first part of every file, so that only that has to be read. It is not stratified, and the same for
    every seed. Without a validation part, training images for statistics are read from the beginnings of a few files.

    Args:
        config: says which data, and what is held out of it.
        in_chans: channels to decode to, 1 or 3.

    Raises:
        ValueError: for anything that does not fit; the message names the setting.
    """
    source = open_streamed_source(config.dataset_name, config.dataset_config_name, config.dataset_revision)
    splits, fraction = split_files(source), config.validation_fraction
    has_labels = streamed_labels(splits, config.label_column)
    train_name, test_name = choose_splits(list(source.splits), config.train_split, config.test_split, has_labels)
    features = source.splits[train_name].features
    images = choose_image_column(features, config.image_column)
    labels = choose_label_column(features, config.label_column)
    classes = _declared_classes(source, train_name, labels)
    if test_name is None:
        raise ValueError(_ONLY_SPLIT.format(split=train_name))
    splits |= {
        split: _naming_classes(splits[split], [names for _, names in found], labels, classes)
        for split in (train_name, test_name)
        if (found := source.declared.row_names(labels, split, train_name))
    }
    train = splits[train_name]
    num_rows = count_rows(train, config.num_train_examples)
    num_held_out = _held_out_of_files(num_rows, fraction)
    kept = datasets.Features({images: datasets.Image(), labels: classes})
    logger.info("reading all of split %r", test_name)
    read = {test_name: read_whole(splits[test_name], kept)}
    first_rows = dict(enumerate(num_held_out)) if fraction else _first_rows_sampled(num_rows)
    logger.info("reading the held-out part of split %r", train_name)
    read[train_name] = read_whole(train, kept, first_rows)
    dataset = datasets.DatasetDict(read)
    first_labels, test_labels, class_names = read_labels(dataset, labels, train_name, test_name)
    assert test_labels is not None  # noqa: S101 (there is a test split)
    test_rows = limit_rows(
        test_labels, torch.arange(len(test_labels)), "--limit_test_examples", config.limit_test_examples, TEST_SEED
    )
    encoded = partial(encoded_images, dataset, images, in_chans)
    return Parts(
        encoded={
            "test": encoded(test_name, test_rows, test_labels),
            "validation" if fraction else "sample": encoded(train_name, torch.arange(len(first_labels)), first_labels),
        },
        shards=Shards(
            source=train,
            image_column=images,
            label_column=labels,
            num_rows=num_rows,
            num_held_out=num_held_out,
            num_classes=len(class_names),
        ),
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


_ONLY_SPLIT = (
    "--dataset_streaming: split {split!r} is the only one, and a test part is not held out of a stream; choose a "
    "dataset with a test or validation split, or leave --dataset_streaming out"
)


def _first_rows_sampled(num_rows: Sequence[int]) -> dict[int, int]:
    """How many rows of which files to read for statistics."""
    sampled = range(0, len(num_rows), max(1, len(num_rows) // SAMPLED_FILES))
    return {file: min(num_rows[file], -(-STATISTICS_EXAMPLES // len(sampled))) for file in sampled}


def _declared_classes(source: StreamedSource, split: str, column: str) -> datasets.ClassLabel:
    names = source.declared.class_names(column, split)
    classes = source.splits[split].features[column] if names is None else datasets.ClassLabel(names=list(names))
    if not isinstance(classes, datasets.ClassLabel):
        raise ValueError(
            f"--dataset_streaming: column {column!r} is {classes.dtype}, and the classes have to be known before all "
            "examples are read: declare it as class_label with its names in the dataset's README.md "
            "(dataset_info, features), or name a ClassLabel column with --label_column"
        )
    return classes


def _naming_classes(
    files: SplitFiles,
    names: Sequence[tuple[str, ...]],
    label_column: str,
    classes: datasets.ClassLabel,
) -> SplitFiles:
    """The files, reading labels by the names that each declares."""
    return replace(files, label_column=label_column, class_names=tuple(classes.names), file_names=tuple(names))


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
