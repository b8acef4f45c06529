"""Progress of a run, the checkpoint that it continues from, and whether that belongs to the same run.

A run may continue with more or fewer processes: the accumulation is recomputed so that an update keeps its number
of examples, and the learning rate stays. Where no accumulation can, the run is refused with values that work.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ham_hf.attacks import Attack
from ham_hf.data import ImageData, TrainingStream, UpdateLayout
from ham_hf.methods import Method
from ham_hf.training.checkpoint import STATE_FILE, find_checkpoint, tidy
from ham_hf.training.config import CHANGES_NO_NUMBER, TrainingConfig

logger = logging.getLogger(__name__)

MATTERS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",  # with the accumulation and the processes it makes examples_per_update
    "gradient_accumulation_steps",
    "memory_format",
    "torch_compile",
)
"""Settings of the training loop that a resumed run may change, although it can change numbers by them, if only in the
last bits or by a validation more."""
MAY_CHANGE = CHANGES_NO_NUMBER | {*MATTERS, "use_cpu"}
"""All settings that it may change."""


@dataclass(kw_only=True)
class Progress:
    """Progress of a run; JSON types only, as it becomes the ``trainer_state.json`` of a checkpoint.

    Attributes:
        step: updates done, skipped ones included.
        skipped_updates: updates skipped because no process had a row to train on.
        overflowed_updates: updates skipped because a gradient overflowed in float16.
        loss_scale: state of the scaler of the loss (``mixed_precision`` fp16); None without one.
        seconds: time of updates and validation so far, earlier parts of a resumed run included; not of saving.
        passes: passes over the network for updates, validation and held-out sums so far, of all processes
            (`ham_hf.training.train_step.PassCounter`).
        class_log: how the current epoch treated each class so far, over all processes; see `MethodState.log`.
        averaged_epochs: epochs that went into the fairness-gated average.
        since_log: sums since the last line of the log.
        validation_due: epoch whose end was reached, but not yet validated, when the run was stopped; else None.
        best: state of the best validation so far; None before the first.
        history: one record per validation.
        plan: settings and data that a resumed run must share to continue this one.
        changeable: the settings that a resumed run may change although they can change numbers, as they are.
        changes: changes of those settings, one sentence per resumption that made some.
    """

    step: int = 0
    skipped_updates: int = 0
    overflowed_updates: int = 0
    loss_scale: dict[str, Any] | None = None
    seconds: float = 0.0
    passes: float = 0.0
    class_log: list[list[float]] = field(default_factory=list)
    averaged_epochs: int = 0
    since_log: dict[str, float] = field(default_factory=dict)
    validation_due: int | None = None
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    changeable: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


def anywhere(accelerator: Accelerator, happened: bool) -> bool:
    """Whether it happened on any process; they all wait for each other."""
    count: Tensor = accelerator.reduce(torch.tensor(float(happened), device=accelerator.device), "sum")
    return count.item() > 0


def agreed_checkpoint(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint that the configuration names, the same on every process; None where it names or finds none.

    Raises:
        ValueError: see `find_checkpoint`; and if a process does not find the main one's checkpoint.
    """
    output_dir, name = Path(config.output_dir), config.resume_from_checkpoint
    if name is None:
        return None
    found: list[Path | ValueError | None] = [None]
    if accelerator.is_main_process:
        tidy(output_dir)
        try:
            found = [find_checkpoint(output_dir, name)]
        except ValueError as error:
            found = [error]
    path: Path | ValueError | None = broadcast_object_list(found)[0]
    if isinstance(path, ValueError):
        raise path
    if path is None:
        return None
    if anywhere(accelerator, not (path / STATE_FILE).is_file()):
        raise ValueError(
            f"--resume_from_checkpoint {name}: not every process finds {path}, from which the main one resumes; "
            f"--output_dir {output_dir} has to be on a file system that all nodes share"
        )
    return path


