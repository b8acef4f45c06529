"""Every method through the trainer: resumes bit for bit, survives missing classes, and 100 classes in bf16."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from ham_hf.attacks import Attack, ThreatModel
from tests.faults.same_runs import assert_same_weights
from tests.support.method_checks import every_method
from tests.support.nets import TensorImages
from tests.support.training import cut_off, image_data, resumed

METHODS = every_method()
ATTACK = Attack(threat_model=ThreatModel("linf", 0.1), num_steps=3, step_size=0.05)


def of_method(folder, label, data=None, net=None, accelerator=None, **changes):
    """A `resumed` trainer of the method."""
    objective, own = METHODS[label]
    settings = {"ema_decay": None, **own, **changes}
    return resumed(folder, objective, data, net, ATTACK, accelerator, **settings)


def few_classes():
    """Class 3 is nowhere, class 2 not held out; 3 updates an epoch."""
    data = image_data(26)
    data.train.labels = torch.where(data.train.labels == 3, 1, data.train.labels)
    held_out = TensorImages(data.validation.x[:16], data.validation.labels[:16] % 2)
    return replace(data, validation=held_out)


@pytest.mark.parametrize("label", METHODS)
def test_resumes_bit_for_bit_and_a_class_without_an_image_does_no_harm(tmp_path, label):
    """Cut in the middle of the second epoch and at its end: 3 updates an epoch, checkpoints every 2 and at the end."""
    whole = of_method(tmp_path / "whole", label, few_classes(), save_steps=2).fit()
    json.dumps(whole.history, allow_nan=False)
    weights = [f"checkpoint-9/{path.name}" for path in (tmp_path / "whole/checkpoint-9").glob("*.safetensors")]
    for name in weights:
        assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "whole" / name).values()), name
    for cut_at in (4, 6):
        folder = cut_off(tmp_path / "whole", tmp_path / f"cut{cut_at}", cut_at)
        run = of_method(folder, label, few_classes(), save_steps=2)
        assert run.progress.step == cut_at
        again = run.fit()
        assert_same_weights(folder, tmp_path / "whole", *weights)
        assert again.history == whole.history


@pytest.mark.parametrize("label", METHODS)
def test_a_hundred_classes_in_bf16(tmp_path, label):
    x = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = TensorImages(x, torch.arange(120) % 100)
    names = tuple(f"class {i}" for i in range(100))
    data = replace(image_data(), train=images, validation=images, class_names=names)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100))
    changes = {"num_train_epochs": 2, "per_device_train_batch_size": 40, "save_steps": None}
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        progress = of_method(tmp_path / "run", label, data, net, accelerator, **changes).fit()
    finally:
        AcceleratorState._reset_state(True)
    json.dumps(progress.history, allow_nan=False)
    assert progress.step == 6
    for parameter in net.parameters():
        assert parameter.dtype == torch.float32
        assert torch.isfinite(parameter).all()


def test_a_sampler_shows_what_it_drew(tmp_path):
    run = of_method(tmp_path / "run", "cfol")
    object.__setattr__(run.method.rule, "cfol_eta", 0.05)
    last = run.fit().history[-1]
    drawn = run.method_state.states["cfol"]["probabilities"] * 4
    assert max(last["class_weight"]) > 1.15 > 0.9 > min(last["class_weight"])
    assert torch.tensor(last["class_weight"]).argmax() == drawn.argmax()


def test_a_resumed_run_keeps_what_its_class_state_depends_on(tmp_path):
    of_method(tmp_path / "run", "wat", max_steps=4).fit()
    with pytest.raises(ValueError, match="per_device_eval_batch_size 256 -> 20"):
        of_method(tmp_path / "run", "wat", more={"eval_batch_size": 20})
