"""Code that the benchmarks share: options, a timing loop whose ratios can be trusted, and one writer of results.

A second on one machine says nothing about another one, and on a shared machine not much about itself. So what is
reported is ratios: everything that is compared runs in one process, in turns (A B C A B C ...), a ratio is taken
within each turn, and its median is shown with its smallest and largest value.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from ham_hf.reporting.formats import text_table
from ham_hf.reporting.run_report import environment
from ham_hf.training.launch import create_accelerator

RESULTS = Path(__file__).parent / "results"
DEFAULT_MODEL = "preactresnet18_cifar"
QUICK_MODEL_ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of repeated measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.min:.3f} to {self.max:.3f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of the ratios of measurements made in the same turns."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    repeats: int,
    warmup: int = 1,
    check: Callable[[str, object], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function, ``repeats`` times, in turns.

    Args:
        functions: what to time, by name.
        device: its queue is empty whenever the clock is read.
        repeats: turns that count.
        warmup: turns before them that do not.
        check: is given the name and the result of every call, outside the measured time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, repeats):
        for name, function in functions.items():
            synchronize(device)
            since = time.perf_counter()
            result = function()
            synchronize(device)
            elapsed = time.perf_counter() - since
            if check is not None:
                check(name, result)
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def parser(benchmark: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--model", default=DEFAULT_MODEL, help="timm name of the network, for 32x32 images")
    options.add_argument(
        "--model_args", nargs="*", metavar="NAME=VALUE", help="arguments of the network, such as patch_size=4"
    )
    options.add_argument("--batch_size", type=int, default=None, help="images per step: 32 on a CPU, 128 elsewhere")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our steps and the floors")
    options.add_argument("--repeats", type=int, default=5, help="measured turns")
    options.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's choice")
    options.add_argument("--use_cpu", action="store_true", help="use the CPU even if there is an accelerator")
    options.add_argument(
        "--training", nargs="*", default=[], metavar="NAME=VALUE", help="settings of our steps: torch_compile=true"
    )
    options.add_argument("--quick", action="store_true", help="a tiny network, to see that it runs; means nothing")
    options.add_argument("--out", type=Path, help="JSON file; default: a name in tests/benchmarks/results, or none")
    options.add_argument("--commit", help="what to write down as the commit where there is no git checkout")
    return options


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: object) -> argparse.Namespace:
    """Read a command line; with ``--quick``, ``quick`` holds other defaults. Values of NAME=VALUE become dicts."""
    if options.parse_args(argv).quick:
        options.set_defaults(**{"batch_size": 8, "repeats": 2, **quick})
    args = options.parse_args(argv)
    small = QUICK_MODEL_ARGS if args.quick and args.model == DEFAULT_MODEL else {}
    args.model_args = {**small, **_pairs(args.model_args or [])}
    args.training = _pairs(args.training)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def _pairs(words: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE words as a dict, values read as YAML."""
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}


def start(args: argparse.Namespace) -> Accelerator:
    """The accelerator of our steps; fills in the batch size that goes with its device."""
    accelerator = create_accelerator(
        use_cpu=args.use_cpu, mixed_precision="bf16" if args.precision == "bf16" else "no"
    )
    if args.batch_size is None:
        args.batch_size = 32 if accelerator.device.type == "cpu" else 128
    return accelerator


def show(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows as a table."""
    print(text_table(rows), flush=True)


def write_json(
    benchmark: str,
    args: argparse.Namespace,
    argv: Sequence[str],
    device: torch.device,
    figures: Mapping[str, object],
    *,
    num_processes: int = 1,
) -> None:
    """Write figures with everything that is needed to judge them; a quick run is not written unless asked to."""
    path = args.out
    if path is None:
        if args.quick:
            return
        variant = [benchmark, device.type]
        variant += [] if args.model == DEFAULT_MODEL else [args.model]
        variant += [] if args.precision == "fp32" else [args.precision]
        path = RESULTS / f"{'_'.join(variant)}.json"
    about = asdict(environment(device=device, num_processes=num_processes))
    about["commit"] = about["commit"] or args.commit
    record = {
        "benchmark": benchmark,
        "command": command_line(benchmark, argv),
        "quick": args.quick,
        "environment": {**about, "processor": processor_name()},
        "settings": {name: _plain(value) for name, value in vars(args).items() if name not in ("out", "commit")},
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=asdict) + "\n")
    print(f"written: {path.name}")


def command_line(benchmark: str, argv: Sequence[str]) -> str:
    """The command as anyone can repeat it: of a path that exists here only its last part is told."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        words.append(f"{flag}={_plain(value)}" if equals else str(_plain(word)))
    return " ".join(["python -m", f"tests.benchmarks.{benchmark}", *words])


def _plain(value: object) -> object:
    """A path without the folders above it, which are nobody else's business."""
    if isinstance(value, str | Path) and (Path(value).is_absolute() or ".." in Path(value).parts):
        return Path(value).name
    return str(value) if isinstance(value, Path) else value


def processor_name() -> str:
    """The CPU's name, by the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
