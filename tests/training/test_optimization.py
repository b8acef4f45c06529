"""Learning rates of every update, and which parameters decay."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from ham_hf.models import PixelModel
from ham_hf.training.optimization import create_optimizer, create_scheduler, set_learning_rate


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


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "resnet18_cifar"])
def test_layer_decay_reaches_the_layers_of_the_network_inside_the_pixel_model(name):
    """With timm's own scales, under every schedule; the classifier has the full rate."""
    net = timm.create_model(name, num_classes=3)
    model = PixelModel(net, (0.5,) * 3, (0.25,) * 3)
    options = {"learning_rate": 0.2, "momentum": 0.9, "weight_decay": 0.05, "decay_norm_and_bias": False}
    optimizer = create_optimizer(model, "adamw", layer_decay=0.5, **options)
    schedule = {"num_epochs": 4, "updates_per_epoch": 2, "min_learning_rate": 0.0, "step_unit": "step"}
    scheduler = create_scheduler(optimizer, "piecewise", drops=[(1, 0.1)], warmup_epochs=0.0, **schedule)
    by_parameter = {id(parameter): name for name, parameter in net.named_parameters()}
    expected = {}
    for group in param_groups_layer_decay(net, layer_decay=0.5):
        expected |= {by_parameter[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    assert len(set(expected.values())) > 2
    assert expected.keys() == set(by_parameter.values())
    for step, rate in ((0, 0.2), (2, 0.02)):
        assert set_learning_rate(scheduler, epoch=step // 2, step=step) == pytest.approx(rate)
        found = {by_parameter[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert found == pytest.approx({name: rate * scale for name, scale in expected.items()})
    head = [name for name in expected if name.startswith(("head", "fc"))]
    assert head
    assert {expected[name] for name in head} == {1.0}


def test_layer_decay_keeps_the_choice_of_what_is_decayed():
    net = timm.create_model("test_vit", num_classes=3)
    options = {"learning_rate": 0.2, "momentum": 0.9, "weight_decay": 0.05, "layer_decay": 0.5}
    for everything in (True, False):
        optimizer = create_optimizer(
            PixelModel(net, (0.5,) * 3, (0.25,) * 3), "adamw", decay_norm_and_bias=everything, **options
        )
        biases = [group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if p.ndim == 1]
        assert set(biases) == ({0.05} if everything else {0.0})


def test_layer_decay_of_a_network_without_known_layers_is_refused():
    with pytest.raises(ValueError, match=r"--layer_decay 0\.5: timm does not say what the layers of Linear are"):
        create_optimizer(
            nn.Linear(2, 2),
            "adamw",
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=0.0,
            decay_norm_and_bias=True,
            layer_decay=0.5,
        )
