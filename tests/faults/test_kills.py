"""SIGKILL at any moment, again and again: the run ends with the weights of one that nobody killed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ham_hf.reporting.report import read_report
from ham_hf.training.checkpoint import check_checkpoint, list_checkpoints, step_of
from tests.conftest import ROOT
from tests.faults.same_runs import Program, assert_same_weights, timeless_log
from tests.support.recipe_runs import SMALL, finish, launch_command, recipe_module

pytestmark = pytest.mark.slow

BATCH = {1: "--per_device_train_batch_size=16", 2: "--per_device_train_batch_size=8"}
# 11 updates per epoch; a checkpoint after each, as checkpoints are where a kill can do most harm.
RUN = [*SMALL, "--save_steps=1", "--save_total_limit=1", "--resume_from_checkpoint=latest"]


class Fork:
    """A run in a copy of this process, which starts at once."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
                recipe_module("train_ham.py").main(arguments)
                status = 0
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def newest(folder: Path) -> int:
    # By their names: the run that writes them may remove one at any moment.
    return max((int(path.name.split("-")[1]) for path in list_checkpoints(folder)), default=0)


def kill_at_random(start: Callable[[], Program | Fork], folder: Path, draw: random.Random, kills: int) -> list[int]:
    """Start a run and kill it ``kills`` times; the update of the newest checkpoint at each kill."""
    found = []
    for _ in range(kills):
        run, goal = start(), newest(folder) + draw.choice([0, 1, 1, 2, 3])
        deadline = time.monotonic() + (draw.uniform(1, 10) if draw.random() < 0.15 else 240)
        while newest(folder) < goal and time.monotonic() < deadline:
            assert run.poll() is None, f"the run ended by itself at update {newest(folder)}"
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        run.kill()
        found.append(newest(folder))
        for path in list_checkpoints(folder):
            check_checkpoint(path)
    return found


def assert_same_runs(ours: Path, theirs: Path) -> None:
    last = list_checkpoints(theirs)[-1]
    assert step_of(ours / last.name) == step_of(last)
    names = (f"{last.name}/model.safetensors", "checkpoint-best/model.safetensors", "model.safetensors")
    assert_same_weights(ours, theirs, *names)
    assert timeless_log(ours) == timeless_log(theirs)
    mine, other = (read_report(folder / "report.json") for folder in (ours, theirs))
    assert mine.training.history == other.training.history
    summaries, others = ({name: one.summary for name, one in found.results.items()} for found in (mine, other))
    assert summaries == others
    assert not [path for path in ours.iterdir() if path.name.startswith(".")]


@pytest.mark.faults(quick=True)
def test_two_kills_quick(tmp_path, capsys):
    def arguments(name):
        return [*RUN, BATCH[1], "--num_train_epochs=1", f"--output_dir={tmp_path / name}"]

    recipe_module("train_ham.py").main(arguments("full"))
    kill_at_random(lambda: Fork(arguments("killed")), tmp_path / "killed", random.Random(0), 2)
    recipe_module("train_ham.py").main(arguments("killed"))
    assert_same_runs(tmp_path / "killed", tmp_path / "full")
    capsys.readouterr()


@pytest.mark.faults
@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 20)], ids=["one_process", "two_processes"])
def test_kills_at_random_moments(tmp_path, subprocess_env, processes, kills):
    def command(name):
        arguments = [*RUN, BATCH[processes], "--num_train_epochs=6", f"--output_dir={tmp_path / name}"]
        if processes == 1:
            return [sys.executable, str(ROOT / "recipes" / "train_ham.py"), *arguments]
        return launch_command("train_ham.py", *arguments, processes=processes)

    finish(command("full"), subprocess_env, timeout=600)
    draw = random.Random(processes)
    found = kill_at_random(lambda: Program(command("killed"), subprocess_env), tmp_path / "killed", draw, kills)
    print(f"killed {kills} times, at updates {found}")
    finish(command("killed"), subprocess_env, timeout=600)
    assert_same_runs(tmp_path / "killed", tmp_path / "full")
