"""Trains a few updates with every method and writes the weights and the class state; run it on 1 or 2 processes.

Attacks start at or near the clean image: random starts differ with the process, everything else must not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from ham_hf.training.launch import create_accelerator
from tests.distributed.legs import make_trainer, no_random_start
from tests.support.method_checks import every_method


def run(accelerator, method, folder, changes):
    """Weights, class state and history of a run in which one process alone meets a class, and neither another one."""
    settings = {"learning_rate": 0.5, "max_grad_norm": None, **changes}
    run = make_trainer(accelerator, folder, method, labels=[0, 1, 2, 2], **settings)
    run.fit()
    found = {f"weights.{key}": value for key, value in run.selected_module.state_dict().items()}
    found |= {f"state.{key}": value for key, value in run.method_state.tensors().items()}
    found["log"] = run._class_log()
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def main(folder: str) -> None:
    accelerator = create_accelerator()
    found = {"num_processes": torch.tensor(accelerator.num_processes)}
    for label, (method, changes) in every_method().items():
        if hasattr(method, "fat_omega"):
            object.__setattr__(method, "fat_omega", 0.0)
        with no_random_start():
            values = run(accelerator, method, Path(folder) / label, changes)
        flat = torch.cat([value.double().flatten() for value in values.values()])
        copies = accelerator.gather(flat[None])
        assert all(torch.equal(copies[0], other) for other in copies), f"{label}: processes differ"
        found |= {f"{label}/{key}": value for key, value in values.items()}
    if accelerator.is_main_process:
        save_file(found, Path(folder) / "found.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
