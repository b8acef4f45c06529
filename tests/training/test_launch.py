"""Variables of the environment and of launchers, and how a run handles them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
import torch.distributed.elastic.agent.server
from huggingface_hub.utils import enable_progress_bars

from ham_hf import training_run
from ham_hf.reporting.report import read_report
from ham_hf.training import environment
from ham_hf.training.checkpoint import load_best
from tests.conftest import ROOT
from tests.faults.same_runs import assert_same_weights
from tests.support.environment_reads import variables_of
from tests.support.recipe_runs import LAUNCH, PROCESSES, SMALL, finish, recipe_module, refused
from tests.support.tables import cases

pytestmark = pytest.mark.slow

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
    return finish(command, env, timeout=300).stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, subprocess_env):
    """The folder of a run with nothing set from environment."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(folder, subprocess_env)
    return folder


def test_variables_that_settings_overrule_change_no_weight_and_are_said_not_to_count(
    tmp_path, subprocess_env, undisturbed
):
    """Each would change gradients, precision or the network itself if accelerate had its way."""
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_FP8_BACKEND": "TE",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_GRADIENT_CLIPPING": "0.01",
        "ACCELERATE_NEW_SWITCH": "1",
    }
    said = train(tmp_path / "run", subprocess_env | variables)
    assert_same_weights(tmp_path / "run", undisturbed, "model.safetensors")
    for sentence in (
        "--gradient_accumulation_steps decides, not the launcher's 8",
        "--mixed_precision decides, not the launcher's bf16",
        "--torch_compile decides, not the launcher's dynamo_backend EAGER",
        "the launcher's fp8_backend TE is not used",
        "--use_cpu decides, not ACCELERATE_TORCH_DEVICE=meta",
        "does not know what ACCELERATE_NEW_SWITCH of the environment does",
    ):
        assert said.count(sentence) == 1
    assert "GRADIENT_CLIPPING" not in said


def test_what_rounds_float32_is_warned_of_recorded_and_in_the_card(tmp_path, subprocess_env):
    outside = {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "MKL_CBWR": "COMPATIBLE", "HF_TOKEN": "hf_secret"}
    said = train(tmp_path / "run", subprocess_env | outside)
    assert "ONEDNN_DEFAULT_FPMATH_MODE=BF16 was set in the environment" in said
    assert "MKL_CBWR" not in said
    report = read_report(tmp_path / "run")
    assert report.environment.variables == ("MKL_CBWR=COMPATIBLE", "ONEDNN_DEFAULT_FPMATH_MODE=BF16")
    assert [note for note in report.notes if "ONEDNN_DEFAULT_FPMATH_MODE=BF16" in note]
    assert "ONEDNN\\_DEFAULT\\_FPMATH\\_MODE=BF16 was set" in (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert not [path for path in (tmp_path / "run").glob("*.*") if b"hf_secret" in path.read_bytes()]


def test_every_variable_that_accelerate_reads_or_sets_has_been_thought_of():
    """A new accelerate may read new ones: put each into one of the lists of `ham_hf.training.environment`."""
    names, unread = variables_of(Path(accelerate.__file__).parent, besides=("test_utils",))
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "WORLD_SIZE", "FSDP_VERSION", "ACCELERATE_FP8_MARGIN"} <= names
    assert len(names) > 100
    assert sorted(name for name in names if environment.fate(name) is None) == []
    # Helpers whose callers are looked at instead, and the options of FP8.
    assert unread <= {
        "utils/environment.py: e",
        "utils/environment.py: key",
        "utils/launch.py: env_var_name",
        "utils/launch.py: f'{prefix}{arg.upper()}'",
    }


def test_every_variable_that_torchs_launcher_sets_has_been_thought_of():
    names, _ = variables_of(Path(torch.distributed.elastic.agent.server.__file__).parent)
    assert {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} <= names
    assert sorted(name for name in names if environment.fate(name) is None) == []


