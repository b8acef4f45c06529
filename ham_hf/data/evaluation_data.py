"""Choose the images to evaluate a finished model on: one whole split, unless the model was trained on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import datasets
import torch
from torch import Tensor

from ham_hf.data.columns import (
    categories,
    choose_image_column,
    choose_label_column,
    choose_splits,
    encoded_images,
    find_test_split,
    labeled,
    read_labels,
)
from ham_hf.data.config import DataConfig
from ham_hf.data.dataset import TestData, check_channels, evaluation_geometry, make_ready, warn_of_absent_classes
from ham_hf.data.declarations import Declarations
from ham_hf.data.decoding import EncodedImages
from ham_hf.data.image_groups import read_groups
from ham_hf.data.provenance import Fingerprint, Provenance, fingerprint_of, plain_name
from ham_hf.data.shards import SplitFiles, read_whole
from ham_hf.data.sources import Source, is_local, open_source, open_streamed_source
from ham_hf.data.splits import held_out_origin, limit_rows, named_labels, stratified_split
from ham_hf.seeding import TEST_SEED

if TYPE_CHECKING:
    from ham_hf.models import Preprocessing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """Known facts about a model's training data.

    Attributes:
        record: as its ``config.json`` has it; None if it has none.
        dataset: name of the dataset, if that alone is known.
        test_fraction: share of it that was held out to test on, if that is known.
        class_names: the model's, in the order of its logits; None if it does not name them.
    """

    record: Provenance | None = None
    dataset: str | None = None
    test_fraction: float | None = None
    class_names: tuple[str, ...] | None = None


class _Opened(NamedTuple):
    """A split of a dataset with its labels; ``rows`` holds it, and of a stored dataset every split."""

    source: Source[datasets.Dataset] | Source[SplitFiles]
    rows: Mapping[str, datasets.Dataset]
    split: str
    train_split: str | None
    labels: Tensor
    class_names: tuple[str, ...]
    image_column: str


def load_test_data(
    config: DataConfig, inputs: Preprocessing, trained: TrainedOn, *, group_column: str | None = None
) -> TestData:
    """Open the images to evaluate a finished model on.

    These are the named split, else the only one, else the test split by the rule of `choose_splits`. Of a split that
    the model was trained on, also of a copy under another name (by its fingerprint), only the recorded test part is
    used. ``config.test_fraction`` is held out of a split that is for training by its name. A stream is read into the
    cache. ``group_column`` names the column of groups to evaluate beside the classes, if there is one.

    Raises:
        ValueError: for anything that does not fit, or if the model was trained on every image of the split; the
            message names the setting.
        CorruptImageError: (a ValueError) for an unreadable image, unless ``skip_corrupt``.
    """
    check_channels(inputs.in_chans)
    opened = _open(config, group_column)
    encoded, origin = _choose_images(config, inputs.in_chans, opened, trained)
    groups = None
    if group_column is not None:
        declared = _alone(opened.source.declared, opened.split)
        of_files = declared.row_names(group_column, opened.split, opened.split)
        groups = read_groups(opened.rows[opened.split], group_column, encoded.rows, of_files)
    geometry = evaluation_geometry(inputs, inputs.image_size)
    images, _, rows = make_ready(encoded, geometry, config, augmentation="none")
    warn_of_absent_classes("test", images.labels, opened.class_names)
    logger.info("%d images to test on (%s)", len(images), origin)
    return TestData(
        name=config.dataset_name,
        config_name=opened.source.config_name,
        revision=opened.source.revision,
        test=images,
        class_names=opened.class_names,
        image_size=geometry.image_size,
        in_chans=inputs.in_chans,
        augmentation="none",
        num_skipped=len(encoded) - len(images),
        test_split_origin=origin,
        notes=opened.source.notes,
        groups=groups and groups.only(torch.isin(encoded.rows, rows)),
    )


def _choose_images(
    config: DataConfig, in_chans: int, opened: _Opened, trained: TrainedOn
) -> tuple[EncodedImages, str]:
    """The images to evaluate on, not decoded; and their split, or how they were held out of it."""
    images_at = partial(encoded_images, opened.rows, opened.image_column, in_chans, opened.split)
    rows, origin = torch.arange(len(opened.labels)), opened.split
    fraction = None
    if _was_trained_on(
        config, opened, trained, lambda: fingerprint_of(images_at(rows, opened.labels), opened.class_names)
    ):
        fraction = _recorded_fraction(config, opened, trained)
    elif opened.train_split == opened.split:
        fraction = config.test_fraction
    if fraction is not None:
        labels = named_labels(opened.labels, opened.class_names, trained.class_names)
        _, rows = stratified_split(labels, fraction, TEST_SEED)
        origin = held_out_origin(opened.split, fraction)
    rows = limit_rows(opened.labels, rows, config.limit_test_examples, TEST_SEED)
    return images_at(rows, opened.labels), origin


def choose_evaluation_split(
    names: Sequence[str],
    train_split: str | None,
    test_split: str | None,
    has_labels: Callable[[str], bool] = lambda split: True,
) -> tuple[str, str | None]:
    """The split to evaluate on, and the training split beside it (the same one if there is no other), if any.

    ValueError if a named split does not exist, or there are several and none is for testing.
    """
    if test_split is not None and test_split not in names:
        choose_splits(names, names[0], test_split)  # raises
    if test_split is None and len(names) == 1 and train_split in (None, names[0]):
        return names[0], None
    train = train_split if train_split is not None else ("train" if "train" in names else None)
    if test_split is not None and train in (None, test_split):
        return test_split, None
    if train is None:
        # Evaluation sets such as ImageNet-A have no training split.
        found = find_test_split(names, has_labels)
        if found is None:
            listed = ", ".join(map(repr, names))
            raise ValueError(f"none of the splits {listed} is for testing by its name: choose one with --test_split")
        return found, None
    train, test = choose_splits(names, train, test_split, has_labels)
    return (train, train) if test is None else (test, train)


def _open(config: DataConfig, group_column: str | None) -> _Opened:
    open_any = open_streamed_source if config.dataset_streaming else open_source
    source = open_any(config)
    has_labels = labeled(source.splits, config.label_column)
    split, train = choose_evaluation_split(list(source.splits), config.train_split, config.test_split, has_labels)
    features = source.splits[train or split].features
    images = choose_image_column(features, config.image_column)
    column = choose_label_column(features, config.label_column)
    rows, declared, files = source.splits, source.declared, source.splits[split]
    if isinstance(files, SplitFiles):
        if train == split:
            raise ValueError(
                f"--dataset_streaming: none of the splits {', '.join(map(repr, source.splits))} is for testing by its "
                "name, and a part is not held out of a stream: choose one with --test_split, or leave "
                "--dataset_streaming out"
            )
        logger.info("reading all of split %r", split)
        # As it is in the files: read_labels and read_groups apply every file's declaration.
        kept = datasets.Features({images: datasets.Image(), column: features[column]})
        if group_column is not None:
            kept[group_column] = features[categories("--group_column", group_column, features)]
        rows, declared = {split: read_whole(files, kept)}, _alone(declared, split)
    if train is not None and train != split and train in rows:
        # Labels that declare no names are numbered by those that train has.
        _, labels, names = read_labels(rows, column, train, split, declared)
        assert labels is not None  # noqa: S101 (a split was named)
    else:
        labels, _, names = read_labels(rows, column, split, None, declared)
        # Of a stream, train is not read, and classes are those that it declares.
        of_train = source.declared.class_names(column, train or split)
        if of_train is not None and set(names) <= set(of_train):
            labels, names = named_labels(labels, names, of_train), of_train
    return _Opened(
        source=source, rows=rows, split=split, train_split=train, labels=labels, class_names=names, image_column=images
    )


def _alone(declared: Declarations, split: str) -> Declarations:
    """Declarations of a split alone, beside README.md's."""
    return Declarations(readme=declared.readme, files={split: declared.files.get(split, ())})


