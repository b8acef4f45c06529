"""Measurements for when a GPU is available, in one command; a short table last, all numbers as JSON.

    python -m tests.benchmarks.gpu --parts 1 2 --data path/to/cifar10
    python -m tests.benchmarks.gpu --parts 3 --data path/to/cifar10 --work outputs/gpu --minutes 9
    python -m tests.benchmarks.gpu --parts 1 2 3 --rehearse

1. It runs: tests marked ``gpu``; gradients of the attack are finite; an epoch of HAM and of PGD-AT in float32 and in
   bf16, one compiled and one contiguous, by ``recipes/compare.py``; does PGD-20 of both precisions agree within noise?
2. Speed: `step` at several batch sizes in both precisions, `evaluation`, `memory`, and `profile` of the step.
3. Fairness: 30 epochs of each method with the same seeds, AutoAttack on 1,000 images, through ``recipes/compare.py``.

Everything runs in processes of its own, so one failure leaves the rest, and after ``--minutes`` what still runs is
stopped. The same command with the same ``--work`` resumes from the checkpoints there. ``--rehearse`` does all of it on
the CPU with tiny settings, on the digits unless ``--data`` is given; its numbers mean nothing. ``--training``
holds for part 2, ``--precision`` for part 3.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from ham_hf.attacks import input_gradient
from ham_hf.reporting.report import read_report
from ham_hf.training.launch import create_accelerator
from tests.benchmarks import common
from tests.benchmarks.workload import batch_of, network

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GRACE_SECONDS = 45
LARGEST_RATIO_TO_FLOOR = 1.15
"""Above it, the step is profiled in bf16 too."""
TINY = {"limit_train_examples": 200, "limit_test_examples": 40, "eval_num_steps": 2, "use_cpu": True}


class Session:
    """The time and the places that all parts share.

    Args:
        args: the command line.
        argv: as it was typed.
    """

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.args, self.argv = args, argv
        self.deadline = time.monotonic() + 60 * args.minutes
        self.work = args.work or Path(tempfile.mkdtemp(prefix="ham_hf_gpu_"))
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, words: Sequence[str]) -> str:
        """Run Python with these words, printing into a log; "done", "stopped", or how it failed."""
        left = self.deadline - time.monotonic()
        if left < 5:
            return "not started: no time left"
        log, since = self.work / f"{name}.log", time.monotonic()
        with log.open("ab") as file:
            process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT)
            try:
                code = process.wait(timeout=left)
                how = "done" if code == 0 else f"failed with status {code}"
            except subprocess.TimeoutExpired:
                # compare.py hands this on to its runs; what has no handler just ends.
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                how = "stopped: out of time"
        print(f"{name}: {how} after {time.monotonic() - since:.0f} s", flush=True)
        if how.startswith("failed"):
            print(log.read_text(errors="replace")[-1500:], flush=True)
        return how

    def benchmark(self, script: str, name: str, *words: str) -> dict[str, object]:
        """Run one of the other benchmarks; its record, and how it went."""
        out = self.work / f"{name}.json"
        out.unlink(missing_ok=True)
        given = ["--use_cpu", "--quick"] if self.args.rehearse else []
        given += ["--training", *(f"{key}={value}" for key, value in self.args.training.items())]
        how = self.run(name, ["-m", f"tests.benchmarks.{script}", *words, f"--out={out}", *given])
        return {"how": how, "record": json.loads(out.read_text()) if out.is_file() else None}

    def compare(self, name: str, runs: dict[str, dict], settings: dict, seeds: list[int]) -> dict[str, object]:
        """Train several settings through ``recipes/compare.py``; the figures of those that are finished."""
        args = self.args
        if args.data is None and not args.rehearse:
            return {"how": "skipped: --data does not name CIFAR-10", "runs": {}}
        recipe = "cifar10/preactresnet18_ham.yaml"
        if args.rehearse:
            recipe = "digits/ham.yaml" if args.data is None else recipe
            settings = {**settings, **TINY, "per_device_train_batch_size": 32}
        if args.data is not None:
            settings = {**settings, "dataset_name": str(Path(args.data).resolve())}
        plan = {"recipe": str(RECIPES / recipe), "seeds": seeds, "settings": settings, "runs": runs}
        file = self.work / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**plan, "output_dir": str(self.work / name)}))
        how = self.run(name, [str(RECIPES / "compare.py"), "--config", str(file)])
        found = {
            f"{label}, seed {seed}": figures(self.work / name / label / f"seed{seed}")
            for seed in seeds
            for label in runs
        }
        settings.pop("dataset_name", None)
        return {"how": how, "settings": settings, "runs": found}


def figures(folder: Path) -> dict[str, object] | None:
    """The numbers of a run; None while it is not finished."""
    if not (folder / "report.json").is_file():
        return None
    report = read_report(folder)
    history = report.training.history
    return {
        "seconds": report.training.seconds,
        "peak_memory_mebibytes": (report.training.peak_memory_bytes or 0) / 2**20,
        "hard_fraction": [line.get("hard_fraction") for line in history],
        "hard_per_class": history[-1].get("hard_per_class"),
        "results": {name: asdict(attack.summary) for name, attack in report.results.items()},
    }


def it_runs(session: Session) -> dict[str, object]:
    """Part 1."""
    tests = "skipped: pytest is not installed"
    if importlib.util.find_spec("pytest"):
        words = ["-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        tests = session.run("gpu_tests", ["-m", "pytest", "-q", *words, "tests"])
    mining = {"mining_start_epoch": 0}
    runs: dict[str, dict] = {}
    for precision in ("no", "bf16"):
        name = "fp32" if precision == "no" else precision
        runs[f"ham-{name}"] = {"mixed_precision": precision, **mining}
        runs[f"pgd_at-{name}"] = {"method": "pgd_at", "mixed_precision": precision}
    if not session.args.rehearse:
        runs["ham-bf16-compiled"] = {"mixed_precision": "bf16", "torch_compile": True, **mining}
        runs["ham-fp32-contiguous"] = {"memory_format": "contiguous", **mining}
    settings = {"num_train_epochs": 1, "limit_test_examples": 2000}
    trained = session.compare("one_epoch", runs, settings, [0])
    return {"tests": tests, "gradients": finite_gradients(session.args), "trained": trained}


def finite_gradients(args: argparse.Namespace) -> dict[str, bool]:
    """Whether the attack's gradients are finite and not all zero, by precision."""
    device = create_accelerator(use_cpu=args.rehearse).device
    model = network(common.DEFAULT_MODEL, common.QUICK_MODEL_ARGS if args.rehearse else {}).eval().to(device)
    model = model.to(memory_format=torch.channels_last)
    batch = batch_of(16, 1.0, device)
    found = {}
    for precision in ("fp32", "bf16"):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            gradient = input_gradient(model, batch.x, batch.y)
        found[precision] = bool(gradient.isfinite().all() and gradient.count_nonzero())
    return found


