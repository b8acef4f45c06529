"""`make same`: what it finds when two runs are not the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.same.__main__ import differences


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
