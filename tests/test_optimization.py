"""Learning rates of every update, and which parameters decay."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from ham_hf.optimization import create_optimizer, create_scheduler, set_learning_rate


def rates(kind, *, epochs=6, updates=4, unit="epoch", drops=(), warmup=0.0, floor=0.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = create_scheduler(
        optimizer,
        kind,
        num_epochs=epochs,
        updates_per_epoch=updates,
        drops=drops,
        warmup_epochs=warmup,
        min_learning_rate=floor,
        step_unit=unit,
    )
    return [set_learning_rate(scheduler, epoch=step // updates, step=step) for step in range(epochs * updates)]


def test_drops_of_the_paper():
    drops = ((59, 0.1), (89, 0.01), (109, 0.005))
    found = rates("piecewise", epochs=120, updates=1, drops=drops)
    assert found == pytest.approx([0.4] * 59 + [0.04] * 30 + [0.004] * 20 + [0.002] * 11)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_drops_fall_on_the_first_update_of_their_epoch(unit):
    found = rates("piecewise", drops=((2, 0.1), (4, 0.5)), unit=unit)
    assert found == pytest.approx([0.4] * 8 + [0.04] * 8 + [0.2] * 8)


def test_cosine_by_epoch_and_by_step():
    by_epoch = rates("cosine", floor=0.1)
    assert by_epoch == pytest.approx([0.1 + 0.15 * (1 + math.cos(math.pi * (s // 4) / 6)) for s in range(24)])
    by_step = rates("cosine", unit="step", floor=0.1)
    assert by_step == pytest.approx([0.1 + 0.15 * (1 + math.cos(math.pi * s / 24)) for s in range(24)])


def test_constant():
    assert rates("constant") == pytest.approx([0.4] * 24)


@pytest.mark.parametrize("kind", ["piecewise", "constant", "cosine"])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_warmup_never_trains_at_rate_zero(kind, unit):
    found = rates(kind, unit=unit, warmup=2)
    ramp = found[:8]
    assert ramp[0] > 0
    assert all(later >= earlier for earlier, later in itertools.pairwise(ramp))
    steps = [s // 4 for s in range(8)] if unit == "epoch" else list(range(8))
    length = 2 if unit == "epoch" else 8
    assert ramp == pytest.approx([0.4 * (t + 1) / (length + 1) for t in steps], rel=1e-6)


def test_rate_is_a_function_of_time_alone():
    whole = rates("cosine", unit="step", warmup=1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = create_scheduler(
        optimizer,
        "cosine",
        num_epochs=6,
        updates_per_epoch=4,
        drops=(),
        warmup_epochs=1,
        min_learning_rate=0.0,
        step_unit="step",
    )
    assert set_learning_rate(scheduler, epoch=4, step=17) == pytest.approx(whole[17])


def test_decay_of_norm_and_bias_is_a_choice():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    options = {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.01}
    everything = create_optimizer(net, "momentum", decay_norm_and_bias=True, **options)
    assert [group["weight_decay"] for group in everything.param_groups] == [0.01]
    assert everything.param_groups[0]["momentum"] == 0.8
    assert not everything.param_groups[0]["nesterov"]
    filtered = create_optimizer(net, "momentum", decay_norm_and_bias=False, **options)
    sizes = {group["weight_decay"]: len(group["params"]) for group in filtered.param_groups}
    assert sizes == {0.0: 3, 0.01: 1}
    with pytest.raises(ValueError, match=r"--optimizer momentun"):
        create_optimizer(net, "momentun", decay_norm_and_bias=True, **options)
