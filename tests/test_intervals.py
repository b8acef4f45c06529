"""Intervals of fairness numbers hold the true number as often as they say."""

from __future__ import annotations

import math

import pytest

from ham_hf.intervals import fairness_intervals, worst_class_interval
from ham_hf.metrics import summarize_counts, wilson_interval
from tests.benchmarks.coverage import COUNTS, PROFILES, coverage, worst_class_coverage


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_worst_class_interval_holds_the_true_number(profile, count):
    assert worst_class_coverage(PROFILES[profile], count, simulations=300) >= 0.93


def test_worst_class_interval_is_made_of_the_smallest_ends():
    correct, counts = [5, 6, 0, 50], [20, 12, 0, 100]
    level = 1 - 0.05 / 3
    ends = [wilson_interval(hit, count, level=level) for hit, count in ((5, 20), (6, 12), (50, 100))]
    assert worst_class_interval(correct, counts) == (min(low for low, _ in ends), min(high for _, high in ends))
    # 1 - 0.05 / 3 two-sided: z = 2.39398
    for end in wilson_interval(5, 20, level=level):
        assert abs(0.25 - end) == pytest.approx(2.393980 * math.sqrt(end * (1 - end) / 20), rel=1e-6)
    with pytest.raises(ValueError, match="every class is empty"):
        worst_class_interval([0], [0])


def test_bootstrap_intervals_hold_equal_and_spread_accuracies():
    """The percentile bootstrap never holds the gap of equal accuracies, which is 0."""
    equal = coverage(PROFILES["calibrated"], 100, simulations=60)
    spread = coverage(PROFILES["spread"], 1000, simulations=60)
    weak = coverage(PROFILES["weak"], 36, simulations=60)
    for name in ("gap", "std", "nsd", "worst_30_percent"):
        assert min(equal[name], spread[name], weak[name]) >= 0.85, name


def test_intervals_are_repeatable_and_about_the_estimate():
    correct, counts = [100, 300, 500, 0, 800], [1000, 1000, 900, 0, 1000]
    found, summary = fairness_intervals(correct, counts), summarize_counts(correct, counts)
    assert found == fairness_intervals(correct, counts)
    assert found != fairness_intervals(correct, counts, seed=1)
    for name in ("worst_class", "worst_30_percent", "gap", "std", "nsd"):
        low, high = getattr(found, name)
        assert low < getattr(summary, name) < high
        assert high - low < 0.12


@pytest.mark.parametrize(
    ("correct", "counts"), [([0, 0], [5, 5]), ([5, 5], [5, 5]), ([3], [7]), ([1, 0, 0], [1, 0, 0]), ([0, 4], [4, 4])]
)
def test_intervals_of_corner_cases_stay_where_the_numbers_can_be(correct, counts):
    found = fairness_intervals(correct, counts)
    assert (found.nsd is None) == (sum(correct) == 0)
    for name in ("worst_class", "worst_30_percent", "gap", "std"):
        low, high = getattr(found, name)
        assert 0 <= low <= high <= 1
        assert low < high or name == "std" or (name == "gap" and counts.count(0) == len(counts) - 1)
