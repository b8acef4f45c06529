"""Choose the examples of train, validation and test: stratified, seeded held-out parts and subsets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import datasets
import torch
from torch import Tensor

from ham_hf.data.columns import (
    choose_image_column,
    choose_label_column,
    choose_splits,
    encoded_images,
    labeled,
    read_labels,
)
from ham_hf.data.config import DataConfig
from ham_hf.data.decoding import EncodedImages
from ham_hf.data.provenance import Fingerprint, fingerprint_of
from ham_hf.data.shards import Shards, SplitFiles, count_rows, held_out_rows, read_whole
from ham_hf.data.sources import Source, open_source, open_streamed_source
from ham_hf.seeding import TEST_SEED

logger = logging.getLogger(__name__)

SAMPLED_FILES = 8
STATISTICS_EXAMPLES = 2_000
"""Largest number of training images in the mean and the standard deviation of the channels."""


def stratified_subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Positions of ``size`` examples in which every class has its share, to within one example.

    Shares are rounded by largest remainder, ties at random, so that they add up to ``size``; a class with a share
    below one example may be left out. For one seed, a larger draw from a class contains every smaller one.

    Args:
        labels: (N,) int64 classes, >= 0.
        size: number of examples, at least 1; N or more selects all.
        seed: of the draw.

    Returns:
        (min(size, N),) int64 positions, ascending.

    Raises:
        ValueError: if ``size`` is less than 1.
    """
    if size < 1:
        raise ValueError(f"a subset needs at least 1 example, got size={size}")
    if size >= len(labels):
        return torch.arange(len(labels))
    counts = torch.bincount(labels)
    # Classes in random order: among equal remainders the first ones win.
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    quota = _proportional_counts(counts[order], size)[order.argsort()]
    return torch.nonzero(_rank_in_class(labels, seed) < quota[labels]).flatten()


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split examples into a kept and a held-out part; every class gives its share, to within one example.

    The held-out part has ``round(fraction * N)`` examples, at least one. The last example of a class is always kept,
    so there may be fewer by the number of classes with a single example.

    Args:
        labels: (N,) int64 classes, >= 0.
        fraction: share of the examples to hold out, in (0, 1).
        seed: of the draw.

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


