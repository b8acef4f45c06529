"""Explain errors: what failed, which setting helps, how to continue, and the exit status.

Exit statuses: 2 for an error with a message (`clean_exit`), 130 for Ctrl-C (`explain_interrupt`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ham_hf.artifacts import CARD_NAME, CONFIG_NAME, FIGURES, PAGE_NAME, PREDICTIONS_NAME, REPORT_NAME, WEIGHTS_NAME
from ham_hf.terminal import printable

# What gloo, NCCL and the store between processes report when a process is gone or silent.
_LOST = re.compile(
    r"gloo|nccl|tcpstore|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE
)
# The allocators of accelerators, Linux and Windows; torch has a class for the first only.
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")

FROM_CHECKPOINT = "the same command and --resume_from_checkpoint latest"
"""How a training continues."""


class FaultError(RuntimeError):
    """The run cannot continue; the message says what failed, and how to resume."""


@contextmanager
def clean_exit(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with status 2 and the message of an exception of these kinds, without a traceback; others pass."""
    try:
        yield
    except kinds as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        raise SystemExit(2) from error


@contextmanager
def explain_interrupt(continue_with: str) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to continue, and exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {continue_with}\n")
        raise SystemExit(130) from None


@contextmanager
def explain_faults(*, num_processes: int, continue_with: str = FROM_CHECKPOINT) -> Iterator[None]:
    """Raise FaultError, with how to continue, if a data-loading process or another process of the run is gone."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        if text[0].startswith("DataLoader worker"):
            raise FaultError(
                f"a process that decodes images is gone ({text[0]}), most often for lack of memory: lower "
                f"--dataloader_num_workers, and continue with {continue_with}"
            ) from error
        if num_processes > 1 and (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise FaultError(
                f"another process of the run is gone or did not answer within --ddp_timeout ({text[0][:200]}); what "
                "stopped it is in its own output. If it was still downloading or decoding the dataset, which the "
                f"others wait for, give a longer --ddp_timeout. Continue with {continue_with}"
            ) from error
        raise


@contextmanager
def explain_unfinished(output_dir: Path) -> Iterator[None]:
    """Raise FaultError, naming what is missing, if the results cannot be written; no training has to be repeated."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        results = (WEIGHTS_NAME, CONFIG_NAME, PREDICTIONS_NAME, REPORT_NAME, FIGURES, CARD_NAME)
        missing = [name for name in (*results, PAGE_NAME) if not (output_dir / name).exists()]
        raise FaultError(
            f"training is complete, but its results could not be written into {output_dir}: {error}; missing or "
            f"incomplete: {', '.join(missing or results)}. Make room there, or make it writable, and finish with "
            f"{FROM_CHECKPOINT}: it evaluates the trained weights, and trains nothing again"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a device or of the CPU, ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _MESSAGES)


@contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Raise FaultError for an allocator's error; ``remedy`` says which settings need less memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise FaultError(f"out of memory ({first_line}); {remedy}") from error


def smaller_batch(batch_size: int, accumulation_steps: int, *, may_change: bool) -> str:
    """Flags for smaller batches and the same images per update; with ``may_change`` False, why there are none."""
    if not may_change:
        return (
            f"an update of this method depends on its batches of {batch_size}: continue with --resume_from_checkpoint "
            "latest on a device with more memory, or start again with a smaller --per_device_train_batch_size or "
            "--mixed_precision bf16"
        )
    factor = next((number for number in range(2, batch_size + 1) if batch_size % number == 0), None)
    if factor is None:
        return (
            "--per_device_train_batch_size is 1 already: use --mixed_precision bf16, a smaller --image_size or "
            "--model_name, or a device with more memory"
        )
    return (
        f"use --per_device_train_batch_size {batch_size // factor} --gradient_accumulation_steps "
        f"{accumulation_steps * factor}, which keeps the images of an update, with --resume_from_checkpoint latest"
    )