def speed(session: Session) -> dict[str, object]:
    """Part 2."""
    sizes = ["--batch_sizes", "8"] if session.args.rehearse else ["--batch_sizes", "128", "256", "512"]
    steps = [*sizes, "--hard_fractions", "0.3", "0.5", "0.7"]
    found = {f"step_{precision}": session.benchmark("step", f"step_{precision}", *steps, f"--precision={precision}")
             for precision in ("fp32", "bf16")}  # fmt: skip
    found["profile_fp32"] = session.benchmark("profile", "profile_fp32")
    record = found["step_bf16"]["record"]
    ratios = record["figures"]["by_batch_size"][0]["ratios"] if record else None
    if ratios and ratios["ham / floor, 0.5"]["median"] > LARGEST_RATIO_TO_FLOOR:
        found["profile_bf16"] = session.benchmark("profile", "profile_bf16", "--precision=bf16")
    images = [] if session.args.rehearse else ["--num_images=1024", "--batch_size=256"]
    found["evaluation"] = session.benchmark("evaluation", "evaluation", *images)
    found["memory"] = session.benchmark("memory", "memory", "--repeats=1")
    return found


def fairness(session: Session) -> dict[str, object]:
    """Part 3."""
    settings = {
        "num_train_epochs": 30,
        "mixed_precision": "bf16" if session.args.precision == "bf16" else "no",
        # The recipe's 120 epochs, four times as fast.
        "lr_drops": ["15:0.1", "22:0.01", "27:0.005"],
        "autoattack": True,
        "autoattack_examples": 1000,
    }
    if session.args.rehearse:
        settings |= {"num_train_epochs": 2, "lr_drops": ["1:0.1"], "autoattack_examples": 20}
    start = {"mining_start_epoch": 1 if session.args.rehearse else 12}
    runs = {method: {"method": method, **(start if method == "ham" else {})} for method in session.args.methods}
    return session.compare("fairness", runs, settings, session.args.seeds)