class Chosen(NamedTuple):
    """Splits and columns of a dataset that are used; ``test_split`` is None if test is held out of ``train_split``."""

    train_split: str
    test_split: str | None
    image_column: str
    label_column: str


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a dataset, not decoded, and the size and fingerprint of its training split.

    Attributes:
        encoded: ``test``, ``validation`` if there is one, and ``train`` or, of a stream, ``sample``: some training
            images for statistics.
        test_split_origin: name of the test split, or how it was held out of train.
        shards: the training split, if it is read as a stream; its labels are not read, so it has no fingerprint.
    """

    source: Source[datasets.Dataset] | Source[SplitFiles]
    chosen: Chosen
    encoded: dict[str, EncodedImages]
    class_names: tuple[str, ...]
    test_split_origin: str
    num_images: int
    shards: Shards | None = None
    fingerprint: Fingerprint | None = None


def _choose(source: Source[datasets.Dataset] | Source[SplitFiles], config: DataConfig) -> Chosen:
    has_labels = labeled(source.splits, config.label_column)
    train, test = choose_splits(list(source.splits), config.train_split, config.test_split, has_labels)
    features = source.splits[train].features
    image_column = choose_image_column(features, config.image_column)
    return Chosen(train, test, image_column, choose_label_column(features, config.label_column))


def held_out_origin(split: str, fraction: float) -> str:
    """How reports name a test part that was held out of a split."""
    return f"held out of {split} ({100 * fraction:g} %, stratified, seed {TEST_SEED})"


def split_dataset(config: DataConfig, in_chans: int, seed: int, order: Sequence[str] = ()) -> Parts:
    """Hold a test part out of train if there is no test split, apply the limits, hold out the validation part.

    Equal remainders of a stratified part go by the place of a class: ``order`` is that of another copy's class names.
    """
    source = open_source(config)
    chosen = _choose(source, config)
    train, test = chosen.train_split, chosen.test_split
    labels, test_labels, class_names = read_labels(source.splits, chosen.label_column, train, test, source.declared)
    encoded = partial(encoded_images, source.splits, chosen.image_column, in_chans)
    train_rows = torch.arange(len(labels))
    fingerprint = fingerprint_of(encoded(train, train_rows, labels), class_names)
    drawn = named_labels(labels, class_names, order)
    if test is None or test_labels is None:
        train_rows, test_rows = hold_out(drawn, train_rows, "--test_fraction", config.test_fraction, TEST_SEED)
        origin = held_out_origin(train, config.test_fraction)
        test, test_labels = train, labels
    else:
        test_rows, origin = torch.arange(len(test_labels)), test
    train_rows = limit_rows(drawn, train_rows, config.limit_train_examples, seed)
    test_rows = limit_rows(test_labels, test_rows, config.limit_test_examples, TEST_SEED)
    parts = {"test": encoded(test, test_rows, test_labels)}
    if config.validation_fraction != 0:
        train_rows, rows = hold_out(drawn, train_rows, "--validation_fraction", config.validation_fraction, seed)
        parts["validation"] = encoded(train, rows, labels)
    parts["train"] = encoded(train, train_rows, labels)
    return Parts(
        source=source,
        chosen=chosen,
        encoded=parts,
        class_names=class_names,
        test_split_origin=origin,
        num_images=len(labels),
        fingerprint=fingerprint,
    )


def split_stream(config: DataConfig, in_chans: int) -> Parts:
    """Leave train where it is; read test and the held-out part of train into the cache of ``datasets``.

    The held-out part is the beginning of every file, so nothing else has to be read. It is not stratified, and it is
    the same for every seed. Without a validation part, the images for statistics are the first ones of a few files.
    """
    source = open_streamed_source(config)
    chosen, fraction = _choose(source, config), config.validation_fraction
    train, test, label_column = chosen.train_split, chosen.test_split, chosen.label_column
    classes = _declared_classes(source, train, label_column)
    if test is None:
        raise ValueError(
            f"--dataset_streaming: no split but {train!r} is for testing by its name, and a test part is not held "
            "out of a stream; choose one with --test_split or a dataset that has one, or leave --dataset_streaming out"
        )
    splits = dict(source.splits)
    for split in (train, test):
        names = tuple(names for _, names in source.declared.row_names(label_column, split, train))
        if names:
            splits[split] = replace(
                splits[split], label_column=label_column, class_names=tuple(classes.names), file_names=names
            )
    num_rows = count_rows(splits[train], config.num_train_examples)
    num_held_out = held_out_rows(num_rows, fraction)
    if fraction and not any(num_held_out):
        raise ValueError(
            f"--validation_fraction {fraction:g} of {sum(num_rows)} examples in {len(num_rows)} files leaves none to "
            "hold out: use a larger fraction"
        )
    kept = datasets.Features({chosen.image_column: datasets.Image(), label_column: classes})
    logger.info("reading all of split %r", test)
    read = {test: read_whole(splits[test], kept)}
    sampled = range(0, len(num_rows), max(1, len(num_rows) // SAMPLED_FILES))
    for_statistics = {file: min(num_rows[file], -(-STATISTICS_EXAMPLES // len(sampled))) for file in sampled}
    first_rows = dict(enumerate(num_held_out)) if fraction else for_statistics
    logger.info("reading the held-out part of split %r", train)
    read[train] = read_whole(splits[train], kept, first_rows)
    labels, test_labels, class_names = read_labels(read, label_column, train, test)
    assert test_labels is not None  # noqa: S101 (there is a test split)
    test_rows = limit_rows(test_labels, torch.arange(len(test_labels)), config.limit_test_examples, TEST_SEED)
    encoded = partial(encoded_images, read, chosen.image_column, in_chans)
    return Parts(
        source=source,
        chosen=chosen,
        encoded={
            "test": encoded(test, test_rows, test_labels),
            "validation" if fraction else "sample": encoded(train, torch.arange(len(labels)), labels),
        },
        class_names=class_names,
        test_split_origin=test,
        num_images=sum(num_rows),
        shards=Shards(
            source=splits[train],
            image_column=chosen.image_column,
            label_column=label_column,
            num_rows=num_rows,
            num_held_out=num_held_out,
            num_classes=len(class_names),
        ),
    )


def _declared_classes(source: Source[SplitFiles], split: str, column: str) -> datasets.ClassLabel:
    names = source.declared.class_names(column, split)
    classes = source.splits[split].features[column] if names is None else datasets.ClassLabel(names=list(names))
    if not isinstance(classes, datasets.ClassLabel):
        raise ValueError(
            f"--dataset_streaming: column {column!r} is {classes.dtype}, and the classes have to be known before all "
            "examples are read: declare it as class_label with its names in the dataset's README.md "
            "(dataset_info, features), or name a ClassLabel column with --label_column"
        )
    return classes


def hold_out(labels: Tensor, rows: Tensor, flag: str, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The (M,) ``rows`` of a split without a stratified part, and that part; an error names the ``flag``."""
    try:
        kept, held_out = stratified_split(labels[rows], fraction, seed)
    except ValueError as error:
        raise ValueError(f"{flag} {fraction:g}: {error}") from error
    return rows[kept], rows[held_out]


def limit_rows(labels: Tensor, rows: Tensor, limit: int | None, seed: int) -> Tensor:
    """A stratified part of the (M,) ``rows`` of a split, at most ``limit``."""
    return rows if limit is None else rows[stratified_subset(labels[rows], limit, seed)]


def named_labels(labels: Tensor, class_names: Sequence[str], order: Sequence[str] | None) -> Tensor:
    """The (N,) labels as places in a different order of the same class names; unchanged if the names differ."""
    if order is None or not set(class_names) <= set(order):
        return labels
    return torch.tensor([order.index(name) for name in class_names])[labels]
