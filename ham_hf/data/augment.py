"""Training augmentation: pad-crop and flip on batches of pixels, timm's own on single images.

All randomness is drawn on the CPU from explicit seeds, so the same images come out on every device, in every
worker process and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

AUGMENTATIONS = ("none", "crop", "crop_flip", "timm")
PixelTransform = Callable[[Image.Image], Tensor]


def random_crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad images (N, C, H, W) with zeros on each side and cut a window of the old size at a random place.

    Draws two numbers per image from the CPU ``generator``. The result is contiguous.
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


def timm_train_transform(image_size: int, interpolation: str) -> PixelTransform:
    """Training transform of timm's defaults (random resized crop, flip, color jitter): PIL to uint8 (C, S, S)."""
    transform: PixelTransform = create_transform(
        image_size, is_training=True, interpolation=interpolation, normalize=False
    )
    return transform


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
