"""Memory and speed of a streamed training split at 224 px, and the speed of the ImageNet recipe's updates.

    python -m tests.benchmarks.streaming

The images are crops of 400 x 350 pixels, the usual size in ImageNet, from the two photographs that scikit-learn
carries, as JPEG; one parquet file of 5,000 of them stands under as many names as are needed. They go through what a
run does with them: reading, shuffle buffer, decoding in workers, timm's augmentation, float32 pixels on the device.
Memory is resident memory of the process and of its workers together.
"""

from __future__ import annotations

import copy
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.config import load_train_config
from ham_hf.data import DataConfig, ImageData, TrainingStream, UpdateLayout, load_image_data
from ham_hf.data.pixels import PixelBatch
from ham_hf.methods import PGDAT
from ham_hf.models import PixelModel, Preprocessing, create_backbone
from ham_hf.training.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.workload import labels, num_hard, prefer_class_0, training_config

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "imagenet" / "convnext_tiny_ham.yaml"
SIZE = 224
CROP = (400, 350)  # width, height
NUM_CLASSES = 10
MEBIBYTE = 2**20


def crops(count: int) -> Iterator[dict[str, object]]:
    """Encoded crops at random places of the photographs, mirrored or not, and labels."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        left, top = (int(rng.integers(0, side - crop)) for side, crop in zip(photograph.size, CROP, strict=True))
        image = photograph.crop((left, top, left + CROP[0], top + CROP[1]))
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=90)
        yield {"image": {"bytes": encoded.getvalue(), "path": None}, "label": number % NUM_CLASSES}


def write_shards(folder: Path, *, num_images: int, per_file: int) -> float:
    """Write the training files and a small test file; returns the mean size of an encoded image in KiB."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(label) for label in range(NUM_CLASSES)])}
    )
    made = datasets.Dataset.from_generator(crops, gen_kwargs={"count": per_file}, features=features)
    (folder / "data").mkdir(parents=True)
    first = folder / "data" / "train-00000.parquet"
    made.to_parquet(first, batch_size=100)
    for number in range(1, -(-num_images // per_file)):
        os.link(first, folder / "data" / f"train-{number:05d}.parquet")
    made.select(range(min(100, per_file))).to_parquet(folder / "data" / "test-00000.parquet")
    return first.stat().st_size / per_file / 1024


def resident() -> float:
    """Memory of this process and its workers, in MiB; pages that several of them share count once (Linux)."""
    here = psutil.Process()
    found = [process.memory_full_info() for process in [here, *here.children(recursive=True)]]
    return sum(getattr(memory, "pss", memory.rss) for memory in found) / MEBIBYTE


def stream_through(data: ImageData, args: object, device: torch.device) -> list[dict[str, float]]:
    """Read one epoch and note memory and speed every tenth of it."""
    assert isinstance(data.train, TrainingStream)
    layout = UpdateLayout(batch_size=args.batch_size, accumulation=1, world=1, rank=0, seed=0)
    batches = data.train.batches(layout, epoch=0, first_update=0, device=device)
    notes: list[dict[str, float]] = []
    whole = len(data.train) // args.batch_size * args.batch_size
    seen, every, since = 0, whole // 10, time.perf_counter()
    for batch in batches:
        seen += len(batch.x)
        if seen >= every * (len(notes) + 1):
            now = time.perf_counter()
            notes.append({"images": seen, "MiB": resident(), "images_per_second": every / (now - since)})
            since = now
            common.show([{name: f"{value:.0f}" for name, value in notes[-1].items()}])
    return notes


def update_speeds(data: ImageData, args: object, accelerator: object) -> dict[str, float]:
    """Images a second of the ImageNet recipe's updates at 224 px: HAM, half of the images hard, and PGD-AT.

    Its attack and method; random weights, SGD, and the precision and batch of the command line.
    """
    recipe = load_train_config(RECIPE)
    threat_model = ThreatModel(recipe.attack.norm, recipe.attack.epsilon)
    attack = Attack(threat_model=threat_model, num_steps=recipe.attack.num_steps, step_size=recipe.attack.step_size)
    size = Preprocessing(
        image_size=SIZE, in_chans=3, interpolation="bicubic", crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    backbone = create_backbone(
        args.model, pretrained=False, num_classes=NUM_CLASSES, preprocessing=size, model_args=args.model_args
    )
    prefer_class_0(backbone, args.model)
    config = training_config(args.precision, args.attack_batch_size, args.training)
    device = accelerator.device
    x = torch.rand(args.attack_batch_size, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    batch = PixelBatch(x, labels(len(x), 0.5).to(device), torch.arange(len(x)))
    steps = {
        name: Trainer(
            PixelModel(copy.deepcopy(backbone), size.mean, size.std), data, method, attack, config, accelerator
        ).train_step
        for name, method in {"ham": replace(recipe.method, mining_start_epoch=0), "pgd_at": PGDAT()}.items()
    }
    hard = {name: step([batch], epoch=0, step=0).hard for name, step in steps.items()}
    assert hard["ham"] == num_hard(len(x), 0.5), hard
    times = common.interleaved(
        {name: partial(step, [batch], epoch=0, step=0) for name, step in steps.items()},
        device=device,
        repeats=args.repeats,
    )
    return {name: len(x) / common.Spread.of(seconds).median for name, seconds in times.items()}


def options() -> object:
    found = common.parser("streaming", __doc__.partition("\n")[0])
    found.set_defaults(model="convnext_tiny", batch_size=64)
    found.add_argument("--images", type=int, default=100_000, help="training images that go through")
    found.add_argument("--images_per_file", type=int, default=5_000, help="of a parquet file")
    found.add_argument("--workers", type=int, default=2, help="decoding processes")
    found.add_argument("--buffer", type=int, default=10_000, help="--shuffle_buffer_size")
    found.add_argument("--attack_batch_size", type=int, default=8, help="images per update when the attack is timed")
    return found


def main(argv: Sequence[str]) -> None:
    small = {"model": "test_convnext", "images": 400, "images_per_file": 100, "buffer": 50, "attack_batch_size": 2}
    args = common.parse(options(), argv, **small)
    accelerator = common.start(args)
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = str(Path(folder) / "cache")
        kibibytes = write_shards(Path(folder) / "set", num_images=args.images, per_file=args.images_per_file)
        config = DataConfig(
            dataset_name=str(Path(folder) / "set"),
            dataset_streaming=True,
            shuffle_buffer_size=args.buffer,
            dataloader_num_workers=args.workers,
            validation_fraction=0.0,
            augmentation="timm",
        )
        inputs = Preprocessing(
            image_size=SIZE, in_chans=3, interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.25,) * 3
        )
        data = load_image_data(config, inputs, seed=0)
        before = resident()
        notes = stream_through(data, args, accelerator.device)
        consumed = update_speeds(data, args, accelerator)
    memory = [note["MiB"] for note in notes]
    speed = common.Spread.of([note["images_per_second"] for note in notes])
    figures = {
        "encoded_kibibytes": kibibytes,
        "mebibytes_before": before,
        "stream": notes,
        "growth_mebibytes": memory[-1] - memory[0],
        "stream_images_per_second": speed,
        "update_images_per_second": consumed,
        "stream_to_update": speed.median / consumed["ham"],
    }
    common.write_json("streaming", args, argv, accelerator.device, figures)
    common.show([{name: str(value) for name, value in figures.items() if name != "stream"}])


if __name__ == "__main__":
    main(sys.argv[1:])
