"""Numbers that trackers get, with stand-ins for trackio and wandb that record how they are called."""

from __future__ import annotations

import json
import sys

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType

from ham_hf.comparison.plan import read_plan
from ham_hf.training.log import TRACKERS, chosen_trackers, class_numbers, start_trackers
from tests.conftest import ROOT
from tests.support.recipe_runs import SMALL, recipe_module

STAND_IN = """
import json, os

class _Config(dict):
    def update(self, values, allow_val_change=False):
        _say("config", values=values)

config = _Config()

def _say(what, **values):
    with open(os.environ["TRACKER_CALLS"], "a") as file:
        file.write(json.dumps({"tracker": __name__, "what": what, **values}) + chr(10))

def init(project, **options):
    _say("init", project=project, **options)
    return Run()

class Run:
    def log(self, values, step=None):
        _say("log", values=values, step=step)

    def finish(self):
        _say("finish")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Reads what the stand-ins were called with, as (tracker, what it was, the rest)."""
    packages, path = tmp_path / "packages", tmp_path / "calls.jsonl"
    for name in ("trackio", "wandb"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("TRACKER_CALLS", str(path))
    # accelerate asks whether they are installed as distributions.
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType(name) for name in TRACKERS])
    yield lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_tracker_gets_names_classes_and_results_and_a_resumed_run_goes_on(calls, tmp_path, capsys):
    folder = tmp_path / "run"
    options = [
        *SMALL,
        "--per_device_train_batch_size=60",
        "--report_to=all",
        "--run_name=first",
        "--project=fair",
        "--trackio_space_id=me/space",
        "--save_total_limit=none",
        f"--output_dir={folder}",
    ]
    train = recipe_module("train_ham.py")
    train.main([*options, "--max_steps=2"])
    capsys.readouterr()
    begun = {call["tracker"]: call for call in calls() if call["what"] == "init"}
    assert begun["trackio"]["project"] == begun["wandb"]["project"] == "fair"
    assert begun["trackio"]["name"] == begun["wandb"]["name"] == "first"
    assert (begun["trackio"]["space_id"], begun["trackio"]["resume"]) == ("me/space", "never")
    logged = [call for call in calls() if call["what"] == "log"]
    for name in ("trackio", "wandb"):
        keys = {key: call["step"] for call in logged if call["tracker"] == name for key in call["values"]}
        assert {f"validation/robust_per_class/{digit}" for digit in range(10)} <= keys.keys()
        assert keys["test/verdict/worst_class"] == keys["train/loss"] == 2
        assert "test/pgd-2/per_class/7" in keys
    report = json.loads((folder / "report.json").read_text())
    (worst,) = {call["values"]["test/clean/average"] for call in logged if "test/clean/average" in call["values"]}
    assert worst == report["results"]["clean"]["summary"]["average"]
    boards = list((folder / "logs" / "fair" / "first").glob("events.out.tfevents.*"))
    assert b"test/verdict/average" in b"".join(path.read_bytes() for path in boards)

    train.main([*options, "--max_steps=3", "--resume_from_checkpoint=latest"])
    capsys.readouterr()
    again = {call["tracker"]: call for call in calls() if call["what"] == "init"}
    assert again["wandb"]["id"] == begun["wandb"]["id"]
    assert again["trackio"]["resume"] == "allow"
    assert set((folder / "logs" / "fair").iterdir()) == {folder / "logs" / "fair" / "first"}


def test_a_new_run_has_a_new_id_and_the_name_of_its_folder(calls, tmp_path):
    for _ in range(2):
        accelerator = Accelerator(cpu=True, log_with=["wandb"])
        settings = {"project": "ham_hf", "run_name": None, "trackio_space_id": None}
        start_trackers(accelerator, tmp_path / "digits", settings, step=0)
    first, second = (call for call in calls() if call["what"] == "init")
    assert first["name"] == "digits"
    assert first["id"] != second["id"]


def test_which_trackers_are_meant(calls, monkeypatch):
    assert chosen_trackers(()) == ()
    assert chosen_trackers(("wandb", "tensorboard")) == ("wandb", "tensorboard")
    assert chosen_trackers(("all",)) == ("tensorboard", "trackio", "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--report_to all: none of tensorboard, trackio, wandb is installed"):
        chosen_trackers(("all",))
    with pytest.raises(ValueError, match="pip install wandb"):
        chosen_trackers(("wandb",))


def test_classes_in_trackers_have_names_that_differ():
    assert class_numbers("v", [0.5, None], ["sea lion", "a/b"]) == {"v/sea lion": 0.5, "v/a_b": None}
    assert list(class_numbers("v", [0.1, 0.2], ["a/b", "a_b"])) == ["v/0 a_b", "v/1 a_b"]
    assert class_numbers("v", [0.1] * 201, [str(index) for index in range(201)]) == {}


def test_runs_of_a_comparison_are_called_by_row_and_seed(tmp_path):
    plan = tmp_path / "plan.yaml"
    tracked = "settings: {report_to: [tensorboard]}\n"
    recipe = f"recipe: {ROOT}/recipes/digits/ham.yaml\n"
    plan.write_text(f"{recipe}output_dir: out\nseeds: [0, 3]\n{tracked}runs: {{ham: {{}}}}\n")
    words = [run.words for run in read_plan(plan).runs]
    assert ["--run_name=ham/seed0" in one for one in words] == [True, False]
    assert "--run_name=ham/seed3" in words[1]
    plan.write_text(plan.read_text().replace(tracked, ""))
    assert not any("run_name" in word for run in read_plan(plan).runs for word in run.words)
