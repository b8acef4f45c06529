"""`accelerate launch recipes/train_ham.py` as a user runs it: artifacts, kill and resume, two processes, bad input."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from ham_hf.config import load_train_config
from ham_hf.data import load_image_data
from ham_hf.evaluation.verdicts import read_verdicts
from ham_hf.metrics import summarize
from ham_hf.models import input_defaults, load_pixel_model, new_model
from ham_hf.reporting.report import read_report
from ham_hf.training.checkpoint import list_checkpoints, load_best
from tests.support.recipe_runs import SMALL, launch, launch_command, recipe_module, refused

pytestmark = pytest.mark.slow

EVERY_THIRD = ["--save_steps=3", "--save_total_limit=2"]
BATCH = {1: "--per_device_train_batch_size=16", 2: "--per_device_train_batch_size=8"}


@pytest.fixture(scope="module", params=[1, 2], ids=["one_process", "two_processes"])
def finished(request, tmp_path_factory, subprocess_env):
    """An uninterrupted run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("train") / "run"
    words = [*SMALL, *EVERY_THIRD, BATCH[request.param], f"--output_dir={folder}"]
    printed = launch("train_ham.py", *words, env=subprocess_env, processes=request.param)
    return request.param, folder, printed


def test_run_leaves_every_artifact(finished):
    processes, folder, printed = finished
    expected = {"model.safetensors", "config.json", "README.md", "report.json", "train_config.yaml", "metrics.jsonl"}
    expected |= {"predictions.parquet", "report.html", "examples.parquet"}
    assert expected <= {path.name for path in folder.iterdir()}
    figures = {"per_class_accuracy", "training_curves", "class_treatment", "adversarial_examples"}
    figures |= {"confusion_pgd-2", "confusion_cw-2"}
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{name}.png" for name in figures}
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-21", "checkpoint-22"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pkl", ".part")]
    report = read_report(folder / "report.json")
    assert list(report.results) == ["clean", "pgd-2", "cw-2"]
    verdicts = read_verdicts(folder)
    assert list(verdicts.attacks) == ["pgd-2", "cw-2"]
    assert verdicts.class_names == report.dataset.class_names
    for name in ("pgd-2", "cw-2"):
        right = (verdicts.clean == verdicts.labels) & (verdicts.attacked[name] == verdicts.labels)
        assert int(right.sum()) == sum(entry.correct for entry in report.results[name].summary.per_class)
    assert report.verdict.summary == summarize(verdicts.withstood, verdicts.labels, 10)
    assert "\nVerdict " in printed
    assert report.results["clean"].summary.num_examples == report.dataset.num_test == 40
    assert report.dataset.num_train == 180
    assert report.dataset.class_names == tuple("0123456789")
    assert report.environment.num_processes == processes
    assert report.training.steps == 22
    assert [line["epoch"] for line in report.training.history] == [0, 1]
    assert report.training.history[0]["hard_per_class"] is None
    assert len(report.training.history[1]["hard_per_class"]) == 10
    assert "PGD-2" in printed
    assert str(folder) in printed


def test_published_model_is_the_selected_one(finished):
    _, folder, _ = finished
    config = load_train_config(folder / "train_config.yaml")
    inputs = input_defaults(config.model.model_name, model_args=config.model.model_args)
    data = load_image_data(config.data, inputs, seed=config.training.seed)
    model, _ = new_model(config.model, data, seed=0)
    model.load_state_dict(load_best(folder)[0])
    published = load_pixel_model(str(folder))
    assert published.class_names == tuple("0123456789")
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(published.model(x), model.eval()(x), rtol=0, atol=1e-5)


