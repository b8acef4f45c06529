"""Use datasets that exist in Python, torch's or those of the datasets library, as the data of a run.

Every image is read once and kept as bytes; pixels of float tensors are rounded to multiples of 1/255.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import datasets
import torch
from PIL import Image
from torch import Tensor

from ham_hf.data.columns import choose_image_column, choose_label_column
from ham_hf.data.dataset import (
    SMALL_IMAGE_SIZE,
    ImageData,
    channel_statistics,
    check_channels,
    choose_augmentation,
    evaluation_geometry,
)
from ham_hf.data.declarations import listed
from ham_hf.data.decoding import MODE_OF_CHANNELS, EvalTransform
from ham_hf.data.pixels import CachedPixels, Images
from ham_hf.data.splits import hold_out, limit_rows
from ham_hf.seeding import TEST_SEED

if TYPE_CHECKING:
    from ham_hf.models import Preprocessing

logger = logging.getLogger(__name__)

NAME = "given in Python"
"""Name of such a dataset in reports; no id of a dataset of the Hub."""


class Examples(Protocol):
    """A dataset with a length whose items are (image, label), or rows of the datasets library."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...  # noqa: ANN401 (a pair or a mapping)


def image_data_from(
    train: Examples,
    test: Examples,
    *,
    inputs: Preprocessing,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    augmentation: str = "auto",
    validation_fraction: float = 0.04,
    limits: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
) -> ImageData:
    """Read two datasets into memory as the data of a run.

    Args:
        train: items are (image, label): a PIL image, or a tensor (C, H, W) of uint8 or of floats in [0, 1], and a
            class number; or a ``datasets.Dataset``. Without random augmentation and without normalization: the run
            augments, and the model normalizes.
        test: likewise. Where both have names of their own (``classes`` or ``ClassLabel``), its labels go by name.
        inputs: input of the model, as in `load_image_data`.
        class_names: C names in label order; None takes those of ``train``, or numbers.
        image_size: side S of the square images; None takes that of the first image if it is a square of at most 96 px,
            else the model's own. PIL images are brought to it; tensors must have it.
        augmentation: of training: none, crop, crop_flip, or auto, which is crop_flip.
        validation_fraction: share of train held out for selection, in [0, 1).
        limits: most images of train and of test, chosen as ``limit_train_examples`` and ``limit_test_examples`` do.
        seed: of the held-out part and of the limited train.

    Raises:
        ValueError: for items, pixels, sizes or labels that do not fit; the message names part and index.
    """
    in_chans = inputs.in_chans
    check_channels(in_chans)
    _check({"train": train, "test": test}, augmentation)
    if image_size is None:
        width, height = _picture(next(_pairs(train, "train"))[0], in_chans, "train[0]").size
        image_size = width if width == height <= SMALL_IMAGE_SIZE else inputs.image_size
    geometry = evaluation_geometry(inputs, image_size)
    pixels, labels = _read(train, "train", geometry, in_chans)
    test_pixels, test_labels = _read(test, "test", geometry, in_chans)
    own = _names_of(train)
    test_labels = _by_name(test_labels, _names_of(test), own, class_names)
    names = _class_names(own if class_names is None else class_names, int(max(labels.max(), test_labels.max())) + 1)
    augmentation = (
        "crop_flip" if augmentation == "auto" else choose_augmentation(augmentation, "ram", NAME, image_size)
    )
    kept, held_out = limit_rows(labels, torch.arange(len(labels)), limits[0], seed), None
    tested = limit_rows(test_labels, torch.arange(len(test_labels)), limits[1], TEST_SEED)
    if validation_fraction:
        kept, rows = hold_out(labels, kept, "validation_fraction", validation_fraction, seed)
        held_out = _images(pixels[rows], labels[rows], "none")
    training = _images(pixels[kept], labels[kept], augmentation)
    mean, std = channel_statistics(training, seed)
    return ImageData(
        name=NAME,
        train=training,
        validation=held_out,
        test=_images(test_pixels[tested], test_labels[tested], "none"),
        class_names=names,
        image_size=image_size,
        in_chans=in_chans,
        crop_pct=geometry.crop_pct,
        interpolation=inputs.interpolation,
        channel_mean=mean,
        channel_std=std,
        crop_mode=inputs.crop_mode,
        augmentation=augmentation,
        test_split_origin="given",
    )


def first_image(train: Examples) -> Any:  # noqa: ANN401 (whatever a dataset holds)
    """The first image of a dataset, as it is; ValueError if it is no dataset, or its items are no pairs or rows."""
    _check({"train": train}, "none")
    return next(_pairs(train, "train"))[0]


