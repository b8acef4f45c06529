"""The recipe with sharded weights: the model that two whole copies train, and checkpoints for either."""

from __future__ import annotations

import shutil

import pytest

from ham_hf.reporting.report import read_report
from ham_hf.training.checkpoint import list_checkpoints
from tests.conftest import ROOT
from tests.faults.same_runs import assert_same_weights
from tests.support.recipe_runs import CONFIGURED, SMALL, finish

pytestmark = [pytest.mark.slow, pytest.mark.faults]
# Sharded weights are contiguous; rounding would differ with another layout.
RUN = [
    str(ROOT / "recipes/train_ham.py"),
    *SMALL,
    "--per_device_train_batch_size=8",
    "--save_steps=15",
    "--memory_format=contiguous",
]
WHOLE = CONFIGURED["cpu.yaml"]
SHARDED = [*CONFIGURED["fsdp.yaml"], "--num_processes=2", "--fsdp_min_num_params=100"]


def run(command, env, folder, *arguments):
    return finish([*command, *RUN, f"--output_dir={folder}", *arguments], env).stderr


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sharded_recipe_publishes_the_model_of_whole_copies(tmp_path, subprocess_env, precision):
    for name, command in (("whole", WHOLE), ("sharded", SHARDED)):
        run(command, subprocess_env, tmp_path / name, f"--mixed_precision={precision}")
    whole, sharded = (tmp_path / name for name in ("whole", "sharded"))
    assert_same_weights(sharded, whole, "model.safetensors")
    one, two = (read_report(folder / "report.json") for folder in (whole, sharded))
    assert two.results["clean"].summary.average == one.results["clean"].summary.average
    assert (sharded / "README.md").is_file()
    # Stopped in mid-epoch with sharded weights, finished with whole ones.
    resumed = tmp_path / "resumed"
    shutil.copytree(sharded / "checkpoint-15", resumed / "checkpoint-15")
    said = run(WHOLE, subprocess_env, resumed, "--resume_from_checkpoint=latest", f"--mixed_precision={precision}")
    assert f"resuming from {resumed / 'checkpoint-15'}" in said
    assert_same_weights(resumed, whole, "model.safetensors")
    assert [path.name for path in list_checkpoints(sharded)] == ["checkpoint-15", "checkpoint-22"]