def run_plan(
    config: TrainingConfig,
    method: Method,
    attack: Attack,
    data: ImageData,
    module: nn.Module,
    *,
    layout: UpdateLayout,
    eval_batch_size: int,
    besides: Mapping[str, object],
) -> dict[str, Any]:
    """Everything that a run must share to continue another: data, network, method, and all that decides an update.

    JSON types only, as they come back from a checkpoint; ``besides`` is what else has to stay, by setting.
    """
    plan = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    plan |= {f"{method.name}.{name}": value for name, value in asdict(method).items()}
    plan |= {
        "method": method.name,
        "norm": attack.threat_model.norm,
        "epsilon": float(attack.threat_model.epsilon),
        "num_steps": attack.num_steps,
        "step_size": attack.step_size,
        "examples_per_update": layout.per_update,
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
    if config.lr_scheduler_type not in ("piecewise", "constant"):
        # The rates depend on where the schedule ends.
        plan["num_train_epochs"] = config.num_train_epochs
    if isinstance(data.train, TrainingStream):
        plan["stream"] = data.train.plan(layout.per_update)
    if method.depends_on_split:
        plan["split"] = [layout.batch_size, layout.world]
    if config.uses_fawa(method) or any(rule.num_held_out_sums for rule in method.rules):
        # The noise of held-out images is numbered by batch.
        plan["per_device_eval_batch_size"] = eval_batch_size
    return dict(json.loads(json.dumps(plan)))  # tuples become lists


def changeable(config: TrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Settings that a resumed run may change although they can change numbers, and where it runs; JSON types."""
    return {name: getattr(config, name) for name in MATTERS} | {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }


def note_changes(progress: Progress, now: dict[str, Any], *, total_steps: int, updates_per_epoch: int) -> None:
    """Add the `changeable` settings that differ ``now``, if any, to ``progress.changes``, and warn of them."""
    before, after = (
        {name: "none" if value is None else value for name, value in of.items()} for of in (progress.changeable, now)
    )
    words = {"processes": "{} processes", "device": "the device {}"}
    changed = ", ".join(
        f"{words.get(name, f'--{name} {{}}').format(value)} instead of {before[name]}"
        for name, value in after.items()
        if name in before and before[name] != value
    )
    complete = progress.step >= total_steps
    if changed:
        later = f"from epoch {progress.step // updates_per_epoch + 1} on, the run had {changed}."
        if complete:
            later = f"the last, the run was started again with {changed}, without further training."
        progress.changes.append(f"After update {progress.step}, {later}")
        logger.warning("the run continues with %s: the card will say so", changed)
    if not complete:
        progress.changeable = now


def check_same_run(checkpoint: Path, saved: dict[str, Any], plan: dict[str, Any]) -> None:
    """Reject a checkpoint with a different plan; the ValueError names what differs."""
    changed = [
        f"{key} {_but_for(saved.get(key), plan.get(key))} -> {_but_for(plan.get(key), saved.get(key))}"
        for key in {**saved, **plan}
        if saved.get(key) != plan.get(key)
    ]
    reasons = {
        "split": f"an update of --method {plan['method']} with these options depends on how its examples are split "
        "into batches, so batch size and number of processes have to stay",
        "num_train_epochs": f"--lr_scheduler_type {plan['lr_scheduler_type']} ends with the last epoch, so that "
        "another number of epochs would give learning rates that no single run has (piecewise and constant do not "
        "depend on the end)",
    }
    changed += [why for key, why in reasons.items() if key in plan and saved.get(key) != plan[key]]
    if changed:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} belongs to a run with other settings: {'; '.join(changed)}; "
            "resume with the same ones, or start a new run in another --output_dir"
        )


def _but_for(value: object, other: object) -> str:
    """The value in few words; of two mappings, what the other one does not have."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: entry for key, entry in value.items() if key not in other or other[key] != entry}
    return str(value)[:60]


def keep_update_size(config: TrainingConfig, checkpoint: Path | None, *, num_processes: int) -> TrainingConfig:
    """The settings with the accumulation that the checkpoint to resume from asks for.

    Raises:
        ValueError: if no accumulation makes updates of the size that the run has had so far, with values that do.
    """
    if checkpoint is None:
        return config
    wanted = json.loads((checkpoint / STATE_FILE).read_text())["plan"]["examples_per_update"]
    batch_size = config.per_device_train_batch_size
    steps, rest = divmod(wanted, num_processes * batch_size)
    if rest:
        raise ValueError(
            f"--resume_from_checkpoint {config.resume_from_checkpoint}: the run makes updates of {wanted} examples, "
            f"and batches of {batch_size} on {num_processes} process(es) cannot; "
            f"{_what_works(wanted, num_processes, batch_size)}"
        )
    if steps != config.gradient_accumulation_steps:
        logger.info(
            "the run makes updates of %d examples: with %d process(es) and --per_device_train_batch_size %d it "
            "continues with --gradient_accumulation_steps %d instead of %d, and the same learning rate",
            wanted,
            num_processes,
            batch_size,
            steps,
            config.gradient_accumulation_steps,
        )
    return replace(config, gradient_accumulation_steps=steps)


def _what_works(wanted: int, num_processes: int, batch_size: int) -> str:
    def words(numbers: Sequence[int]) -> str:
        *first, last = map(str, numbers)
        return f"{', '.join(first)} or {last}" if first else last

    def divisors(number: int) -> list[int]:
        return [candidate for candidate in range(1, number + 1) if number % candidate == 0]

    if wanted % num_processes:
        return f"start {words(divisors(wanted))} processes"
    sizes = sorted(divisors(wanted // num_processes), key=lambda size: abs(size - batch_size))[:4]
    return f"take --per_device_train_batch_size {words(sorted(sizes))}"
