"""How a run starts: the accelerator, peak memory, and a check of the shared output folder."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, broadcast_object_list

from ham_hf.faults import FaultError
from ham_hf.invocation import shown_path
from ham_hf.training.config import TrainingConfig
from ham_hf.training.environment import check_variables, is_on, mpi_processes, overruled, rounding, unknown
from ham_hf.training.sharding import shard_on_cpu, sharding_plugin

logger = logging.getLogger(__name__)


def create_accelerator(
    *,
    use_cpu: bool = False,
    mixed_precision: str = "no",
    trackers: Sequence[str] = (),
    logging_dir: Path | None = None,
    ddp_timeout: int = TrainingConfig.ddp_timeout,
) -> Accelerator:
    """The accelerator of a run; with ``accelerate launch``, one of several processes. The settings beat the launcher.

    Args:
        use_cpu: use the CPU even if there is an accelerator.
        mixed_precision: "no", "bf16" or "fp16".
        trackers: what `ham_hf.training.log.chosen_trackers` gives.
        logging_dir: folder of trackers that write files.
        ddp_timeout: seconds that a process waits for the others.

    Raises:
        ValueError: if the launcher asks for an engine that cannot run attacks, a variable of the environment has an
            impossible value, or fp16 is asked of a CPU.
        FaultError: if the launcher started several processes and they are not connected.
    """
    check_variables()
    plugin = sharding_plugin()
    for sentence in overruled(mixed_precision=mixed_precision):
        logger.warning(sentence)
    for sentence in rounding():
        logger.warning("%s report.json says so; unset it for a run that others can repeat", sentence)
    if names := unknown():
        logger.warning(
            "this version of ham_hf does not know what %s of the environment does; if it is not meant, unset it",
            ", ".join(names),
        )
    # accelerate reads it whenever it prepares a network, whatever the precision.
    os.environ.pop("ACCELERATE_FP8_BACKEND", None)
    world = _joined_processes(use_cpu=use_cpu)
    _choose_device(use_cpu=use_cpu, several=world > 1)
    accelerator = Accelerator(
        # Without this, several processes on a machine without accelerators would each run alone.
        cpu=use_cpu or (world > 1 and not torch.accelerator.is_available()),
        mixed_precision=mixed_precision,
        fsdp_plugin=plugin,
        # If it were on, it would wrap the network and change the names of weights in every file.
        dynamo_backend="no",
        # A plugin, as the number alone loses to the launcher's variable: accelerate would divide every gradient by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(trackers) or None,
        project_dir=None if logging_dir is None else str(logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout))],
    )
    if left_out := set(trackers) - set(map(str, accelerator.log_with)):
        raise ValueError(f"--report_to {' '.join(sorted(left_out))}: accelerate does not find it; install it with pip")
    if accelerator.num_processes != world:
        raise FaultError(
            f"the launcher started {world} processes, but accelerate sees {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu"
        )
    if mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate would silently train in float32.
        raise ValueError(
            f"--mixed_precision fp16 is for accelerators, and this run is on the {accelerator.device.type}; use "
            "--mixed_precision bf16 or no (--attack_precision fp16 works everywhere, and is slow on CPUs)"
        )
    shard_on_cpu(accelerator, plugin)
    return accelerator


def launched_processes() -> int:
    """Number of processes that the launcher has started, known before they are connected."""
    check_variables()
    mpi = mpi_processes()
    return int(os.environ.get("WORLD_SIZE", mpi[1] if mpi else 1))


def _joined_processes(*, use_cpu: bool) -> int:
    """Number of processes that accelerate will join; warns of others that were started beside this one."""
    if "WORLD_SIZE" in os.environ:
        return launched_processes()
    name, started = mpi_processes() or ("SLURM_STEP_NUM_TASKS", int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1))
    if started == 1:
        return 1
    if name != "SLURM_STEP_NUM_TASKS" and (use_cpu or is_on(os.environ, "ACCELERATE_USE_CPU")):
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"{name}={started} in the environment says that MPI started {started} processes, and MASTER_ADDR, "
                f"where they meet, is not set: set it, or unset {name} for a run of one process"
            )
        return started
    logger.warning(
        "%s=%d in the environment: %d processes were started side by side, and each runs alone; for one run of all "
        "of them start it with accelerate launch, as %s does",
        name,
        started,
        started,
        shown_path("accelerate/slurm.sh"),
    )
    return 1


def _choose_device(*, use_cpu: bool, several: bool) -> None:
    """Ignore a device of the environment where a setting or the launcher decides; otherwise check that it is there."""
    asked = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if asked is None:
        return
    if several or (use_cpu and asked != "cpu"):
        by = "the launcher gives each process its device" if several else "--use_cpu decides"
        logger.warning("%s, not ACCELERATE_TORCH_DEVICE=%s of the environment", by, asked)
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        return
    try:
        torch.ones(1, device=torch.device(asked)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"ACCELERATE_TORCH_DEVICE={asked} in the environment: there is no such device here ({reason}); unset it, "
            "or name another one, such as cpu"
        ) from error


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
    """Refuse, with ValueError, an output folder that is not the same one on all nodes; call it on all processes.

    ``written`` is a file that the main process has just written. It is waited for, up to ``patience`` seconds: clients
    of NFS remember for half a minute that a file is not there.
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
