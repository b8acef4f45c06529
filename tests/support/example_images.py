"""Small image datasets in the layouts that users have, for the tests of data loading."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ham_hf.data import BatchRequest, DataConfig, ImageData, Images, TestData, load_image_data, load_test_data
from ham_hf.data.evaluation_data import TrainedOn
from ham_hf.data.sources import Source, open_source
from ham_hf.models import Preprocessing


def gray(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """An RGB image of one gray value, which names the example; size is (width, height)."""
    return Image.new("RGB", size, (value, value, value))


def noise(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """Random pixels; size is (width, height)."""
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=mode)


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def dataset(
    images: Sequence[Image.Image | bytes | None],
    labels: Sequence[Any],
    *,
    image: str = "image",
    label: str = "label",
    label_feature: Any = None,
    image_feature: Any = None,
) -> datasets.Dataset:
    """Images with labels; the label feature defaults to a ClassLabel with the names c0, c1, ..."""
    encoded = [encode(item) if isinstance(item, Image.Image) else item for item in images]
    if label_feature is None:
        label_feature = datasets.ClassLabel(names=[f"c{index}" for index in range(max(labels) + 1)])
    features = datasets.Features({image: image_feature or datasets.Image(), label: label_feature})
    return datasets.Dataset.from_dict({image: encoded, label: list(labels)}, features=features)


def grays(num_examples: int, num_classes: int = 2, *, first: int = 0, **options: Any) -> datasets.Dataset:
    """Example i has the gray value ``first + i`` and the label i modulo ``num_classes``."""
    labels = [index % num_classes for index in range(num_examples)]
    return dataset([gray(first + index) for index in range(num_examples)], labels, **options)


def write_parquet(folder: Path, **splits: datasets.Dataset) -> str:
    """The Hub's layout: one parquet file per split."""
    (folder / "data").mkdir(parents=True)
    for split, examples in splits.items():
        examples.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def write_files(root: Path, files: Mapping[str, bytes]) -> str:
    """Files by their paths below ``root``."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return str(root)


def pictures(*paths: str, first: int = 0) -> dict[str, bytes]:
    """A different image for each path."""
    return {path: encode(noise(first + number)) for number, path in enumerate(paths)}


def in_class_folders(*classes: str, count: int = 4) -> list[str]:
    """Paths of ``count`` images of each class."""
    return [f"{name}/{number}.png" for name in classes for number in range(count)]


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for path, content in files.items():
            opened.writestr(path, content)
    return buffer.getvalue()


def load(dataset_name: str, **options: Any) -> ImageData:
    """``load_image_data`` with the small values that a model would give."""
    in_chans, image_size = options.pop("in_chans", 3), options.pop("image_size", None)
    inputs = Preprocessing(
        image_size=options.pop("default_image_size", 112),
        in_chans=in_chans,
        interpolation=options.pop("interpolation", "bicubic"),
        crop_pct=options.pop("crop_pct", 0.875),
        mean=(0.5,) * in_chans,
        std=(0.25,) * in_chans,
    )
    seed = options.pop("seed", 0)
    return load_image_data(DataConfig(dataset_name=dataset_name, **options), inputs, seed=seed, image_size=image_size)


def open_stored(dataset_name: str) -> Source[datasets.Dataset]:
    """The dataset of this name, by the rules."""
    return open_source(DataConfig(dataset_name=dataset_name))


def load_to_evaluate(
    folder: str, trained: TrainedOn | None = None, *, group_column: str | None = None, **options: Any
) -> TestData:
    """``load_test_data`` with the small values that a model would give."""
    config = DataConfig(dataset_name=folder, dataloader_num_workers=0, **options)
    inputs = Preprocessing(
        image_size=8, in_chans=3, interpolation="bicubic", crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    return load_test_data(config, inputs, trained or TrainedOn(), group_column=group_column)


def everything(images: Images) -> Tensor:
    """All pixels of a split, in order, without augmentation."""
    (batch,) = images.batches([BatchRequest(torch.arange(len(images)), None)], device=torch.device("cpu"))
    return batch.x


def gray_values(images: Images) -> list[int]:
    """Gray values of a split, which name its examples."""
    return (everything(images)[:, 0, 0, 0] * 255).round().int().tolist()
