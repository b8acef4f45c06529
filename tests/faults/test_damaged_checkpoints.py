"""A checkpoint that is not what was written: the one before is resumed, and the final weights are the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ham_hf.files import DamagedError
from ham_hf.training import checkpoint as checkpoints
from ham_hf.training.checkpoint import CheckpointWriteError, check_checkpoint, find_checkpoint, list_checkpoints, tidy
from tests.faults.same_runs import FINAL, assert_same_weights, timeless_log
from tests.support.checkpoints import FILES, make
from tests.support.training import cut_off, resumed

pytestmark = pytest.mark.faults(quick=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    # In place: another name for the same file would change with it.
    with path.open("r+b") as file:
        file.write(content)


@pytest.fixture
def killed(undisturbed, tmp_path):
    """The same run, killed after update 17."""
    return cut_off(undisturbed[0], tmp_path / "run", 17)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, flip])
def test_damaged_newest_checkpoint_is_found_out(killed, name, damage, caplog):
    damage(killed / "checkpoint-16" / name)
    with pytest.raises(DamagedError):
        check_checkpoint(killed / "checkpoint-16")
    assert find_checkpoint(killed, "latest") == killed / "checkpoint-12"
    (warning,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert re.fullmatch(r"checkpoint-16 is damaged \(.+\); continuing from checkpoint-12", warning)
    assert name in warning or "SHA256SUMS" in warning
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint .*checkpoint-16 .*damaged.*checkpoint-12.*latest"):
        find_checkpoint(killed, str(killed / "checkpoint-16"))


@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_run_goes_on_from_the_one_before_to_the_same_weights(undisturbed, killed, damage):
    damage(killed / "checkpoint-16" / "trainer_state.json")
    run = resumed(killed)
    assert run.progress.step == 12
    assert (killed / "checkpoint-16.abandoned").is_dir()
    assert run.fit().history == undisturbed[1].history
    assert_same_weights(killed, undisturbed[0], *FINAL)
    assert timeless_log(killed) == timeless_log(undisturbed[0])


def test_damaged_selected_weights_of_the_run_do_not_touch_the_checkpoints(killed):
    flip(killed / "checkpoint-best" / "model.safetensors")
    for path in list_checkpoints(killed):
        check_checkpoint(path)


def test_nothing_whole_is_refused_with_every_reason(killed):
    for path in list_checkpoints(killed):
        truncate(path / "optimizer.pt")
    message = r"no checkpoint in .* is whole .*checkpoint-16: .*checkpoint-4: optimizer.pt"
    with pytest.raises(ValueError, match=message):
        find_checkpoint(killed, "latest")


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_not_written_as_meant_replaces_nothing(tmp_path, monkeypatch, keep):
    checkpoints.save_checkpoint(tmp_path, make(1), keep=keep)
    checkpoints.save_checkpoint(tmp_path, make(2), keep=keep)
    before = list_checkpoints(tmp_path)
    write = checkpoints.write_checksums

    def bad_disk(folder):
        write(folder)
        flip(folder / "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_checksums", bad_disk)
        with pytest.raises(CheckpointWriteError, match=r"checkpoint-3 could not be written: model.safetensors is not"):
            checkpoints.save_checkpoint(tmp_path, make(3), keep=keep)
    assert list_checkpoints(tmp_path) == before
    for path in before:
        check_checkpoint(path)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"


def test_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, make(5), keep=1)
    (tmp_path / "checkpoint-5").rename(tmp_path / ".checkpoint-5.old")
    (tmp_path / ".checkpoint-5.part").mkdir()
    (tmp_path / ".checkpoint-7.part").mkdir()
    (tmp_path / ".mine").mkdir()
    assert find_checkpoint(tmp_path, "latest") is None
    tidy(tmp_path)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-5"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoint-5"]


def test_kill_while_an_old_checkpoint_is_deleted_leaves_no_damaged_one(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, make(5), keep=1)

    def break_off(folder, **_):
        if (folder / "optimizer.pt").exists():
            (folder / "optimizer.pt").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", break_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save_checkpoint(tmp_path, make(6), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6"]
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_checksums_are_those_of_the_tool(undisturbed):
    folder = undisturbed[0] / "checkpoint-18"
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(FILES) - 1 == len(list(folder.iterdir())) - 1
