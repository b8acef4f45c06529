"""FAAL: the weights of the authors' solver and their losses; a closed form that does not fail where theirs is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ham_hf.methods.rules.faal import FAAL, worst_case_weights
from tests.support.golden_data import exact, golden_batch, golden_net, golden_tensors
from tests.support.method_checks import initial_states

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
