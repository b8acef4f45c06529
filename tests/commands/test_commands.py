"""The commands of an installed package: overview, recipes by name, the first screen of --help, who is told what."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest

from ham_hf.__main__ import main
from ham_hf.commands import COMMANDS
from ham_hf.config import load_train_config, parse_calibrate_config, parse_evaluate_config, parse_train_config
from ham_hf.invocation import SCRIPTS, command, find_recipe, list_recipes, program, shown_path
from ham_hf.methods import available
from tests.conftest import ROOT
from tests.support.recipe_runs import recipe_module
from tests.support.tables import cases

PARSERS = {"train": parse_train_config, "evaluate": parse_evaluate_config, "calibrate": parse_calibrate_config}


def shown(capsys: pytest.CaptureFixture[str], function, *arguments) -> tuple[int, str, str]:
    """Status, standard output and standard error."""
    status = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        status = stop.code or 0
    return (status, *capsys.readouterr())


# ------------------------------------------------------------------------------------------------- ham-hf COMMAND


def test_overview_names_every_command_in_one_screen(capsys):
    status, out, _ = shown(capsys, main, ["--help"])
    assert status == 0
    assert len(out.splitlines()) <= 25
    for name, known in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(known.summary)}$", out, re.MULTILINE)
    assert shown(capsys, main, []) == (2, "", out)


def test_word_that_is_no_command_is_refused_with_the_nearest(capsys):
    status, out, err = shown(capsys, main, ["trian", "--seed", "1"])
    assert (status, out) == (2, "")
    assert "'trian': expected one of train, evaluate" in err
    assert err.endswith("did you mean train?\n")


def test_command_gets_the_words_after_its_name(capsys):
    status, out, _ = shown(capsys, main, ["train", "--config", "digits/pgd_at", "--seed", "7", "--print_config"])
    assert status == 0
    assert "method: pgd_at" in out
    assert "seed: 7" in out


@pytest.mark.parametrize("name", SCRIPTS)
def test_recipes_run_the_commands(name):
    assert recipe_module(SCRIPTS[name]).__name__ == COMMANDS[name].module
    text = (ROOT / "recipes" / SCRIPTS[name]).read_text()
    assert "# /// script" not in text
    assert len(text.partition('"""\n\n')[2].splitlines()) < 10


# ------------------------------------------------------------------------------------------------- recipes by name


def test_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for written in ("digits/pgd_at", "digits/pgd_at.yaml"):
        assert find_recipe(written) == ROOT / "recipes/digits/pgd_at.yaml"
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/pgd_at.yaml").write_text("seed: 3\nmethod: pgd_at\n")
    assert load_train_config(find_recipe("digits/pgd_at.yaml")).training.seed == 3
    # What is no name of a recipe stays a path, and says what is missing.
    for written in ("../recipes/digits/pgd_at", str(ROOT / "recipes/digits/pgd_at"), "digits", "a\0b", "x" * 5000, ""):
        assert str(find_recipe(written)) in (written, ".")
    status, _, err = shown(capsys, parse_train_config, ["--config", "digits/hamm"])
    assert status == 2
    assert "--config digits/hamm: there is no such file" in err
    assert "ham-hf recipes" in err


def test_every_recipe_is_listed_by_the_name_that_config_takes(capsys):
    status, out, _ = shown(capsys, main, ["recipes"])
    assert status == 0
    found = {recipe.name: recipe for recipe in list_recipes()}
    assert {recipe.path for recipe in found.values()} == set((ROOT / "recipes").glob("*/*.yaml"))
    kinds = {use: [name for name in found if found[name].use == use] for use in ("train", "compare", "launch")}
    assert "cifar10/preactresnet18_ham" in kinds["train"]
    assert set(kinds["compare"]) >= {"digits/compare", "cifar10/compare"}
    assert "accelerate/ddp" in kinds["launch"]
    for name in kinds["train"]:
        assert find_recipe(name) == found[name].path
        assert load_train_config(find_recipe(name))
    for name, recipe in found.items():
        assert re.search(rf"^  {name}(\.yaml)? +{re.escape(recipe.summary)}$", out, re.MULTILINE), name
        assert recipe.summary
        assert not recipe.summary.startswith(("#", "What"))


# ------------------------------------------------------------------------------------------------- --help


@pytest.mark.parametrize("name", PARSERS)
def test_help_is_a_screen_and_all_of_it_on_request(name, capsys):
    status, first, _ = shown(capsys, PARSERS[name], ["--help"])
    assert status == 0
    assert len(first.splitlines()) <= 28
    assert max(map(len, first.splitlines())) <= 90
    assert first.startswith(f"usage: ham-hf {name} ")
    whole = shown(capsys, PARSERS[name], ["--help", "all"])[1]
    assert len(whole.splitlines()) > 60
    flags = re.findall(r"^  (--\w+)", first, re.MULTILINE)
    assert len(set(flags)) >= 12
    assert {"--output_dir", "--dataset_name", "--config"} <= set(flags) <= set(re.findall(r"--\w+", whole))
    assert "--help all" in first
    assert shown(capsys, PARSERS[name], ["--help=all"])[1] == whole
    # A flag that follows is no topic.
    assert shown(capsys, PARSERS[name], ["-h", "--seed", "3"])[1] == first


def test_defaults_on_the_screen_are_those_of_the_settings(capsys):
    first = shown(capsys, parse_train_config, ["--help"])[1]
    assert re.search(r"--epsilon NUMBER .*\[8/255\]$", first, re.MULTILINE)
    assert re.search(r"--seed INT .*\[0\]$", first, re.MULTILINE)
    assert not re.search(r"--hub_model_id.*\[", first)


@pytest.mark.parametrize("method", sorted(available()))
def test_help_on_a_method_shows_its_own_options(method, capsys):
    status, out, _ = shown(capsys, parse_train_config, ["--help", method])
    assert status == 0
    assert out.startswith(f"--method {method}: {available()[method].summary}")
    for field in dataclasses.fields(available()[method]):
        assert len(re.findall(rf"^  --{field.name}[ ,\n]", out, re.MULTILINE)) == 1, field.name
    assert "--num_train_epochs" not in out


def test_help_on_what_does_not_exist_says_what_does(capsys):
    status, _, err = shown(capsys, parse_train_config, ["--help", "hamm"])
    assert status == 2
    assert "--help hamm: expected all, " in err
    assert "trades" in err
    status, _, err = shown(capsys, parse_evaluate_config, ["--help", "ham"])
    assert (status, err) == (2, "ham-hf evaluate: error: --help ham: expected all\n")


# ------------------------------------------------------------------------------------------------- who is told what


@pytest.mark.parametrize(("started", "expected", "usage"), cases(__file__, "started_as.yaml"))
def test_messages_name_the_command_that_the_reader_has(started, expected, usage, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started, "--seed=1"])
    assert command("push") == expected
    assert program("train") == usage
    assert command("recipes") == "ham-hf recipes"


def test_launch_configurations_are_named_where_they_are(tmp_path, monkeypatch):
    assert shown_path("accelerate/ddp.yaml") == "recipes/accelerate/ddp.yaml"
    (tmp_path / "ham_hf/recipes").mkdir(parents=True)
    monkeypatch.setattr("ham_hf.invocation.__file__", str(tmp_path / "ham_hf/invocation.py"))
    assert shown_path("accelerate/ddp.yaml") == str(tmp_path / "ham_hf/recipes/accelerate/ddp.yaml")
