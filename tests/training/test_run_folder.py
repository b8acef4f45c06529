"""Whose files an output folder holds, and one run per folder: a lock never outlives its process."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ham_hf.artifacts import OWNED_BY_EVALUATION, OWNED_BY_TRAINING, PARTIAL_RESULTS
from ham_hf.training.checkpoint import list_checkpoints, save_best, save_checkpoint
from ham_hf.training.run_folder import (
    LOCK_NAME,
    OWNER_NAME,
    RunLock,
    check_output_dir,
    check_results_dir,
    clear_output_dir,
)
from tests.conftest import ROOT
from tests.support.checkpoints import make
from tests.support.recipe_runs import SMALL, refused

pytestmark = pytest.mark.faults(quick=True)


def test_output_folder_with_content_is_refused(tmp_path):
    check_output_dir(tmp_path / "new" / "run", overwrite=False)
    assert not (tmp_path / "new").exists()
    check_output_dir(tmp_path, overwrite=False)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--output_dir .*--overwrite_output_dir.*--resume_from_checkpoint latest"):
        check_output_dir(tmp_path, overwrite=False)
    check_output_dir(tmp_path, overwrite=False, resume_from="latest")
    check_output_dir(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "note.txt", overwrite=True)


def test_resuming_takes_no_folder_of_another_run(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    checkpoint = str(save_checkpoint(theirs, make(4), keep=None))
    check_output_dir(ours, overwrite=False, resume_from=checkpoint)
    check_output_dir(theirs, overwrite=False, resume_from=checkpoint)
    save_checkpoint(ours, make(8), keep=None)
    with pytest.raises(ValueError, match=r"ours already holds files, which are not those of .*checkpoint-4"):
        check_output_dir(ours, overwrite=False, resume_from=checkpoint)
    check_output_dir(ours, overwrite=False, resume_from="latest")


def test_finished_model_without_checkpoints_is_not_trained_over(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "report.json").write_text("")
    with pytest.raises(ValueError, match=r"latest: .* holds model.safetensors and report.json, and no checkpoint"):
        check_output_dir(tmp_path, overwrite=False, resume_from="latest")
    save_checkpoint(tmp_path, make(4), keep=None)
    check_output_dir(tmp_path, overwrite=False, resume_from="latest")


def test_interrupted_evaluation_goes_on_in_its_folder(tmp_path):
    (tmp_path / PARTIAL_RESULTS).mkdir()
    for name in OWNED_BY_EVALUATION:
        (tmp_path / name).write_text("half")
    check_results_dir(tmp_path, OWNED_BY_EVALUATION, overwrite=False)
    (tmp_path / PARTIAL_RESULTS).rmdir()
    with pytest.raises(ValueError, match=r"already holds files.*--overwrite_output_dir") as error:
        check_results_dir(tmp_path, OWNED_BY_EVALUATION, overwrite=False)
    assert "resume" not in str(error.value)
    check_results_dir(tmp_path, OWNED_BY_EVALUATION, overwrite=True)


@pytest.mark.parametrize("name", ["model.safetensors", "train_config.yaml"])
def test_evaluation_never_goes_where_a_model_is(tmp_path, name):
    check_results_dir(tmp_path, OWNED_BY_EVALUATION, overwrite=False)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="holds a model"):
        check_results_dir(tmp_path, OWNED_BY_EVALUATION, overwrite=True)


def test_clearing_removes_a_run_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=None)
    save_best(tmp_path, {"w": torch.ones(1)}, {})
    for name in ("model.safetensors", "report.json", "note.txt", "checkpoint-old.zip"):
        (tmp_path / name).touch()
    for name in ("figures", "checkpoint-9.abandoned", ".checkpoint-3.part"):
        (tmp_path / name).mkdir()
    clear_output_dir(tmp_path, OWNED_BY_EVALUATION)
    assert not (tmp_path / "figures").exists()
    assert (tmp_path / "model.safetensors").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    clear_output_dir(tmp_path, OWNED_BY_TRAINING)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-old.zip", "note.txt"]


# The module alone, loaded from its file: the recipe is not needed to hold a lock.
OWNER = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("run_folder", {str(ROOT / "ham_hf/training/run_folder.py")!r})
run_folder = importlib.util.module_from_spec(spec); spec.loader.exec_module(run_folder)
lock = run_folder.RunLock(Path(sys.argv[1]))
lock.acquire()
# Printed by the child: before it has run, it cannot have closed what it inherited.
if sys.argv[2] == "alone" or os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def owner(folder, mode="alone"):
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(folder), mode], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


@pytest.mark.slow
def test_second_run_is_refused_by_name_until_the_first_is_dead(tmp_path):
    folder = tmp_path / "run"
    process, _ = owner(folder)
    with pytest.raises(ValueError, match=rf"--output_dir .*run is in use .*process {process.pid} on .*since 20"):
        RunLock(folder).acquire()
    process.kill()
    process.wait()
    assert (folder / LOCK_NAME).exists()
    with RunLock(folder) as lock:
        lock.acquire()
        assert json.loads((folder / OWNER_NAME).read_text())["pid"] == os.getpid()
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_forked_child_that_outlives_its_run_holds_nothing(tmp_path):
    process, child = owner(tmp_path / "run", "fork")
    process.kill()
    process.wait()
    try:
        with RunLock(tmp_path / "run") as lock:
            lock.acquire()
    finally:
        os.kill(child, signal.SIGKILL)


def test_lock_is_released_with_everything_it_made_and_nothing_else(tmp_path):
    with RunLock(tmp_path / "a" / "b") as lock:
        lock.acquire()
        (tmp_path / "a" / "note.txt").write_text("mine")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["note.txt"]
    with RunLock(tmp_path / "a") as lock:
        lock.acquire()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["note.txt"]


def test_run_that_ends_between_our_opening_and_locking_is_no_obstacle(tmp_path, monkeypatch):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    lock = fcntl.flock

    def first_ends_now(handle, how):
        monkeypatch.undo()
        first.release()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", first_ends_now)
    second.acquire()
    assert fcntl.flock is lock
    with pytest.raises(ValueError, match="in use by another run"):
        RunLock(tmp_path).acquire()
    second.release()


def test_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert "has no locks (Function not implemented)" in caplog.text


@pytest.mark.slow
def test_recipe_refuses_a_folder_in_use_and_leaves_it_alone(tmp_path, capsys):
    folder = tmp_path / "run"
    process, _ = owner(folder)
    since = time.monotonic()
    arguments = [*SMALL, f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
    assert f"process {process.pid} on" in refused(capsys, "train_ham.py", *arguments)
    assert {path.name for path in folder.iterdir()} == {LOCK_NAME, OWNER_NAME}
    assert time.monotonic() - since < 60
    process.kill()
    process.wait()
