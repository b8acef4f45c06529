"""A streamed training split whose server stumbles or goes away; two processes, and then one, on one stream."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.same_runs import assert_same_weights
from tests.support.example_images import dataset, encode, noise
from tests.support.hub_server import Hub, hub_environment
from tests.support.recipe_runs import SMALL, finish, launch_command

pytestmark = pytest.mark.faults

CLASSES = 4
FILES, ROWS = 6, 24
FLAGS = [
    *[flag for flag in SMALL if not flag.startswith(("--dataset_name", "--limit_train", "in_chans"))],
    "--dataset_name=me/stream",
    "--dataset_streaming",
    "--shuffle_buffer_size=16",
    "--augmentation=timm",
    "--image_size=32",
    "--validation_fraction=0.05",
    "--per_device_train_batch_size=4",
    "--save_steps=5",
    "--save_total_limit=20",
    "--selection_metric=last",
    "--dataloader_num_workers=1",
]


@pytest.fixture
def hub(tmp_path):
    tree = {}
    for number in range(FILES + 1):
        name = f"train-{number:05d}-of-{FILES:05d}" if number < FILES else "test-00000-of-00001"
        images = [encode(noise(100 * number + row, (40, 36)), "JPEG") for row in range(ROWS)]
        # Row groups of four, so that a file is read in several requests.
        dataset(images, [row % CLASSES for row in range(ROWS)]).to_parquet(tmp_path / "one.parquet", batch_size=4)
        tree[f"data/{name}.parquet"] = (tmp_path / "one.parquet").read_bytes()
    with Hub(tokens={"hf_me": "me"}) as hub:
        hub.add("dataset", "me/stream", tree)
        yield hub


@pytest.fixture
def env(hub, tmp_path):
    return hub_environment(hub, tmp_path, token="hf_me") | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def training(folder, *more):
    return [sys.executable, str(ROOT / "recipes" / "train_ham.py"), *FLAGS, f"--output_dir={folder}", *more]


def last(folder):
    return max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-[0-9]*"))


def test_a_stumbling_server_changes_nothing_and_a_lost_one_ends_the_run_with_the_fix(hub, env, tmp_path):
    finish(training(tmp_path / "whole"), env)
    # Footers and held-out images are in the cache by now: what is asked for is training.
    hub.fail("GET .*train-", status=503, times=2)
    hub.fail("GET .*train-", status=500, times=1)
    hub.disturb("cut", "GET .*train-", times=1)
    hub.disturb("drop", "GET .*train-", times=1)
    finish(training(tmp_path / "stumbled"), env)
    assert not any(fault.times for fault in hub.faults)
    name = f"checkpoint-{last(tmp_path / 'whole')}/model.safetensors"
    assert_same_weights(tmp_path / "whole", tmp_path / "stumbled", name)

    finish(training(tmp_path / "lost", "--max_steps=12"), env)
    # Of the first file every start reads the names of the columns.
    hub.fail("GET .*train-0000[1-9]", status=503, times=10**6)
    again = training(tmp_path / "lost", "--resume_from_checkpoint=latest")
    lost = subprocess.run(again, env=env, capture_output=True, text=True, timeout=600)
    assert lost.returncode == 2, lost.stderr[-3000:]
    assert "reading the stream failed" in lost.stderr
    assert "--resume_from_checkpoint latest" in lost.stderr
    assert "Traceback" not in lost.stderr.partition("error: ")[2]
    assert last(tmp_path / "lost") >= 12
    hub.faults.clear()
    finish(again, env)
    assert_same_weights(tmp_path / "whole", tmp_path / "lost", name)


SEEN = """
import sys
from pathlib import Path
from ham_hf.training.train_step import TrainStep
from tests.support.recipe_runs import recipe_module

original = TrainStep.__call__

def noting(self, batches, *, epoch, step, **more):
    with (Path(sys.argv[1]) / f"seen-{epoch}.txt").open("a") as file:
        file.write("".join(f"{step} {number}\\n" for batch in batches for number in batch.indices.tolist()))
    return original(self, batches, epoch=epoch, step=step, **more)

TrainStep.__call__ = noting
recipe_module("train_ham.py").main(sys.argv[2:])
"""


def test_two_processes_and_then_one_see_every_example_once(env, tmp_path):
    """137 examples stay in train, 34 updates of 4: one example is left out of each epoch."""
    script = tmp_path / "noting.py"
    script.write_text(SEEN)
    flags = [*FLAGS, f"--output_dir={tmp_path / 'run'}", "--method=pgd_at"]
    flags = [flag for flag in flags if not flag.startswith("--mining")]

    def run(processes, *more):
        command = launch_command("train_ham.py", *flags, *more, processes=processes)
        place = command.index(str(ROOT / "recipes" / "train_ham.py"))
        command[place : place + 1] = [str(script), str(tmp_path)]
        finish(command, env, timeout=600)

    run(2, "--per_device_train_batch_size=2", "--max_steps=11")
    run(1, "--resume_from_checkpoint=latest")
    for epoch in range(2):
        lines = [line.split() for line in (tmp_path / f"seen-{epoch}.txt").read_text().splitlines()]
        assert len(lines) == 136
        assert len({number for _, number in lines}) == 136
        assert all([step for step, _ in lines].count(str(34 * epoch + update)) == 4 for update in range(34))
