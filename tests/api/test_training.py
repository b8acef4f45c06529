"""`train`: any dataset and network, twice in one process, in a thread, beside somebody's own accelerator."""

from __future__ import annotations

import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import ham_hf
from ham_hf.api.training import APPLIED
from ham_hf.data import DataConfig, image_data_from
from ham_hf.models import load_pixel_model
from ham_hf.reporting.report import read_report
from ham_hf.settings import settings_of
from tests.support.example_images import everything, load, write_parquet
from tests.support.exports import preprocessing
from tests.support.nets import batch_norm_net
from tests.support.training import tensors

NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
TINY = {"method": "ham", "mining_start_epoch": 0, "mining_step": 1, "num_steps": 2, "num_train_epochs": 1}
TINY |= {"max_steps": 2, "per_device_train_batch_size": 16, "eval_num_steps": 1, "validation_fraction": 0.25}
TINY |= {"use_cpu": True, "disable_tqdm": True}
NOT_OF_GIVEN_IMAGES = {
    "dataset_name": "you/open",
    "dataset_config_name": "plain",
    "dataset_revision": "v2",
    "train_split": "train",
    "test_split": "test",
    "image_column": "img",
    "label_column": "label",
    "test_fraction": 0.5,
    "cache_images": "none",
    "skip_corrupt": True,
    "dataloader_num_workers": 4,
    "dataset_streaming": True,
}


def rows(num: int) -> datasets.Dataset:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    images = [Image.new("RGB", (8, 8), (10 * index % 256, 0, 0)) for index in range(num)]
    return datasets.Dataset.from_dict({"img": images, "label": [index % 4 for index in range(num)]}, features=features)


def test_any_network_is_trained_twice_in_one_process_and_once_in_a_thread(tmp_path: Path) -> None:
    mine = Accelerator(cpu=True, gradient_accumulation_steps=3)
    net = batch_norm_net().float()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def train(folder: Path | str, precision: str = "no"):
        settings = {**TINY, "mixed_precision": precision, "output_dir": folder}
        return ham_hf.train(settings, train=tensors(40), test=tensors(16, 1), model=net)

    first = train(tmp_path / "1")
    # Another precision: accelerate refuses that where a state is left.
    found = []
    thread = threading.Thread(target=lambda: found.append(train(str(tmp_path / "2"), "bf16")))
    thread.start()
    thread.join()
    again = train(tmp_path / "3")
    assert len(found) == 1
    assert mine.mixed_precision == "no"
    assert mine.gradient_state.num_steps == 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    written = load_file(tmp_path / "1" / "model.safetensors")
    for one in (first, again):
        assert all(torch.equal(value, written[name]) for name, value in one.model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in written.items())
    assert not first.loads_with_timm
    assert "timm cannot load it" in (tmp_path / "1" / "LOADING.md").read_text()
    assert first.report.clean.summary.num_examples == 16
    assert list(first.report.attacks) == ["pgd-1", "cw-1"]
    assert (tmp_path / "1" / "predictions.parquet").is_file()


def test_a_timm_network_on_rows_of_datasets_loads_with_plain_timm(tmp_path: Path) -> None:
    backbone = timm.create_model("resnet18_cifar", num_classes=4, **NARROW)
    trained = ham_hf.train({**TINY, "output_dir": tmp_path}, train=rows(40), test=rows(16), model=backbone)
    assert trained.loads_with_timm
    assert trained.class_names == ("a", "b", "c", "d")
    assert read_report(tmp_path).dataset.class_names == trained.class_names
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_pixel_model(str(tmp_path)).model(x), trained.model(x), rtol=1e-4, atol=1e-4)


def test_a_given_network_gets_the_input_that_it_was_made_for(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    pictures = [(Image.new("RGB", (12, 10), (60 * (index % 4), 0, 0)), index % 4) for index in range(24)]
    settings = {**TINY, "output_dir": tmp_path / "timm", "max_steps": 1, "learning_rate": np.float32(0.5)}
    assert ham_hf.train(settings, train=pictures, test=pictures, model=network).loads_with_timm
    wanted = timm.data.resolve_model_data_config(network)
    found = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).pretrained_cfg
    assert found["input_size"] == (1, *wanted["input_size"][1:])
    assert (found["crop_pct"], found["interpolation"]) == (wanted["crop_pct"], wanted["interpolation"])
    assert found["mean"] == pytest.approx((sum(wanted["mean"]) / 3,))
    gray, own = rows(24), nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    assert ham_hf.train({**TINY, "output_dir": tmp_path / "own"}, train=gray, test=gray, model=own).class_names
    for train, network, message in [
        (DataLoader(tensors(20)), own, r"train\[0\]: expected|expected a dataset"),
        (tensors(20), own, r"the model does not take images \(3, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ham_hf.train({**TINY, "output_dir": tmp_path / "x"}, train=train, test=tensors(20), model=network)


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {**TINY, "output_dir": folder}
    net, data = batch_norm_net().float(), tensors(20)
    for change, given, message in [
        ({}, {"train": data}, "test is missing"),
        ({"push_to_hub": True, "hub_model_id": "me/x"}, {"train": data, "test": data}, "push_to_hub"),
        ({"epsilon": 8}, {"train": data, "test": data}, "did you mean 8/255"),
        ({"minig_step": 1}, {}, "minig_step"),
        *(
            ({**ask}, {"train": data, "test": data}, f"^{', '.join(ask)}: .* the configuration names")
            for ask in (*({name: value} for name, value in NOT_OF_GIVEN_IMAGES.items()), NOT_OF_GIVEN_IMAGES)
        ),
        ({}, {"class_names": list("abcd")}, "class_names"),
        ({"model_args": {"layers": [1]}}, {"train": data, "test": data}, "model_args"),
        ({}, {"train": data, "test": data, "model": batch_norm_net(3).float()}, "3 logits and the data 4 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            ham_hf.train({**settings, **change}, **{"model": net, **given})
    assert not folder.exists()


def test_every_setting_of_the_data_is_applied_to_given_images_or_refused() -> None:
    applied = {*APPLIED, "num_train_examples", "shuffle_buffer_size"}  # the last two go with dataset_streaming alone
    assert {known.name for known in settings_of(DataConfig)} == applied | NOT_OF_GIVEN_IMAGES.keys()


def test_limits_choose_the_images_that_they_choose_of_a_stored_dataset(tmp_path: Path) -> None:
    limits = {"limit_train_examples": 24, "limit_test_examples": 8, "validation_fraction": 0.25}
    given, seed = {"train": rows(40), "test": rows(20)}, {"seed": 3}
    stored = load(write_parquet(tmp_path, **given), image_size=8, **limits, **seed)
    data = image_data_from(**given, inputs=preprocessing(), validation_fraction=0.25, limits=(24, 8), **seed)
    for part, size in {"train": 18, "validation": 6, "test": 8}.items():
        ours, theirs = getattr(data, part), getattr(stored, part)
        assert len(ours) == size
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(everything(ours), everything(theirs))
    settings = {**TINY, **limits, "output_dir": tmp_path / "run", "num_train_epochs": 1, "max_steps": 1}
    trained = ham_hf.train(settings, **given, model=batch_norm_net().float())
    assert trained.report.clean.summary.num_examples == 8
