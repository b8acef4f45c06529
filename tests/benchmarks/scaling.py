"""Two processes on two cores against one process on one core: time per image, and the share of communication.

    python -m tests.benchmarks.scaling

HAM steps on the CPU with half of the rows hard, one thread and one batch per process. Three ways take turns, each in
fresh processes: one process alone; two that know nothing of each other, at the same time; and two that train one
network together (``accelerate launch --multi_gpu --num_processes 2``, gloo). The second way separates what two
processes lose by sharing caches and memory from what they lose by talking: the time of a step of the third way minus
that of the second is communication that could not be hidden behind the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks import common
from tests.benchmarks.workload import OurStep, batch_of, network, num_hard

HARD_FRACTION = 0.5
WARMUP = 2
MODULE = ["-m", "tests.benchmarks.scaling"]
TOGETHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
# accelerate would ask its configuration file for what is not given.
TOGETHER += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]


def work(args: argparse.Namespace) -> None:
    """Time steps in this process, and print them."""
    torch.set_num_threads(1)
    accelerator = common.start(args)
    step = OurStep(
        "ham",
        network(args.model, args.model_args),
        accelerator,
        precision=args.precision,
        batch_size=args.batch_size,
        settings=args.training,
    )
    batch = batch_of(args.batch_size, HARD_FRACTION, accelerator.device)
    meant = num_hard(args.batch_size, HARD_FRACTION) * accelerator.num_processes
    seconds = []
    for number in range(WARMUP + args.updates):
        since = time.perf_counter()
        totals = step(batch)
        if number >= WARMUP:
            seconds.append(time.perf_counter() - since)
        if totals.hard != meant:
            raise RuntimeError(f"{totals.hard} rows were hard, {meant} were meant to be")
    if accelerator.is_main_process:
        print(json.dumps(seconds), flush=True)
    accelerator.end_training()


def run(command: list[str], argv: Sequence[str], copies: int) -> list[float]:
    """Median seconds of a step in each of so many programs running at the same time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, *command, *argv, "--worker", "--use_cpu"]
    programs = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(copies)
    ]
    found = []
    for program in programs:
        out, errors = program.communicate()
        if program.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
        found.append(statistics.median(json.loads(out.splitlines()[-1])))
    return found


def options() -> argparse.ArgumentParser:
    found = common.parser("scaling", __doc__.partition("\n")[0])
    found.add_argument("--updates", type=int, default=6, help="measured steps per turn")
    found.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str]) -> None:
    args = common.parse(options(), argv, repeats=1, updates=2)
    if args.worker:
        args.batch_size = args.batch_size or 32
        work(args)
        return
    args.use_cpu = True
    device = common.start(args).device
    seconds: dict[str, list[float]] = {"one": [], "apart": [], "together": []}
    for _ in range(args.repeats):
        seconds["one"] += run(MODULE, argv, 1)
        seconds["apart"].append(statistics.mean(run(MODULE, argv, 2)))
        seconds["together"] += run([*TOGETHER, *MODULE], argv, 1)
    communication = [
        1 - apart / together for apart, together in zip(seconds["apart"], seconds["together"], strict=True)
    ]
    contention = [1 - one / apart for one, apart in zip(seconds["one"], seconds["apart"], strict=True)]
    per_image = common.ratio([value / 2 for value in seconds["together"]], seconds["one"])
    figures = {
        "seconds_per_step": {name: common.Spread.of(values) for name, values in seconds.items()},
        "time_per_image_two_over_one": per_image,
        "communication_share": common.Spread.of(communication),
        "contention_share": common.Spread.of(contention),
    }
    common.write_json("scaling", args, argv, device, figures, num_processes=2)
    names = {"one": "one process", "apart": "two, apart", "together": "two, together"}
    rows = []
    for name, label in names.items():
        images = args.batch_size * (1 if name == "one" else 2)
        spread = figures["seconds_per_step"][name]
        rows.append({"processes": label, "s/step": str(spread), "ms/image": f"{1000 * spread.median / images:.2f}"})
    common.show(rows)
    print(f"time per image, two processes / one: {per_image} (0.5 would be perfect)")
    print(f"share of a step that is communication: {figures['communication_share']}")
    print(f"share that is lost to the shared machine: {figures['contention_share']}")


if __name__ == "__main__":
    main(sys.argv[1:])