def test_killed_run_resumes_to_the_same_weights(finished, tmp_path, subprocess_env):
    processes, full, _ = finished
    folder = tmp_path / "killed"
    arguments = [*SMALL, *EVERY_THIRD, BATCH[processes], f"--output_dir={folder}"]
    command = launch_command("train_ham.py", *arguments, processes=processes)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(command, env=subprocess_env, start_new_session=True, **quiet)
    # In the second epoch, between two checkpoints, with mining on.
    deadline = time.monotonic() + 240
    while not (folder / "checkpoint-15").exists() and time.monotonic() < deadline:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (folder / "checkpoint-21").exists()
    launch("train_ham.py", *arguments, "--resume_from_checkpoint=latest", env=subprocess_env, processes=processes)
    for name in ("checkpoint-22/model.safetensors", "checkpoint-best/model.safetensors", "model.safetensors"):
        ours, theirs = load_file(folder / name), load_file(full / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = (read_report(where / "report.json") for where in (folder, full))
    assert ours.training.history == theirs.training.history
    assert ours.results["pgd-2"].summary == theirs.results["pgd-2"].summary
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("finished", [1], indirect=True)
def test_written_configuration_reproduces_the_run(finished, tmp_path, subprocess_env):
    _, full, _ = finished
    again = tmp_path / "again"
    arguments = ["--config", str(full / "train_config.yaml"), f"--output_dir={again}"]
    launch("train_ham.py", *arguments, env=subprocess_env)
    ours, theirs = (load_file(where / "model.safetensors") for where in (again, full))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_refused_resume_leaves_the_run_as_it_was(finished, capsys):
    _, folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changes = ["--epsilon=0.02", "--weight_decay=0.1", "--per_device_train_batch_size=16"]
    resume = [f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
    message = refused(capsys, "train_ham.py", *SMALL, *resume, *changes)
    assert "epsilon 0.1 -> 0.02" in message
    assert "weight_decay 0.0005 -> 0.1" in message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("place", ["Trainer.fit", "load_image_data"])
def test_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch, place):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ham_hf.training_run.{place}", interrupted)
    words = [*SMALL, f"--output_dir={tmp_path / 'run'}", "--per_device_train_batch_size=16"]
    assert "--resume_from_checkpoint latest" in refused(capsys, "train_ham.py", *words, status=130)


def test_evaluation_needs_a_folder_of_its_own_and_images_of_its_own(finished, tmp_path, capsys):
    _, folder, _ = finished
    options = [str(folder), "--dataset_name=digits", "--use_cpu"]
    before = sorted(folder.rglob("*"))
    message = refused(capsys, "evaluate.py", *options, f"--output_dir={folder}", "--overwrite_output_dir")
    assert "holds a model" in message
    options += [f"--output_dir={tmp_path / 'e'}", "--test_fraction=0.5"]
    message = refused(capsys, "evaluate.py", *options)
    assert "--test_fraction 0.5 would test on images that the model was trained on" in message
    assert sorted(folder.rglob("*")) == before


def test_existing_output_folder_is_not_overwritten(finished, capsys):
    _, folder, _ = finished
    before = (folder / "report.json").stat().st_mtime_ns
    message = refused(capsys, "train_ham.py", *SMALL, f"--output_dir={folder}")
    assert "--overwrite_output_dir" in message
    assert (folder / "report.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("finished", [1], indirect=True)
def test_overwriting_replaces_the_run(finished, tmp_path, capsys):
    _, full, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(full, folder)
    options = ["--overwrite_output_dir", "--max_steps=2", "--per_device_train_batch_size=16"]
    recipe_module("train_ham.py").main([*SMALL, f"--output_dir={folder}", *options])
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    assert read_report(folder / "report.json").training.steps == 2
    capsys.readouterr()


@pytest.mark.cifar10
@pytest.mark.skipif("HAM_HF_CIFAR10" not in os.environ, reason="HAM_HF_CIFAR10 does not name a copy of CIFAR-10")
def test_robust_accuracy_rises_on_cifar10(tmp_path, subprocess_env):
    folder = tmp_path / "cifar10"
    options = """
        --model_name=resnet18_cifar --model_args layers=[1,1,1,1] channels=[32,64,128,256]
        --epsilon=2/255 --step_size=1/255 --num_steps=5 --mining_step=2 --mining_start_epoch=2
        --limit_train_examples=12800 --limit_test_examples=500 --validation_fraction=0.1 --num_train_epochs=4
        --per_device_train_batch_size=64 --lr_scheduler_type=cosine --lr_step_unit=step --disable_tqdm
    """
    places = [f"--dataset_name={os.environ['HAM_HF_CIFAR10']}", f"--output_dir={folder}"]
    env = subprocess_env | {"OMP_NUM_THREADS": "2"}
    launch("train_ham.py", *places, *options.split(), env=env, timeout=1800)
    report = read_report(folder / "report.json")
    assert report.training.steps == 4 * 180
    robust = [line["robust_accuracy"] for line in report.training.history]
    assert robust[3] > robust[1] > 0.2  # mining adds to what two epochs of warm-up have reached
    assert 0.3 < report.training.history[3]["hard_fraction"] < 0.9