def step_rows(found: dict[str, object]) -> list[dict[str, str]]:
    """Table of part 2."""
    rows = []
    for name, part in found.items():
        if name.startswith("step_") and part["record"]:
            for at_size in part["record"]["figures"]["by_batch_size"]:
                about = {"precision": name.removeprefix("step_"), "batch": str(at_size["batch_size"])}
                rows += [
                    {**about, "ratio": what, "median": f"{spread['median']:.3f}",
                     "from": f"{spread['min']:.3f}", "to": f"{spread['max']:.3f}"}
                    for what, spread in at_size["ratios"].items()
                ]  # fmt: skip
    return rows


def run_rows(found: dict[str, object]) -> list[dict[str, str]]:
    """Table of what was trained: PGD with its 95 % interval, and the strongest attack."""
    rows = []
    for name, run in found["runs"].items():
        row = dict.fromkeys(("run", "seconds", "clean", "PGD", "95 %", "worst class", "AutoAttack", "its worst"), "")
        row["run"] = name if run else f"{name}: not finished"
        if run:
            pgd = next(summary for key, summary in run["results"].items() if key.startswith("pgd"))
            row |= {"seconds": f"{run['seconds']:.0f}", "clean": f"{100 * run['results']['clean']['average']:.1f}"}
            row |= {"PGD": f"{100 * pgd['average']:.1f}", "worst class": f"{100 * pgd['worst_class']:.1f}"}
            row["95 %"] = f"{100 * pgd['average_low']:.1f} to {100 * pgd['average_high']:.1f}"
            if auto := run["results"].get("autoattack"):
                row |= {"AutoAttack": f"{100 * auto['average']:.1f}", "its worst": f"{100 * auto['worst_class']:.1f}"}
        rows.append(row)
    return rows


def options() -> argparse.ArgumentParser:
    found = common.parser("gpu", __doc__.partition("\n")[0])
    found.add_argument("--parts", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2], help="what to run")
    found.add_argument("--data", help="folder of CIFAR-10 as parquet")
    found.add_argument("--work", type=Path, help="folder for runs and logs; default: a new temporary one")
    found.add_argument("--minutes", type=float, default=9.0, help="stop after this long")
    found.add_argument("--methods", nargs="+", default=["pgd_at", "ham"], help="of part 3")
    found.add_argument("--seeds", type=int, nargs="+", default=[0], help="of part 3")
    found.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny settings")
    return found


def main(argv: Sequence[str]) -> None:
    args = common.parse(options(), argv)
    args.quick |= args.rehearse
    device = create_accelerator(use_cpu=args.rehearse).device
    if device.type == "cpu" and not args.rehearse:
        raise SystemExit("there is no accelerator here: add --rehearse to try this on the CPU")
    session = Session(args, argv)
    parts = {1: it_runs, 2: speed, 3: fairness}
    found: dict[str, dict] = {}
    for number in args.parts:
        found[str(number)] = parts[number](session)
        # After every part, so that being cut off costs one part and not all.
        common.write_json("gpu", args, argv, device, found)
    if "1" in found:
        print(f"tests marked gpu: {found['1']['tests']}; finite gradients: {found['1']['gradients']}")
        common.show(run_rows(found["1"]["trained"]))
    if "2" in found:
        common.show(step_rows(found["2"]))
    if "3" in found:
        common.show(run_rows(found["3"]))


if __name__ == "__main__":
    main(sys.argv[1:])
