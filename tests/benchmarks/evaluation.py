"""Robust accuracy per class by PGD-20 through ``evaluate``, against bare passes over the images that are right.

    python -m tests.benchmarks.evaluation

The bare passes are 21 forwards and 20 input gradients of the images that are classified right as they are; the clean
classification of all images, which ``evaluate`` needs to know them, is not among them. Two networks: one that no image
falls on, and one that all fall on: PGD counts the last iterate, so both take the same time. With ``--training
memory_format=contiguous``, the layout is what it is worth.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator

from ham_hf.data.pixels import BatchRequest
from ham_hf.evaluation import AttackResult, Workplace, evaluate, standard_attacks
from tests.benchmarks import common
from tests.benchmarks.workload import ATTACK, EPSILON, MARGIN, image_data, labels, network
from tests.benchmarks.yardsticks import Floor

NUM_STEPS = 20


def measure(args: argparse.Namespace, accelerator: Accelerator, margin: float) -> dict[str, object]:
    """Seconds and their ratio on a network with this margin."""
    device = accelerator.device
    layout = args.training.get("memory_format", "channels_last")
    # As `ham_hf.commands.evaluate` does; images take the layout of the weights.
    model = network(args.model, args.model_args, margin=margin).eval().to(device)
    model = model.to(memory_format=getattr(torch, {"contiguous": "contiguous_format"}.get(layout, layout)))
    data = image_data(labels(args.num_images, 1 - args.right_fraction))
    if not margin:
        _label_by_prediction(model, data.test, args, device)
    attack = standard_attacks(replace(ATTACK, num_steps=NUM_STEPS, step_size=EPSILON / 4))[0]
    floor = Floor(copy.deepcopy(model).to(memory_format=torch.channels_last), args.precision, args.precision)
    requests = [BatchRequest(part, None) for part in torch.arange(args.num_images).split(args.batch_size)]
    right = []
    for batch in data.test.batches(requests, device=device):
        with torch.no_grad():
            is_right = model(batch.x).argmax(1) == batch.y
        right.append(batch.x[is_right].contiguous(memory_format=torch.channels_last))

    def ours() -> dict[str, AttackResult]:
        return evaluate(
            model, data.test, [attack], Workplace(accelerator=accelerator, batch_size=args.batch_size, seed=0)
        )

    def bare() -> None:
        for x in right:
            if len(x):
                floor.evaluation(x, NUM_STEPS)

    num_right, survivors = sum(map(len, right)), []

    def check(name: str, result: object) -> None:
        if name == "ours":
            found = int(result["clean"].flags.sum())
            if found != num_right:
                raise RuntimeError(f"{found} images were right, {num_right} were meant to be")
            survivors.append(int(result[attack.name].flags.sum()))

    seconds = common.interleaved(
        {"ours": ours, "bare": bare}, device=device, repeats=args.repeats, warmup=1, check=check
    )
    return {
        "num_images": args.num_images,
        "num_right": num_right,
        "num_robust": survivors[-1],
        "seconds": {name: common.Spread.of(values) for name, values in seconds.items()},
        "ratio": common.ratio(seconds["ours"], seconds["bare"]),
    }


def _label_by_prediction(model: torch.nn.Module, images, args: argparse.Namespace, device: torch.device) -> None:
    """Label images as the network classifies them, but for the share that is to be wrong."""
    wrong = images.labels != 0
    for part in torch.arange(args.num_images).split(args.batch_size):
        (batch,) = images.batches([BatchRequest(part, None)], device=device)
        with torch.no_grad():
            logits = model(batch.x).cpu()
        images.labels[part] = torch.where(wrong[part], logits.argmin(1), logits.argmax(1))


def options() -> argparse.ArgumentParser:
    found = common.parser("evaluation", __doc__.partition("\n")[0])
    found.add_argument("--num_images", type=int, default=64, help="images that are evaluated")
    found.add_argument("--right_fraction", type=float, default=0.75, help="share that is classified right, in (0, 1]")
    return found


def main(argv: Sequence[str]) -> None:
    args = common.parse(options(), argv, num_images=16)
    accelerator = common.start(args)
    figures = {"none falls": measure(args, accelerator, MARGIN), "all fall": measure(args, accelerator, 0.0)}
    common.write_json("evaluation", args, argv, accelerator.device, figures)
    rows = [
        {
            "network": name,
            "images": str(part["num_images"]),
            "right": str(part["num_right"]),
            "robust": str(part["num_robust"]),
            "seconds": f"{part['seconds']['ours'].median:.2f}",
            "/ bare passes": str(part["ratio"]),
        }
        for name, part in figures.items()
    ]
    common.show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
