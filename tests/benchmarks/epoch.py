"""Epochs of training with the real data pipeline: what is not the step, HAM against PGD-AT, and growth with the data.

    python -m tests.benchmarks.epoch --data path/to/cifar10

Needs CIFAR-10 in the Hub's parquet layout, named by ``--data`` or HAM_HF_CIFAR10; without it nothing is measured, as
images made up in memory would have no pipeline. Labels are replaced so that half of the images of every ten batches
are hard for HAM (see `workload`); which of them meet in a batch is left to chance, so the size of the hard part
changes from step to step, as in real training.

An epoch on a CPU takes long, so some batches of it stand for all: after four that warm up, ``--updates`` in a row.
They are an even sample, since the order of an epoch is a random permutation of all images, and a multiple of 10 of
them has its share of hard images and of log lines. What comes once per epoch, before its first update, is added in
proportion. Validation and checkpoints are not part of any figure.

- data and logging: wall-clock time of these updates minus the time inside ``TrainStep.__call__``, the device's queue
  being empty at both ends of it, as a share of the wall-clock time;
- HAM / PGD-AT: ratio of their epochs; of HAM also with the hard examples of two batches packed into full ones
  (``pack_hard_examples``, two accumulation steps: half as many updates, of twice the size);
- cost per image: time of a HAM epoch on 2,000, 10,000 and 50,000 images, divided by their number.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ham_hf.config import DataConfig
from ham_hf.data import ImageData, PixelBatch, load_image_data
from ham_hf.models import PixelModel, input_defaults
from ham_hf.training.data_order import epoch_order
from ham_hf.training.train_step import Totals
from ham_hf.training.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.workload import ATTACK, IMAGE_SIZE, METHODS, labels, network, training_config

WARMUP = 4  # batches
SHARE_IS_EXACT_IN = 10  # batches
ACCUMULATION = {"ham": 1, "pgd_at": 1, "ham_packed": 2}


class Clock:
    """Stands in for a ``TrainStep`` and notes when each call began and ended."""

    def __init__(self, step: Callable[..., Totals], device: torch.device) -> None:
        self.step, self.device = step, device
        self.times: list[tuple[float, float]] = []
        self.totals: list[Totals] = []

    def __call__(self, batches: Sequence[PixelBatch], **place: object) -> Totals:
        common.synchronize(self.device)
        began = time.perf_counter()
        totals = self.step(batches, **place)
        common.synchronize(self.device)
        self.times.append((began, time.perf_counter()))
        self.totals.append(totals)
        return totals


@dataclass(frozen=True, kw_only=True)
class Part:
    """Duration of one stretch of an epoch, in seconds per batch.

    Attributes:
        step: inside the step.
        other: data and logging.
        hard_fraction: that was met.
    """

    step: float
    other: float
    hard_fraction: float


def train(method: str, data: ImageData, model: PixelModel, args: argparse.Namespace, accelerator: Accelerator) -> Part:
    """Train for some updates of an epoch and take the time."""
    accumulation = ACCUMULATION[method]
    first, num = WARMUP // accumulation, args.updates // accumulation
    with tempfile.TemporaryDirectory() as folder:
        config = training_config(
            args.precision,
            args.batch_size,
            args.training,
            output_dir=folder,
            num_train_epochs=1,
            gradient_accumulation_steps=accumulation,
            # One more begins, and ends the measured stretch.
            max_steps=first + num + 1,
        )
        trainer = Trainer(copy.deepcopy(model), data, METHODS[method], ATTACK, config, accelerator)
        clock = Clock(trainer.train_step, accelerator.device)
        trainer.train_step = clock
        since = time.perf_counter()
        trainer.fit()
    begins = [began for began, _ in clock.times]
    wall = begins[first + num] - begins[first]
    inside = sum(ended - began for began, ended in clock.times[first : first + num])
    once = (begins[0] - since) / trainer.updates_per_epoch / accumulation
    mined = sum(totals.mined for totals in clock.totals[first : first + num])
    hard = sum(totals.hard for totals in clock.totals[first : first + num])
    return Part(
        step=inside / args.updates,
        other=(wall - inside) / args.updates + once,
        hard_fraction=hard / mined if mined else 1.0,
    )


def open_data(args: argparse.Namespace, limit: int | None) -> ImageData:
    """CIFAR-10 through the pipeline of a run; half of the training images labeled as hard."""
    config = DataConfig(
        dataset_name=args.data, validation_fraction=0.0, limit_train_examples=limit, limit_test_examples=100
    )
    data = load_image_data(config, input_defaults(args.model, model_args={}), seed=0, image_size=IMAGE_SIZE)
    order = epoch_order(data.train.labels, training_config(args.precision, 1, {}).seed, 0, None)
    y = labels(len(order), 0.5)
    stretches = torch.split(order[WARMUP * args.batch_size :], SHARE_IS_EXACT_IN * args.batch_size)
    for number, stretch in enumerate(stretches):
        y[stretch] = labels(len(stretch), 0.5, seed=number)
    data.train.labels = y
    return data


def measure(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, object]:
    """All figures; what is compared takes turns."""
    model = network(args.model, args.model_args)
    loaded = {size: open_data(args, size) for size in args.sizes}
    largest = max(args.sizes)
    parts: dict[str, list[Part]] = {f"ham {size}": [] for size in args.sizes}
    parts |= {f"pgd_at {largest}": [], f"ham_packed {largest}": []}
    for _ in range(args.repeats):
        for name, found in parts.items():
            method, size = name.split()
            found.append(train(method, loaded[int(size)], model, args, accelerator))
    seconds = {name: [part.step + part.other for part in found] for name, found in parts.items()}
    return {
        "updates": args.updates,
        "hard_fraction": {
            name: common.Spread.of([part.hard_fraction for part in found]) for name, found in parts.items()
        },
        "seconds_per_batch": {name: common.Spread.of(values) for name, values in seconds.items()},
        "images_per_second": {name: args.batch_size / common.Spread.of(v).median for name, v in seconds.items()},
        "data_and_logging_share": {
            name: common.Spread.of([part.other / (part.step + part.other) for part in found])
            for name, found in parts.items()
        },
        "ham / pgd_at": common.ratio(seconds[f"ham {largest}"], seconds[f"pgd_at {largest}"]),
        "ham_packed / pgd_at": common.ratio(seconds[f"ham_packed {largest}"], seconds[f"pgd_at {largest}"]),
        "cost_per_image_relative_to_smallest": {
            str(size): common.ratio(seconds[f"ham {size}"], seconds[f"ham {min(args.sizes)}"]) for size in args.sizes
        },
    }


def options() -> argparse.ArgumentParser:
    found = common.parser("epoch", __doc__.partition("\n")[0])
    found.add_argument("--data", default=os.environ.get("HAM_HF_CIFAR10"), help="folder of CIFAR-10 as parquet")
    found.add_argument("--updates", type=int, default=10, help="measured batches; a multiple of 10")
    found.add_argument("--sizes", type=int, nargs="+", default=[2_000, 10_000, 50_000], help="numbers of images")
    return found


def main(argv: Sequence[str]) -> None:
    args = common.parse(options(), argv, sizes=[500, 2_000])
    if args.data is None:
        print("skipped: CIFAR-10 is named neither by --data nor by HAM_HF_CIFAR10")
        return
    accelerator = common.start(args)
    figures = measure(args, accelerator)
    common.write_json("epoch", args, argv, accelerator.device, figures)
    largest = max(args.sizes)
    rows = []
    for name, spread in figures["seconds_per_batch"].items():
        method, size = name.split()
        growth = figures["cost_per_image_relative_to_smallest"][size] if method == "ham" else ""
        rows.append(
            {
                "epoch": f"{method}, {int(size):,} images",
                "hard": f"{figures['hard_fraction'][name].median:.2f}",
                "img/s": f"{figures['images_per_second'][name]:.1f}",
                "minutes": f"{spread.median * (int(size) // args.batch_size) / 60:.1f}",
                "data and logging": str(figures["data_and_logging_share"][name]),
                f"cost per image / that of {min(args.sizes):,}": str(growth),
            }
        )
    common.show(rows)
    print(f"HAM epoch / PGD-AT epoch, {largest:,} images: {figures['ham / pgd_at']}")
    print(f"the same with hard examples of two batches packed: {figures['ham_packed / pgd_at']}")


if __name__ == "__main__":
    main(sys.argv[1:])