def _was_trained_on(
    config: DataConfig, opened: _Opened, trained: TrainedOn, fingerprint: Callable[[], Fingerprint]
) -> bool:
    """Whether the model was trained on the split: by its fingerprint, else by name where there is none to compare."""
    record = trained.record
    if record is None:
        named_for_training = opened.split == "train" or len(opened.rows) == 1
        return trained.dataset == plain_name(config.dataset_name) and (
            opened.train_split == opened.split or (opened.train_split is None and named_for_training)
        )
    if record.is_of(fingerprint()):
        return True
    same_name = record.dataset == plain_name(config.dataset_name) and record.train_split == opened.split
    same_configuration = (record.config_name or "default") == (opened.source.config_name or "default")
    # Another revision of a dataset of the Hub has most images in common.
    return same_name and same_configuration and (not is_local(config.dataset_name) or record.fingerprint is None)


def _recorded_fraction(config: DataConfig, opened: _Opened, trained: TrainedOn) -> float:
    """Share of the split that training held out to test on; ValueError if none, or not the share asked for."""
    record, asked = trained.record, config.test_fraction
    if record is not None and record.test_split is not None:
        raise ValueError(
            f"--dataset_name {config.dataset_name}: split {opened.split!r} holds the {record.num_images} images of "
            f"{record.dataset} that the model was trained on (by its config.json), so accuracy on them says nothing; "
            f"it was tested on split {record.test_split!r}: choose that or another with --test_split, or another "
            "dataset"
        )
    known = record.test_fraction if record is not None else trained.test_fraction
    if known is None:
        return asked
    if asked not in (known, DataConfig.test_fraction):
        raise ValueError(
            f"--test_fraction {asked} would test on images that the model was trained on; "
            f"it was trained with --test_fraction {known}"
        )
    if record is not None and record.dataset != plain_name(config.dataset_name):
        logger.warning(
            "split %r of %s is %s, which the model was trained on: evaluating on the part held out of training",
            opened.split,
            plain_name(config.dataset_name),
            record.dataset,
        )
    return known
