"""Intervals of fairness numbers hold the true number as often as they say, and paired tests are exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ham_hf.comparison.pairs import compare_paired, mcnemar
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
    for name in ("gap", "std", "nsd", "worst_30_percent"):
        assert equal[name] >= 0.85, name
        assert spread[name] >= 0.85, name


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


def test_mcnemar_is_the_two_sided_binomial_test():
    for one, other in itertools.product(range(7), repeat=2):
        num, few = one + other, min(one, other)
        tail = sum(math.comb(num, index) for index in range(few + 1)) / 2**num
        assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail), abs=1e-15)
    assert mcnemar(0, 0) == 1.0
    assert 0 < mcnemar(4000, 5000) < 1e-20
    with pytest.raises(ValueError, match="counts >= 0"):
        mcnemar(-1, 2)


def drawn(num, chances, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % len(chances)
    return labels, torch.rand(num, generator=generator) < torch.tensor(chances)[labels]


def test_paired_differences_against_loops():
    labels, reference = drawn(400, [0.2, 0.5, 0.6, 0.9], 0)
    _, other = drawn(400, [0.5, 0.5, 0.5, 0.9], 1)
    found = compare_paired(reference[None], other[None], labels, num_classes=4)
    ours, theirs = (
        [float(flags[labels == index].double().mean()) for index in range(4)] for flags in (other, reference)
    )
    order = sorted(range(4), key=lambda index: theirs[index])
    assert found.num_examples == 400
    assert found.average.mean == pytest.approx(float(other.double().mean() - reference.double().mean()))
    assert found.worst_class.mean == pytest.approx(ours[order[0]] - theirs[order[0]])
    pair = [ours[index] - theirs[index] for index in order[:2]]
    assert found.worst_30_percent.mean == pytest.approx(sum(pair) / 2)
    assert found.only_reference == (int((reference & ~other).sum()),)
    assert found.only_other == (int((~reference & other).sum()),)
    assert found.p_values == (mcnemar(found.only_reference[0], found.only_other[0]),)
    # The interval of a difference of paired flags, by the formula of its variance.
    gain = (other.double() - reference.double())[labels == order[0]].numpy()
    half = 1.96 * gain.std() / math.sqrt(len(gain))
    assert found.worst_class.high - found.worst_class.low == pytest.approx(2 * half, rel=0.1)
    assert found.worst_class.is_sure()
    assert found.worst_class.low > 0


def test_one_model_against_itself_differs_in_nothing():
    labels, flags = drawn(200, [0.2, 0.5, 0.7], 0)
    found = compare_paired(flags[None], flags[None], labels, num_classes=4)
    for difference in (found.average, found.worst_class, found.worst_30_percent):
        assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
        assert not difference.is_sure()
    assert found.p_values == (1.0,)


def test_several_pairs_are_averaged_and_have_to_agree():
    labels, _ = drawn(3000, [0.3, 0.6], 0)
    pairs = [(drawn(3000, [0.3, 0.6], 2 * seed)[1], drawn(3000, [0.4, 0.6], 2 * seed + 1)[1]) for seed in range(3)]
    reference, other = (torch.stack(flags) for flags in zip(*pairs, strict=True))
    found = compare_paired(reference, other, labels, num_classes=2)
    singles = [
        compare_paired(one[None], two[None], labels, num_classes=2) for one, two in zip(reference, other, strict=True)
    ]
    assert found.worst_class.per_seed == tuple(one.worst_class.mean for one in singles)
    assert found.worst_class.mean == pytest.approx(np.mean(found.worst_class.per_seed))
    assert found.p_values == tuple(one.p_values[0] for one in singles)
    assert found.worst_class.is_sure()
    # One pair that says the opposite is enough.
    mixed = compare_paired(
        torch.stack([reference[0], reference[1], other[2]]),
        torch.stack([other[0], other[1], reference[2]]),
        labels,
        num_classes=2,
    )
    assert not mixed.worst_class.is_sure()


def test_flags_of_different_images_are_refused():
    flags = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected flags"):
        compare_paired(flags, flags[:, :2], torch.zeros(3, dtype=torch.long), num_classes=2)
    with pytest.raises(ValueError, match="expected flags"):
        compare_paired(flags[0], flags[0], torch.zeros(3, dtype=torch.long), num_classes=2)
