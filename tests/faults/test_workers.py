"""Processes that decode images: killed, signaled with the run, or given an image that cannot be read."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ham_hf import training_run
from ham_hf.data import BatchRequest
from ham_hf.faults import FaultError, explain_faults
from ham_hf.reporting.report import read_report
from ham_hf.training.checkpoint import find_checkpoint, step_of
from tests.support.example_images import dataset, encode, load, noise, write_parquet
from tests.support.recipe_runs import SMALL, recipe_module, refused

pytestmark = [pytest.mark.slow, pytest.mark.faults(quick=True)]
IMAGES, CLASSES = 72, 4


def images(corrupt=()):
    """Noise; a corrupt image has a header that promises more than there is."""
    encoded = [encode(noise(seed)) for seed in range(IMAGES)]
    for row in corrupt:
        encoded[row] = encoded[row][:60]
    return dataset(encoded, [row % CLASSES for row in range(IMAGES)])


@pytest.fixture
def stored(tmp_path):
    return write_parquet(tmp_path / "data", train=images(), test=images())


def arguments(data, folder, *more):
    # The last value of an option counts.
    return [
        *SMALL,
        f"--dataset_name={data}",
        "--model_args",
        "in_chans=3",
        "layers=[1,1,1,1]",
        "channels=[8,8,8,8]",
        "--limit_train_examples=none",
        "--limit_test_examples=none",
        "--image_size=8",
        "--cache_images=none",
        "--dataloader_num_workers=2",
        "--per_device_train_batch_size=8",
        "--num_train_epochs=2",
        "--save_steps=1",
        f"--output_dir={folder}",
        *more,
    ]


def started(data):
    """Batches of a split, and the processes that decode them."""
    requests = [BatchRequest(torch.arange(start, start + 4), None) for start in range(0, 60, 4)]
    before = set(multiprocessing.active_children())
    batches = data.train.batches(requests, device=torch.device("cpu"))
    first = next(batches)
    return first, batches, [child.pid for child in multiprocessing.active_children() if child not in before]


def wait_until_at_work(worker):
    """Until the process has begun its work: before, it knows nothing of signals yet. Its mask shows it."""
    status = Path(f"/proc/{worker}/status")
    if not status.is_file():
        pytest.skip("this system does not show which signals a process blocks")
    for _ in range(200):
        (blocked,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigBlk"))
        if int(blocked, 16) & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.05)
    pytest.fail(f"process {worker} has not begun")


def test_signal_to_every_process_leaves_the_decoding_ones_at_work(stored):
    data = load(stored, cache_images="none", dataloader_num_workers=2, augmentation="none")
    first, batches, workers = started(data)
    assert len(workers) == 2
    for worker in workers:
        wait_until_at_work(worker)
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    time.sleep(0.2)
    x = torch.cat([first.x, *(batch.x for batch in batches)])
    cached = load(stored, cache_images="ram", augmentation="none").train
    (expected,) = cached.batches([BatchRequest(torch.arange(60), None)], device=torch.device("cpu"))
    assert torch.equal(x, expected.x)
    assert not multiprocessing.active_children()


def test_decoding_process_obeys_its_own_run(stored):
    data = load(stored, cache_images="none", dataloader_num_workers=1, augmentation="none")
    _, batches, (worker,) = started(data)
    (child,) = [child for child in multiprocessing.active_children() if child.pid == worker]
    child.terminate()
    child.join(10)
    assert child.exitcode == 0
    with pytest.raises(FaultError, match="--dataloader_num_workers"), explain_faults(num_processes=1):
        list(batches)


def test_killed_decoding_process_ends_the_run_with_a_message_and_it_goes_on(stored, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    update = training_run.Trainer._one_update

    def kill_a_worker(self, *args):
        if self.progress.step == 4:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                child.join()
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training_run.Trainer, "_one_update", kill_a_worker)
        message = refused(capsys, "train_ham.py", *arguments(stored, folder))
    for words in ("a process that decodes images", "--dataloader_num_workers", "--resume_from_checkpoint latest"):
        assert words in message
    # Batches that were decoded before are still used.
    assert 4 <= step_of(find_checkpoint(folder, "latest")) < 16
    recipe_module("train_ham.py").main(
        arguments(stored, folder, "--resume_from_checkpoint=latest", "--dataloader_num_workers=0")
    )
    assert read_report(folder / "report.json").training.steps == 16
    capsys.readouterr()


def test_corrupt_image_in_mid_run_names_its_row_and_the_run_goes_on_once_it_is_repaired(tmp_path, capsys):
    data, folder = tmp_path / "data", tmp_path / "run"
    write_parquet(data, train=images(corrupt=[17]), test=images())
    message = refused(capsys, "train_ham.py", *arguments(data, folder))
    for words in ("split 'train', row 17", "cannot be read", "--skip_corrupt"):
        assert words in message
    shutil.rmtree(data)
    write_parquet(data, train=images(), test=images())
    recipe_module("train_ham.py").main(arguments(data, folder, "--resume_from_checkpoint=latest"))
    assert read_report(folder / "report.json").training.steps == 16
    capsys.readouterr()
