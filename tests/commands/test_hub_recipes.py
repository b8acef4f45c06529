"""From a dataset on the Hub to a model on the Hub and back, as a user does it, over HTTP with faults on the way."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml

from ham_hf.evaluation.verdicts import read_verdicts
from ham_hf.models import load_pixel_model
from ham_hf.reporting.page import has_images
from ham_hf.reporting.report import read_report
from tests.conftest import ROOT
from tests.support.hub_server import Hub, hub_environment
from tests.support.recipe_runs import SMALL, finish, launch_command

pytestmark = pytest.mark.slow

TOKEN = "hf_secretWriterToken"

MAKE_DATASET = """
import sys
import numpy as np
from huggingface_hub import HfApi
from PIL import Image as PILImage
from datasets import ClassLabel, Dataset, Features, Image
random = np.random.default_rng(0)
features = Features({"img": Image(), "kind": ClassLabel(names=["dark | *sky*", "dusk", "noon"])})
def split(count):
    labels = [i % 3 for i in range(count)]
    pixels = [np.clip(40 + 80 * y + random.normal(0, 25, (16, 16, 3)), 0, 255).astype("uint8") for y in labels]
    return Dataset.from_dict({"img": [PILImage.fromarray(p) for p in pixels], "kind": labels}, features=features)
for name, count in (("train", 150), ("test", 30)):
    split(count).to_parquet(f"{sys.argv[1]}/data/{name}-00000-of-00001.parquet")
HfApi().create_repo("me/skies", repo_type="dataset")
HfApi().upload_folder(repo_id="me/skies", folder_path=sys.argv[1], repo_type="dataset")
"""

LOAD_WITHOUT_HAM = """
import sys
sys.modules["ham_hf"] = None
import json, timm, torch
model = timm.create_model("hf-hub:me/sky", pretrained=True).eval()
x = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
cfg = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
scale = cfg["input_size"][1] // 16
with torch.no_grad():
    logits = model((torch.nn.functional.interpolate(x, scale_factor=scale, mode="nearest") - mean) / std)
print(json.dumps({"logits": logits.tolist(), "names": list(model.pretrained_cfg["label_names"])}))
"""


def python(code, environment, *arguments):
    return finish([sys.executable, "-c", code, *map(str, arguments)], environment)


def recipe(script, environment, *arguments):
    return finish([sys.executable, str(ROOT / "recipes" / script), *map(str, arguments)], environment)


@pytest.fixture(scope="module")
def hub():
    with Hub({TOKEN: "me", "hf_anotherUsersToken": "you"}) as server:
        yield server


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    found = hub_environment(hub, tmp_path_factory.mktemp("home"), token=TOKEN)
    return found | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def pushed(hub, environment, tmp_path_factory):
    """A training run on a Hub dataset that pushes on every save, while the Hub has bad moments."""
    source = tmp_path_factory.mktemp("skies")
    (source / "data").mkdir()
    python(MAKE_DATASET, environment, source)
    hub.fail(r"POST /api/models/me/sky/commit/", status=503, times=1)
    hub.disturb("drop", r"POST /api/models/me/sky/commit/", times=1)
    folder = tmp_path_factory.mktemp("train") / "run"
    options = """
        --dataset_name=me/skies --model_args layers=[1,1,1,1] channels=[8,8,8,8] --per_device_train_batch_size=32
        --limit_train_examples=none --limit_test_examples=none --save_steps=3
        --push_to_hub --hub_model_id=sky --hub_space --hub_strategy=every_save
    """
    command = launch_command("train_ham.py", *SMALL, *options.split(), f"--output_dir={folder}")
    return folder, finish(command, environment)


def test_hub_dataset_feeds_the_run(pushed):
    folder, _ = pushed
    report = read_report(folder / "report.json")
    assert report.dataset.hub_id == "me/skies"
    assert report.dataset.num_train + report.dataset.num_validation == 150
    assert report.dataset.num_test == 30
    assert report.dataset.class_names == ("dark | *sky*", "dusk", "noon")
    assert re.fullmatch(r"[0-9a-f]{40}", report.dataset.revision)


def test_everything_published_is_what_lies_on_disk(pushed, hub):
    folder, done = pushed
    tree = hub.model("me/sky").tree()
    published = {path for path in tree if path != ".gitattributes"}
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "checkpoint" not in str(p)}
    assert published == on_disk - {"examples.parquet"}  # test images are published inside of the page alone
    assert all(tree[path].data == (folder / path).read_bytes() for path in published)
    assert len(hub.model("me/sky").history()) >= 3  # the first commit, pushes in mid-run, the last one
    assert "pushed to" in done.stdout
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "timm"
    assert metadata["datasets"] == ["me/skies"]
    assert "hf-hub:me/sky" in card
    # The page has a Space, which the card links; one that the images, as those of a public dataset, are in.
    assert "https://huggingface.co/spaces/me/sky" in card
    assert f"its page is at {hub.url}/spaces/me/sky" in done.stdout
    shown = hub.repos["space", "me/sky"].tree()["index.html"].data.decode()
    assert has_images(shown)
    assert "https://huggingface.co/me/sky" in shown


def test_plain_timm_gives_the_evaluated_models_logits(pushed, environment):
    folder, _ = pushed
    found = json.loads(python(LOAD_WITHOUT_HAM, environment).stdout.splitlines()[-1])
    ours = load_pixel_model(str(folder))
    with torch.no_grad():
        logits = ours.model(torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16))
    assert tuple(found["names"]) == ours.class_names
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-5, rtol=0)


def test_evaluation_of_the_hub_model_agrees_with_the_report(pushed, environment, tmp_path):
    folder, _ = pushed
    target = tmp_path / "evaluation"
    options = ["me/sky", "--dataset_name=me/skies", "--eval_num_steps=2", "--use_cpu", f"--output_dir={target}"]
    recipe("evaluate.py", environment, *options)
    ours, theirs = read_report(target / "report.json"), read_report(folder / "report.json")
    # Without --epsilon the model is attacked as it was trained.
    assert ours.threat_model == theirs.threat_model
    for name in ("clean", "pgd-2", "cw-2"):
        assert ours.results[name].summary == theirs.results[name].summary
    assert ours.verdict.summary == theirs.verdict.summary
    assert torch.equal(read_verdicts(target).withstood, read_verdicts(folder).withstood)
    assert ours.training is None
    assert "PGD-2" in (target / "EVALUATION.md").read_text()


def test_finished_folder_is_pushed_elsewhere(pushed, hub, environment):
    folder, _ = pushed
    recipe("push.py", environment, folder, "--hub_model_id=me/second", "--hub_private_repo", "--hub_space")
    repo = hub.model("me/second")
    assert repo.private
    assert b"hf-hub:me/second" in repo.tree()["README.md"].data
    assert hub.repos["space", "me/second"].private
    recipe("push.py", environment, folder, "--hub_model_id=me/third")
    assert b"/spaces/" not in hub.model("me/third").tree()["README.md"].data


def test_missing_rights_stop_the_run_before_it_starts(environment, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "recipes/train_ham.py"), *SMALL, "--push_to_hub", "--hub_model_id=me/other"]
    env = environment | {"HF_TOKEN": "hf_anotherUsersToken"}
    command.append(f"--output_dir={folder}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "--hub_model_id me/other" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "metrics.jsonl").exists()
