"""What comes from outside a run: variables of the environment and of launchers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.recipe_runs import SMALL

QUICK = [
    *SMALL,
    "--num_train_epochs=1",
    "--mining_start_epoch=0",
    "--limit_train_examples=60",
    "--limit_test_examples=20",
    "--per_device_train_batch_size=16",
    "--gradient_accumulation_steps=2",
]


def train(folder, env):
    """A short training as ``python`` runs it; what it said on standard error."""
    command = [sys.executable, str(ROOT / "recipes/train_ham.py"), *QUICK, f"--output_dir={folder}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, subprocess_env):
    """Weights of a run with nothing set from outside."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(folder, subprocess_env)
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, expected):
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_launchers_accumulation_changes_no_weight_and_is_said_not_to_count(tmp_path, subprocess_env, undisturbed):
    said = train(tmp_path / "run", subprocess_env | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"})
    assert_same_weights(tmp_path / "run", undisturbed)
    assert "--gradient_accumulation_steps decides, not the launcher's 8" in said
