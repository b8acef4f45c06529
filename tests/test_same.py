"""`make same`: what it finds when two runs are not the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.same.__main__ import cut_in_the_middle, differences, weights_that_differ


def write_run(folder, *, weight=1.0, loss=0.5, seconds=1.0):
    (folder / "checkpoint-3").mkdir(parents=True)
    save_file({"weight": torch.tensor([weight])}, folder / "checkpoint-3/model.safetensors")
    (folder / "metrics.jsonl").write_text(json.dumps({"loss": loss, "images_per_second": 8 / seconds}) + "\n")
    (folder / "report.json").write_text(json.dumps({"training": {"seconds": seconds, "steps": 3}}))
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seconds": 2.0}, []),
        ({"weight": 1.0000001}, ["checkpoint-3/model.safetensors"]),
        ({"loss": 0.50000000000001}, ["metrics.jsonl"]),
    ],
)
def test_every_bit_counts_but_those_of_the_clock(tmp_path, change, expected):
    assert differences(write_run(tmp_path / "old"), write_run(tmp_path / "new", **change)) == expected


def test_a_missing_file_and_a_refused_run_are_differences(tmp_path):
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    (new / "report.json").unlink()
    assert differences(old, new) == ["report.json"]
    (tmp_path / "other-refused").write_text("status 2: there is no such setting\n")
    assert differences(old, tmp_path / "other") == ["no run to compare", "status 2: there is no such setting"]


def test_a_resumed_run_has_to_end_with_the_old_weights(tmp_path):
    old = write_run(tmp_path / "old")
    for step in (6, 9, 12):
        shutil.copytree(old / "checkpoint-3", old / f"checkpoint-{step}")
    cut_in_the_middle(old, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert weights_that_differ(old, tmp_path / "new") == [f"checkpoint-{step}/model.safetensors" for step in (12, 9)]
    shutil.copytree(old / "checkpoint-9", tmp_path / "new/checkpoint-9")
    save_file({"weight": torch.tensor([1.0000001])}, old / "checkpoint-9/model.safetensors")
    assert weights_that_differ(old, tmp_path / "new") == [f"checkpoint-{step}/model.safetensors" for step in (12, 9)]
    shutil.copytree(old / "checkpoint-12", tmp_path / "new/checkpoint-12")
    assert weights_that_differ(old, tmp_path / "new") == ["checkpoint-9/model.safetensors"]
