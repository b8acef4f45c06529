"""Signals to a launcher, to one process and to all; a process that dies or falls silent while the others wait."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ham_hf.training.checkpoint import find_checkpoint, list_checkpoints, step_of
from ham_hf.training.run_folder import LOCK_NAME
from ham_hf.training.stopping import EXIT_REQUEUE
from tests.conftest import ROOT
from tests.faults.same_runs import assert_same_weights, timeless_log
from tests.support.recipe_runs import SMALL, finish, launch_command

pytestmark = pytest.mark.faults
BATCH = {1: "--per_device_train_batch_size=16", 2: "--per_device_train_batch_size=8"}
SCRIPT = str(ROOT / "recipes" / "train_ham.py")


def command(folder, processes, *more, launcher=True):
    # 44 updates, 11 per epoch.
    arguments = [*SMALL, "--num_train_epochs=4", "--save_steps=7", "--resume_from_checkpoint=latest", BATCH[processes]]
    arguments += [f"--output_dir={folder}", *more]
    if launcher:
        return launch_command("train_ham.py", *arguments, processes=processes)
    return [sys.executable, SCRIPT, *arguments]


class Run:
    """A run that is under way; what it says goes into a file, which no process has to wait for."""

    def __init__(self, words, env, log):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(words, env=env, stdout=file, stderr=file, start_new_session=True)

    def workers(self):
        """Processes of the recipe, in order of their rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [one for one in children if SCRIPT in " ".join(one.cmdline())]
        return sorted(found, key=lambda one: int(one.environ().get("RANK", "0")))

    def wait_for(self, folder, step, seconds=240):
        deadline = time.monotonic() + seconds
        while not any(step_of(path) >= step for path in list_checkpoints(folder)):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def end(self, seconds=120):
        status = self.process.wait(timeout=seconds)
        return status, self.said()

    def said(self):
        return self.log.read_text()


def started(tmp_path, env, processes, *more, launcher=True):
    """A run that has saved a checkpoint, and the processes of the recipe; it writes to ``run``."""
    run = Run(command(tmp_path / "run", processes, *more, launcher=launcher), env, tmp_path / "log")
    run.wait_for(tmp_path / "run", 7)
    return run, run.workers()


def everyone_gone(workers, seconds=90):
    _, alive = psutil.wait_procs(workers, timeout=seconds)
    assert not alive


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, subprocess_env):
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp("full") / str(processes)
        finish(command(folders[processes], processes), subprocess_env)
    return folders


def finish_and_compare(folder: Path, full: Path, processes, env):
    """Whatever the launcher was told, the same command continues to the same end."""
    done = finish(command(folder, processes), env)
    assert "resuming from" in done.stderr
    assert_same_weights(folder, full, "checkpoint-44/model.safetensors", "model.safetensors")
    assert timeless_log(folder) == timeless_log(full)


def saved_beyond(folder, step):
    """A checkpoint after another update than the planned ones: the stop made it."""
    assert not (folder / LOCK_NAME).exists()
    newest = step_of(find_checkpoint(folder, "latest"))
    assert step <= newest < 44
    return newest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_one_process_without_launcher_leaves_with_the_status_for_requeueing(
    tmp_path, subprocess_env, undisturbed, number
):
    run, _ = started(tmp_path, subprocess_env, 1, launcher=False)
    os.killpg(run.process.pid, number)
    status, said = run.end()
    assert status == EXIT_REQUEUE
    message = rf"stopped by {number.name} after update \d+ of 44; saved in .*latest continues \(status 75\)"
    assert re.search(message, said)
    saved_beyond(tmp_path / "run", 7)
    finish_and_compare(tmp_path / "run", undisturbed[1], 1, subprocess_env)


def test_launcher_of_one_process_passes_nothing_on_and_the_run_stops_all_the_same(
    tmp_path, subprocess_env, undisturbed
):
    run, workers = started(tmp_path, subprocess_env, 1)
    run.process.send_signal(signal.SIGTERM)
    status, _ = run.end()
    assert status == -signal.SIGTERM
    everyone_gone(workers)
    assert "stopped by the end of its launcher" in run.said()
    saved_beyond(tmp_path / "run", 7)
    finish_and_compare(tmp_path / "run", undisturbed[1], 1, subprocess_env)


def test_launcher_of_one_process_makes_status_1_of_75(tmp_path, subprocess_env):
    folder = tmp_path / "run"
    run = Run(command(folder, 1, "--max_train_hours=0.00001"), subprocess_env, tmp_path / "log")
    status, said = run.end()
    assert status == 1
    assert "stopped by --max_train_hours 1e-05 after update 1 of 44" in said
    assert "returned non-zero exit status 75" in said
    assert saved_beyond(folder, 1) == 1


@pytest.mark.parametrize("to", ["launcher", "one_process", "all"])
def test_two_processes_stop_together(tmp_path, subprocess_env, undisturbed, to):
    run, workers = started(tmp_path, subprocess_env, 2)
    assert len(workers) == 2
    if to == "launcher":
        run.process.send_signal(signal.SIGTERM)
    elif to == "one_process":
        workers[1].send_signal(signal.SIGUSR1)
    else:
        for one in (*workers, run.process):
            one.send_signal(signal.SIGTERM)
    status, said = run.end()
    everyone_gone(workers)
    assert status == 1
    reason = "SIGTERM" if to != "one_process" else "(SIGUSR1|a request to another process)"
    assert re.search(rf"stopped by {reason} after update \d+ of 44; saved in", said)
    if to == "one_process":
        assert re.search(r"exitcode\s*: 75", said)
    saved_beyond(tmp_path / "run", 7)
    finish_and_compare(tmp_path / "run", undisturbed[2], 2, subprocess_env)


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_dies_ends_the_others_and_the_run_goes_on(tmp_path, subprocess_env, undisturbed, rank):
    run, workers = started(tmp_path, subprocess_env, 2)
    since = time.monotonic()
    workers[rank].kill()
    status, said = run.end()
    everyone_gone(workers)
    print(f"all processes ended {time.monotonic() - since:.1f} s after rank {rank} was killed")
    assert status == 1
    assert re.search(r"error: another process of the run is gone .*--resume_from_checkpoint latest", said)
    assert "Signal 9 (SIGKILL)" in said
    finish_and_compare(tmp_path / "run", undisturbed[2], 2, subprocess_env)


def test_process_that_falls_silent_is_given_up_within_the_time_out(tmp_path, subprocess_env, undisturbed):
    run, workers = started(tmp_path, subprocess_env | {"PET_SHUTDOWN_TIMEOUT": "5"}, 2, "--ddp_timeout=15")
    since = time.monotonic()
    workers[1].suspend()
    status, said = run.end()
    everyone_gone(workers)
    seconds = time.monotonic() - since
    print(f"all processes ended {seconds:.1f} s after rank 1 fell silent, with --ddp_timeout 15")
    assert status == 1
    assert seconds < 15 + 60
    assert re.search(r"error: another process .* did not answer within --ddp_timeout .*--resume_from_checkpoint", said)
    finish_and_compare(tmp_path / "run", undisturbed[2], 2, subprocess_env)