def test_a_variable_is_in_one_list_only():
    kinds = ("FIXED", "REFUSED", "SHARDING", "LAYOUT", "DEVICE", "ROUNDING", "RECORDED")
    lists = [*(getattr(environment, kind) for kind in kinds), *environment.HARMLESS.values()]
    names = [name for known in lists for name in known]
    assert len(names) == len(set(names))
    assert environment.fate("ACCELERATE_FP8_BACKEND") == "fixed"
    assert environment.fate("CUDA_VISIBLE_DEVICES") == "device"
    assert environment.fate("PATH") is None


@pytest.mark.parametrize("processes", [1, 2])
def test_what_an_ordinary_launch_sets_is_no_warning(processes, subprocess_env, tmp_path):
    script = tmp_path / "create.py"
    script.write_text(
        "import os\n"
        "from ham_hf.terminal import set_up_logging\n"
        "from ham_hf.training.environment import process_rank\n"
        "from ham_hf.training.launch import create_accelerator\n"
        "set_up_logging(process_rank())\n"
        # One write each: print writes text and newline apart, which two processes may interleave.
        "os.write(1, b'%d\\n' % create_accelerator(use_cpu=True).num_processes)\n"
    )
    command = [*LAUNCH, *PROCESSES[processes], str(script)]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == [str(processes)] * processes
    assert "ham_hf" not in done.stderr


@pytest.mark.parametrize("name", environment.AT_IMPORT)
def test_what_accelerate_reads_at_import_is_refused_by_name(name, subprocess_env):
    """Without it, a ValueError from the middle of accelerate, which names neither."""
    env = subprocess_env | {name: "ju\x1bnk"}
    for command in (["recipes/train_ham.py"], ["recipes/evaluate.py", "x"], ["-m", "ham_hf", "train"]):
        command = [sys.executable, *command, "--help"]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr == f"error: {name}=ju?nk in the environment: expected true or false; unset it, or set one\n"
    assert subprocess.run([sys.executable, "-c", "import accelerate"], env=env, capture_output=True).returncode == 1


@pytest.mark.parametrize(("variables", "said"), cases(__file__, "bad_environments.yaml"))
def test_values_that_cannot_be_meant_are_refused_in_one_line(variables, said, tmp_path, monkeypatch, capsys):
    for name in [*environment.LAYOUT, "MASTER_ADDR", "ACCELERATE_USE_CPU"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = refused(capsys, "train_ham.py", f"--output_dir={tmp_path}/run").strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "run/train_config.yaml").exists()


def test_evaluation_refuses_them_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "")
    said = refused(capsys, "evaluate.py", "resnet18", "--dataset_name=digits", f"--output_dir={tmp_path}/run")
    assert "error: WORLD_SIZE= (empty) in the environment" in said


@pytest.mark.parametrize("name", ["PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_were_started_side_by_side_without_a_launcher_are_told(name, subprocess_env):
    code = "from ham_hf.training.launch import create_accelerator; print(create_accelerator().num_processes)"
    env = {key: value for key, value in subprocess_env.items() if key != "ACCELERATE_USE_CPU"} | {name: "4"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "1"
    assert f"{name}=4 in the environment: 4 processes were started side by side, and each runs alone" in done.stderr


def test_weights_selected_before_mining_are_told_in_log_report_and_card(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    recipe = recipe_module("train_ham.py")

    def first_epoch_was_best(where):
        weights, best = load_best(where)
        return weights, best | {"epoch": 0}

    monkeypatch.setattr(training_run, "load_best", first_epoch_was_best)
    try:
        recipe.main([*SMALL, "--limit_train_examples=60", "--limit_test_examples=20", f"--output_dir={folder}",
                     "--per_device_train_batch_size=16"])  # fmt: skip
    finally:
        datasets.enable_progress_bars()
        enable_progress_bars()
    sentence = (
        "The weights were selected in epoch 1, and mining (ham) begins with epoch 2 (--mining_start_epoch 1): it had "
        "no part in them, and these are weights of pgd_at alone."
    )
    assert read_report(folder).notes == (sentence,)
    assert sentence in caplog.text
    assert "it had no effect on them" in (folder / "README.md").read_text(encoding="utf-8")
