"""Disturb a run, and compare it with one that nothing happened to."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from ham_hf.training.trainer import Trainer

FINAL = ("checkpoint-18/model.safetensors", "checkpoint-18/averaged.safetensors", "checkpoint-best/model.safetensors")


def before_updates(run: Trainer, actions: Mapping[int, Callable[[], object]]) -> None:
    """Do something as updates begin, by update."""
    update = run.train_step

    def disturbed(batches, **where):
        actions.get(where["step"], lambda: None)()
        return update(batches, **where)

    run.train_step = disturbed


class Program:
    """A run as a user starts it, in processes of its own."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **silent)

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        # Workers of a launcher are in sessions of their own.
        main = psutil.Process(self.process.pid)
        everyone = [*main.children(recursive=True), main]
        for one in everyone:
            one.suspend()  # so that nobody sees another one die, as with a power cut
        for one in everyone:
            one.kill()
        self.process.wait()


def assert_same_weights(ours: Path, theirs: Path, *names: str) -> None:
    for name in names:
        mine, other = load_file(ours / name), load_file(theirs / name)
        assert mine.keys() == other.keys(), name
        assert all(torch.equal(mine[key], other[key]) for key in mine), name


def timeless_log(folder: Path) -> list[dict[str, object]]:
    """Lines of the log without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]
