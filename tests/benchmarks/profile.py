"""Where the time of one step goes: operations, passes over the network, and waits for the device.

    python -m tests.benchmarks.profile
    python -m tests.benchmarks.profile --of "published 0.5"

Passes are counted by arithmetic, so that copies of the network count like the network itself: floating-point
operations of a step, divided by those of one forward of a full batch (`yardsticks` says what to expect; a training
pass is a little below 3, as nobody asks the first layer for the gradient of its input). What torch.compile has fused
is not seen. Waits for the device: with CUDA, those that PyTorch's synchronization debugger reports; on a CPU, calls
that would wait if the tensors were elsewhere (``nonzero``, indexing with a mask, ``item`` (``_local_scalar_dense``),
``tolist``).
"""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.benchmarks import common
from tests.benchmarks.step import Contestants
from tests.benchmarks.workload import network, pixels

WAITING_OPERATIONS = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "_unique2", "is_nonzero", "equal")
NUM_SHOWN = 15


class WaitsInOperations(TorchDispatchMode):
    """Counts operations whose result a device has to hand over before the program can continue."""

    def __init__(self, counts: collections.Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING_OPERATIONS:
            self.counts[name] += 1
        if name in ("index", "index_put", "index_put_"):
            masks = [index for index in args[1] if isinstance(index, torch.Tensor) and index.dtype == torch.bool]
            self.counts["index with a mask"] += len(masks)
        return func(*args, **(kwargs or {}))


class WaitsInMethods(TorchFunctionMode):
    """Counts ``tolist``, which reads a CPU tensor without any operation."""

    def __init__(self, counts: collections.Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy"):
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits(device: torch.device) -> Iterator[collections.Counter]:
    """Count waits for the device, by what waited."""
    counts: collections.Counter = collections.Counter()
    if device.type != "cuda":
        with WaitsInMethods(counts), WaitsInOperations(counts):
            yield counts
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            counts[f"{warning.filename.rpartition('/')[2]}:{warning.lineno}"] += 1


class Operations(TorchDispatchMode):
    """Adds up the floating-point operations of convolutions, matrix products and attention.

    PyTorch's own FlopCounterMode has the formulas, but it also follows modules, which `torch.autograd.grad` refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with Operations() as counter:
        function()
    return counter.total


def measure(args: argparse.Namespace, contestants: Contestants, device: torch.device) -> dict[str, object]:
    """Passes, waits, and time by operation of one call."""
    step = contestants.functions[args.of]
    model = network(args.model, args.model_args).eval().to(device)
    x = pixels(args.batch_size).to(device)
    for _ in range(1 if device.type == "cpu" else 3):
        contestants.check(args.of, step())
    common.synchronize(device)
    with torch.no_grad():
        one_pass = operations(lambda: model(x))
    passes = operations(step) / one_pass
    with counted_waits(device) as waits:
        step()
    common.synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        common.synchronize(device)
    events = profiler.key_averages()
    of_device = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    total = sum(getattr(event, of_device) for event in events)
    ranked = sorted(events, key=lambda event: getattr(event, of_device), reverse=True)[:NUM_SHOWN]
    return {
        "of": args.of,
        "passes": passes,
        "waits": dict(waits),
        "seconds_in_operations": total / 1e6,
        "operations": [
            {"name": event.key, "share": getattr(event, of_device) / max(total, 1), "calls": event.count}
            for event in ranked
        ],
    }


def options() -> argparse.ArgumentParser:
    found = common.parser("profile", __doc__.partition("\n")[0])
    found.add_argument("--hard_fractions", type=float, nargs="+", default=[0.5], help="shares in (0, 1]")
    found.add_argument(
        "--of", default="ham 0.5", help='"ham 0.5", "published 0.5", "careful 0.5", "floor 0.5", "pgd_at"'
    )
    return found


def main(argv: Sequence[str]) -> None:
    args = common.parse(options(), argv)
    accelerator = common.start(args)
    contestants = Contestants(args, accelerator, args.batch_size)
    if args.of not in contestants.functions:
        raise SystemExit(f"--of {args.of}: expected one of {', '.join(map(repr, contestants.functions))}")
    figures = measure(args, contestants, accelerator.device)
    common.write_json("profile", args, argv, accelerator.device, figures)
    common.show(
        [
            {"operation": line["name"][:60], "share": f"{100 * line['share']:.1f} %", "calls": str(line["calls"])}
            for line in figures["operations"]
        ]
    )
    waits = ", ".join(f"{name} {count}" for name, count in figures["waits"].items() if count) or "none"
    print(f"{args.of}: {figures['passes']:.2f} passes; waits for the device: {waits}")


if __name__ == "__main__":
    main(sys.argv[1:])
