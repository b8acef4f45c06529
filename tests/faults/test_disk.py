"""A disk that is full, read-only or gone during a run: training continues, and the end says what is missing."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess

import pytest

from ham_hf import training_run
from ham_hf.reporting.report import read_report
from ham_hf.training.checkpoint import CheckpointWriteError, check_checkpoint, list_checkpoints, load_best
from tests.faults.same_runs import FINAL, assert_same_weights, before_updates, timeless_log
from tests.support.recipe_runs import SMALL, recipe_module, refused
from tests.support.training import resumed, trainer

pytestmark = pytest.mark.faults(quick=True)


class Disk:
    """A small file system of its own."""

    def __init__(self, path):
        self.path, self.ballast = path, path / "somebody else's"

    def fill(self, *, leave=0):
        """Take all space but ``leave`` bytes."""
        held = 0
        with self.ballast.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    held += file.write(b"\0" * 4096)
            file.truncate(held - leave)

    def empty(self):
        self.ballast.unlink()

    def read_only(self, on):
        subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def errors(caplog):
    return [record.message for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("space", [0, 8192], ids=["no_space", "space_for_a_part"])
def test_disk_full_for_a_while(disk, undisturbed, caplog, space):
    folder = disk.path / "run"
    run = trainer(folder)
    # Full over a validation that selects weights, two checkpoints and some lines of the log.
    before_updates(run, {5: lambda: disk.fill(leave=space), 13: disk.empty})
    progress = run.fit()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-16", "checkpoint-18"]
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    for path in list_checkpoints(folder):
        check_checkpoint(path)
    said = [message for message in errors(caplog) if "checkpoint-8 could not be written" in message]
    assert re.search(r"No space left on device|needs about", said[0])
    assert re.search(r"it needs about \d+\.\d MB, and 0\.\d MB are free there", said[0])
    assert re.search(r"kept: .*checkpoint-4; training continues", said[0])
    assert progress.history == undisturbed[1].history
    assert load_best(folder)[1] == progress.best == undisturbed[1].best
    assert_same_weights(folder, undisturbed[0], *FINAL)
    # The lines of the meantime were kept.
    assert timeless_log(folder) == timeless_log(undisturbed[0])


def test_disk_full_at_the_end(disk, undisturbed):
    folder = disk.path / "run"
    run = trainer(folder)
    before_updates(run, {17: disk.fill})
    with pytest.raises(
        CheckpointWriteError,
        match=r"at update 18 of 18, and checkpoint-18 is missing: .*make room.*--resume_from_checkpoint latest, which "
        r"continues from .*checkpoint-16",
    ):
        run.fit()
    disk.empty()
    again = resumed(folder)
    assert again.progress.step == 16
    again.fit()
    assert_same_weights(folder, undisturbed[0], *FINAL)


def test_results_that_do_not_fit_are_named_and_made_without_training_again(disk, capsys, monkeypatch):
    folder = disk.path / "run"
    arguments = [*SMALL, "--max_steps=2", "--per_device_train_batch_size=16", f"--output_dir={folder}"]
    evaluate = training_run.evaluate_on_test

    def evaluate_and_fill(*args, **kwargs):
        results = evaluate(*args, **kwargs)
        disk.fill(leave=8192)
        return results

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "evaluate_on_test", evaluate_and_fill)
        message = refused(capsys, "train_ham.py", *arguments)
    assert "training is complete, but its results could not be written" in message
    assert re.search(r"missing or incomplete: .*report\.json", message)
    assert "--resume_from_checkpoint latest" in message
    disk.empty()
    monkeypatch.setattr(training_run.Trainer, "_one_update", lambda *args, **kwargs: pytest.fail("it trains again"))
    recipe_module("train_ham.py").main([*arguments, "--resume_from_checkpoint=latest"])
    assert read_report(folder / "report.json").training.steps == 2
    capsys.readouterr()


def test_folder_turns_read_only_for_a_while(disk, undisturbed, caplog):
    folder = disk.path / "run"
    run = trainer(folder)
    before_updates(run, {5: lambda: disk.read_only(True), 13: lambda: disk.read_only(False)})
    run.fit()
    assert any("Read-only file system" in message for message in errors(caplog))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-16", "checkpoint-18"]
    assert_same_weights(folder, undisturbed[0], *FINAL)
    assert timeless_log(folder) == timeless_log(undisturbed[0])


def test_read_only_folder_is_refused_before_training(disk, capsys):
    disk.read_only(True)
    message = refused(capsys, "train_ham.py", *SMALL, f"--output_dir={disk.path / 'run'}")
    disk.read_only(False)
    assert "Read-only file system" in message
    assert str(disk.path / "run") in message


@pytest.mark.parametrize("at", [5, 8, 14])
def test_folder_vanishes(tmp_path, undisturbed, caplog, at):
    folder = tmp_path / "run"
    run = trainer(folder)
    before_updates(run, {at: lambda: shutil.rmtree(folder)})
    progress = run.fit()
    # All that comes later is there; weights that were selected before are gone, and said to be.
    assert [path.name for path in list_checkpoints(folder)] == [
        f"checkpoint-{n}" for n in (4, 8, 12, 16, 18) if n > at
    ]
    assert_same_weights(folder, undisturbed[0], "checkpoint-18/model.safetensors")
    assert load_best(folder)[1] == progress.best
    assert any("selected before are gone" in message for message in errors(caplog)) == (at > 6)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == [line["step"] for line in timeless_log(undisturbed[0]) if line["step"] > at]
