"""Parts of runs that the tests start on several numbers of processes and engines, and put together again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.data import PixelBatch
from ham_hf.methods import HAM, Method, TradesLoss
from ham_hf.training.checkpoint import load_best
from ham_hf.training.sharding import whole_state
from ham_hf.training.trainer import Trainer
from tests.support.method_checks import every_method
from tests.support.nets import TensorImages, group_norm_net
from tests.support.training import image_data, trainer

ATTACK = Attack(threat_model=ThreatModel("linf", 0.06), num_steps=3, step_size=0.03)
METHODS: dict[str, Method] = {
    "ham": HAM(mining_start_epoch=0, mining_step=1),
    # Looks at training logits before it weighs.
    "faal": every_method()["faal"][0],
    # Looks at held-out images before every epoch.
    "wat": every_method()["wat"][0],
}
RELAY = {2: 2, 1: 4, 4: 6}
"""Processes of each leg of one run, and the update that it goes to; an epoch has three."""
RELAY_METHOD = every_method()["ham-cfa"][0]


class RecordedImages(TensorImages):
    """Images that note which of them were asked for."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        super().__init__(x, labels)
        self.seen: list[list[int]] = []

    def batches(self, requests, *, device) -> Iterator[PixelBatch]:
        for batch in super().batches(requests, device=device):
            self.seen.append(batch.indices.tolist())
            yield batch


@contextmanager
def no_random_start() -> Iterator[None]:
    """Attacks start at or near the clean image: random starts differ with the process, all else must not."""

    def near(self, x, threat_model, generator):
        # Not the clean image itself, where the KL divergence has no gradient but rounding.
        return x + 0.001 * torch.linspace(-2, 3, x[0].numel()).view(x[0].shape)

    with (
        mock.patch.object(ThreatModel, "random_start", lambda self, x, generator=None: x.clone()),
        mock.patch.object(TradesLoss, "start", near),
    ):
        yield


def make_trainer(accelerator, folder, method, labels=range(4), **changes) -> Trainer:
    """Two epochs of three updates of 16 images; float64, no batch statistics; in training, other ``labels``."""
    data = image_data(48)
    for part in (data.train, data.validation):
        part.x = part.x.double().expand(-1, 3, -1, -1)
    data = replace(data, train=RecordedImages(data.train.x, torch.tensor(labels)[data.train.labels]))
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8 // accelerator.num_processes,
        "gradient_accumulation_steps": 2,
        "ema_decay": None,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        **changes,
    }
    more = {"eval_batch_size": 20}
    return trainer(folder, method, data, group_norm_net(), ATTACK, accelerator, more, **settings)


def outcome(run: Trainer) -> dict[str, Tensor]:
    """Final weights, class state and selected weights."""
    found = {f"weights.{key}": value for key, value in whole_state(run.module.state_dict()).items()}
    found |= {f"method.{key}": value for key, value in run.method_state.tensors().items()}
    found["best"] = torch.cat([value.flatten() for value in load_best(run.output_dir)[0].values()])
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def run_sharded(accelerator: Accelerator, folder: Path) -> dict[str, Tensor]:
    """Whole runs with sharded weights, and one stopped in mid-epoch and continued from its checkpoint."""
    found = {}
    for label, method in METHODS.items():
        run = make_trainer(accelerator, folder / label, method)
        assert sum(isinstance(part, FSDPModule) for part in run.module.modules()) > 1, "nothing is sharded"
        run.fit()
        found |= {f"{label}/{key}": value for key, value in outcome(run).items()}
        accelerator.free_memory()
    make_trainer(accelerator, folder / "stopped", METHODS["ham"], max_steps=4).fit()
    accelerator.free_memory()
    run = make_trainer(accelerator, folder / "stopped", METHODS["ham"], resume_from_checkpoint="latest")
    run.resume()
    run.fit()
    return found | {f"resumed/{key}": value for key, value in outcome(run).items()}


def run_leg(accelerator: Accelerator, folder: Path) -> dict[str, Tensor]:
    """The part of the relay that belongs to this number of processes, from where the one before got to."""
    world, rank = accelerator.num_processes, accelerator.process_index
    changes = {"per_device_train_batch_size": 4, "max_steps": RELAY[world], "resume_from_checkpoint": "latest"}
    run = make_trainer(accelerator, folder, RELAY_METHOD, **changes)
    run.resume()
    first = run.progress.step
    run.fit()
    seen = {"first": first, "accumulation": run.config.gradient_accumulation_steps, "indices": run.data.train.seen}
    (folder / f"seen-{world}-{rank}.json").write_text(json.dumps(seen))
    return outcome(run)
