"""One update of training: ours against the published step, the careful step, and the floor of bare passes.

    python -m tests.benchmarks.step
    python -m tests.benchmarks.step --model vit_tiny_patch16_224 --model_args patch_size=4
    python -m tests.benchmarks.step --model convnext_atto --model_args patch_size=1
    python -m tests.benchmarks.step --training attack_precision=bf16
    python -m tests.benchmarks.step --batch_sizes 128 256 512 --precision bf16 --training torch_compile=true

The published and the careful step run in float32 and the contiguous layout, the floors in the precision and the layout
of ours. `yardsticks` writes them out; `workload` says how the hard fraction is set.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from tests.benchmarks import common
from tests.benchmarks.workload import (
    EPSILON,
    LEARNING_RATE,
    MINING_STEP,
    NUM_STEPS,
    STEP_SIZE,
    OurStep,
    batch_of,
    network,
    num_hard,
)
from tests.benchmarks.yardsticks import Attack, Floor, careful_step, published_step

ATTACK = Attack(epsilon=EPSILON, step_size=STEP_SIZE, num_steps=NUM_STEPS, mining_step=MINING_STEP)


class Contestants:
    """Everything that is compared, ready to be called.

    Args:
        args: the command line.
        accelerator: of the process.
        batch_size: images per step.

    Attributes:
        functions: by name: "pgd_at", "pgd_at floor", and for each hard fraction "ham 0.5", "published 0.5",
            "careful 0.5" and "floor 0.5".
        hard: number of hard rows that "ham", "published" and "careful" have to find, by the same names.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, batch_size: int) -> None:
        device = accelerator.device
        model = network(args.model, args.model_args)
        # One for each hard fraction, as HAM remembers it from the epoch before.
        names = ["pgd_at", *(f"ham {fraction:g}" for fraction in args.hard_fractions)]
        ours = {
            name: OurStep(
                name.split()[0],
                copy.deepcopy(model),
                accelerator,
                precision=args.precision,
                batch_size=batch_size,
                settings=args.training,
            )
            for name in names
        }
        plain = copy.deepcopy(model).to(device)
        optimizer = torch.optim.SGD(plain.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        contiguous = args.training.get("memory_format") == "contiguous"
        layout = torch.contiguous_format if contiguous else torch.channels_last
        attack_precision = "bf16" if args.training.get("attack_precision") == "bf16" else args.precision
        floor = Floor(copy.deepcopy(model).to(device).to(memory_format=layout), args.precision, attack_precision)
        x = batch_of(batch_size, 0.5, device).x.contiguous(memory_format=layout)

        self.functions: dict[str, Callable[[], object]] = {}
        self.hard: dict[str, int] = {}
        for fraction in args.hard_fractions:
            batch, hard = batch_of(batch_size, fraction, device), num_hard(batch_size, fraction)
            self.functions[f"ham {fraction:g}"] = lambda batch=batch, step=ours[f"ham {fraction:g}"]: step(batch)
            self.functions[f"floor {fraction:g}"] = lambda hard=hard: floor.ham(x, x[:hard], ATTACK)
            self.functions[f"published {fraction:g}"] = lambda batch=batch: published_step(
                plain, optimizer, batch.x, batch.y, ATTACK
            )
            self.functions[f"careful {fraction:g}"] = lambda batch=batch: careful_step(
                plain, optimizer, batch.x, batch.y, ATTACK
            )
            for name in ("ham", "published", "careful"):
                self.hard[f"{name} {fraction:g}"] = hard
        whole = batch_of(batch_size, 1.0, device)
        self.functions["pgd_at"] = lambda: ours["pgd_at"](whole)
        self.functions["pgd_at floor"] = lambda: floor.pgd_at(x, ATTACK)

    def check(self, name: str, result: object) -> None:
        """Refuse a call that found another number of hard rows than was meant."""
        found = getattr(result, "hard", result)
        if name in self.hard and found != self.hard[name]:
            raise RuntimeError(f"{name}: {found} rows were hard, {self.hard[name]} were meant to be")


def measure(args: argparse.Namespace, accelerator: Accelerator, batch_size: int) -> dict[str, object]:
    """Seconds and ratios of everything at one batch size."""
    contestants = Contestants(args, accelerator, batch_size)
    seconds = common.interleaved(
        contestants.functions,
        device=accelerator.device,
        repeats=args.repeats,
        warmup=1 if accelerator.device.type == "cpu" else 3,
        check=contestants.check,
    )
    ratios = {"pgd_at / floor": common.ratio(seconds["pgd_at"], seconds["pgd_at floor"])}
    for fraction in (f"{value:g}" for value in args.hard_fractions):
        for other in ("published", "careful", "floor"):
            ratios[f"ham / {other}, {fraction}"] = common.ratio(
                seconds[f"ham {fraction}"], seconds[f"{other} {fraction}"]
            )
        ratios[f"ham / pgd_at, {fraction}"] = common.ratio(seconds[f"ham {fraction}"], seconds["pgd_at"])
    spread = {name: common.Spread.of(values) for name, values in seconds.items()}
    images = {name: batch_size / spread[name].median for name in spread}
    return {"batch_size": batch_size, "seconds": spread, "images_per_second": images, "ratios": ratios}


def table(args: argparse.Namespace, figures: Sequence[dict]) -> list[dict[str, str]]:
    """One row per batch size and hard fraction, and one for PGD-AT."""
    rows = []
    for part in figures:
        ratios, images = part["ratios"], part["images_per_second"]
        about = {"batch": str(part["batch_size"])}
        for fraction in (f"{value:g}" for value in args.hard_fractions):
            others = {
                f"/ {other}": str(ratios[f"ham / {other}, {fraction}"])
                for other in ("published", "careful", "floor", "pgd_at")
            }
            rows.append(
                {**about, "step": f"HAM, {fraction} hard", "img/s": f"{images[f'ham {fraction}']:.1f}", **others}
            )
        nothing = dict.fromkeys(("/ published", "/ careful"), "")
        own = {"/ floor": str(ratios["pgd_at / floor"]), "/ pgd_at": ""}
        rows.append({**about, "step": "PGD-AT", "img/s": f"{images['pgd_at']:.1f}", **nothing, **own})
    return rows


def options() -> argparse.ArgumentParser:
    found = common.parser("step", __doc__.partition("\n")[0])
    found.add_argument("--batch_sizes", type=int, nargs="+", help="several batch sizes, one after the other")
    found.add_argument(
        "--hard_fractions", type=float, nargs="+", default=[0.3, 0.5, 0.7, 1.0], help="shares in (0, 1]"
    )
    return found


def main(argv: Sequence[str]) -> None:
    args = common.parse(options(), argv, hard_fractions=[0.5])
    accelerator = common.start(args)
    figures = [measure(args, accelerator, size) for size in args.batch_sizes or [args.batch_size]]
    common.write_json("step", args, argv, accelerator.device, {"by_batch_size": figures})
    print("ratios of seconds: median (smallest to largest) of the turns")
    common.show(table(args, figures))


if __name__ == "__main__":
    main(sys.argv[1:])
