"""Training data of a model: recorded in config.json, recognized in a copy, its validation images found again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import datasets
import pytest
import torch

from ham_hf.config import DataConfig
from ham_hf.data.provenance import label_fingerprint, read_provenance
from ham_hf.fitting import find_validation_part, provenance_of
from ham_hf.models import create_backbone, load_pixel_model
from tests.support import exports
from tests.support.example_images import dataset, encode, everything, gray, grays, load, noise, write_parquet
from tests.support.exports import preprocessing


def write_folders(root, *, count=12):
    for label in range(3):
        (root / "train" / f"c{label}").mkdir(parents=True)
        for index in range(count + label):
            (root / "train" / f"c{label}" / f"{index}.png").write_bytes(encode(noise(100 * label + index)))
    return str(root)


def export(data, folder):
    """Export a network as a run on this data does, and load it again."""
    settings = preprocessing(data.image_size)
    backbone = create_backbone(
        "resnet18_cifar",
        pretrained=False,
        num_classes=len(data.class_names),
        preprocessing=settings,
        model_args={"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]},
    )
    record = {"trained_on": data.provenance.record()}
    exports.export(backbone, folder, settings, class_names=data.class_names, metadata=record)
    return load_pixel_model(str(folder))


FRACTIONS = {"validation_fraction": 0.3, "test_fraction": 0.4, "seed": 7}
LIMITED = {"limit_train_examples": 20, "validation_fraction": 0.25, "seed": 3}


def values(data):
    pixels, labels = everything(data.validation), data.validation.labels.tolist()
    return [(x.numpy().tobytes(), data.class_names[y]) for x, y in zip(pixels, labels, strict=True)]


@pytest.mark.parametrize(
    ("layout", "options"), [("folders", FRACTIONS), ("folders", LIMITED), ("parquet", {}), ("test split", LIMITED)]
)
def test_validation_images_are_found_again_from_config_json(options, layout, tmp_path):
    if layout == "folders":
        folder = write_folders(tmp_path / "set")
    else:
        splits = {"train": grays(40, 3)} | ({"test": grays(9, 3, first=100)} if layout == "test split" else {})
        folder = write_parquet(tmp_path / "set", **splits)
    data = load(folder, **options)
    loaded = export(data, tmp_path / "model")
    moved = shutil.move(folder, tmp_path / "renamed")
    if layout == "parquet":  # a copy that declares the classes in another order, which settles ties of their shares
        copy, names = grays(40, 3), ["c2", "c0", "c1"]
        labels = [names.index(f"c{label}") for label in copy["label"]]
        moved = write_parquet(
            tmp_path / "copy", train=dataset(copy["image"], labels, label_feature=datasets.ClassLabel(names=names))
        )
    again = find_validation_part(loaded, DataConfig(dataset_name=str(moved)))
    assert values(again) == values(data)
    assert values(again)
    text = (tmp_path / "model" / "config.json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)["ham_hf"]["trained_on"]
    expected = {"dataset": "set", "num_images": 39 if layout == "folders" else 40, "seed": options.get("seed", 0)}
    assert (expected | {"train_split": "train", "label_column": "label"}).items() <= record.items()


def test_a_stream_is_recorded_with_the_reason_and_found_again(tmp_path):
    folder = write_parquet(tmp_path / "set", train=grays(40), test=grays(6))
    data = load(folder, dataset_streaming=True, validation_fraction=0.2, augmentation="none")
    loaded = export(data, tmp_path / "model")
    record = provenance_of(loaded)
    assert record.fingerprint is None
    assert "streamed" in str(record.fingerprint_missing)
    assert values(find_validation_part(loaded, DataConfig(dataset_name=folder))) == values(data)


def test_other_data_or_no_record_is_refused(tmp_path):
    data = load(write_parquet(tmp_path / "set", train=grays(40)))
    loaded = export(data, tmp_path / "model")
    other = write_parquet(tmp_path / "other", train=dataset([gray(9)] * 40, [0, 0, 1, 1] * 10))
    with pytest.raises(ValueError, match=r"--dataset_name .*other: .* not what .* trained on, 40 images of"):
        find_validation_part(loaded, DataConfig(dataset_name=other))
    with pytest.raises(ValueError, match=r"does not record which images .*--calibration_split"):
        find_validation_part(replace(loaded, metadata={"dataset": "set"}), DataConfig(dataset_name=other))
    unseen = export(load(str(tmp_path / "set"), validation_fraction=0), tmp_path / "all")
    with pytest.raises(ValueError, match="--validation_fraction 0, so it has seen every training image"):
        find_validation_part(unseen, DataConfig(dataset_name=str(tmp_path / "set")))
    here = str(tmp_path / "set")
    assert len(find_validation_part(loaded, DataConfig(dataset_name=here, train_split="train")).validation)
    for name, value in {"test_split": "train", "test_fraction": 0.5, "skip_corrupt": True}.items():
        with pytest.raises(ValueError, match=f"--{name} .*has no effect without --calibration_split"):
            find_validation_part(loaded, DataConfig(dataset_name=here, **{name: value}))
    broken = {"trained_on": {**loaded.metadata["trained_on"], "seed": "7"}}
    with pytest.raises(ValueError, match=r"ham_hf.trained_on.seed is not what this package writes: '7'"):
        provenance_of(replace(loaded, metadata=broken))
    assert provenance_of(replace(loaded, metadata={})) is None


def test_other_data_of_the_same_numbers_in_class_order_is_refused(tmp_path):
    """Labels in class order say no more than how many images each class has; the pixels decide."""
    here, there = (dataset([gray(first + i) for i in range(40)], [0] * 20 + [1] * 20) for first in (0, 100))
    loaded = export(load(write_parquet(tmp_path / "set", train=here)), tmp_path / "model")
    other = write_parquet(tmp_path / "other", train=there)
    with pytest.raises(ValueError, match="number of images, labels or pixels differ"):
        find_validation_part(loaded, DataConfig(dataset_name=other))
    copy = write_parquet(tmp_path / "copy", train=here)
    assert len(find_validation_part(loaded, DataConfig(dataset_name=copy)).validation)


def test_a_copy_is_recognized_by_its_fingerprint_whatever_its_name_and_form(tmp_path):
    """Class folders as parquet, losslessly encoded anew, classes declared in another order."""
    data = load(write_folders(tmp_path / "set"))
    rows = [(noise(100 * label + index), label) for label in range(3) for index in range(12 + label)]
    # In the order of files that class folders have: by name.
    rows = sorted(rows, key=lambda row: row[1])
    names = datasets.ClassLabel(names=["c2", "unused", "c0", "c1"])
    order = [names.str2int(f"c{label}") for _, label in rows]
    copy = load(write_parquet(tmp_path / "copy", train=dataset([i for i, _ in rows], order, label_feature=names)))
    assert copy.provenance.fingerprint == data.provenance.fingerprint
    fewer = dataset([i for i, _ in rows][1:], order[1:], label_feature=names)
    less = load(write_parquet(tmp_path / "less", train=fewer))
    assert less.provenance.fingerprint != data.provenance.fingerprint


def test_label_fingerprint_tells_orders_names_and_numbers_apart():
    labels = torch.tensor([0, 1, 0, 2])
    base = label_fingerprint(labels, ("a", "b", "c"))
    assert base == label_fingerprint(torch.tensor([1, 0, 1, 2]), ("b", "a", "c"))
    assert base == label_fingerprint(labels, ("a", "b", "c", "never seen"))
    others = [
        label_fingerprint(torch.tensor([0, 0, 1, 2]), ("a", "b", "c")),
        label_fingerprint(labels, ("a", "b", "d")),
        label_fingerprint(labels[:3], ("a", "b", "c")),
    ]
    assert len({base, *others}) == 4


def test_a_record_of_a_newer_version_is_read_and_a_damaged_one_named():
    data = load("digits", validation_fraction=0.1, in_chans=1)
    record = data.provenance.record()
    assert read_provenance({**record, "new": 1}) == data.provenance
    assert read_provenance(json.loads(json.dumps(record))) == data.provenance
    for key, value in {"validation_fraction": 1.5, "num_images": True, "seed": -1, "dataset": None}.items():
        with pytest.raises(ValueError, match=f"trained_on.{key}"):
            read_provenance({**record, key: value})
    del record["train_split"]
    with pytest.raises(ValueError, match="train_split"):
        read_provenance(record)
    with pytest.raises(ValueError, match="object"):
        read_provenance([])
