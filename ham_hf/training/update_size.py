"""Going on with another number of processes: an update keeps its size, the accumulation makes up for the rest.

The rule: a checkpoint's ``examples_per_update`` and the learning rate stay what they were. Where ``processes x
per_device_train_batch_size x gradient_accumulation_steps`` would make another number, the accumulation is recomputed;
where no accumulation can, the run is refused with values that work. As every update takes the next examples of an
order that only the seed and the epoch decide (`ham_hf.training.data_order`), each example is still seen once per
epoch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ham_hf.training.checkpoint import STATE_FILE, list_checkpoints, tidy
from ham_hf.training.config import TrainingConfig

logger = logging.getLogger(__name__)


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
