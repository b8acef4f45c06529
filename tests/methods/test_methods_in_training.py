"""Every method through the trainer: resumes bit for bit, survives missing classes, bf16 and 100 classes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.training.checkpoint import list_checkpoints
from ham_hf.training.trainer import Trainer
from tests.support.method_checks import every_method
from tests.support.nets import TensorImages
from tests.support.training import config, image_data, make_net

METHODS = every_method()
ATTACK = Attack(threat_model=ThreatModel("linf", 0.1), num_steps=3, step_size=0.05)


def trainer(folder, label, data=None, net=None, **changes):
    objective, own = METHODS[label]
    settings = {"num_train_epochs": 3, "ema_decay": None, "save_steps": 4, **own, **changes}
    return Trainer(
        net or make_net(), data or image_data(), objective, ATTACK, config(folder, **settings), Accelerator(cpu=True)
    )


@pytest.mark.parametrize("label", METHODS)
def test_resumes_bit_for_bit(tmp_path, label):
    """Cut in the middle of the second epoch and at its end: 6 updates an epoch, checkpoints every 4."""
    whole = trainer(tmp_path / "whole", label).fit()
    for cut_at in (8, 12):
        folder = tmp_path / f"cut{cut_at}"
        shutil.copytree(tmp_path / "whole", folder)
        for path in list_checkpoints(folder):
            if int(path.name.split("-")[1]) > cut_at:
                shutil.rmtree(path)
        run = trainer(folder, label, resume_from_checkpoint="latest")
        run.resume()
        assert run.progress.step == cut_at
        again = run.fit()
        for path in (tmp_path / "whole/checkpoint-18").glob("*.safetensors"):
            theirs, ours = load_file(path), load_file(folder / "checkpoint-18" / path.name)
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(ours[key], value) for key, value in theirs.items()), path.name
        assert again.history == whole.history


@pytest.mark.parametrize("label", METHODS)
def test_class_without_an_image_does_no_harm(tmp_path, label):
    """Class 3 is nowhere, class 2 not held out; and the history is JSON without NaN."""
    data = image_data()
    data.train.labels = torch.where(data.train.labels == 3, 1, data.train.labels)
    data.validation.labels = data.validation.labels % 2
    progress = trainer(tmp_path / "run", label, data).fit()
    json.dumps(progress.history, allow_nan=False)
    state = load_file(tmp_path / "run/checkpoint-18/method.safetensors")
    weights = load_file(tmp_path / "run/checkpoint-18/model.safetensors")
    assert all(torch.isfinite(value).all() for value in [*state.values(), *weights.values()])


@pytest.mark.parametrize("label", METHODS)
def test_bf16_runs(tmp_path, label):
    AcceleratorState._reset_state(True)
    try:
        objective, own = METHODS[label]
        settings = {"num_train_epochs": 2, "ema_decay": None, "save_steps": None, **own}
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        run = Trainer(make_net(), image_data(), objective, ATTACK, config(tmp_path / "run", **settings), accelerator)
        progress = run.fit()
    finally:
        AcceleratorState._reset_state(True)
    assert all(parameter.dtype == torch.float32 for parameter in run.module.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in run.module.parameters())
    assert progress.step == 12


@pytest.mark.parametrize("label", METHODS)
def test_a_hundred_classes(tmp_path, label):
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"class {i}" for i in range(100))
    images = TensorImages(torch.rand(200, 1, 8, 8, generator=generator), torch.arange(200) % 100)
    made = image_data()
    data = type(made)(**{**vars(made), "train": images, "validation": images, "class_names": names})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100))
    changes = {"num_train_epochs": 2, "per_device_train_batch_size": 40, "save_steps": None}
    progress = trainer(tmp_path / "run", label, data, net, **changes).fit()
    json.dumps(progress.history, allow_nan=False)
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())


def test_a_sampler_shows_what_it_drew(tmp_path):
    run = trainer(tmp_path / "run", "cfol")
    object.__setattr__(run.objective.rule, "cfol_eta", 0.05)
    last = run.fit().history[-1]
    drawn = run.method_state.states["cfol"]["probabilities"] * 4
    assert max(last["class_weight"]) > 1.15 > 0.9 > min(last["class_weight"])
    assert torch.tensor(last["class_weight"]).argmax() == drawn.argmax()


def test_a_resumed_run_keeps_what_its_class_state_depends_on(tmp_path):
    trainer(tmp_path / "run", "wat", max_steps=4).fit()
    run = trainer(tmp_path / "run", "wat", resume_from_checkpoint="latest")
    run.eval_batch_size = 20
    with pytest.raises(ValueError, match="per_device_eval_batch_size 256 -> 20"):
        run.resume()
