"""Any image-classification dataset as batches of pixels in [0, 1] and labels; class names; a held-out split."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ham_hf.data.config import TIMM_NEEDS_ORIGINALS, DataConfig
from ham_hf.data.decoding import (
    MODE_OF_CHANNELS,
    EncodedImages,
    EvalTransform,
    PixelTransform,
    common_side,
    content_digest,
    decode_all,
    for_each_image,
    timm_train_transform,
)
from ham_hf.data.image_groups import ImageGroups
from ham_hf.data.pixels import AUGMENTATIONS, BatchRequest, CachedPixels, Images, StreamedPixels
from ham_hf.data.provenance import STREAMED, Fingerprint, Provenance, plain_name
from ham_hf.data.sources import DIGITS
from ham_hf.data.splits import STATISTICS_EXAMPLES, Parts, split_dataset, split_stream
from ham_hf.data.streaming import TrainingStream

if TYPE_CHECKING:
    from ham_hf.models import Preprocessing

logger = logging.getLogger(__name__)

SMALL_IMAGE_SIZE = 96  # up to here: the dataset's own size, no center crop, pad-crop augmentation
CACHE_LIMIT_BYTES = 4 * 2**30  # of one split; above, --cache_images auto streams
FEW_PER_CLASS = 5  # held-out images, on average


@dataclass(frozen=True, kw_only=True)
class TestData:
    """Images ready to evaluate on.

    Attributes:
        name: Hub id, folder or ``digits``, as given.
        config_name: configuration that was opened; as given for local data.
        revision: commit of the Hub dataset if known, else as given.
        test: used once, at the end.
        class_names: C names, in label order.
        image_size: side S of the square images, in pixels.
        in_chans: channels of the images, 1 or 3.
        augmentation: of the training images: none, crop, crop_flip or timm.
        num_skipped: unreadable images of all splits, which are left out.
        test_split_origin: name of the test split, or how it was held out of train.
        provenance: what decides which images these are, to find them again; None for data given in Python.
        notes: images and files of the dataset that are left out, each kind with its number and an example.
        num_test_in_train: test images with the pixels of an image of train or validation; None if unknown, because
            images are not all decoded beforehand.
        groups: of the test images, where a column of groups was named.
    """

    __test__ = False  # no test of pytest

    name: str
    config_name: str | None = None
    revision: str | None = None
    test: Images
    class_names: tuple[str, ...]
    image_size: int
    in_chans: int
    augmentation: str
    num_skipped: int = 0
    test_split_origin: str
    provenance: Provenance | None = None
    notes: tuple[str, ...] = ()
    num_test_in_train: int | None = None
    groups: ImageGroups | None = None


@dataclass(frozen=True, kw_only=True)
class ImageData(TestData):
    """A dataset ready for training and evaluation.

    Attributes:
        train: without the held-out parts; the only part that is augmented. It may be a stream.
        validation: held out of train for selection; None if ``validation_fraction`` is 0.
        crop_pct: of the evaluation geometry, see ``decoding.EvalTransform``.
        interpolation: of the evaluation geometry.
        channel_mean: of at most 2,000 training images in [0, 1], one per channel.
        channel_std: standard deviation of the same pixels, at least one gray level.
        crop_mode: of the evaluation geometry.
        fingerprint: of the whole split that ``train`` is of; None of a stream.
    """

    train: Images | TrainingStream
    validation: Images | None
    crop_pct: float
    interpolation: str
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    crop_mode: str = "center"
    fingerprint: Fingerprint | None = None


def load_image_data(
    config: DataConfig, inputs: Preprocessing, *, seed: int, image_size: int | None = None, order: Sequence[str] = ()
) -> ImageData:
    """Open a dataset, choose splits, columns and classes, and prepare its images.

    The order is: hold a test part out of train if there is no test split, apply the limits, hold the validation part
    out of train, decode, leave out unreadable images. Which part an example is in does not depend on unreadable ones.
    The test part and the limited test set are the same for every ``seed``.

    ``cache_images``: ``ram`` decodes every image once into memory; ``none`` decodes batch by batch in workers;
    ``auto`` caches each split of at most 4 GiB, on the accelerator if it takes at most a quarter of the free memory,
    and decodes train in workers for timm's augmentation, which needs the original pixels.

    Args:
        config: which data, which parts are held out, and how it is read.
        inputs: input of the model. Its ``crop_pct`` holds at its own size and above 96 px; at other sizes up to
            there it is 1.0, which keeps images that are small already whole.
        seed: of the validation part and of the limited training set.
        image_size: side in pixels; None: that of the images if all are equal squares of at most 96 px, else the
            model's own.
        order: class names in the order of another copy of the data, to draw the parts that were drawn from it.

    Raises:
        ValueError: for anything that does not fit; the message names the setting.
        CorruptImageError: (a ValueError) for an unreadable image, unless ``skip_corrupt``.
    """
    check_channels(inputs.in_chans)
    if config.dataset_streaming:
        parts = split_stream(config, inputs.in_chans)
    else:
        parts = split_dataset(config, inputs.in_chans, seed, order)
    geometry = evaluation_geometry(
        inputs, image_size or common_side(parts.encoded.values(), SMALL_IMAGE_SIZE) or inputs.image_size
    )
    # Of a stream, train is never cached.
    cached = "none" if config.dataset_streaming else config.cache_images
    augmentation = choose_augmentation(config.augmentation, cached, config.dataset_name, geometry.image_size)
    images: dict[str, Images] = {}
    digests: dict[str, list[bytes] | None] = {}
    for part, encoded in parts.encoded.items():
        own = augmentation if part == "train" else "none"
        images[part], digests[part], _ = make_ready(encoded, geometry, config, augmentation=own)
    _report_sizes(images, parts)
    # Of a stream, the images that are read already: the held-out part of train, or a sample of it.
    mean, std = channel_statistics(images.get("train") or images.get("validation") or images["sample"], seed)
    return ImageData(
        name=config.dataset_name,
        config_name=parts.source.config_name,
        revision=parts.source.revision,
        train=images["train"] if parts.shards is None else _stream(parts, geometry, config, augmentation),
        validation=images.get("validation"),
        test=images["test"],
        class_names=parts.class_names,
        image_size=geometry.image_size,
        in_chans=inputs.in_chans,
        crop_pct=geometry.crop_pct,
        interpolation=inputs.interpolation,
        channel_mean=mean,
        channel_std=std,
        augmentation=augmentation,
        num_skipped=sum(len(encoded) - len(images[part]) for part, encoded in parts.encoded.items()),
        test_split_origin=parts.test_split_origin,
        crop_mode=inputs.crop_mode,
        fingerprint=parts.fingerprint,
        provenance=_provenance(parts, config, seed),
        notes=parts.source.notes,
        num_test_in_train=_test_images_in_train(digests),
    )


def check_channels(in_chans: int) -> None:
    """Raise ValueError unless images can have this many channels."""
    if in_chans not in MODE_OF_CHANNELS:
        raise ValueError(f"the model takes {in_chans} input channels; images can be given as 1 (gray) or 3 (RGB)")


def evaluation_geometry(inputs: Preprocessing, image_size: int) -> EvalTransform:
    """How images of this size are made; small ones whose size is not the model's own stay whole."""
    small = image_size <= SMALL_IMAGE_SIZE and image_size != inputs.image_size
    return EvalTransform(
        image_size,
        1.0 if small else inputs.crop_pct,
        inputs.interpolation,
        crop_mode=inputs.crop_mode,
        border_color=inputs.mean,
    )


