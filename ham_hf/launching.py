"""How a recipe starts and stops: the accelerator, logging, and errors that need no traceback."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)


def create_accelerator(
    *,
    use_cpu: bool = False,
    mixed_precision: str = "no",
    report_to: str = "none",
    logging_dir: Path | None = None,
) -> Accelerator:
    """The accelerator of a run; with ``accelerate launch``, one of several processes.

    Args:
        use_cpu: use the CPU even if there is an accelerator.
        mixed_precision: "no" or "bf16"; wins over what the launcher says.
        report_to: tracker, or "none".
        logging_dir: folder of trackers that write files.

    Raises:
        RuntimeError: if the launcher started several processes and they do not know of each other.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched_with not in ("no", mixed_precision):
        logger.warning("--mixed_precision %s decides, not the launcher's %s", mixed_precision, launched_with)
    accelerator = Accelerator(
        # Without this, several processes on a machine without accelerators each believe to be alone.
        cpu=use_cpu or (world > 1 and not torch.accelerator.is_available()),
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=None if logging_dir is None else str(logging_dir),
    )
    if accelerator.num_processes != world:
        raise RuntimeError(
            f"the launcher started {world} processes, but accelerate sees {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu"
        )
    return accelerator


def set_up_logging() -> None:
    """Log to standard error: everything of ours on the main process, warnings elsewhere."""
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("ham_hf").setLevel(logging.INFO if main else logging.WARNING)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory that this process has held so far, in bytes.

    On an accelerator: tensors on ``device`` as its allocator counts them, without its cache and the driver's share.
    On the CPU: resident memory of the process, libraries included. A resumed run counts from where it was resumed.

    Returns:
        None where there is no such number (Windows; accelerators whose allocator keeps no peak).
    """
    if device.type != "cpu":
        count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return None if count is None else int(count(device))
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    status = Path("/proc/self/status")
    # On Linux getrusage also counts what the parent held when it started this process, hence the other source first.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def explain_interrupt(output_dir: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on, and exit status 130.

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
def clean_exit(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors that explain themselves into their message and exit status 2, without a traceback.

    Args:
        *kinds: what to turn; other exceptions pass.

    Raises:
        SystemExit: instead of an exception of these kinds.
    """
    try:
        yield
    except kinds as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
