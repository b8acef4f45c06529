"""A checkpoint of one tensor, and the files of every whole one."""

from __future__ import annotations

import torch

from ham_hf.training.checkpoint import Checkpoint

FILES = ["model.safetensors", "averaged.safetensors", "method.safetensors", "best.safetensors", "optimizer.pt"]
FILES += ["trainer_state.json", "SHA256SUMS"]


def make(step, value=1.0):
    weights = {"w": torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)}
    optimizer = {"state": {0: {"m": torch.ones(2)}}}
    return Checkpoint(model=weights, averaged=None, method={}, optimizer=optimizer, state={"step": step})
