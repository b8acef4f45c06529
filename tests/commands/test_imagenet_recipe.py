"""The ImageNet recipes, end to end on a stand-in with the same layout, from a stand-in Hub; streamed and resumed."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file

from ham_hf.reporting.report import read_report
from tests.conftest import ROOT
from tests.support.example_images import dataset, noise
from tests.support.hub_server import Hub, hub_environment
from tests.support.recipe_runs import finish
from tests.support.training import log_of

pytestmark = pytest.mark.slow

CLASSES = ("tench", "goldfish", "great white shark", "tiger shark")
ROWS = (14, 9, 17)  # of the training files: 38 stay in train, 2 are held out
SMALL = shlex.split(
    "--no_pretrained --image_size=64 --num_steps=2 --num_train_epochs=2 --per_device_train_batch_size=4 "
    "--gradient_accumulation_steps=2 --validation_fraction=0.05 --validation_num_steps=1 --eval_num_steps=1 "
    "--save_total_limit=9 --save_steps=2 --logging_steps=1 --dataloader_num_workers=1 --mixed_precision=no "
    "--selection_metric=last --use_cpu --disable_tqdm"
)
NETS = {"convnext_tiny_ham": "test_convnext", "vit_small_patch16_pgd_at": "test_vit"}
RUN = """
import json, sys
from tests.support.recipe_runs import recipe_module

for script, *arguments in json.load(sys.stdin):
    recipe_module(script).main(arguments)
"""


def split(rows: int, first: int, *, labeled: bool = True) -> datasets.Dataset:
    """The columns of imagenet-1k; its test split has the label -1 throughout."""
    images = [noise(first + row, (80, 70)) for row in range(rows)]
    labels = [row % len(CLASSES) if labeled else -1 for row in range(rows)]
    return dataset(images, labels, label_feature=datasets.ClassLabel(names=list(CLASSES)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of runs: streamed; streamed, stopped and resumed; with a local copy; another recipe."""
    folder = tmp_path_factory.mktemp("imagenet")
    splits = [(f"train-{number:05d}-of-00003", split(rows, 100 * number)) for number, rows in enumerate(ROWS)]
    splits += [("validation-00000-of-00001", split(8, 900)), ("test-00000-of-00001", split(6, 950, labeled=False))]
    tree = {}
    for name, examples in splits:
        examples.to_parquet(folder / "one.parquet")
        tree[f"data/{name}.parquet"] = (folder / "one.parquet").read_bytes()

    def arguments(recipe: str, name: str, *more: str) -> list[str]:
        words = [f"--config=imagenet/{recipe}", *SMALL, f"--model_name={NETS[recipe]}"]
        # mining_start_epoch is 10 in the recipe.
        words += ["--mining_start_epoch=1"] if recipe.endswith("ham") else []
        return ["train_ham.py", *words, f"--output_dir={folder / name}", *more]

    streamed = ("convnext_tiny_ham", "--dataset_streaming", "--shuffle_buffer_size=12")
    with Hub(tokens={"hf_me": "me"}) as hub:
        hub.add("dataset", "ILSVRC/imagenet-1k", tree)
        runs = [
            arguments(streamed[0], "whole", *streamed[1:]),
            arguments(streamed[0], "parts", *streamed[1:], "--max_steps=3"),
            arguments(streamed[0], "parts", *streamed[1:], "--resume_from_checkpoint=latest"),
        ]
        evaluation = ["--dataset_name=ILSVRC/imagenet-1k", "--dataset_streaming", f"--output_dir={folder / 'again'}"]
        runs += [["evaluate.py", str(folder / "whole"), *evaluation, "--eval_num_steps=1", "--use_cpu"]]
        copied = [arguments("vit_small_patch16_pgd_at", "copied", "--max_steps=1")]
        for home, these in (("home_streamed", runs), ("home_copied", copied)):
            env = hub_environment(hub, folder / home, token="hf_me") | {"ACCELERATE_USE_CPU": "true"}
            finish([sys.executable, "-c", RUN], env, input=json.dumps(these), cwd=ROOT)
    return folder


@pytest.mark.parametrize("name", ["whole", "copied"])
def test_the_test_is_on_validation_as_the_test_labels_are_secret(finished, name):
    report = json.loads((finished / name / "report.json").read_text())
    assert report["dataset"]["test_split_origin"] == "validation"
    assert report["dataset"]["num_test"] == 8
    assert (report["dataset"]["num_train"], report["dataset"]["num_validation"]) == (38, 2)
    assert list(report["dataset"]["class_names"]) == list(CLASSES)


def test_evaluation_of_a_stream_gives_the_numbers_of_the_training_report(finished):
    trained, again = (read_report(finished / name / "report.json") for name in ("whole", "again"))
    assert list(again.results) == ["clean", "pgd-1", "cw-1"]
    for name, result in again.results.items():
        assert result.summary == trained.results[name].summary


def _is_parquet(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.open("rb").read(4) == b"PAR1"


def test_streamed_run_makes_all_updates_of_its_epochs_without_a_copy_of_train(finished):
    state = json.loads((finished / "whole" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["step"] == 2 * (38 // 8)

    def parquet_files(home: str) -> list[Path]:
        return [path for path in (finished / home).rglob("*") if _is_parquet(path)]

    assert len(parquet_files("home_copied")) == 5
    assert parquet_files("home_streamed") == []


def test_resumed_stream_gives_the_weights_of_the_uninterrupted_one(finished):
    whole, parts = (load_file(finished / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(bool((whole[key] == parts[key]).all()) for key in whole)

    def losses(name: str) -> list[tuple[int, float]]:
        records = log_of(finished / name)
        return [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]

    assert losses("whole") == losses("parts")
