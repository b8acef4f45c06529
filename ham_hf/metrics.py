"""Per-class accuracy and fairness numbers from per-example flags: plain tensors in, plain numbers out.

Everything is computed from counts: nothing assumes balanced classes, and a class without an example is reported as
missing (``None``), never as 0 or NaN. Definitions and who uses them: NSD is ABSLD's (NeurIPS 2024), worst-class
accuracy is the common measure of robust fairness (FRL, CFA, DAFA, HAM).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

Z_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """Accuracy of one class.

    Attributes:
        count: number of evaluated examples of the class.
        correct: number of those that were classified correctly.
        accuracy: ``correct / count`` in [0, 1]; None if the class has no example.
        low: lower end of the 95 % Wilson interval of ``accuracy``; None if the class has no example.
        high: upper end of that interval; None if the class has no example.
    """

    count: int
    correct: int
    accuracy: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class FairnessSummary:
    """How accuracy is spread over the classes; all values in [0, 1] except ``nsd`` (a ratio >= 0).

    Attributes:
        num_examples: number of evaluated examples.
        average: micro average, correct / all.
        average_low: lower end of the 95 % Wilson interval of ``average``.
        average_high: upper end of that interval.
        macro_average: mean of the class accuracies (differs from ``average`` on unbalanced data).
        worst_class: smallest class accuracy.
        worst_class_index: class that has it (the first, if several).
        best_class: largest class accuracy.
        gap: ``best_class - worst_class``.
        worst_10_percent: mean of the ceil(C / 10) smallest class accuracies.
        worst_30_percent: mean of the ceil(3 C / 10) smallest class accuracies.
        std: population standard deviation over classes.
        nsd: ``std / macro_average`` (ABSLD, NeurIPS 2024); None if ``macro_average`` is 0.
        missing_classes: indices of classes without an example; they enter no other number.
        per_class: one entry per class, in class order.
    """

    num_examples: int
    average: float
    average_low: float
    average_high: float
    macro_average: float
    worst_class: float
    worst_class_index: int
    best_class: float
    gap: float
    worst_10_percent: float
    worst_30_percent: float
    std: float
    nsd: float | None
    missing_classes: tuple[int, ...]
    per_class: tuple[ClassAccuracy, ...]


def wilson_interval(correct: float, count: float, *, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a proportion at ``level`` (Wilson, 1927): unlike the normal one, it stays in [0, 1].

    Raises:
        ValueError: if ``count`` is not positive or ``correct`` lies outside [0, count].
    """
    if count <= 0 or not 0 <= correct <= count:
        raise ValueError(f"expected 0 <= correct <= count and count > 0, got correct={correct}, count={count}")
    z = Z_95 if level == 0.95 else NormalDist().inv_cdf((1 + level) / 2)
    share, z2 = correct / count, z**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At 0 and at count the exact bound is 0 and 1; rounding would leave it just inside.
    low = 0.0 if correct == 0 else max(0.0, center - half)
    high = 1.0 if correct == count else min(1.0, center + half)
    return low, high


def count_per_class(labels: Tensor, num_classes: int, where: Tensor | None = None) -> Tensor:
    """Number of examples of each class, (num_classes,) int64, on the device of ``labels`` (N,).

    Only examples where ``where`` (N,) is True count; None: all.
    """
    weights = torch.ones_like(labels) if where is None else where.to(labels.dtype)
    return torch.zeros(num_classes, dtype=labels.dtype, device=labels.device).scatter_add_(0, labels, weights)


def summarize_counts(correct: Sequence[int], counts: Sequence[int]) -> FairnessSummary:
    """Fairness numbers from the number of correct and of all examples of each class.

    Raises:
        ValueError: if the lengths differ or there is no example at all.
    """
    if len(correct) != len(counts):
        raise ValueError(f"got {len(correct)} correct counts for {len(counts)} classes")
    if not sum(counts):
        raise ValueError("no example to evaluate: every class is empty")
    per_class = []
    for hit, count in zip(correct, counts, strict=True):
        low, high = wilson_interval(hit, count) if count else (None, None)
        accuracy = hit / count if count else None
        per_class.append(ClassAccuracy(count=count, correct=hit, accuracy=accuracy, low=low, high=high))
    present = [index for index, count in enumerate(counts) if count]
    accuracies = {index: correct[index] / counts[index] for index in present}
    ascending = sorted(accuracies.values())
    macro = sum(ascending) / len(ascending)
    std = math.sqrt(sum((value - macro) ** 2 for value in ascending) / len(ascending))
    worst = min(present, key=lambda index: (accuracies[index], index))
    total, hits = sum(counts), sum(correct)
    average_low, average_high = wilson_interval(hits, total)
    return FairnessSummary(
        num_examples=total,
        average=hits / total,
        average_low=average_low,
        average_high=average_high,
        macro_average=macro,
        worst_class=ascending[0],
        worst_class_index=worst,
        best_class=ascending[-1],
        gap=ascending[-1] - ascending[0],
        worst_10_percent=mean_of_worst(ascending, 10),
        worst_30_percent=mean_of_worst(ascending, 30),
        std=std,
        nsd=std / macro if macro > 0 else None,
        missing_classes=tuple(index for index, count in enumerate(counts) if not count),
        per_class=tuple(per_class),
    )


def summarize(flags: Tensor, labels: Tensor, num_classes: int) -> FairnessSummary:
    """Fairness numbers from per-example flags.

    Args:
        flags: (N,) bool, True where the example was classified correctly (for an attack: still correct).
        labels: (N,) integers in [0, num_classes).
        num_classes: C.

    Raises:
        ValueError: if the shapes differ, a label is out of range, or there is no example.
    """
    if flags.shape != labels.shape or flags.ndim != 1:
        raise ValueError(f"flags and labels must be one-dimensional alike, got {flags.shape} and {labels.shape}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {int(labels.min())}..{int(labels.max())}")
    correct = count_per_class(labels, num_classes, flags)
    return summarize_counts(correct.tolist(), count_per_class(labels, num_classes).tolist())


def mean_of_worst(accuracies: Sequence[float], percent: int) -> float:
    """Mean of the ceil(percent * C / 100) smallest of C class accuracies (at least one)."""
    kept = num_worst(len(accuracies), percent)
    return sum(sorted(accuracies)[:kept]) / kept


def num_worst(num_classes: int, percent: int = 30) -> int:
    """ceil(percent * C / 100), at least 1."""
    # Integer arithmetic: 30 % of 10 classes is 3, whatever 0.3 * 10 rounds to.
    return max(1, -(-percent * num_classes // 100))


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64 counts; row = true class, column = predicted class.

    Args:
        predictions: (N,) integers in [0, num_classes), or -1 for logits that are not finite: no class, so that the
            example is in no cell, and the cells of a row may add up to less than the examples of the class.
        labels: (N,) integers in [0, num_classes).
        num_classes: C.
    """
    cells = (labels * num_classes + predictions)[predictions >= 0]
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
