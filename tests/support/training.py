"""A small training: made-up images, a network of two layers, and the trainer with its settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.config import TrainingConfig
from ham_hf.data import ImageData
from ham_hf.methods import HAM
from ham_hf.training.checkpoint import list_checkpoints, step_of
from ham_hf.training.trainer import Trainer
from tests.support.nets import TensorImages

ATTACK = Attack(threat_model=ThreatModel("linf", 0.05), num_steps=3, step_size=0.02)
HAM_FROM_1 = HAM(mining_start_epoch=1, mining_step=1)


def images(count, seed):
    """Classes that differ in brightness, with noise: easy to learn, not trivial."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    x = 0.2 * labels.view(-1, 1, 1, 1) + 0.1 + 0.25 * torch.rand(count, 1, 8, 8, generator=generator)
    return TensorImages(x, labels)


def tensors(num: int, seed: int = 0, side: int = 8) -> TensorDataset:
    """Noise in three channels, with four classes in turn."""
    x = torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, torch.arange(num) % 4)


def image_data(num_train=50, *, validation=True):
    return ImageData(
        name="made up",
        config_name=None,
        revision=None,
        train=images(num_train, 0),
        validation=images(64, 1) if validation else None,
        test=images(16, 2),
        class_names=("a", "b", "c", "d"),
        image_size=8,
        in_chans=1,
        crop_pct=1.0,
        interpolation="bilinear",
        channel_mean=(0.5,),
        channel_std=(0.25,),
        augmentation="none",
        num_skipped=0,
        test_split_origin="test",
    )


def make_net(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def config(folder, **changes):
    settings = TrainingConfig(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        lr_scheduler_type="cosine",
        lr_step_unit="step",
        ema_decay=0.9,
        logging_steps=2,
        save_steps=4,
        save_total_limit=None,
        validation_num_steps=3,
        use_cpu=True,
        disable_tqdm=True,
    )
    return replace(settings, **changes)


def trainer(folder, method=HAM_FROM_1, data=None, net=None, attack=ATTACK, accelerator=None, more=None, **changes):
    """A trainer with these changes of its `config`, and ``more`` arguments."""
    settings, accelerator = config(folder, **changes), accelerator or Accelerator(cpu=True)
    return Trainer(net or make_net(), data or image_data(), method, attack, settings, accelerator, **(more or {}))


def resumed(folder, *args, **options):
    """A `trainer` that has gone to its checkpoint: the latest one unless another is named."""
    run = trainer(folder, *args, **({"resume_from_checkpoint": "latest"} | options))
    run.resume()
    return run


def cut_off(whole, folder, last):
    """A copy of a run as a kill leaves it: no checkpoint after update ``last``, the log lines of later updates."""
    shutil.copytree(whole, folder)
    for path in list_checkpoints(folder):
        if step_of(path) > last:
            shutil.rmtree(path)
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
