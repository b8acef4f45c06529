"""What a finished model is evaluated on: one split, whole, unless the model was trained on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import datasets
import torch
from torch import Tensor

from ham_hf.data.columns import (
    TEST_SPLITS,
    choose_group_column,
    choose_image_column,
    choose_label_column,
    choose_splits,
    read_labels,
)
from ham_hf.data.config import DataConfig
from ham_hf.data.declarations import Declarations, FileClasses
from ham_hf.data.decoding import EncodedImages
from ham_hf.data.image_groups import ImageGroups, read_groups
from ham_hf.data.provenance import Fingerprint, Provenance, fingerprint_of, plain_name
from ham_hf.data.shards import read_whole
from ham_hf.data.sources import is_local, open_source, open_streamed_source
from ham_hf.data.splits import (
    TEST_SEED,
    encoded_images,
    limit_rows,
    named_labels,
    split_files,
    stored_labels,
    stratified_split,
    streamed_labels,
)

logger = logging.getLogger(__name__)

DEFAULT_TEST_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """What is known of a model's training data.

    Attributes:
        record: as its ``config.json`` has it; None if it was written by an earlier version or by something else.
        dataset: name of the dataset, if that alone is known.
        test_fraction: share of it that was held out to test on, if that is known.
        class_names: the model's, in the order of its logits; None if it does not name them.
    """

    record: Provenance | None = None
    dataset: str | None = None
    test_fraction: float | None = None
    class_names: tuple[str, ...] | None = None


class _Opened(NamedTuple):
    """A split of a dataset with its labels."""

    splits: datasets.DatasetDict
    split: str
    train_split: str | None
    labels: Tensor
    class_names: tuple[str, ...]
    image_column: str
    config_name: str | None
    revision: str | None
    notes: tuple[str, ...]
    group_files: list[tuple[FileClasses, tuple[str, ...]]]


@dataclass(frozen=True, kw_only=True)
class EvaluationPart:
    """The images to evaluate on, not decoded.

    Attributes:
        encoded: the images.
        class_names: names of the classes that their labels count.
        origin: name of the split, or how the images were held out of it.
        config_name: configuration that was opened.
        revision: commit of a Hub dataset if known, else as given.
        notes: what of the dataset is not read.
        groups: of the images, where a column of groups was named.
    """

    encoded: EncodedImages
    class_names: tuple[str, ...]
    origin: str
    config_name: str | None
    revision: str | None
    notes: tuple[str, ...]
    groups: ImageGroups | None = None


def evaluation_part(
    config: DataConfig, in_chans: int, trained: TrainedOn, group_column: str | None = None
) -> EvaluationPart:
    """The named split, else the only one, else the test split by the rule of `ham_hf.data.columns.choose_splits`.

    It is taken whole, unless the model was trained on it: then the images are those that were held out to test on, as
    recorded. A copy of the training data under another name is recognized by its fingerprint.

    Args:
        config: says which data. ``test_fraction`` is held out of a split that is for training by its name; of a
            stream, the split is read into the cache.
        in_chans: channels to decode to, 1 or 3.
        trained: what is known of the model.
        group_column: column of groups to evaluate beside the classes; None for none.

    Raises:
        ValueError: for anything that does not fit, or where every image of the split was for training.
    """
    opened = (_open_streamed if config.dataset_streaming else _open)(config, group_column)
    images_at = partial(encoded_images, opened.splits, opened.image_column, in_chans, opened.split)
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
        origin = f"held out of {opened.split} ({100 * fraction:g} %, stratified, seed {TEST_SEED})"
    rows = limit_rows(opened.labels, rows, "--limit_test_examples", config.limit_test_examples, TEST_SEED)
    groups = None
    if group_column is not None:
        groups = read_groups(opened.splits[opened.split], group_column, rows, opened.group_files)
    return EvaluationPart(
        encoded=images_at(rows, opened.labels),
        groups=groups,
        class_names=opened.class_names,
        origin=origin,
        config_name=opened.config_name,
        revision=opened.revision,
        notes=opened.notes,
    )


def choose_evaluation_split(
    names: Sequence[str],
    train_split: str | None,
    test_split: str | None,
    has_labels: Callable[[str], bool] = lambda split: True,
) -> tuple[str, str | None]:
    """The split to evaluate on, and the training split beside it (the same one if there is no other), if any.

    Raises:
        ValueError: if a named split does not exist, or there are several and none is for testing.
    """
    if test_split is not None and test_split not in names:
        choose_splits(names, names[0], test_split)  # says so
    if test_split is None and len(names) == 1 and train_split in (None, names[0]):
        return names[0], None
    train = train_split if train_split is not None else ("train" if "train" in names else None)
    if test_split is not None and train in (None, test_split):
        return test_split, None
    if train is None:
        # Evaluation sets such as ImageNet-A have no training split.
        found = [name for name in TEST_SPLITS if name in names]
        found = [name for name in found if has_labels(name)] or found
        if not found:
            listed = ", ".join(map(repr, names))
            raise ValueError(f"none of the splits {listed} is for testing by its name: choose one with --test_split")
        return found[0], None
    train, test = choose_splits(names, train, test_split, has_labels)
    return (train, train) if test is None else (test, train)


def _open(config: DataConfig, group_column: str | None) -> _Opened:
    source = open_source(config.dataset_name, config.dataset_config_name, config.dataset_revision)

    has_labels = stored_labels(source, config.label_column)
    split, train = choose_evaluation_split(list(source.splits), config.train_split, config.test_split, has_labels)
    features = source.splits[train or split].features
    column = choose_label_column(features, config.label_column)
    if train is not None and train != split:
        # Labels that declare no names are numbered by those that train has.
        _, labels, names = read_labels(source.splits, column, train, split, source.declared)
        assert labels is not None  # noqa: S101 (a split was named)
    else:
        labels, _, names = read_labels(source.splits, column, split, None, source.declared)
    return _Opened(
        splits=source.splits,
        split=split,
        train_split=train,
        labels=labels,
        class_names=names,
        image_column=choose_image_column(features, config.image_column),
        config_name=source.config_name,
        revision=source.revision,
        notes=source.notes,
        group_files=_group_files(group_column, source.declared, split),
    )


def _open_streamed(config: DataConfig, group_column: str | None) -> _Opened:
    source = open_streamed_source(config.dataset_name, config.dataset_config_name, config.dataset_revision)

    files = split_files(source)
    has_labels = streamed_labels(files, config.label_column)
    split, train = choose_evaluation_split(list(source.splits), config.train_split, config.test_split, has_labels)
    features = source.splits[train or split].features
    images = choose_image_column(features, config.image_column)
    column = choose_label_column(features, config.label_column)
    logger.info("reading all of split %r", split)
    kept = datasets.Features({images: datasets.Image(), column: features[column]})
    if group_column is not None:
        kept[group_column] = features[choose_group_column(features, group_column)]
    # As they are in the files: every file's declaration is applied when labels are read.
    if train == split:
        raise ValueError(
            f"--dataset_streaming: none of the splits {', '.join(map(repr, source.splits))} is for testing by its "
            "name, and a part is not held out of a stream: choose one with --test_split, or leave "
            "--dataset_streaming out"
        )
    whole = datasets.DatasetDict({split: read_whole(files[split], kept)})
    labels, _, names = read_labels(whole, column, split, None, _alone(source.declared, split))
    # As for a stored dataset, classes are those that train declares, where it does.
    of_train = source.declared.class_names(column, train or split)
    if of_train is not None and set(names) <= set(of_train):
        labels, names = named_labels(labels, names, of_train), of_train
    return _Opened(
        splits=whole,
        split=split,
        train_split=train,
        labels=labels,
        class_names=names,
        image_column=images,
        config_name=source.config_name,
        revision=source.revision,
        notes=(),
        group_files=_group_files(group_column, source.declared, split),
    )


def _group_files(column: str | None, declared: Declarations, split: str) -> list[tuple[FileClasses, tuple[str, ...]]]:
    """Files of a split with the names that their groups count; empty without groups or where no file declares any."""
    return [] if column is None else _alone(declared, split).row_names(column, split, split)


def _alone(declared: Declarations, split: str) -> Declarations:
    """Declarations of a split alone, beside README.md's."""
    return Declarations(readme=declared.readme, files={split: declared.files.get(split, ())})


def _was_trained_on(
    config: DataConfig, opened: _Opened, trained: TrainedOn, fingerprint: Callable[[], Fingerprint]
) -> bool:
    """Whether the model was trained on the split: by its fingerprint, else by name where there is none to compare."""
    record = trained.record
    if record is None:
        named_for_training = opened.split == "train" or len(opened.splits) == 1
        return trained.dataset == plain_name(config.dataset_name) and (
            opened.train_split == opened.split or (opened.train_split is None and named_for_training)
        )
    if record.is_of(fingerprint()):
        return True
    same_name = record.dataset == plain_name(config.dataset_name) and record.train_split == opened.split
    same_configuration = (record.config_name or "default") == (opened.config_name or "default")
    on_hub = not is_local(config.dataset_name, config.dataset_config_name, config.dataset_revision)
    # Another revision of a dataset of the Hub has most images in common.
    return same_name and same_configuration and (on_hub or record.fingerprint is None)


def _recorded_fraction(config: DataConfig, opened: _Opened, trained: TrainedOn) -> float:
    """Share of the split that was held out to test on when the model was trained.

    Raises:
        ValueError: if none was, or another share is asked for.
    """
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
    if asked not in (known, DEFAULT_TEST_FRACTION):
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
