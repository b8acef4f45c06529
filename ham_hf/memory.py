"""Running out of memory, and the settings that need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The allocators of accelerators, Linux and Windows; torch has a class for the first only.
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class MemoryExhaustedError(RuntimeError):
    """There was not enough memory; the message names settings that need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocator, of a device or of the CPU, had nothing left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _MESSAGES)


@contextmanager
def explain_out_of_memory(way_out: str) -> Iterator[None]:
    """Say which settings need less memory when there is not enough.

    Args:
        way_out: what to do, to end a sentence.

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
        may_change: whether the run may go on with other batches.
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
