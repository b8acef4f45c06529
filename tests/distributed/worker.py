"""Run by `accelerate launch` from the tests here: the same updates on any number of processes and engine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.evaluation import NamedAttack, Workplace, evaluate
from ham_hf.evaluation.autoattack import evaluate_autoattack
from ham_hf.evaluation.corruption_accuracy import evaluate_corruptions
from ham_hf.evaluation.foreign import foreign_attack
from ham_hf.methods import HAM
from ham_hf.training.launch import create_accelerator
from ham_hf.training.sharding import prepare, whole_state
from tests.distributed.legs import make_trainer, no_random_start, run_leg, run_sharded
from tests.support.method_checks import every_method
from tests.support.nets import TensorImages, Watched, batch_norm_net, group_norm_net, labeled_for, pixel_batch
from tests.support.updates import train_step

ROWS = 16
# Which of the 16 rows of an update are hard. Two processes with two accumulation steps each get four rows a time:
# first accumulation step: rows 0-3 and 4-7, second: rows 8-11 and 12-15.
PATTERNS = {
    "uneven": "1111 1000 1010 1110",
    "second_process_has_none": "1101 0000 1000 0000",
    "last_accumulation_step_has_none": "1101 1000 0000 0000",
    "first_accumulation_step_has_none": "0000 0000 0010 1100",
    "none_anywhere": "0000 0000 0000 0000",
}
SCENARIOS = {name: [mark == "1" for mark in pattern.replace(" ", "")] for name, pattern in PATTERNS.items()}
NO_ATTACK = Attack(threat_model=ThreatModel("linf", 0.0), num_steps=2, step_size=0.01)


def scenario_data(net: torch.nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(ROWS, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x, labeled_for(net, x, SCENARIOS[name])


def assert_same_on_all(accelerator: Accelerator, state: dict[str, torch.Tensor], label: str) -> None:
    """Every process must hold the same copy."""
    flat = torch.cat([value.double().flatten() for value in state.values()])
    copies = accelerator.gather(flat[None])
    assert all(torch.equal(copies[0], other) for other in copies), f"{label}: processes differ"


def run_update(accelerator: Accelerator, name: str, *, batch_norm: bool) -> dict[str, torch.Tensor]:
    """Parameters (and buffers) after one update of lr 1 without momentum."""
    net = batch_norm_net() if batch_norm else group_norm_net()
    x, y = scenario_data(net, name)
    wrapped, optimizer = prepare(accelerator, net, torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9))
    ham, counts = HAM(mining_start_epoch=0, mining_step=1), torch.full((4,), 4)
    step = train_step(wrapped, optimizer, ham, NO_ATTACK, accelerator, class_counts=counts, seed=0)
    size = ROWS // accelerator.num_processes // 2
    parts = torch.arange(ROWS).view(2, accelerator.num_processes, size)[:, accelerator.process_index]
    totals = step([pixel_batch(x[part], y[part]) for part in parts], epoch=0, step=0)
    counts = accelerator.reduce(step.method_state.log.clone(), "sum")
    state = whole_state(accelerator.unwrap_model(wrapped).state_dict())
    state = {key: value.double() for key, value in state.items()}
    assert_same_on_all(accelerator, state, name)
    return state | {
        "totals": torch.tensor([totals.loss, totals.updates, totals.hard, totals.mined, totals.seen]).double(),
        "counts": counts.double(),
    }


def random_signs(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """An attack that draws from torch's global random state."""
    return (x + 0.05 * torch.randn_like(x).sign()).clamp(0, 1)


def run_evaluation(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    net = group_norm_net()
    x = torch.rand(23, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    y = labeled_for(net, x, [i % 5 == 0 for i in range(23)])
    threat, place = ThreatModel("linf", 0.05), Workplace(accelerator=accelerator, batch_size=4, seed=1)
    # Of two processes, the second one has to halve its batches; the first one does not wait for it.
    attacked = Watched(net, limit_always=2) if accelerator.process_index else net
    pgd = NamedAttack(name="pgd", threat_model=threat, num_steps=3, step_size=0.02)
    noise = replace(foreign_attack("noise", random_signs), threat_model=threat)
    results = evaluate(attacked, TensorImages(x, y), [pgd, noise], place)
    attacked.float()
    images = TensorImages(x.float(), y)
    auto = evaluate_autoattack(attacked, images, place, num_classes=4, threat_model=threat, num_examples=7)
    corrupted = evaluate_corruptions(attacked, images, ["gaussian_noise", "fog"], [1, 5], place)
    parts = ("flags", "predictions", "margins", "indices")
    every = {**results, "autoattack": auto}
    found = {f"{name}_{part}": getattr(result, part).clone() for name, result in every.items() for part in parts}
    return found | {"corrupted": torch.stack([corruption.flags for corruption in corrupted])}


def run_methods(accelerator: Accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """Weights, class state and log of a few updates with every method.

    One process alone meets a class, and neither another one.
    """
    found = {}
    for label, (method, changes) in every_method().items():
        if hasattr(method, "fat_omega"):
            object.__setattr__(method, "fat_omega", 0.0)
        settings = {"learning_rate": 0.5, "max_grad_norm": None, **changes}
        run = make_trainer(accelerator, folder / label, method, labels=[0, 1, 2, 2], **settings)
        with no_random_start():
            run.fit()
        state = {f"weights.{key}": value for key, value in run.selected_module.state_dict().items()}
        state |= {f"state.{key}": value for key, value in run.method_state.tensors().items()}
        state["log"] = run._class_log()
        assert_same_on_all(accelerator, state, label)
        found |= {f"{label}/{key}": value.detach().clone().contiguous() for key, value in state.items()}
    return found


def run_engine(accelerator: Accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """Updates, evaluations and runs, as far as the engine has them."""
    found = {}
    for name in SCENARIOS:
        for kind in ("group_norm", "batch_norm"):
            state = run_update(accelerator, name, batch_norm=kind == "batch_norm")
            found |= {f"{kind}/{name}/{key}": value.contiguous() for key, value in state.items()}
            accelerator.free_memory()
    if accelerator.num_processes <= 2 and not accelerator.is_fsdp2:
        found |= {f"evaluation/{key}": value for key, value in run_evaluation(accelerator).items()}
    with no_random_start():
        run = run_sharded if accelerator.is_fsdp2 else run_leg
        found |= {f"trained/{key}": value for key, value in run(accelerator, folder).items()}
    return found


def main(what: str, target: str, folder: str) -> None:
    accelerator = create_accelerator(use_cpu=True)
    found = {"engine": run_engine, "methods": run_methods}[what](accelerator, Path(folder))
    found["num_processes"] = torch.tensor(accelerator.num_processes)
    if accelerator.is_main_process:
        save_file(found, target)
    accelerator.end_training()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(*sys.argv[1:])
