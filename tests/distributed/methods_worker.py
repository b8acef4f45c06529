"""Trains a few updates with every method and writes the weights and the class state; run it on 1 or 2 processes.

Attacks start at or near the clean image: random starts differ with the process, everything else must not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from ham_hf.attacks import Attack, ThreatModel
from ham_hf.training.launch import create_accelerator
from ham_hf.training.trainer import Trainer
from tests.distributed.legs import no_random_start
from tests.support.method_checks import every_method
from tests.support.nets import group_norm_net
from tests.support.training import config, image_data

ATTACK = Attack(threat_model=ThreatModel("linf", 0.06), num_steps=4, step_size=0.025)


def run(accelerator, objective, folder, changes):
    """Weights, class state and history after two epochs of three updates of 16 images."""
    data = image_data(48)
    for part in (data.train, data.validation):
        part.x = part.x.double().expand(-1, 3, -1, -1)
    # A class that only one process meets, and one that nobody does.
    data.train.labels = torch.where(data.train.labels == 3, 2, data.train.labels)
    world = accelerator.num_processes
    settings = config(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        learning_rate=0.5,
        **({"ema_decay": None} | changes),
    )
    run = Trainer(group_norm_net(), data, objective, ATTACK, settings, accelerator, eval_batch_size=20)
    run.fit()
    found = {f"weights.{key}": value for key, value in run.selected_module.state_dict().items()}
    found |= {f"state.{key}": value for key, value in run.method_state.tensors().items()}
    found["log"] = run._class_log()
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def main(folder: str) -> None:
    accelerator = create_accelerator()
    found = {"num_processes": torch.tensor(accelerator.num_processes)}
    for label, (objective, changes) in every_method().items():
        if hasattr(objective, "fat_omega"):
            object.__setattr__(objective, "fat_omega", 0.0)
        with no_random_start():
            values = run(accelerator, objective, Path(folder) / label, changes)
        flat = torch.cat([value.double().flatten() for value in values.values()])
        copies = accelerator.gather(flat[None])
        assert all(torch.equal(copies[0], other) for other in copies), f"{label}: processes differ"
        found |= {f"{label}/{key}": value for key, value in values.items()}
    if accelerator.is_main_process:
        save_file(found, Path(folder) / "found.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
