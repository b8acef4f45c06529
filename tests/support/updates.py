"""One update of a method, with the rows of every forward pass."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.training.config import TrainingConfig
from ham_hf.training.train_step import TrainStep
from tests.support.nets import pixel_batch

ATTACK = Attack(threat_model=ThreatModel("linf", 0.03), num_steps=5, step_size=0.01)


def train_step(net, optimizer, method, attack, accelerator, *, class_counts, average=None, **settings):
    """A `TrainStep` whose settings are the defaults but for ``settings``, with images as they come."""
    config = TrainingConfig(**{"memory_format": "contiguous", **settings})
    return TrainStep(net, optimizer, method, attack, accelerator, config, class_counts=class_counts, average=average)


def updated(method, net, batches, *, epoch=0, number=0, attack=ATTACK, num_classes=10, prepare=lambda step: None):
    """One update of a copy of the network: the step with the updated copy, its totals, and the rows of every pass."""
    net, rows = copy.deepcopy(net), []
    net.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    optimizer, counts = torch.optim.SGD(net.parameters(), lr=1.0), torch.full((num_classes,), 5)
    step = train_step(net, optimizer, method, attack, Accelerator(cpu=True), class_counts=counts, seed=3)
    prepare(step)
    totals = step([pixel_batch(x, y) for x, y in batches], epoch=epoch, step=number)
    return step, totals, rows
