"""What must not differ between a run that nothing happened to and one that went on after a fault."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_same_weights(ours: Path, theirs: Path, *names: str) -> None:
    for name in names:
        mine, other = load_file(ours / name), load_file(theirs / name)
        assert mine.keys() == other.keys(), name
        assert all(torch.equal(mine[key], other[key]) for key in mine), name


def timeless_log(folder: Path) -> list[dict[str, object]]:
    """Lines of the log without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]
