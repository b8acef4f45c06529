"""Which checkpoint a run goes on from, and whether it belongs to the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ham_hf.config import TrainingConfig
from ham_hf.data import ImageData, TrainingStream
from ham_hf.objectives import InnerAttack, Objective
from ham_hf.training.checkpoint import STATE_FILE, find_checkpoint, tidy

MAY_CHANGE = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "num_train_epochs",
        "max_steps",
        "max_train_hours",
        "per_device_train_batch_size",  # with the accumulation and the processes it makes examples_per_update
        "gradient_accumulation_steps",
        "memory_format",
        "torch_compile",
        "use_cpu",
        "ddp_timeout",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "report_to",
        "disable_tqdm",
    }
)
"""Settings of the training loop that a resumed run may change."""


def anywhere(accelerator: Accelerator, happened: bool) -> bool:
    """Whether it happened on any process; they all wait for each other."""
    count: Tensor = accelerator.reduce(torch.tensor(float(happened), device=accelerator.device), "sum")
    return count.item() > 0


def agreed_checkpoint(output_dir: Path, name: str, accelerator: Accelerator) -> Path | None:
    """What `find_checkpoint` finds, the same on every process: the main one reads and compares all files.

    Args:
        output_dir: output folder of the run.
        name: "latest" or the path of a checkpoint folder.
        accelerator: of the processes, all of which have to call this.

    Returns:
        None if there is no checkpoint yet.

    Raises:
        ValueError: see `find_checkpoint`; and if a process does not find what the main one does.
    """
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        tidy(output_dir)
        try:
            found = [find_checkpoint(output_dir, name), None]
        except ValueError as error:
            found = [None, str(error)]
    path, problem = broadcast_object_list(found)
    if problem is not None:
        raise ValueError(problem)
    if path is None:
        return None
    path = Path(path)
    if anywhere(accelerator, not (path / STATE_FILE).is_file()):
        raise ValueError(
            f"--resume_from_checkpoint {name}: not every process finds {path}, from which the main one resumes; "
            f"--output_dir {output_dir} has to be on a file system that all nodes share"
        )
    return path


def run_plan(
    config: TrainingConfig,
    objective: Objective,
    attack: InnerAttack,
    data: ImageData,
    module: nn.Module,
    *,
    per_update: int,
    num_processes: int,
    eval_batch_size: int,
    besides: Mapping[str, object],
) -> dict[str, Any]:
    """What a run that continues another must share: data, network, method, and all that decides an update.

    Args:
        config: settings of the training loop.
        objective: training method.
        attack: attack of the inner maximization.
        data: training and held-out images.
        module: the network.
        per_update: examples of an update, over all processes and accumulation steps.
        num_processes: number of processes.
        eval_batch_size: images per batch and process when validating.
        besides: what else has to stay, by the name of its setting.

    Returns:
        JSON types only, as they come back from a checkpoint.
    """
    plan = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    plan |= {f"{objective.name}.{name}": value for name, value in asdict(objective).items()}
    plan |= {
        "method": objective.name,
        "norm": attack.threat_model.norm,
        "epsilon": float(attack.threat_model.epsilon),
        "num_steps": attack.num_steps,
        "step_size": attack.step_size,
        "examples_per_update": per_update,
        "num_train_examples": len(data.train),
        "num_validation_examples": len(data.validation) if data.validation is not None else 0,
        "class_names": data.class_names,
        "augmentation": data.augmentation,
        "parameter_shapes": [list(parameter.shape) for parameter in module.parameters()],
        # A folder may move; its name may not.
        "dataset": [Path(data.name).name, data.config_name, data.revision],
        "image_size": data.image_size,
        "in_chans": data.in_chans,
        "crop_pct": data.crop_pct,
        "interpolation": data.interpolation,
        **besides,
    }
    if data.crop_mode != "center":  # checkpoints of earlier versions know no other
        plan["crop_mode"] = data.crop_mode
    if isinstance(data.train, TrainingStream):
        plan["stream"] = data.train.plan(per_update)
    if objective.depends_on_split:
        plan["split"] = [config.per_device_train_batch_size, num_processes]
    if config.uses_fawa(objective) or any(part.uses_held_out for part in objective.parts):
        # The noise of held-out images is numbered by batch.
        plan["per_device_eval_batch_size"] = eval_batch_size
    # Through JSON: tuples become lists.
    same_types: dict[str, Any] = json.loads(json.dumps(plan))
    return same_types


def check_same_run(checkpoint: Path, saved: dict[str, Any], plan: dict[str, Any]) -> None:
    """Refuse a checkpoint whose plan is another one.

    Raises:
        ValueError: naming what differs.
    """
    changed = [
        f"{key} {str(saved.get(key))[:60]} -> {str(plan.get(key))[:60]}"
        for key in {**saved, **plan}
        if saved.get(key) != plan.get(key)
    ]
    if "split" in plan and saved.get("split") != plan["split"]:
        changed.append(
            f"an update of --method {plan['method']} with these options depends on how its examples are split into "
            "batches, so batch size and number of processes have to stay"
        )
    if changed:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} belongs to a run with other settings: {'; '.join(changed)}; "
            "resume with the same ones, or start a new run in another --output_dir"
        )
