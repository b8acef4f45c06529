"""One run per output folder; a lock never outlives its process."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ham_hf.training.run_folder import LOCK_NAME, OWNER_NAME, RunLock
from tests.conftest import ROOT
from tests.support.recipe_runs import SMALL, refused

pytestmark = [pytest.mark.slow, pytest.mark.faults(quick=True)]

# run_lock.py imports nothing else of the package, so this process starts in a fraction of a second.
OWNER = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("run_lock", {str(ROOT / "ham_hf/training/run_folder.py")!r})
run_lock = importlib.util.module_from_spec(spec); spec.loader.exec_module(run_lock)
lock = run_lock.RunLock(Path(sys.argv[1]))
lock.acquire()
# Printed by the child: before it has run, it cannot have closed what it inherited.
if sys.argv[2] == "alone" or os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def owner(folder, mode="alone"):
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(folder), mode], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


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
