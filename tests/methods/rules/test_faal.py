"""FAAL: the weights of the authors' solver and their losses; a closed form that does not fail where theirs is not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ham_hf.methods import HAM
from ham_hf.methods.rules.faal import FAAL, FAALRule, worst_case_weights
from tests.support.golden_data import golden_net
from tests.support.method_checks import (
    attack_of,
    exact,
    golden_batch,
    golden_tensors,
    initial_states,
    rows_of,
    update_loss,
)

TENSORS, HYPER = golden_tensors("faal")
ROWS = HYPER["rows"]
MODES = {"AT": "pgd_at", "TRADES": "trades", "MART": "mart"}


def divergence(weights):
    return float(-(weights * len(weights)).log().mean())


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("radius", HYPER["radii"])
def test_weights_are_those_of_the_authors_solver(number, radius):
    y = TENSORS["in/solver_y"][number]
    counts = y[y >= 0].bincount(minlength=10)
    found = worst_case_weights(TENSORS["in/solver_margin"][number] * counts, radius)
    exact(found, TENSORS[f"out/solver/{number}/r{radius}/closed_form"])
    exact(found, TENSORS[f"out/solver/{number}/r{radius}/weights"], 2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_margins_and_weights_of_a_batch_are_the_authors(mode):
    """Of the authors' images; with FAAL on MART they attack the KL term too, where ours is the attack of MART."""
    faal = FAAL(base_loss=MODES[mode], faal_radius=HYPER["r"])
    state, y = initial_states(faal)["faal"], golden_batch(ROWS)[1]
    theirs = TENSORS["out/AT/x_adv"] if mode == "AT" else golden_tensors("trades")[0]["out/x_adv"][:ROWS]
    with torch.no_grad():
        sums = faal.rule.preview(golden_net().train()(theirs), y, 10)
    counts = y.bincount(minlength=10)
    exact(torch.where(counts > 0, sums / counts.clamp(min=1), -1.0), TENSORS[f"out/{mode}/class_margin"])
    faal.rule.before_update(state, sums)
    exact(state["weight"] / 10, TENSORS[f"out/{mode}/closed_form"])
    exact(state["weight"] / 10, TENSORS[f"out/{mode}/weights"], 2e-6)


