"""Start recipes as a user would, or inside the test's process."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ham_hf.config import config_to_yaml, parse_train_config
from tests.conftest import ROOT

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
PROCESSES = {
    1: ["--num_processes", "1", "--num_machines", "1"],
    2: ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"],
}

# What a user writes after `accelerate launch`, and nothing else.
CONFIGURED = {
    path.name: [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={path}"]
    for path in sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
}

PLAN = """\
recipe: base.yaml
output_dir: FOLDER
seeds: [0, 1]
baseline: plain
settings: {save_steps: 2}
runs:
  plain: {method: pgd_at}
  mined: {mining_step: 2}
"""
# A network that trains in seconds and still is published as plain resnet18.
SMALL = shlex.split(
    "--dataset_name=digits --model_name=resnet18_cifar --model_args in_chans=1 layers=[1,1,1,1] channels=[8,8,8,8] "
    "--epsilon=0.1 --step_size=0.03 --num_steps=3 --mining_step=1 --mining_start_epoch=1 --num_train_epochs=2 "
    "--limit_train_examples=200 --limit_test_examples=40 --validation_fraction=0.1 --learning_rate=0.05 "
    "--lr_scheduler_type=cosine --eval_num_steps=2 --logging_steps=2 --use_cpu --disable_tqdm"
)


# The same with enough held-out images of every class to calibrate on.
HELD_OUT = [*SMALL, "--limit_train_examples=800", "--validation_fraction=0.3"]


def launch_command(script: str, *arguments: str, processes: int = 1) -> list[str]:
    return [*LAUNCH, *PROCESSES[processes], str(ROOT / "recipes" / script), *arguments]


def launch(script: str, *arguments: str, env: dict[str, str], processes: int = 1, timeout: int = 300) -> str:
    """Run a recipe to its end and return what it printed."""
    return finish(launch_command(script, *arguments, processes=processes), env, timeout).stdout


def finish(
    command: list[str], env: dict[str, str] | None, timeout: int = 500, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run a program to its successful end; ``options`` are those of `subprocess.run`."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def refused(capsys: pytest.CaptureFixture[str], script: str, *arguments: str, status: int = 2) -> str:
    """Output of a recipe that ends with this status, in this process."""
    with pytest.raises(SystemExit) as stop:
        recipe_module(script).main(list(arguments))
    assert stop.value.code == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def recipe_module(script: str) -> ModuleType:
    """The module whose ``main`` a recipe runs, to call it in this process."""
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(script).stem}", ROOT / "recipes" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(module.main.__module__)


def write_plan(place: Path, plan: str, base: list[str]) -> Path:
    """compare.yaml in a folder, with its runs below ``out`` there, and base.yaml with the flags of ``base``."""
    (place / "base.yaml").write_text(config_to_yaml(parse_train_config(base)))
    path = place / "compare.yaml"
    path.write_text(plan.replace("FOLDER", str(place / "out")))
    return path
