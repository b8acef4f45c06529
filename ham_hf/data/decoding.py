"""Turn encoded images into uint8 pixels: decoding, channels, geometry.

Training sees the pixels that users of the published model get from timm: ``Image.open(f).convert("RGB")`` (or
``"L"``) and timm's evaluation transform; so the alpha channel is dropped, not composited. Two corrections: EXIF
orientation is applied, as ``datasets`` does, and 16-bit gray is scaled to 8 bits, where Pillow would clip it to white.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data.transforms_factory import create_transform
from torch import Tensor

logger = logging.getLogger(__name__)

DECODE_CHUNK = 256
MODE_OF_CHANNELS = {1: "L", 3: "RGB"}
PixelTransform = Callable[[Image.Image], Tensor]


class CorruptImageError(ValueError):
    """An image of the dataset cannot be read; the message names split, row and reason."""


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Encoded images of one part of a dataset, with their labels.

    Attributes:
        images: a dataset with one column, ``image``, which yields ``{"bytes": ..., "path": ...}``.
        split: name of the split, for messages.
        rows: (N,) int64, the row of the dataset that each position stands for.
        labels: (N,) int64 classes.
        in_chans: channels to decode to, 1 or 3.
    """

    images: datasets.Dataset
    split: str
    rows: Tensor
    labels: Tensor
    in_chans: int

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, positions: Tensor) -> list[Mapping[str, Any] | None]:
        """Encoded images at the given (B,) positions."""
        encoded: list[Mapping[str, Any] | None] = self.images[self.rows[positions].tolist()]["image"]
        return encoded

    def decode(self, position: int, encoded: Mapping[str, Any] | None) -> Image.Image:
        """Decode what ``read`` gave for ``position`` to a PIL image of mode L or RGB, or raise CorruptImageError."""
        return decode_or_explain(encoded, self.in_chans, where=f"split {self.split!r}, row {int(self.rows[position])}")

    def subset(self, keep: Tensor) -> EncodedImages:
        """The images where the (N,) bool ``keep`` is True."""
        return replace(self, rows=self.rows[keep], labels=self.labels[keep])


def _opened(encoded: Mapping[str, Any] | None) -> Image.Image:
    """Open an encoded image (header only) from its bytes or its file."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError("the image is missing")
    return Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))


def _decoded(encoded: Mapping[str, Any] | None, in_chans: int) -> Image.Image:
    """An image of mode L (``in_chans`` 1) or RGB (3), upright; Pillow raises nearly anything on damaged data."""
    with _opened(encoded) as image:
        image.load()
        file_format, upright = image.format, image
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            upright = ImageOps.exif_transpose(image)
        # Pillow opens a 16-bit PGM, older ones a 16-bit PNG too, as 32-bit integers.
        if upright.mode.startswith("I;16") or (upright.mode == "I" and file_format in ("PNG", "PPM")):
            deep = np.asarray(upright).astype(np.uint32)
            upright = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
        elif upright.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {upright.mode} have no defined range; store 8- or 16-bit pixels")
        converted: Image.Image = upright.convert(MODE_OF_CHANNELS[in_chans])
    return converted


def decode_or_explain(encoded: Mapping[str, Any] | None, in_chans: int, *, where: str) -> Image.Image:
    """Decode to mode L (``in_chans`` 1) or RGB (3), upright, or raise CorruptImageError naming ``where`` it is."""
    try:
        return _decoded(encoded, in_chans)
    except Exception as error:
        file = f", {encoded['path']}" if encoded and encoded["path"] else ""
        raise CorruptImageError(
            f"{where}{file}: the image cannot be read ({type(error).__name__}: {error}); repair it, or leave such "
            "images out with --skip_corrupt"
        ) from error


class EvalTransform:
    """Evaluation geometry of timm: PIL image to uint8 (C, S, S), pixel for pixel as timm makes it.

    An image of that size stays exactly as it is if ``crop_pct`` is 1. A class, not a closure: worker processes that do
    not fork get it by pickle. Arguments are as in `ham_hf.models.Preprocessing`, S is ``image_size``. Above a
    ``crop_pct`` of 1, timm pads the smaller image: with black, or with ``border_color`` (in [0, 1]) for ``border``.
    """

    def __init__(
        self,
        image_size: int,
        crop_pct: float,
        interpolation: str,
        *,
        crop_mode: str = "center",
        border_color: Sequence[float] = (),
    ) -> None:
        self.image_size, self.interpolation, self.crop_pct = image_size, interpolation, crop_pct
        self._transform: PixelTransform = create_transform(
            image_size,
            is_training=False,
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            mean=tuple(border_color),
            normalize=False,
        )
        keeps_size = math.floor(image_size / crop_pct) == image_size
        self._unchanged_size = (image_size, image_size) if keeps_size else None

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one image of mode L or RGB."""
        if image.size != self._unchanged_size:
            return self._transform(image)
        width, height = image.size
        return torch.from_numpy(np.array(image).reshape(height, width, -1)).permute(2, 0, 1)


