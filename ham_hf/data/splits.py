"""Stratified, seeded choices of examples: held-out parts and subsets. Labels in, positions out."""

from __future__ import annotations

import torch
from torch import Tensor

TEST_SEED = 0
"""Seed of everything that is tested on. It is not a run's own: none may be tested on what another was trained on, and
runs of several seeds are compared on the same images."""


def stratified_subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Positions of ``size`` examples in which every class has its share, to within one example.

    Shares are rounded by largest remainder, so they add up to ``size``; a class with a share below one example may
    be left out. For one seed, the examples drawn of a class are the first of a fixed order: a larger draw from a
    class contains every smaller one.

    Args:
        labels: (N,) int64 classes, >= 0.
        size: number of examples, at least 1; N or more selects all.
        seed: of the draw; the result depends on nothing else.

    Returns:
        (min(size, N),) int64 positions, ascending.

    Raises:
        ValueError: if ``size`` is less than 1.
    """
    if size < 1:
        raise ValueError(f"a subset needs at least 1 example, got size={size}")
    if size >= len(labels):
        return torch.arange(len(labels))
    quota = _proportional_counts(torch.bincount(labels), size)
    return torch.nonzero(_rank_in_class(labels, seed) < quota[labels]).flatten()


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split examples into a kept and a held-out part; every class gives its share, to within one example.

    The held-out part has ``round(fraction * N)`` examples, at least one. No class is starved: the last example of
    a class is always kept, so a class with a single example is never held out and the held-out part may be smaller
    by the number of such classes.

    Args:
        labels: (N,) int64 classes, >= 0.
        fraction: share of the examples to hold out, in (0, 1).
        seed: of the draw; the result depends on nothing else.

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
