"""One command brings what earlier versions exported into today's form, in a folder and on the Hub."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from huggingface_hub import HfApi

from ham_hf.models import PixelModel, create_backbone, input_defaults, load_pixel_model
from ham_hf.models.export import repair_folder
from tests.conftest import ROOT
from tests.support.exports import FAMILIES, export, preprocessing, trained
from tests.support.hub_server import Hub, content, hub_environment, use_hub
from tests.support.recipe_runs import finish, recipe_module, refused


def older(folder, name="resnet18_cifar", in_chans=3):
    """An export as 0.1.0 wrote it: num_classes in both records of arguments, no crop mode, no ``rgb/``."""
    export(trained(name, 32, in_chans, **FAMILIES[name]), folder, preprocessing(32, in_chans))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["num_classes"] = 10
    config["ham_hf"]["trained_form"]["model_args"]["num_classes"] = 10
    del config["ham_hf"]["trained_form"]["crop_mode"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder / "rgb", ignore_errors=True)
    return folder


def logits(folder, in_chans=3):
    x = torch.rand(2, in_chans, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load_pixel_model(str(folder)).model(x)


@pytest.mark.parametrize(("name", "in_chans"), [("resnet18_cifar", 3), ("preactresnet18_cifar", 3), ("test_vit", 1)])
def test_folder_is_repaired_once(name, in_chans, tmp_path, capsys):
    folder = older(tmp_path / "run", name, in_chans)
    before, expected = content(folder), logits(folder, in_chans)
    main = recipe_module("push.py").main
    main([str(folder), "--repair"])
    said = capsys.readouterr().out
    assert "num_classes taken out of model_args" in said
    assert ("rgb/: the same network" in said) == (in_chans == 1)
    after = content(folder)
    assert after["model.safetensors"] == before["model.safetensors"]
    old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
    for config in (old, new):
        for arguments in (config["model_args"], config["ham_hf"]["trained_form"]["model_args"]):
            assert arguments.pop("num_classes", None) == (10 if config is old else None)
    assert old == new
    torch.testing.assert_close(logits(folder, in_chans), expected, rtol=0, atol=0)
    main([str(folder), "--repair"])
    assert capsys.readouterr().out == f"{folder} is in order: nothing was changed\n"
    assert content(folder) == after


def test_older_exports_are_read_without_repair(tmp_path):
    """Training continues from one, with its classes and with others."""
    name = f"local-dir:{older(tmp_path)}"
    settings = input_defaults(name, model_args={})
    assert settings == preprocessing()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for num_classes in (10, 4):
        again = create_backbone(name, pretrained=True, num_classes=num_classes, preprocessing=settings, model_args={})
        with torch.no_grad():
            found = PixelModel(again.eval(), settings.mean, settings.std)(x)
        assert found.shape == (2, num_classes)


def test_repaired_folder_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; the test extra has it")
    folder = older(tmp_path)
    with pytest.raises(TypeError, match="num_classes"):
        transformers.AutoModelForImageClassification.from_pretrained(folder)
    repair_folder(folder)
    assert transformers.AutoModelForImageClassification.from_pretrained(folder).config.num_labels == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config: config["model_args"].update(num_classes=7), "."),
        (lambda config: config.pop("ham_hf"), "was not written by ham_hf"),
        (lambda config: config["ham_hf"]["trained_form"]["model_args"].update(num_classes=3), "10, and 3 inside of"),
        (lambda config: config.update(architecture="no_such_net"), "no architecture"),
    ],
)
def test_what_is_not_right_is_left_alone(damage, message, tmp_path):
    folder = older(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    damage(config)
    (folder / "config.json").write_text(json.dumps(config))
    before = content(folder)
    with pytest.raises(ValueError, match=message):
        repair_folder(folder)
    assert content(folder) == before


WRITER, READER = "hf_writer0123456789", "hf_reader0123456789"


@pytest.fixture
def hub(monkeypatch, tmp_path, waits):
    """A Hub that this process talks to as "me"."""
    with Hub({WRITER: "me", READER: "me"}, read_only={READER}) as server:
        use_hub(server, monkeypatch, tmp_path / "hf_home", WRITER)
        yield server


def publish(folder, name):
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)


def push(*arguments):
    recipe_module("push.py").main(arguments)


def test_repository_is_repaired_with_one_commit(hub, tmp_path, capsys):
    publish(older(tmp_path / "run", "test_vit", 1), "me/gray")
    repo = hub.model("me/gray")
    before, commits = repo.tree(), len(repo.commits)
    push("me/gray", "--repair")
    assert "num_classes taken out of model_args" in capsys.readouterr().out
    assert len(repo.commits) == commits + 1
    after = repo.tree()
    changed = {name for name in after if name not in before or after[name].data != before[name].data}
    assert changed == {"config.json", "rgb/config.json", "rgb/model.safetensors"}
    assert "num_classes" not in json.loads(after["config.json"].data)["model_args"]
    push("me/gray", "--repair")
    assert capsys.readouterr().out == "me/gray is in order: nothing was changed\n"
    assert len(repo.commits) == commits + 1


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["me/nothing", "--repair"], "could not get config.json of me/nothing"),
        (["me/a", "--repair", "--hub_model_id", "me/b"], "there is no folder me/a"),
        (["nothing"], "--hub_model_id is missing"),
    ],
)
def test_slips(hub, arguments, fragment, capsys):
    assert fragment in refused(capsys, "push.py", *arguments)


def test_repository_that_this_user_may_not_change(hub, tmp_path, monkeypatch, capsys):
    publish(older(tmp_path), "me/mine")
    before = hub.model("me/mine").tree()
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "may not write there" in refused(capsys, "push.py", "me/mine", "--repair")
    assert hub.model("me/mine").tree() == before


def test_a_pull_request_repairs_the_repository_of_somebody_else(hub, tmp_path, monkeypatch, capsys):
    publish(older(tmp_path), "me/theirs")
    repo = hub.model("me/theirs")
    before = repo.tree()
    monkeypatch.setenv("HF_TOKEN", READER)
    push("me/theirs", "--repair", "--create_pr")
    assert f"pushed to {hub.url}/me/theirs/discussions/1" in capsys.readouterr().out
    assert repo.tree() == before
    assert "num_classes" not in json.loads(repo.tree("refs/pr/1")["config.json"].data)["model_args"]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--hub_model_id me/x --create_pr", "--create_pr is not for a folder without EVALUATION.md"),
        ("--create_pr", "--create_pr is not for a repair without --hub_model_id"),
        ("--hub_revision v2", "--hub_revision is not for a repair without --hub_model_id"),
        ("--model_license mit", "--model_license is not for a repair without --hub_model_id"),
    ],
)
def test_a_folder_is_not_repaired_with_flags_that_have_no_effect(tmp_path, capsys, flags, what):
    folder = older(tmp_path / "run")
    before = content(folder)
    assert what in refused(capsys, "push.py", str(folder), "--repair", *flags.split())
    assert content(folder) == before


def test_push_that_fails_leaves_the_repository(hub, tmp_path, capsys):
    publish(older(tmp_path), "me/mine")
    before = hub.model("me/mine").tree()
    hub.fail("POST .*/commit/", status=500, times=99)
    with pytest.raises(SystemExit, match="2"):
        push("me/mine", "--repair")
    said = capsys.readouterr()
    assert "me/mine is as it was" in said.err
    assert "num_classes taken out" not in said.out
    assert hub.model("me/mine").tree() == before


LOAD_FROM_HUB = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
print(AutoModelForImageClassification.from_pretrained("me/both").config.num_labels)
network = AutoModelForImageClassification.from_pretrained("me/both", subfolder="rgb")
processor = AutoImageProcessor.from_pretrained("me/both", subfolder="rgb")
classify = pipeline("image-classification", model=network, image_processor=processor)
print(classify(Image.new("RGB", (40, 50)))[0]["label"])
"""


@pytest.mark.slow
def test_transformers_loads_both_forms_from_the_hub(hub, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed; the test extra has it")
    export(trained("test_vit", 32, 1, patch_size=8), tmp_path / "run", preprocessing(32, 1))
    publish(tmp_path / "run", "me/both")
    environment = hub_environment(hub, tmp_path / "home", token=WRITER) | {"PYTHONPATH": str(ROOT)}
    number, name = finish([sys.executable, "-c", LOAD_FROM_HUB], environment).stdout.splitlines()
    assert number == "10"
    assert name.startswith("class ")