def test_margins_by_hand_in_any_number_of_batches():
    torch.manual_seed(0)
    logits, y = torch.randn(40, 5), torch.randint(0, 4, (40,))
    expected = [0.0] * 5
    for row, label in zip(logits.double().softmax(1), y.tolist(), strict=True):
        expected[label] += max(float(p) for j, p in enumerate(row) if j != label) - float(row[label])
    faal = FAAL()
    found = sum(faal.rule.preview(part, labels, 5) for part, labels in zip(logits.split(7), y.split(7), strict=True))
    assert found.tolist() == pytest.approx(expected)
    assert float(found[4]) == 0
    assert faal.rule.preview(logits[:0], y[:0], 5).tolist() == [0.0] * 5
    half = faal.rule.preview(logits.bfloat16(), y, 5)
    assert half.dtype == torch.float64
    torch.testing.assert_close(half, found, rtol=0, atol=0.1)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4).map(lambda value: round(value, 3)), min_size=2, max_size=12),
    radius=st.floats(1e-3, 2.0),
)
def test_weights_are_the_worst_within_the_radius(values, radius):
    a = torch.tensor(values, dtype=torch.float64)
    p = worst_case_weights(a, radius)
    assert torch.isfinite(p).all()
    assert float(p.sum()) == pytest.approx(1)
    if len(set(values)) == 1:
        assert p.tolist() == pytest.approx([1 / len(a)] * len(a))
        return
    assert divergence(p) == pytest.approx(radius, abs=1e-6)
    assert all((p[i] >= p[j]) == (a[i] >= a[j]) for i in range(len(a)) for j in range(len(a)) if a[i] != a[j])
    # No distribution within the radius does better: try ones on the way from p to others.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.rand(len(a), generator=generator, dtype=torch.float64).pow(3)
        other = 0.9 * p + 0.1 * other / other.sum()
        if divergence(other) <= radius:
            assert float(other @ a) <= float(p @ a) + 1e-6 * float(a.abs().max())


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 10,
        [-0.25] * 7,
        [3.0],
        [1e-14, 0.0, -1e-14],
        [1e12, -1e12, 0.0, 1e-12],
        [1e-6, 0.0, 0.0],
        [1.0] * 99 + [0.0],
        [1.0] + [0.0] * 99,
        list(range(100)),
    ],
)
@pytest.mark.parametrize("radius", [0.0, 1e-9, 0.5, 3.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_values_stay_finite(values, radius, dtype):
    a = torch.tensor(values, dtype=dtype)
    p = worst_case_weights(a, radius)
    assert p.dtype == dtype
    assert torch.isfinite(p).all()
    assert (p >= 0).all()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    if radius == 0 or float(a.max() - a.min()) < 1e-9:
        assert p.tolist() == pytest.approx([1 / len(a)] * len(a), rel=1e-3)
    if dtype == torch.float64 and 1e-3 < radius <= 3 and float(a.max() - a.min()) > 1e-9:
        assert divergence(p) == pytest.approx(radius, abs=1e-6)


def test_two_classes_by_hand():
    p = worst_case_weights(torch.tensor([2.0, -1.0], dtype=torch.float64), 0.5)
    # KL(U || p) = -log(2) - (log(p) + log(1 - p)) / 2, so 4 p (1 - p) = exp(-2 r).
    larger = (1 + math.sqrt(1 - math.exp(-1.0))) / 2
    assert p.tolist() == pytest.approx([larger, 1 - larger])


def test_missing_classes_get_the_largest_weight_where_the_others_are_easy():
    faal = FAAL()
    state = faal.rule.initial_state(torch.ones(4, dtype=torch.float64))
    faal.rule.before_update(state, torch.tensor([-3.0, -1.0, 0.0, -2.0], dtype=torch.float64))
    weight = faal.rule.class_weight(state, faal.loss, epoch=0)
    assert weight.shape == (1, 4)
    assert int(weight[0].argmax()) == 2
    assert float(weight.sum()) == pytest.approx(4)
    faal.rule.before_update(state, torch.zeros(4, dtype=torch.float64))
    assert state["weight"].tolist() == [1.0] * 4


def test_ham_borrows_weights_from_its_hard_examples():
    ham = HAM(mining_start_epoch=0, mining_step=1, class_weighting="faal", class_rule_args={"faal_radius": 0.2})
    ham.check(num_steps=3)
    assert ham.weights == FAALRule(faal_radius=0.2)
    states, net = initial_states(ham), golden_net()
    x, y = golden_batch(64)
    batch = rows_of(ham, net, x, y, attack=attack_of(HYPER, num_steps=3), states=states, seed=1)
    assert 0 < len(batch.y) < 64
    logits = net.train()(batch.x)
    ham.weights.before_update(states["faal"], ham.weights.preview(logits, batch.y, 10))
    loss, _ = update_loss(ham, golden_net(), batch, epoch=0, states=states)
    weight = states["faal"]["weight"]
    assert divergence(weight / 10) == pytest.approx(0.2, abs=1e-6)
    exact(loss, (weight[batch.y] * F.cross_entropy(logits, batch.y, reduction="none")).mean())


def test_a_class_without_training_images_takes_nothing_from_the_others():
    faal = FAAL()
    counts = torch.tensor([5.0, 0, 5, 5], dtype=torch.float64)
    state, smaller = faal.rule.initial_state(counts), faal.rule.initial_state(counts[counts > 0])
    sums = torch.tensor([-3.0, 0, -1, -2], dtype=torch.float64)
    faal.rule.before_update(state, sums)
    faal.rule.before_update(smaller, sums[counts > 0])
    torch.testing.assert_close(state["weight"][counts > 0], smaller["weight"])
    assert float(state["weight"][1]) == 0
    assert float(state["weight"].sum()) == pytest.approx(3)
