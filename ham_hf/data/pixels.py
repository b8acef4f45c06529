"""Batches of pixels in [0, 1] and labels, from a cache in memory or streamed by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ham_hf.data.augment import PixelTransform, augment_batch, isolated_rng, seed_for_example
from ham_hf.data.decoding import CorruptImageError, EncodedImages
from ham_hf.data.workers import shield_worker, start_method


class BatchRequest(NamedTuple):
    """Which examples make a batch.

    Attributes:
        indices: (B,) int64 on the CPU, positions in the split.
        seed: of the augmentation, >= 0; None: no augmentation.
    """

    indices: Tensor
    seed: int | None


class PixelBatch(NamedTuple):
    """A batch of images.

    Attributes:
        x: (B, C, S, S) float32 in [0, 1], contiguous, on the device asked for.
        y: (B,) int64 classes, on the device asked for.
        indices: (B,) int64 on the CPU, positions in the split.
    """

    x: Tensor
    y: Tensor
    indices: Tensor


class PixelStore(Protocol):
    """Where the pixels of a split come from."""

    def read(self, requests: Sequence[BatchRequest], device: torch.device) -> Iterator[Tensor]:
        """One (B, C, S, S) uint8 tensor on ``device`` per request, in order."""


class CachedPixels:
    """Pixels of a whole split in one tensor.

    Args:
        pixels: (N, C, S, S) uint8 on the CPU.
        move_to_device: keep them on the accelerator from the first read on, if they need no more than a quarter
            of its free memory.
    """

    def __init__(self, pixels: Tensor, *, move_to_device: bool) -> None:
        self._pixels = pixels
        self._move_to_device = move_to_device

    def read(self, requests: Sequence[BatchRequest], device: torch.device) -> Iterator[Tensor]:
        """See ``PixelStore``."""
        if self._move_to_device and self._pixels.device != device and self._fits(device):
            self._pixels = self._pixels.to(device)
        for request in requests:
            batch = self._pixels[request.indices.to(self._pixels.device)]
            if can_pin(device) and batch.device.type == "cpu":
                batch = batch.pin_memory()
            yield batch.to(device, non_blocking=True)

    def _fits(self, device: torch.device) -> bool:
        module = torch.get_device_module(device)
        if device.type == "cpu" or not hasattr(module, "mem_get_info"):
            return False
        free_bytes, _ = module.mem_get_info(device)
        return bool(self._pixels.nbytes * 4 <= free_bytes)


class StreamedPixels:
    """Pixels decoded batch by batch in worker processes.

    Args:
        images: what to decode.
        transform: for requests without a seed.
        train_transform: random transform for requests with a seed; None: ``transform`` for these too.
        num_workers: processes; 0 decodes in the calling one.
    """

    def __init__(
        self,
        images: EncodedImages,
        transform: PixelTransform,
        *,
        train_transform: PixelTransform | None,
        num_workers: int,
    ) -> None:
        self._images = images
        self._transform = transform
        self._train_transform = train_transform
        self._num_workers = num_workers

    def load(self, request: BatchRequest) -> Tensor:
        """(B, C, S, S) uint8 on the CPU; depends on the request alone.

        Raises:
            CorruptImageError: if an image cannot be read.
        """
        pixels = []
        positions = request.indices.tolist()
        with isolated_rng():
            for position, encoded in zip(positions, self._images.read(request.indices), strict=True):
                image = self._images.decode(position, encoded)
                if request.seed is None or self._train_transform is None:
                    pixels.append(self._transform(image))
                else:
                    pixels.append(transform_example(self._train_transform, image, request.seed, position))
        return torch.stack(pixels)

    def read(self, requests: Sequence[BatchRequest], device: torch.device) -> Iterator[Tensor]:
        """See ``PixelStore``."""
        num_workers = min(self._num_workers, len(requests))
        loader = DataLoader(
            _Requests(self, requests),
            batch_size=None,
            num_workers=num_workers,
            multiprocessing_context=start_method(num_workers),
            pin_memory=can_pin(device),
            # Its own generator: by default a loader draws from, and so advances, torch's global one.
            generator=torch.Generator(),
            worker_init_fn=shield_worker,
        )
        for batch in loader:
            if isinstance(batch, CorruptImageError):
                raise batch
            yield batch.to(device, non_blocking=True)


class Images:
    """The images and labels of one split.

    Attributes:
        labels: (N,) int64 classes, on the CPU.
    """

    def __init__(self, labels: Tensor, pixels: PixelStore, augmentation: str) -> None:
        self.labels = labels
        self._pixels = pixels
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def relabeled(self, labels: Tensor) -> Images:
        """The same images with other labels (N,)."""
        return Images(labels, self._pixels, self._augmentation)

    def batches(self, requests: Sequence[BatchRequest], *, device: torch.device) -> Iterator[PixelBatch]:
        """Yield one batch per request, in order; augmented if the request has a seed.

        A batch depends on its request alone, bit for bit: not on the batches before it, the number of workers, the
        device, or whether the images are cached. A run resumes by asking for the rest of its requests.

        Raises:
            CorruptImageError: if an image cannot be read (streamed images only; cached ones were read at the start).
        """
        for request, pixels in zip(requests, self._pixels.read(requests, device), strict=True):
            if request.seed is not None:
                pixels = augment_batch(pixels, self._augmentation, request.seed)
            labels = self.labels[request.indices].to(device, non_blocking=True)
            yield PixelBatch(x=to_unit_interval(pixels), y=labels, indices=request.indices)


class _Requests(Dataset[Tensor | CorruptImageError]):
    """Requests by number, for a DataLoader. Errors travel as values, to keep their message free of tracebacks."""

    def __init__(self, pixels: StreamedPixels, requests: Sequence[BatchRequest]) -> None:
        self._pixels = pixels
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, number: int) -> Tensor | CorruptImageError:
        try:
            return self._pixels.load(self._requests[number])
        except CorruptImageError as error:
            return error


def transform_example(transform: PixelTransform, image: Image.Image, seed: int, index: int) -> Tensor:
    """(C, S, S) uint8 of a random transform, which depends on (seed of the batch, example) alone.

    Call it inside `isolated_rng`.
    """
    seed_for_example(seed, index)
    return transform(image)


def can_pin(device: torch.device) -> bool:
    """Whether batches for ``device`` go through page-locked memory."""
    return device.type not in ("cpu", "mps")


def to_unit_interval(pixels: Tensor) -> Tensor:
    """uint8 to float32 ``pixels / 255``, rounded the same on every device, contiguous."""
    # By a tensor, not a number: accelerators replace division by a number with an inexact multiplication.
    scale = torch.full((), 255.0, device=pixels.device)
    return (pixels.to(torch.float32) / scale).contiguous()
