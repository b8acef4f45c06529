"""Peak memory of a step, ours against an ordinary training step of the same network, batch and precision.

    python -m tests.benchmarks.memory

Every measurement is a process of its own: building a step and making two updates with it. With CUDA, the figure is
what the allocator counts at most (``max_memory_allocated``), weights included. On a CPU it is the peak of resident
memory minus resident memory before the step was built: the C allocator keeps and returns pages as it likes, so repeats
may differ; the smallest and largest are shown, and how far they are apart says how much of a difference to believe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ham_hf.training.launch import peak_memory_bytes
from tests.benchmarks import common
from tests.benchmarks.workload import LEARNING_RATE, OurStep, batch_of, network
from tests.benchmarks.yardsticks import ordinary_step

KINDS = ("ham 0.5", "ham 1", "ordinary")
NUM_STEPS = 2  # from the second on, the momentum is there from the beginning


def build(kind: str, args: argparse.Namespace, accelerator: Accelerator) -> Callable[[], object]:
    """A function that makes one update."""
    device = accelerator.device
    model = network(args.model, args.model_args)
    method, _, fraction = kind.partition(" ")
    batch = batch_of(args.batch_size, float(fraction or 1), device)
    if kind != "ordinary":
        step = OurStep(
            method, model, accelerator, precision=args.precision, batch_size=args.batch_size, settings=args.training
        )
        return lambda: step(batch)
    layout = torch.contiguous_format if args.training.get("memory_format") == "contiguous" else torch.channels_last
    model = model.to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    x = batch.x.contiguous(memory_format=layout)

    def step_in_precision() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            ordinary_step(model, optimizer, x, batch.y)

    return step_in_precision


def work(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure in this process."""
    accelerator = common.start(args)
    device = accelerator.device
    # The libraries behind the first convolution and its gradient stay in memory, and are nobody's step.
    x = torch.rand(2, 3, 8, 8, device=device, requires_grad=True)
    F.conv2d(x, torch.rand(4, 3, 3, 3, device=device)).sum().backward()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is None:
        before, peak_is_reset = psutil.Process().memory_info().rss, _reset_peak()
    else:
        module.reset_peak_memory_stats(device)
        before, peak_is_reset = module.memory_allocated(device), True
    step = build(kind, args, accelerator)
    for _ in range(NUM_STEPS):
        step()
    common.synchronize(device)
    peak = peak_memory_bytes(device)
    if peak is None:
        raise SystemExit("this platform does not tell the peak memory of a process")
    # An accelerator's allocator starts at nothing; a process comes with a Python of some hundred megabytes.
    return {"bytes": peak if module else peak - before, "before": before, "peak_is_reset": peak_is_reset}


def _reset_peak() -> bool:
    """Start the kernel's count of the peak anew, where it lets us (Linux); else building may hide behind imports."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(kind: str, argv: Sequence[str]) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", *argv, f"--worker={kind}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def options() -> argparse.ArgumentParser:
    found = common.parser("memory", __doc__.partition("\n")[0])
    found.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str]) -> None:
    args = common.parse(options(), argv, repeats=1)
    if args.worker:
        print(json.dumps(work(args.worker, args)))
        return
    device = common.start(args).device
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind, values in found.items():
            values.append(measure(kind, argv))
    mebibytes = {kind: [value["bytes"] / 2**20 for value in values] for kind, values in found.items()}
    ratios = {kind: common.ratio(mebibytes[kind], mebibytes["ordinary"]) for kind in KINDS}
    figures = {
        "mebibytes": {kind: common.Spread.of(values) for kind, values in mebibytes.items()},
        "ratio_to_ordinary": ratios,
        "peak_is_reset": all(value["peak_is_reset"] for values in found.values() for value in values),
    }
    common.write_json("memory", args, argv, device, figures)
    rows = [{"step": kind, "MiB": str(figures["mebibytes"][kind]), "/ ordinary": str(ratios[kind])} for kind in KINDS]
    common.show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
