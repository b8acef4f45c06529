"""Learning rates of every update, and which parameters decay."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from ham_hf.config import LearningRateDrop, TrainingConfig
from ham_hf.models import PixelModel
from ham_hf.training.optimization import check_optimizer, create_optimizer, create_scheduler, set_learning_rate


def rates(kind, *, epochs=6, updates=4, unit="epoch", drops=(), warmup=0.0, floor=0.0, steps=None):
    """The learning rate of every update, or of some, set in this order."""
    config = TrainingConfig(
        lr_scheduler_type=kind,
        num_train_epochs=epochs,
        lr_step_unit=unit,
        lr_drops=tuple(LearningRateDrop(*drop) for drop in drops),
        warmup_epochs=warmup,
        min_learning_rate=floor,
        learning_rate=0.4,
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = create_scheduler(optimizer, config, updates_per_epoch=updates)
    every = range(epochs * updates) if steps is None else steps
    return [set_learning_rate(scheduler, epoch=step // updates, step=step) for step in every]


def test_drops_of_the_paper():
    drops = ((59, 0.1), (89, 0.01), (109, 0.005))
    found = rates("piecewise", epochs=120, updates=1, drops=drops)
    assert found == pytest.approx([0.4] * 59 + [0.04] * 30 + [0.004] * 20 + [0.002] * 11)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_drops_fall_on_the_first_update_of_their_epoch(unit):
    found = rates("piecewise", drops=((2, 0.5), (4, 0.1)), unit=unit)
    assert found == pytest.approx([0.4] * 8 + [0.2] * 8 + [0.04] * 8)


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
    options = {"unit": "step", "warmup": 1}
    assert rates("cosine", steps=[17], **options) == pytest.approx([rates("cosine", **options)[17]])


def optimizer_of(model, name="adamw", **changes):
    settings = {"learning_rate": 0.2, "weight_decay": 0.05, "decay_norm_and_bias": False, **changes}
    return create_optimizer(model, TrainingConfig(optimizer=name, **settings))


def test_decay_of_norm_and_bias_is_a_choice():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    options = {"momentum": 0.8, "weight_decay": 0.01}
    everything = optimizer_of(net, "momentum", decay_norm_and_bias=True, **options)
    assert [group["weight_decay"] for group in everything.param_groups] == [0.01]
    assert everything.param_groups[0]["momentum"] == 0.8
    assert not everything.param_groups[0]["nesterov"]
    filtered = optimizer_of(net, "momentum", **options)
    sizes = {group["weight_decay"]: len(group["params"]) for group in filtered.param_groups}
    assert sizes == {0.0: 3, 0.01: 1}
    with pytest.raises(ValueError, match=r"--optimizer momentun"):
        check_optimizer("momentun")


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "resnet18_cifar"])
def test_layer_decay_reaches_the_layers_of_the_network_inside_the_pixel_model(name):
    """With timm's own scales, under every schedule; the classifier has the full rate."""
    net = timm.create_model(name, num_classes=3)
    model = PixelModel(net, (0.5,) * 3, (0.25,) * 3)
    optimizer = optimizer_of(model, layer_decay=0.5)
    schedule = TrainingConfig(num_train_epochs=4, lr_step_unit="step", lr_drops=(LearningRateDrop(1, 0.1),))
    scheduler = create_scheduler(optimizer, schedule, updates_per_epoch=2)
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
    model = PixelModel(timm.create_model("test_vit", num_classes=3), (0.5,) * 3, (0.25,) * 3)
    for everything in (True, False):
        optimizer = optimizer_of(model, decay_norm_and_bias=everything, layer_decay=0.5)
        biases = [group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if p.ndim == 1]
        assert set(biases) == ({0.05} if everything else {0.0})


def test_layer_decay_of_a_network_without_known_layers_is_refused():
    with pytest.raises(ValueError, match=r"--layer_decay 0\.5: timm does not say what the layers of Linear are"):
        optimizer_of(nn.Linear(2, 2), layer_decay=0.5)
