"""Errors that explain themselves: what failed, which setting helps, how to continue, and the exit status.

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

from ham_hf.terminal import printable

# What gloo, NCCL and the store between processes report when a process is gone or silent.
_LOST = re.compile(
    r"gloo|nccl|tcpstore|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE
)
# The allocators of accelerators, Linux and Windows; torch has a class for the first only.
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class FaultError(RuntimeError):
    """Something around the run failed; the message says what, and how to continue."""


class MemoryExhaustedError(RuntimeError):
    """Memory ran out; the message names settings that need less."""


@contextmanager
def clean_exit(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors that explain themselves into their message and exit status 2, without a traceback.

    Args:
        *kinds: classes of such errors; other exceptions pass.

    Raises:
        SystemExit: instead of an exception of these kinds.
    """
    try:
        yield
    except kinds as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        raise SystemExit(2) from error


@contextmanager
def explain_interrupt(output_dir: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to continue, and exit status 130.

    Raises:
        SystemExit: instead of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(
            f"interrupted; go on from the last checkpoint in {output_dir} with the same command and "
            "--resume_from_checkpoint latest\n"
        )
        raise SystemExit(130) from None


@contextmanager
def explain_faults(
    *, num_processes: int, way_on: str = "the same command and --resume_from_checkpoint latest"
) -> Iterator[None]:
    """Explain how to continue when a data-loading process or another process of the run is gone.

    Args:
        num_processes: processes of the run.
        way_on: how to continue.

    Raises:
        FaultError: instead of what torch raises.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        if text[0].startswith("DataLoader worker"):
            raise FaultError(
                f"a process that decodes images is gone ({text[0]}), most often for lack of memory: lower "
                f"--dataloader_num_workers, and go on with {way_on}"
            ) from error
        if num_processes > 1 and (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise FaultError(
                f"another process of the run is gone or did not answer within --ddp_timeout ({text[0][:200]}); what "
                "stopped it is in its own output. If it was still downloading or decoding the dataset, which the "
                f"others wait for, give a longer --ddp_timeout. Go on with {way_on}"
            ) from error
        raise


@contextmanager
def explain_unfinished(output_dir: Path) -> Iterator[None]:
    """Explain what is missing when the results cannot be written, and how to get it without training again.

    Raises:
        FaultError: instead of the error of the file system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        results = ("model.safetensors", "config.json", "predictions.parquet", "report.json", "figures", "README.md")
        missing = [name for name in (*results, "report.html") if not (output_dir / name).exists()]
        raise FaultError(
            f"training is complete, but its results could not be written into {output_dir}: {error}; missing or "
            f"incomplete: {', '.join(missing or results)}. Make room there, or make it writable, and finish with the "
            "same command and --resume_from_checkpoint latest: it evaluates the trained weights, and trains nothing "
            "again"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a device or of the CPU, ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _MESSAGES)


@contextmanager
def explain_out_of_memory(way_out: str) -> Iterator[None]:
    """Name settings that need less memory when it runs out.

    Args:
        way_out: what to change; ends a sentence.

    Raises:
        MemoryExhaustedError: instead of the error of the allocator.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MemoryExhaustedError(f"out of memory ({first_line}); {way_out}") from error


def smaller_batch(batch_size: int, accumulation_steps: int, *, may_change: bool) -> str:
    """Flags that train with smaller batches and the same number of images per update.

    Args:
        batch_size: images per process and batch.
        accumulation_steps: batches per update.
        may_change: whether the run may continue with other batches.
    """
    if not may_change:
        return (
            f"an update of this method depends on its batches of {batch_size}: go on with --resume_from_checkpoint "
            "latest on a device with more memory, or begin anew with a smaller --per_device_train_batch_size or "
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
