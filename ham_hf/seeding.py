"""Random streams by name and position: no generator outlives the step it was made for.

A stream depends only on the run's seed, its purpose, and its place in the run (epoch, step, rank), so a
resumed run repeats the uninterrupted one and no random state needs to be saved.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

TEST_SEED = 0
"""Seed of every test part, whatever a run's own seed: so no run is tested on what another was trained on, and runs of
several seeds are compared on the same images."""


class Stream(IntEnum):
    """Purposes of randomness. The numbers are part of every run's results: append, never renumber."""

    DATA_ORDER = 0
    AUGMENTATION = 1
    ATTACK = 2
    MODEL = 3
    EVALUATION = 4
    AUTOATTACK = 5
    HELD_OUT = 6
    CALIBRATION = 7
    CORRUPTION = 8


def derive_seed(seed: int, stream: Stream, *position: int) -> int:
    """A 63-bit seed, well mixed and different for every stream and position.

    Args:
        seed: the run's seed, >= 0.
        stream: purpose of the randomness.
        *position: where in the run, non-negative numbers such as epoch, step and rank.
    """
    mixed = np.random.SeedSequence([seed, int(stream), *position]).generate_state(1, np.uint64)[0]
    return int(mixed) >> 1


def make_generator(device: torch.device, seed: int, stream: Stream, *position: int) -> torch.Generator:
    """A generator on ``device`` with the seed of `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, *position))
