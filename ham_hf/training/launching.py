"""How a recipe starts: the accelerator, logging, peak memory, and a check of the shared output folder."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from ham_hf.training.sharding import shard_on_cpu, sharding_plugin

logger = logging.getLogger(__name__)


def create_accelerator(
    *,
    use_cpu: bool = False,
    mixed_precision: str = "no",
    report_to: str = "none",
    logging_dir: Path | None = None,
    ddp_timeout: int = 1800,
) -> Accelerator:
    """The accelerator of a run; with ``accelerate launch``, one of several processes.

    Args:
        use_cpu: use the CPU even if there is an accelerator.
        mixed_precision: "no" or "bf16"; wins over what the launcher says.
        report_to: tracker, or "none".
        logging_dir: folder of trackers that write files.
        ddp_timeout: seconds that a process waits for the others before it gives up.

    Raises:
        ValueError: if the launcher asks for an engine that cannot run attacks; see `sharding_plugin`.
        RuntimeError: if the launcher started several processes and they do not know of each other.
    """
    plugin = sharding_plugin()
    world = launched_processes()
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched_with not in ("no", mixed_precision):
        logger.warning("--mixed_precision %s decides, not the launcher's %s", mixed_precision, launched_with)
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        # It would wrap the network, whose weights then have other names in every file.
        logger.warning("--torch_compile decides, not the launcher's dynamo_backend %s", dynamo)
    accelerator = Accelerator(
        # Without this, several processes on a machine without accelerators each believe to be alone.
        cpu=use_cpu or (world > 1 and not torch.accelerator.is_available()),
        mixed_precision=mixed_precision,
        fsdp_plugin=plugin,
        dynamo_backend="no",
        log_with=None if report_to == "none" else report_to,
        project_dir=None if logging_dir is None else str(logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout))],
    )
    if accelerator.num_processes != world:
        raise RuntimeError(
            f"the launcher started {world} processes, but accelerate sees {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu"
        )
    shard_on_cpu(accelerator, plugin)
    return accelerator


def launched_processes() -> int:
    """Number of processes that the launcher has started, known before they know of each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def set_up_logging() -> None:
    """Log to standard error: everything of ours on the main process, warnings elsewhere."""
    main = os.environ.get("RANK", "0") == "0"
    # It has a handler of its own: everything would be said twice.
    logging.getLogger("huggingface_hub").propagate = False
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


def check_shared_folder(written: Path, accelerator: Accelerator, *, patience: float) -> None:
    """Refuse an output folder that is not the same one on all nodes; call it on all processes.

    Every process reads from it: checkpoints to resume from, and the selected weights at the end.

    Args:
        written: a file that the main process has just written.
        accelerator: the accelerator.
        patience: seconds to wait for the file, fewer than processes wait for each other; clients of NFS remember for
            half a minute that a file is not there.

    Raises:
        ValueError: if a process does not read there what the main one wrote.
    """
    if accelerator.num_processes == 1:
        return
    (expected,) = broadcast_object_list([written.read_text() if accelerator.is_main_process else None])
    deadline = time.monotonic() + patience
    while (missing := not written.is_file() or written.read_text() != expected) and time.monotonic() < deadline:
        time.sleep(0.5)
    count: torch.Tensor = accelerator.reduce(torch.tensor(float(missing), device=accelerator.device), "sum")
    if count.item():
        raise ValueError(
            f"--output_dir {written.parent}: {count.item():.0f} of {accelerator.num_processes} processes do not find "
            "there what the main one wrote; it has to be a folder on a file system that all nodes share"
        )
