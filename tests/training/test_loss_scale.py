"""Training in float16 with a scaled loss, on the CPU: its autocast and its scaler are real, its use is not.

accelerate scales the loss on accelerators alone, so the accelerator is told of both here.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import HAM, PGDAT
from ham_hf.training.launch import create_accelerator
from ham_hf.training.sharding import prepare
from ham_hf.training.train_step import NonFiniteLossError
from tests.support.nets import pixel_batch
from tests.support.training import log_of, resumed
from tests.support.updates import train_step


def scaled_accelerator(scale, growth_interval=2000):
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return accelerator


@pytest.fixture(autouse=True)
def precision_of_this_test_alone():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


BATCH = (torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)


def step_of(accelerator, objective=PGDAT(), **options):  # noqa: B008 (frozen)
    net = small_net()
    wrapped, optimizer = prepare(accelerator, net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    attack = Attack(threat_model=ThreatModel("linf", 0.05), num_steps=2, step_size=0.03)
    return net, train_step(
        wrapped, optimizer, objective, attack, accelerator, class_counts=torch.full((3,), 4), seed=0, **options
    )


@pytest.mark.parametrize(
    ("objective", "options"),
    [(PGDAT(), {}), (HAM(mining_start_epoch=0, mining_step=1, easy_weight=0.5), {"max_grad_norm": 0.1}),
     (PGDAT(), {"awp_gamma": 0.01, "max_grad_norm": 0.1})],
)  # fmt: skip
def test_a_scaled_update_is_that_of_float32_up_to_rounding(objective, options):
    found = []
    for make in (lambda: Accelerator(cpu=True), lambda: scaled_accelerator(1024.0)):
        accelerator = make()
        net, step = step_of(accelerator, objective, **options)
        totals = step([pixel_batch(*BATCH)], epoch=0, step=0)
        assert (totals.updates, totals.overflows) == (1, 0)
        found.append((net.state_dict(), totals.loss))
    assert found[1][1] == pytest.approx(found[0][1], rel=0.01)
    before = small_net().state_dict()
    for name, value in found[0][0].items():
        moved = (value - before[name]).float().norm()
        assert (found[1][0][name] - value).float().norm() <= 0.05 * moved + 1e-6, name


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"awp_gamma": 0.01}])
def test_an_overflow_skips_the_update_and_lowers_the_scale(options):
    accelerator = scaled_accelerator(2.0**40)
    net, step = step_of(accelerator, **options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    totals = step([pixel_batch(*BATCH)], epoch=0, step=0)
    assert (totals.updates, totals.overflows, totals.loss) == (0, 1, 0)
    assert accelerator.scaler.get_scale() == 2.0**39
    for name, value in net.state_dict().items():
        # A perturbation is added to the weights and subtracted again.
        assert torch.equal(value, before[name]) or options.get("awp_gamma"), name
        assert torch.allclose(value, before[name], rtol=0, atol=1e-7), name
    for number in range(1, 40):
        if step([pixel_batch(*BATCH)], epoch=0, step=number).updates:
            break
    assert 0 < accelerator.scaler.get_scale() < 2.0**39
    assert not all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_overflow_of_the_perturbation_alone_skips_the_update(monkeypatch):
    accelerator = scaled_accelerator(1024.0)
    net, step = step_of(accelerator, awp_gamma=0.01)
    real, calls = step._backward, []

    def first_overflows(works, place):
        result = real(works, place)
        calls.append(place)
        if len(calls) == 1:
            net[1].weight.grad[0, 0] = math.inf
        return result

    monkeypatch.setattr(step, "_backward", first_overflows)
    assert step([pixel_batch(*BATCH)], epoch=0, step=0).overflows == 1
    assert len(calls) == 2
    assert accelerator.scaler.get_scale() == 512


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_what_is_not_finite_without_a_scale_ends_training(scale, monkeypatch):
    net, step = step_of(scaled_accelerator(scale))
    net[1].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError, match="gradient of update 0"):
        step([pixel_batch(*BATCH)], epoch=0, step=0)


def run(folder, accelerator, **changes):
    settings = {"ema_decay": None, "mixed_precision": "fp16", "max_grad_norm": 1.0, **changes}
    method = HAM(mining_start_epoch=1, mining_step=1, easy_weight=0.5)
    made = resumed(folder, method, accelerator=accelerator, **settings)
    return made, made.fit()


def test_a_resumed_run_repeats_scale_and_weights_bit_for_bit(tmp_path):
    whole, progress = run(tmp_path / "whole", scaled_accelerator(2.0**22, growth_interval=4))
    assert 0 < progress.overflowed_updates < progress.step
    scales = [line["loss_scale"] for line in log_of(tmp_path / "whole") if line["type"] == "train"]
    assert len(set(scales)) > 2
    last = [line for line in log_of(tmp_path / "whole") if line["type"] == "train"][-1]
    assert last["overflowed_updates"] == progress.overflowed_updates
    assert last["skipped_updates"] == 0

    # Stopped where the scale has been lowered and has begun to grow again.
    run(tmp_path / "cut", scaled_accelerator(2.0**22, growth_interval=4), max_steps=12)
    saved = json.loads((tmp_path / "cut/checkpoint-12/trainer_state.json").read_text())
    assert saved["loss_scale"]["scale"] != 2.0**22
    again, finished = run(tmp_path / "cut", scaled_accelerator(65536.0, growth_interval=4))
    assert finished.loss_scale == progress.loss_scale
    assert finished.overflowed_updates == progress.overflowed_updates
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name


def test_fp16_is_refused_on_the_cpu():
    with pytest.raises(ValueError, match="--mixed_precision fp16 is for accelerators, and this run is on the cpu"):
        create_accelerator(use_cpu=True, mixed_precision="fp16")