def _stream(parts: Parts, geometry: EvalTransform, config: DataConfig, augmentation: str) -> TrainingStream:
    assert parts.shards is not None  # noqa: S101 (a stream)
    return TrainingStream(
        parts.shards,
        train_transform(geometry, augmentation),
        augmentation=augmentation,
        in_chans=parts.encoded["test"].in_chans,
        buffer_size=config.shuffle_buffer_size,
        num_workers=config.dataloader_num_workers,
        skip_corrupt=config.skip_corrupt,
    )


def _report_sizes(images: Mapping[str, Images], parts: Parts) -> None:
    """Log the numbers of images, and warn of classes without one and of a small held-out part."""
    for part in images:
        if part != "sample":
            warn_of_absent_classes(part, images[part].labels, parts.class_names)
    held_out, num_classes, origin = len(images.get("validation", ())), len(parts.class_names), parts.test_split_origin
    what = "%d images held out of train to select the weights with, %d to test on (%s)"
    logger.info(what, held_out, len(images["test"]), origin)
    if "validation" in images and held_out < FEW_PER_CLASS * num_classes:
        what = (
            "%d held-out images for %d classes tell little about which weights are best: raise --validation_fraction"
        )
        logger.warning(what, held_out, num_classes)


def _provenance(parts: Parts, config: DataConfig, seed: int) -> Provenance:
    revision, known = parts.source.revision or "", parts.fingerprint
    names = ("validation_fraction", "test_fraction", "limit_train_examples", "num_train_examples", "skip_corrupt")
    return Provenance(
        dataset=plain_name(config.dataset_name),
        seed=seed,
        **{name: getattr(config, name) for name in names},
        config_name=parts.source.config_name,
        revision=revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None,
        **parts.chosen._asdict(),
        dataset_streaming=parts.shards is not None,
        num_images=parts.num_images,
        fingerprint=known.labels if known else None,
        fingerprint_missing=None if known else STREAMED,
        image_fingerprint=known.images if known else None,
    )


