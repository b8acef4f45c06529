"""GAIRAT: kappa, weights, loss and gradients against the authors' numbers; weights that never vanish."""

from __future__ import annotations

import math

import pytest
import torch

from ham_hf.attacks import evaluation_mode, pgd
from ham_hf.methods.gairat import GAIRAT, CorrectIterates, gairat_weights
from tests.support.golden_data import exact, golden_batch, golden_net, golden_noise, golden_tensors, starting_at
from tests.support.method_checks import attack_of, rows_of

TENSORS, HYPER = golden_tensors("gairat")
FUNCTIONS = ["tanh", "sigmoid", "discrete"]


@pytest.mark.parametrize("num_steps", HYPER["table_num_steps"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_weight_tables_are_the_authors(function, num_steps):
    table = TENSORS[f"out/table/{function.title()}/K{num_steps}"]
    offsets = HYPER["table_Lambda"] if function != "discrete" else [0.0]
    assert len(table) == len(offsets)
    for offset, expected in zip(offsets, table, strict=True):
        weights = gairat_weights(torch.arange(num_steps + 1), num_steps, function, float(offset))
        exact(weights / weights.mean(), expected)


def test_kappa_counts_the_correct_iterates_before_the_last_one():
    x, y = golden_batch(64)
    net, attack = golden_net(), attack_of(HYPER)
    start = (x + golden_noise("uniform", 64)).clamp(0, 1)
    options = {"threat_model": attack.threat_model, "step_size": attack.step_size, "start": start}
    counted = CorrectIterates(y)
    pgd(net, x, y, num_steps=10, loss_fn=counted, **options)
    assert torch.equal(counted.count, TENSORS["out/kappa"])
    by_hand = torch.zeros_like(y)
    for steps in range(10):
        with evaluation_mode(net):
            by_hand += net(pgd(net, x, y, num_steps=steps, **options)).argmax(1) == y
    assert torch.equal(counted.count, by_hand)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 100])
def test_no_weight_vanishes_in_single_precision_and_none_grows_with_kappa(function, num_steps):
    for offset in (-1e4, -20.0, -1.0, 0.0, 30.0, math.inf):
        weights = gairat_weights(torch.arange(num_steps + 1), num_steps, function, offset).float()
        assert torch.isfinite(weights).all()
        assert weights[0] == 1
        assert (weights > math.exp(-30.1)).all()
        assert (weights.diff() <= 0).all()


def test_one_step_uses_the_papers_half_where_the_published_code_divides_by_zero():
    weights = gairat_weights(torch.tensor([0, 1]), 1, "tanh", -1.0)
    expected = [(1 + math.tanh(-1 + 5 * (1 - 2 * kappa))) / 2 for kappa in (0, 1)]
    assert float(weights[1] / weights[0]) == pytest.approx(expected[1] / expected[0])
    gairat, (x, y) = GAIRAT(gairat_start_epoch=0), golden_batch(16)
    with starting_at(uniform=golden_noise("uniform", 16)):
        batch = rows_of(gairat, golden_net(), x, y, attack=attack_of(HYPER, num_steps=1))
    assert batch.weight.unique().numel() == 2