def _check(given: Mapping[str, Examples], augmentation: str) -> None:
    """Refuse what cannot be read, before the first image is."""
    if augmentation == "timm":
        raise ValueError(
            "augmentation timm needs encoded images: use none, crop or crop_flip for data given in Python"
        )
    for part, examples in given.items():
        if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")) or not len(examples):
            raise ValueError(
                f"{part}: expected a dataset with a length, at least 1, and items (image, label), got "
                f"{type(examples).__name__}"
            )


def _images(pixels: Tensor, labels: Tensor, augmentation: str) -> Images:
    return Images(labels, CachedPixels(pixels, move_to_device=True), augmentation)


def _read(given: Examples, part: str, geometry: EvalTransform, in_chans: int) -> tuple[Tensor, Tensor]:
    """Pixels (N, C, S, S) uint8 and labels (N,) int64 of a dataset."""
    size = geometry.image_size
    pixels, labels = torch.empty(len(given), in_chans, size, size, dtype=torch.uint8), []
    for index, (image, label) in enumerate(_pairs(given, part)):
        where = f"{part}[{index}]"
        picture = _picture(image, in_chans, where)
        if isinstance(image, Tensor) and picture.size != (size, size):
            raise ValueError(
                f"{where}: a tensor of {picture.height}x{picture.width} pixels, expected {size}x{size}; give tensors "
                "of one square size, or PIL images, which are resized"
            )
        pixels[index] = geometry(picture)
        labels.append(_label(label, where))
    return pixels, torch.tensor(labels)


def _pairs(given: Any, part: str) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 (whatever a dataset holds)
    image_key: Any = 0
    label_key: Any = 1
    if isinstance(given, datasets.Dataset):
        image_key = choose_image_column(given.features, None)
        label_key = choose_label_column(given.features, None)
    for index in range(len(given)):
        example = given[index]
        usable = isinstance(example, Mapping) if isinstance(image_key, str) else isinstance(example, (tuple, list))
        if not usable or len(example) < 2:
            raise ValueError(f"{part}[{index}]: expected (image, label), got {type(example).__name__}")
        yield example[image_key], example[label_key]


def _picture(image: Any, in_chans: int, where: str) -> Image.Image:  # noqa: ANN401 (checked here)
    mode = MODE_OF_CHANNELS[in_chans]
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(f"{where}: pixels of mode {image.mode} have no defined range; give 8-bit pixels")
        return image.convert(mode)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != in_chans:
        got = f"a tensor {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{where}: expected a PIL image or a tensor ({in_chans}, H, W), got {got}")
    if image.is_floating_point():
        low, high = (float(end) for end in image.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{where}: pixels must lie in [0, 1], got values from {low:g} to {high:g}; leave normalization to the "
                "model"
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"{where}: expected pixels of uint8 or floats in [0, 1], got {image.dtype}")
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if in_chans == 1 else array)


def _label(label: Any, where: str) -> int:  # noqa: ANN401 (checked here)
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():
        label = int(label)
    if isinstance(label, bool) or not hasattr(label, "__index__") or int(label) < 0:
        raise ValueError(f"{where}: expected a class number of at least 0 as label, got {label!r}")
    return int(label)


def _names_of(given: Any) -> list[str] | None:  # noqa: ANN401 (any dataset)
    """Names of a dataset's classes in label order, if it has any."""
    names = getattr(given, "classes", None)
    if names is None and isinstance(given, datasets.Dataset):
        names = getattr(given.features[choose_label_column(given.features, None)], "names", None)
    return list(map(str, names)) if isinstance(names, Iterable) and not isinstance(names, str) else None


def _by_name(
    labels: Tensor, names: Sequence[str] | None, own: Sequence[str] | None, given: Sequence[str] | None
) -> Tensor:
    """The (N,) labels of test, which index ``names``, as indices of the same names of train.

    Those are its ``own``, or the ``given`` ones where it shares none with test.
    """
    if not own or not names or own == names:
        return labels
    names = _class_names(names, int(labels.max()) + 1)
    wanted = own if given is None or set(own) & set(names) else [*map(str, given)]
    new = [names[label] for label in torch.unique(labels).tolist() if names[label] not in wanted]
    if new:
        raise ValueError(
            f"train has the classes {listed(wanted)}, and test {listed(names)}: {listed(new)} is in test only; give "
            "both the same names"
        )
    return torch.tensor([wanted.index(name) if name in wanted else -1 for name in names])[labels]


def _class_names(names: Sequence[str] | None, least: int) -> tuple[str, ...]:
    """Names of the classes, or numbers; ``least`` is one more than the largest label."""
    if names is None:
        return tuple(map(str, range(least)))
    if len(names) < least:
        raise ValueError(f"there are {len(names)} class names, but a label of {least - 1}; give one name per class")
    return tuple(map(str, names))
