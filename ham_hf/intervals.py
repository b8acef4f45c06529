"""95 % intervals of fairness numbers, from the counts of each class.

The smallest of several noisy numbers is lower than the number that is truly smallest, and a spread of noisy numbers
is wider than the true spread. A percentile bootstrap adds the same error a second time, so it is not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ham_hf.metrics import FairnessSummary, num_worst, wilson_interval

Floats = NDArray[np.float64]

REPETITIONS = 2000
"""Resamples of a bootstrap (our choice)."""
_ERROR = 0.05


@dataclass(frozen=True, kw_only=True)
class FairnessIntervals:
    """95 % intervals (low, high) of the numbers of `ham_hf.metrics.FairnessSummary` with the same names.

    Attributes:
        worst_class: `worst_class_interval`, simultaneous over the classes.
        worst_30_percent: by bootstrap (`fairness_intervals`), like the following ones.
        gap: best class minus worst class.
        std: standard deviation over classes.
        nsd: ``std`` divided by the mean of the classes; None if all accuracies are 0.
    """

    worst_class: tuple[float, float]
    worst_30_percent: tuple[float, float]
    gap: tuple[float, float]
    std: tuple[float, float]
    nsd: tuple[float, float] | None


def worst_class_interval(correct: Sequence[int], counts: Sequence[int]) -> tuple[float, float]:
    """Simultaneous 95 % interval of the smallest class accuracy.

    Each of the C classes with an example gets its Wilson interval at 1 - 0.05 / C (Bonferroni); the smallest of the
    lower ends and the smallest of the upper ends, which may be another class's, are the interval. It holds whichever
    class is the worst, unlike that of one class alone in `ham_hf.metrics.ClassAccuracy`. Simulated
    coverage for C = 10 and 36, 100 and 1,000 images a class (`python -m tests.benchmarks.coverage`): 97.8 to 100 %.

    Raises:
        ValueError: if no class has an example.
    """
    ends = simultaneous_intervals(correct, counts)
    return min(low for low, _ in ends), min(high for _, high in ends)


def simultaneous_intervals(correct: Sequence[int], counts: Sequence[int]) -> list[tuple[float, float]]:
    """Intervals of class accuracies that all hold at once with 95 %; ValueError if no class has an example."""
    present = [(hit, count) for hit, count in zip(correct, counts, strict=True) if count]
    if not present:
        raise ValueError("no example: every class is empty")
    return [wilson_interval(hit, count, level=1 - _ERROR / len(present)) for hit, count in present]


def fairness_intervals(
    correct: Sequence[int], counts: Sequence[int], *, seed: int = 0, repetitions: int = REPETITIONS
) -> FairnessIntervals:
    """Intervals of worst class (closed form), worst 30 %, gap, std and NSD (bootstrap).

    Images are resampled within each class, which is a binomial per class. The interval is the *basic* one (Davison and
    Hinkley, 1997, section 5.2): estimate minus the quantiles of what resampling changed, so that what noise adds to a
    spread is taken off and not added once more. Where the counts are compatible with equal accuracies (5 % test of
    the standard deviation, simulated), resampling changes too little at the low end: the interval then also covers
    the one that resampling from equal accuracies gives. A class with none or all right does not change at all: worst
    30 % and gap also cover `_score_intervals` (both our choice). Ends are cut to the possible range.

    Simulated coverage for C = 10, in percent, for 36 / 100 / 1,000 images a class
    (`python -m tests.benchmarks.coverage`):

    ============================  ==================  ==================  ==================  ==================
    true accuracies               worst 30 %          gap                 std                 NSD
    ============================  ==================  ==================  ==================  ==================
    spread (10 to 80 %)           96.3 / 95.9 / 95.4  98.0 / 97.2 / 95.7  92.0 / 93.3 / 94.8  93.5 / 94.2 / 94.5
    tied (three at 20, to 75 %)   96.5 / 96.2 / 95.0  96.6 / 93.5 / 94.9  92.3 / 93.4 / 94.7  93.5 / 93.9 / 93.9
    weak (1, 3, 5 %, to 70 %)     98.5 / 96.6 / 96.3  98.9 / 97.6 / 96.7  93.5 / 95.0 / 94.6  94.5 / 95.2 / 94.5
    calibrated (all 40 %)         93.5 / 94.3 / 94.5  94.6 / 94.5 / 94.8  94.8 / 94.7 / 95.5  94.8 / 94.7 / 95.5
    ============================  ==================  ==================  ==================  ==================

    Args:
        correct: right examples of each class.
        counts: examples of each class; classes without one are left out.
        seed: seed of the resampling.
        repetitions: number of resamples.

    Raises:
        ValueError: if no class has an example.
    """
    worst = worst_class_interval(correct, counts)
    sizes = np.array([count for count in counts if count])
    hits = np.array([hit for hit, count in zip(correct, counts, strict=True) if count])
    generator, shape = np.random.default_rng(seed), (repetitions, len(sizes))
    accuracies = hits / sizes
    estimate = spread_numbers(accuracies)
    low, high = _basic_interval(
        spread_numbers(generator.binomial(sizes, accuracies, shape) / sizes), estimate, estimate
    )
    equal = np.full(len(sizes), hits.sum() / sizes.sum())
    resampled = spread_numbers(generator.binomial(sizes, equal, shape) / sizes)
    if (resampled[_STD] >= estimate[_STD]).mean() > _ERROR:
        other_low, other_high = _basic_interval(resampled, spread_numbers(equal), estimate)
        low, high = np.minimum(low, other_low), np.maximum(high, other_high)
    other_low, other_high = _score_intervals(hits, sizes)
    low[:2], high[:2] = np.minimum(low[:2], other_low), np.maximum(high[:2], other_high)
    # NSD of C classes is largest where one of them has all there is.
    ends = np.clip([low, high], 0, [1, 1, 0.5, np.sqrt(len(sizes) - 1)]).T
    worst_30, gap, std, nsd = ((float(a), float(b)) for a, b in ends)
    return FairnessIntervals(
        worst_class=worst, worst_30_percent=worst_30, gap=gap, std=std, nsd=nsd if hits.any() else None
    )


def _score_intervals(hits: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Ends (2,) and (2,) for worst 30 % (Wilson) and gap (Newcombe, 1998, method 10), taking the ranks as known."""
    accuracies = hits / sizes
    order = np.argsort(accuracies, kind="stable")
    kept = order[: num_worst(len(order))]
    size = len(kept) ** 2 / float((1 / sizes[kept]).sum())
    low, high = wilson_interval(float(accuracies[kept].mean()) * size, size)
    (least, under), (over, most) = (wilson_interval(int(hits[one]), int(sizes[one])) for one in order[[0, -1]])
    worst, best = accuracies[order[[0, -1]]]
    # Of a single class the gap is 0.
    above = np.hypot(most - best, worst - least) if len(order) > 1 else 0.0
    return np.array([low, best - worst - np.hypot(best - over, under - worst)]), np.array([high, best - worst + above])