def choose_augmentation(augmentation: str, cache_images: str, dataset_name: str, image_size: int) -> str:
    """Resolve ``auto``, see `load_image_data`; ValueError for an unknown one, or one that the cache rules out."""
    if augmentation == "auto":
        small = "none" if dataset_name == DIGITS else "crop_flip"
        augmentation = small if image_size <= SMALL_IMAGE_SIZE else "timm"
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"--augmentation {augmentation}: expected auto or one of {', '.join(AUGMENTATIONS)}")
    if augmentation == "timm" and cache_images == "ram":
        raise ValueError(TIMM_NEEDS_ORIGINALS)
    return augmentation


def train_transform(geometry: EvalTransform, augmentation: str) -> PixelTransform:
    """From a training image to (C, S, S) uint8 pixels; random if the augmentation is timm's."""
    if augmentation == "timm":
        return timm_train_transform(geometry.image_size, geometry.interpolation)
    return geometry


def make_ready(
    encoded: EncodedImages, geometry: EvalTransform, config: DataConfig, *, augmentation: str
) -> tuple[Images, list[bytes] | None, Tensor]:
    """The images of a part, a digest of each where all are read here, and the row of the split that each is."""
    cache_images, skip_corrupt = config.cache_images, config.skip_corrupt
    num_bytes = len(encoded) * encoded.in_chans * geometry.image_size**2
    fits = num_bytes <= CACHE_LIMIT_BYTES and augmentation != "timm"
    pixels: CachedPixels | StreamedPixels
    digests: list[bytes] | None = None
    if cache_images == "ram" or (cache_images == "auto" and fits):
        logger.info("decoding %d images of %r into %.0f MiB of memory", len(encoded), encoded.split, num_bytes / 2**20)
        decoded, readable, digests = decode_all(encoded, geometry, skip_corrupt=skip_corrupt)
        pixels = CachedPixels(decoded, move_to_device=cache_images == "auto")
        encoded = encoded.subset(readable)
    else:
        if skip_corrupt:
            logger.info("checking %d images of %r for unreadable ones", len(encoded), encoded.split)
            found: list[bytes] = []  # in any order
            readable = for_each_image(encoded, lambda _, image: found.append(content_digest(image)), skip_corrupt=True)
            encoded, digests = encoded.subset(readable), found
        pixels = StreamedPixels(
            encoded,
            geometry,
            train_transform=train_transform(geometry, augmentation),
            num_workers=config.dataloader_num_workers,
        )
    if not len(encoded):
        raise ValueError(f"split {encoded.split!r} has no readable image, --skip_corrupt left out every one")
    return Images(encoded.labels, pixels, augmentation), digests, encoded.rows


def _test_images_in_train(digests: Mapping[str, list[bytes] | None]) -> int | None:
    """How many test images are training or validation images too; None if not all of them were read."""
    test, train = digests["test"], digests.get("train")
    held_out = digests.get("validation", [])
    if test is None or train is None or held_out is None:
        return None
    seen = {*train, *held_out}
    found = sum(digest in seen for digest in test)
    if found:
        logger.warning(
            "%d of %d test images are training images too, pixel for pixel: numbers on them say nothing "
            "about new images",
            found,
            len(test),
        )
    return found


def warn_of_absent_classes(part: str, labels: Tensor, class_names: tuple[str, ...]) -> None:
    """Warn of classes without an example in a part."""
    if len(labels) <= (len(class_names) if part == "train" else 1):
        return  # An evaluation asked for so few that some classes have to be absent.
    absent = torch.nonzero(torch.bincount(labels, minlength=len(class_names)) == 0).flatten().tolist()
    if absent:
        names = ", ".join(repr(class_names[index]) for index in absent[:5])
        more = ", ..." if len(absent) > 5 else ""
        logger.warning("%d of %d classes have no example in %s: %s", len(absent), len(class_names), part, names + more)


def channel_statistics(images: Images, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the pixels of at most ``STATISTICS_EXAMPLES`` images."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(images), generator=generator)[:STATISTICS_EXAMPLES].sort().values
    requests = [BatchRequest(indices, seed=None) for indices in torch.split(sample, 100)]
    # Per image first: sums of float64 over equally many pixels each.
    moments = [
        torch.stack([batch.x.double().mean((2, 3)), batch.x.double().square().mean((2, 3))])
        for batch in images.batches(requests, device=torch.device("cpu"))
    ]
    mean, mean_square = torch.cat(moments, dim=1).mean(1)
    # At least one gray level: a constant channel must not be divided by zero.
    std = (mean_square - mean**2).clamp(min=255.0**-2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
