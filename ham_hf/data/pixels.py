"""Batches of pixels in [0, 1] and labels, cached or streamed by worker processes, and their augmentation.

All randomness is drawn on the CPU from explicit seeds, so the same images come out on every device, in every worker
process and after a resume.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ham_hf.data.decoding import CorruptImageError, EncodedImages, PixelTransform
from ham_hf.seeding import Stream, derive_seed

AUGMENTATIONS = ("none", "crop", "crop_flip", "timm")


class BatchRequest(NamedTuple):
    """Which examples make a batch.

    Attributes:
        indices: (B,) int64 on the CPU, positions in the split.
        seed: of the augmentation, >= 0; None: no augmentation.
    """

    indices: Tensor
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class UpdateLayout:
    """How updates are made from the training images: ``accumulation`` batches of each of ``world`` processes.

    ``rank`` is this process, whose batches are given out; ``seed`` is that of the run.
    """

    batch_size: int
    accumulation: int
    world: int
    rank: int
    seed: int

    @property
    def per_update(self) -> int:
        """Examples of an update, of all processes."""
        return self.batch_size * self.world * self.accumulation

    def requests(self, order: Tensor, epoch: int) -> list[BatchRequest]:
        """This process's batches of an epoch, one per accumulation step.

        Every update takes the next examples of ``order`` (N,); the last incomplete update is left out.
        """
        whole = len(order) // self.per_update * self.per_update
        mine = order[:whole].view(-1, self.world, self.batch_size)[:, self.rank]
        return [
            BatchRequest(indices, derive_seed(self.seed, Stream.AUGMENTATION, epoch, number, self.rank))
            for number, indices in enumerate(mine)
        ]


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
        """One (B, C, S, S) uint8 tensor on ``device`` per request, in order."""
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
    """Pixels decoded batch by batch in worker processes; with 0 of them in the calling one.

    ``train_transform`` is for requests with a seed and may draw from the global generators.
    """

    def __init__(
        self, images: EncodedImages, transform: PixelTransform, *, train_transform: PixelTransform, num_workers: int
    ) -> None:
        self._images = images
        self._transform = transform
        self._train_transform = train_transform
        self._num_workers = num_workers

    def load(self, request: BatchRequest) -> Tensor:
        """(B, C, S, S) uint8 on the CPU; depends on the request alone."""
        pixels = []
        positions = request.indices.tolist()
        with isolated_rng():
            for position, encoded in zip(positions, self._images.read(request.indices), strict=True):
                transform = self._transform
                if request.seed is not None:
                    transform = self._train_transform
                    seed_for_example(request.seed, position)
                pixels.append(transform(self._images.decode(position, encoded)))
        return torch.stack(pixels)

    def read(self, requests: Sequence[BatchRequest], device: torch.device) -> Iterator[Tensor]:
        """As `CachedPixels.read`."""
        num_workers = min(self._num_workers, len(requests))
        # Workers get the number of a request, as they have the requests already.
        load = partial(_load_numbered, self, requests)
        for batch in done_by_workers(load, range(len(requests)), num_workers, device):
            yield batch.to(device, non_blocking=True)


class Images:
    """The images and labels of one split.

    Attributes:
        labels: (N,) int64 classes, on the CPU.
    """

    def __init__(self, labels: Tensor, pixels: CachedPixels | StreamedPixels, augmentation: str) -> None:
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


def _load_numbered(pixels: StreamedPixels, requests: Sequence[BatchRequest], number: int) -> Tensor:
    return pixels.load(requests[number])


class _Tasks(Dataset[Any]):
    """The work of a DataLoader on each task. Errors are returned as values, so that messages hold no traceback."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, task: object) -> object:
        try:
            return self._work(task)
        except CorruptImageError as error:
            return error


def done_by_workers(
    work: Callable[[Any], Any], tasks: Iterable[object], num_workers: int, device: torch.device
) -> Iterator[Any]:
    """Yield the result of ``work`` on each task, in order, on the CPU.

    ``num_workers`` processes decode, 0 decodes in the calling one; ``device`` is where batches go next.

    Raises:
        CorruptImageError: if an image cannot be read.
    """
    loader = DataLoader(
        _Tasks(work),
        sampler=tasks,
        batch_size=None,
        num_workers=num_workers,
        # Python 3.14 would start them by forkserver, which imports torch again in each worker, for every epoch.
        multiprocessing_context="fork" if num_workers > 0 and sys.platform == "linux" else None,
        pin_memory=can_pin(device),
        # Its own generator: by default a loader draws from, and so advances, torch's global one.
        generator=torch.Generator(),
        worker_init_fn=_shield_worker,
    )
    for found in loader:
        if isinstance(found, CorruptImageError):
            raise found
        yield found


def _shield_worker(worker_id: int) -> None:
    """Let a worker outlive a signal to all processes of a run, which needs it to reach its checkpoint.

    SIGTERM of the process that started the worker still ends it.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS, Windows: no way to see who sent it
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def random_crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad images (N, C, H, W) with zeros and cut a window of the old size, contiguous, at a random place.

    Draws two numbers per image from the CPU ``generator``.
    """
    num_images, _, height, width = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, num_images), generator=generator).to(x.device)
    padded = F.pad(x, (padding, padding, padding, padding))
    # A view with every window of every image; indexing it copies one window per image.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(num_images, device=x.device), :, top, left].contiguous()


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of (N, C, H, W) left-right with probability 1/2, by one number of the CPU ``generator``."""
    flipped = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)


def augment_batch(x: Tensor, augmentation: str, seed: int) -> Tensor:
    """Augment a batch of square images; the pad-crop pads an eighth of the side (4 pixels at 32).

    Args:
        x: (N, C, S, S), any dtype, any device; the result has the same.
        augmentation: ``crop``, ``crop_flip``, or ``none`` and ``timm``, which change nothing here (timm's transform
            works on single images, before).
        seed: of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    if augmentation in ("crop", "crop_flip"):
        x = random_crop(x, x.shape[-1] // 8, generator)
    if augmentation == "crop_flip":
        x = random_flip(x, generator)
    return x


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch (CPU) on leaving."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)


def seed_for_example(seed: int, index: int) -> None:
    """Seed Python's, numpy's and torch's (CPU) global generators from the batch's seed and the example's position.

    timm's transforms draw from all three. Call it inside ``isolated_rng``.
    """
    words = np.random.SeedSequence([seed, index]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed: that would also reseed the accelerator of the calling process.
    torch.default_generator.manual_seed(int(words[2]))


def can_pin(device: torch.device) -> bool:
    """Whether batches for ``device`` go through page-locked memory."""
    return device.type not in ("cpu", "mps")


def to_unit_interval(pixels: Tensor) -> Tensor:
    """uint8 to float32 ``pixels / 255``, rounded the same on every device, contiguous."""
    # By a tensor, not a number: accelerators replace division by a number with an inexact multiplication.
    scale = torch.full((), 255.0, device=pixels.device)
    return (pixels.to(torch.float32) / scale).contiguous()
