"""evaluate.py with a foreign attack, corruptions and groups, as a user runs it."""

from __future__ import annotations

import pytest

from ham_hf import evaluation_run
from ham_hf.evaluation.verdicts import read_verdicts
from ham_hf.reporting.report import read_report
from tests.support.example_images import dataset, noise, write_parquet
from tests.support.exports import SMALL_RESNET, export, preprocessing, trained
from tests.support.recipe_runs import recipe_module, refused
from tests.support.tables import cases

ATTACK = """
import torch

def attack(model, x, y):
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), x)
    return (x + gradient.sign() / 255).clamp(0, 1).detach()

def far(model, x, y):
    return (x + 0.5).clamp(0, 1)
"""
CLASSES = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a dataset with a column of sites, and a file with attacks."""
    folder = tmp_path_factory.mktemp("evaluate")
    settings = preprocessing(16)
    export(trained("resnet18_cifar", 16, **SMALL_RESNET), folder / "model", settings)
    split = dataset([noise(number, (16, 16)) for number in range(30)], [number % CLASSES for number in range(30)])
    split = split.add_column("site", [["north", "south", None][number % 3] for number in range(30)])
    write_parquet(folder / "set", test=split)
    (folder / "my_attack.py").write_text(ATTACK)
    return folder


def words(place, out, *options):
    quick = ["--epsilon=1/255", "--eval_num_steps=1", "--per_device_eval_batch_size=16", "--use_cpu", "--disable_tqdm"]
    places = [str(place / "model"), f"--dataset_name={place / 'set'}", f"--output_dir={out}"]
    return [*places, *quick, *options]


def test_all_three_are_in_report_predictions_evaluation_and_page(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    attack = f"{place / 'my_attack.py'}:attack"
    options = ["--corruptions=contrast,saturate", "--severities", "2", "4", "--group_column=site"]
    recipe_module("evaluate.py").main(words(place, out, f"--foreign_attack={attack}", *options))
    report = read_report(out)
    assert list(report.results) == ["clean", "pgd-1", "cw-1", "my_attack.attack"]
    assert report.results["my_attack.attack"].settings["function"] == attack
    assert report.verdict.settings["attacks"] == ["pgd-1", "cw-1", "my_attack.attack"]
    assert report.groups.names == ("north", "south", "(missing)")
    assert [entry.count for entry in report.groups.results["verdict"].summary.per_class] == [10, 10, 10]
    assert [(found.name, found.severity) for found in report.corruptions.results] == [
        ("contrast", 2), ("contrast", 4), ("saturate", 2), ("saturate", 4),
    ]  # fmt: skip
    assert report.corruptions.constants == "CIFAR-10-C (meant for 32 px)"
    verdicts = read_verdicts(out)
    assert list(verdicts.attacked) == ["pgd-1", "cw-1", "my_attack.attack"]
    assert verdicts.groups.column == "site"
    evaluation = (out / "EVALUATION.md").read_text()
    for part in ("my\\_attack.attack", "### By site", "### Common corruptions", "(missing)"):
        assert part in evaluation
    page = (out / "report.html").read_text()
    assert "my_attack.attack" in page
    assert "Each group by site" in page
    shown = capsys.readouterr().out
    assert "my_attack.attack" in shown
    assert "mean of 2" in shown
    assert not (out / "evaluation-progress").exists()


@pytest.mark.parametrize(("options", "message"), cases(__file__, "bad_evaluations.yaml"))
def test_what_cannot_be_is_refused_in_one_line(place, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = [option.format(place=place) for option in options]
    assert message in refused(capsys, "evaluate.py", *words(place, tmp_path / "out", *options))
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("option", ["--corruptions=frog", "--foreign_attack=nowhere.py:attack"])
def test_what_settings_alone_say_is_refused_before_the_hub_and_the_model_are_asked(
    place, tmp_path, monkeypatch, capsys, option
):
    for name in ("check_target", "load_pixel_model"):
        monkeypatch.setattr(evaluation_run, name, lambda *_, **__: pytest.fail("too early"))
    push = ["--push_to_hub", "--hub_model_id=me/x"]
    assert option.partition("=")[0] in refused(capsys, "evaluate.py", *words(place, tmp_path / "out", option, *push))