def intervals_of(summary: FairnessSummary) -> FairnessIntervals:
    """Intervals of the fairness numbers of a summary."""
    entries = summary.per_class
    return fairness_intervals([entry.correct for entry in entries], [entry.count for entry in entries])


_STD = 2


def spread_numbers(accuracies: Floats) -> Floats:
    """Worst 30 %, gap, std and NSD (4, ...) of class accuracies (..., C); NSD is NaN where all are 0."""
    ascending = np.sort(accuracies, axis=-1)
    kept = num_worst(accuracies.shape[-1])
    mean, std = accuracies.mean(-1), accuracies.std(-1)
    nsd = std / np.where(mean > 0, mean, np.nan)
    return np.stack([ascending[..., :kept].mean(-1), ascending[..., -1] - ascending[..., 0], std, nsd])


def _basic_interval(resampled: Floats, center: Floats, estimate: Floats) -> tuple[Floats, Floats]:
    """``estimate`` minus the upper and the lower quantile of ``resampled - center``; (4,) each."""
    usable = resampled[:, ~np.isnan(resampled[-1])]
    if not usable.shape[1]:
        return estimate, estimate
    low, high = np.quantile(usable, [_ERROR / 2, 1 - _ERROR / 2], axis=1)
    return estimate - (high - center), estimate - (low - center)
