"""Properties of the stratified draws, on arbitrary labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from ham_hf.data.splits import stratified_split, stratified_subset

labels_of_examples = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(torch.tensor)
seeds = st.integers(0, 2**63 - 1)
fractions = st.floats(0.01, 0.99)


def counts(labels):
    return torch.bincount(labels, minlength=7)


@given(labels_of_examples, fractions, seeds)
def test_split_is_complete_disjoint_and_proportional_to_within_one(labels, fraction, seed):
    if int(counts(labels).max()) == 1:
        with pytest.raises(ValueError, match="last example of a class"):
            stratified_split(labels, fraction, seed)
        return
    kept, held_out = stratified_split(labels, fraction, seed)
    assert len(held_out)
    assert torch.cat([kept, held_out]).sort().values.tolist() == list(range(len(labels)))
    share = counts(labels) * max(1, round(fraction * len(labels))) / len(labels)
    assert ((counts(labels[held_out]) - share).abs() < 1 + 1e-6).all()
    # No class is starved.
    assert ((counts(labels[kept]) > 0) == (counts(labels) > 0)).all()
    again = stratified_split(labels, fraction, seed)
    assert torch.equal(again[0], kept)
    assert torch.equal(again[1], held_out)


@given(labels_of_examples, st.integers(1, 100), seeds)
def test_subset_has_its_size_and_is_proportional_to_within_one(labels, size, seed):
    subset = stratified_subset(labels, size, seed)
    assert len(subset) == len(subset.unique()) == min(size, len(labels))
    assert torch.equal(subset, subset.sort().values)
    share = counts(labels) * len(subset) / len(labels)
    assert ((counts(labels[subset]) - share).abs() < 1 + 1e-6).all()
    assert torch.equal(subset, stratified_subset(labels, size, seed))


def test_draws_depend_on_the_seed_and_are_nested():
    labels = torch.arange(10).repeat_interleave(100)
    small, large = stratified_subset(labels, 100, 0), stratified_subset(labels, 300, 0)
    assert counts(labels[small])[:7].tolist() == [10] * 7
    assert set(small.tolist()) < set(large.tolist())
    assert set(small.tolist()) != set(stratified_subset(labels, 100, 1).tolist())
    # Random within a class: not its first examples. And classes with less than one each are drawn alike.
    assert not torch.equal(small[:10], torch.arange(10))
    assert {int(labels[stratified_subset(labels, 1, seed)]) for seed in range(100)} == set(range(10))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        stratified_split(torch.zeros(10, dtype=torch.int64), fraction, 0)


def test_subset_of_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        stratified_subset(torch.zeros(10, dtype=torch.int64), 0, 0)