def timm_train_transform(image_size: int, interpolation: str) -> PixelTransform:
    """Training transform of timm's defaults (random resized crop, flip, color jitter): PIL to uint8 (C, S, S)."""
    transform: PixelTransform = create_transform(
        image_size, is_training=True, interpolation=interpolation, normalize=False
    )
    return transform


def common_side(parts: Iterable[EncodedImages], most: int) -> int | None:
    """Side if all readable images are squares of one size, at most ``most`` pixels, else None. Reads headers only."""
    sides: set[int] = set()
    for images, chunk in ((part, chunk) for part in parts for chunk in _chunks(len(part))):
        for encoded in images.read(chunk):
            try:
                with _opened(encoded) as image:
                    width, height = image.size
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue  # Decoding reports it, with its row.
            sides.add(width)
            if len(sides) > 1 or not width == height <= most:
                return None
    return sides.pop() if sides else None


def for_each_image(images: EncodedImages, visit: Callable[[int, Image.Image], None], *, skip_corrupt: bool) -> Tensor:
    """Decode every image once, on threads, and hand it to ``visit(position, image)``.

    Returns:
        (N,) bool, False where an image could not be read; all True unless ``skip_corrupt``.

    Raises:
        CorruptImageError: for the first unreadable image, unless ``skip_corrupt``.
    """
    readable = torch.ones(len(images), dtype=torch.bool)

    def visit_chunk(chunk: Tensor) -> None:
        for position, encoded in zip(chunk.tolist(), images.read(chunk), strict=True):
            try:
                visit(position, images.decode(position, encoded))
            except CorruptImageError as error:  # noqa: PERF203 (each image on its own)
                if not skip_corrupt:
                    raise
                logger.warning("left out: %s", error)
                readable[position] = False

    chunks = _chunks(len(images))
    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(visit_chunk, chunks):
            pass
    return readable


def content_digest(image: Image.Image) -> bytes:
    """16 bytes that tell images of other mode, size or pixels apart."""
    start = f"{image.mode} {image.size}".encode()
    return hashlib.blake2b(start + image.tobytes(), digest_size=16).digest()


def decode_all(
    images: EncodedImages, geometry: EvalTransform, *, skip_corrupt: bool
) -> tuple[Tensor, Tensor, list[bytes]]:
    """Decode all images into one tensor.

    Returns:
        (M, C, S, S) uint8 pixels of the readable images, the (N,) bool of ``for_each_image``, and `content_digest` of
        the M images at their own size.
    """
    pixels = torch.empty((len(images), images.in_chans, *[geometry.image_size] * 2), dtype=torch.uint8)
    digests = [b""] * len(images)

    def store(position: int, image: Image.Image) -> None:
        pixels[position] = geometry(image)
        digests[position] = content_digest(image)

    readable = for_each_image(images, store, skip_corrupt=skip_corrupt)
    found = [digest for digest in digests if digest]
    return (pixels if bool(readable.all()) else pixels[readable]), readable, found


def _chunks(num_images: int) -> list[Tensor]:
    return [torch.arange(start, min(start + DECODE_CHUNK, num_images)) for start in range(0, num_images, DECODE_CHUNK)]
