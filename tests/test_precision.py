"""Attacks in bfloat16: the network alone is coarser, the update is not."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from accelerate import Accelerator

import ham_hf  # noqa: F401 (registers the CIFAR networks with timm)
from ham_hf.attacks import ThreatModel, input_gradient, pgd
from ham_hf.methods import HAM, PGDAT, InnerAttack
from ham_hf.precision import BFloat16Passes
from ham_hf.training.train_step import TrainStep
from tests.support.nets import pixel_batch

ATTACK = InnerAttack(threat_model=ThreatModel("linf", 8 / 255), num_steps=4, step_size=2 / 255)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = timm.create_model("resnet18_cifar", num_classes=10)
    with torch.no_grad():
        made.train()(torch.rand(64, 3, 16, 16))
    return made.eval()


@pytest.fixture(scope="module")
def batch(net):
    x = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x).topk(2).indices[torch.arange(32), torch.arange(32) % 2]
    return x, y


def test_few_signs_of_the_gradient_differ(net, batch):
    exact, coarse = input_gradient(net, *batch), input_gradient(BFloat16Passes(net), *batch)
    assert coarse.dtype == torch.float32
    differs = exact.sign() != coarse.sign()
    assert 0 < differs.float().mean() < 0.01
    assert exact[differs].abs().sum() < 0.01 * exact.abs().sum()


def test_the_attack_is_as_strong_and_stays_in_the_ball(net, batch):
    settings = {"threat_model": ATTACK.threat_model, "num_steps": 10, "step_size": 2 / 255, "start": batch[0]}
    losses = []
    for model in (net, BFloat16Passes(net)):
        x_adv = pgd(model, *batch, **settings)
        assert x_adv.dtype == torch.float32
        assert (x_adv - batch[0]).abs().max() <= 8 / 255 + 1e-6
        losses.append(torch.nn.functional.cross_entropy(net(x_adv), batch[1]).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_only_the_attack_of_an_update_is_coarser(net, batch):
    """With no attack step, both precisions make the same update to the bit."""
    after = {}
    still = InnerAttack(threat_model=ThreatModel("linf", 0.0), num_steps=1, step_size=0.1)
    for objective, attack in ((PGDAT(), still), (HAM(mining_start_epoch=0, mining_step=2), ATTACK)):
        for precision in ("training", "bf16"):
            model = copy.deepcopy(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            step = TrainStep(
                model,
                optimizer,
                objective,
                attack,
                Accelerator(cpu=True),
                class_counts=torch.full((10,), 3),
                seed=0,
                attack_precision=precision,
            )
            assert all(value.dtype != torch.bfloat16 for value in model.state_dict().values())
            step([pixel_batch(*batch)], epoch=0, step=0)
            after[objective.name, precision] = model.state_dict()
    for name, value in after["pgd_at", "training"].items():
        assert torch.equal(value, after["pgd_at", "bf16"][name])
    # Of the mined update, the images differ by few values and so do the weights, which shows that bf16 was used.
    moved = [
        (after["ham", "bf16"][name] - value).abs().max() > 0
        for name, value in after["ham", "training"].items()
        if value.is_floating_point()
    ]
    assert any(moved)
