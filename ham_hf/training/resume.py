"""Which checkpoint a run continues from, and whether it belongs to the same run.

A run may continue with another number of processes. A checkpoint's ``examples_per_update`` and the learning rate stay
what they were. Where ``processes x per_device_train_batch_size x gradient_accumulation_steps`` would make another
number, the accumulation is recomputed; where no accumulation can, the run is refused with values that work. As every
update takes the next examples of an order that only the seed and the epoch decide (`ham_hf.training.data_order`), each
example is still seen once per epoch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ham_hf.attacks import Attack
from ham_hf.data import ImageData, TrainingStream
from ham_hf.methods import Method
from ham_hf.training.checkpoint import STATE_FILE, find_checkpoint, list_checkpoints, tidy
from ham_hf.training.config import TrainingConfig
from ham_hf.training.optimization import depends_on_end

logger = logging.getLogger(__name__)

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
        "run_name",
        "project",
        "trackio_space_id",
        "disable_tqdm",
    }
)
"""Settings of the training loop that a resumed run may change."""
MATTERS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "memory_format",
    "torch_compile",
)
"""Those of them that can change numbers, if only in the last bits or by a validation more."""


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
    objective: Method,
    attack: Attack,
    data: ImageData,
    module: nn.Module,
    *,
    accelerator: Accelerator,
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
        accelerator: knows the number of processes.
        eval_batch_size: images per batch and process when validating.
        besides: what else has to stay, by the name of its setting.

    Returns:
        JSON types only, as they come back from a checkpoint.
    """
    split = [config.per_device_train_batch_size, accelerator.num_processes]
    per_update = math.prod(split) * config.gradient_accumulation_steps
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
    if depends_on_end(config.lr_scheduler_type):
        plan["num_train_epochs"] = config.num_train_epochs
    if isinstance(data.train, TrainingStream):
        plan["stream"] = data.train.plan(per_update)
    if objective.depends_on_split:
        plan["split"] = split
    if config.uses_fawa(objective) or any(rule.uses_held_out for rule in objective.rules):
        # The noise of held-out images is numbered by batch.
        plan["per_device_eval_batch_size"] = eval_batch_size
    # Through JSON: tuples become lists.
    same_types: dict[str, Any] = json.loads(json.dumps(plan))
    return same_types


def changeable(config: TrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Settings that a resumed run may change although they can change numbers, and where it runs; JSON types."""
    settings = asdict(config)
    return {name: settings[name] for name in MATTERS} | {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }


def changes_on_the_way(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words, such as "--num_train_epochs 4 instead of 2"; empty if nothing does."""

    def shown(name: str, value: object) -> str:
        return (
            f"{value} processes"
            if name == "processes"
            else f"the {name} {value}"
            if name == "device"
            else (f"--{name} {'none' if value is None else value}")
        )

    return ", ".join(
        f"{shown(name, value)} instead of {'none' if before[name] is None else before[name]}"
        for name, value in now.items()
        if name in before and before[name] != value
    )


def check_same_run(checkpoint: Path, saved: dict[str, Any], plan: dict[str, Any]) -> None:
    """Refuse a checkpoint whose plan is another one.

    Raises:
        ValueError: naming what differs.
    """
    if "num_train_epochs" in plan and "num_train_epochs" not in saved:
        logger.warning(
            "%s does not say for how many epochs its --lr_scheduler_type %s was meant: taking it to be the %d of now",
            checkpoint,
            plan["lr_scheduler_type"],
            plan["num_train_epochs"],
        )
        plan = {key: value for key, value in plan.items() if key != "num_train_epochs"}
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
    if "num_train_epochs" in plan and saved["num_train_epochs"] != plan["num_train_epochs"]:
        changed.append(
            f"--lr_scheduler_type {plan['lr_scheduler_type']} ends with the last epoch, so that another number of "
            "epochs would give learning rates that no single run has (piecewise and constant do not depend on the end)"
        )
    if changed:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} belongs to a run with other settings: {'; '.join(changed)}; "
            "resume with the same ones, or start a new run in another --output_dir"
        )


def keep_update_size(config: TrainingConfig, accelerator: Accelerator) -> TrainingConfig:
    """The settings with the accumulation that the checkpoint to resume from asks for; call it on all processes.

    Raises:
        ValueError: if no accumulation makes updates of the size that the run has had so far, with values that do.
    """
    if config.resume_from_checkpoint is None:
        return config
    found: list[int | None] = [None]
    if accelerator.is_main_process:
        tidy(Path(config.output_dir))
        found = [_examples_per_update(Path(config.output_dir), config.resume_from_checkpoint)]
    (wanted,) = broadcast_object_list(found)
    if wanted is None:
        return config
    at_once = accelerator.num_processes * config.per_device_train_batch_size
    steps, rest = divmod(wanted, at_once)
    if rest:
        raise ValueError(
            f"--resume_from_checkpoint {config.resume_from_checkpoint}: the run makes updates of {wanted} examples, "
            f"and batches of {config.per_device_train_batch_size} on {accelerator.num_processes} process(es) cannot; "
            f"{_what_works(wanted, accelerator.num_processes, config.per_device_train_batch_size)}"
        )
    if steps != config.gradient_accumulation_steps:
        logger.info(
            "the run makes updates of %d examples: with %d process(es) and --per_device_train_batch_size %d it goes "
            "on with --gradient_accumulation_steps %d instead of %d, and the same learning rate",
            wanted,
            accelerator.num_processes,
            config.per_device_train_batch_size,
            steps,
            config.gradient_accumulation_steps,
        )
    return replace(config, gradient_accumulation_steps=steps)


def _examples_per_update(output_dir: Path, resume_from: str) -> int | None:
    """What the checkpoints of a run say; None where none can be read, which `find_checkpoint` will refuse by name."""
    paths = list_checkpoints(output_dir)[::-1] if resume_from == "latest" else [Path(resume_from)]
    return next((found for found in map(_read_examples_per_update, paths) if found is not None), None)


def _read_examples_per_update(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / STATE_FILE).read_text())["plan"]["examples_per_update"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("%s does not say how large an update is: %r", checkpoint, error)
        return None


def _what_works(wanted: int, num_processes: int, batch_size: int) -> str:
    if wanted % num_processes:
        return f"start {_words(_divisors(wanted))} processes"
    sizes = sorted(_divisors(wanted // num_processes), key=lambda size: abs(size - batch_size))[:4]
    return f"take --per_device_train_batch_size {_words(sorted(sizes))}"


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _words(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
