"""Opening datasets; which splits, columns and classes are found; what is said when they are not."""

from __future__ import annotations

import json
import sys

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from sklearn.datasets import load_digits

from ham_hf.data.columns import read_labels
from ham_hf.data.sources import DIGITS_FILE, read_digits
from tests.conftest import ROOT
from tests.support.example_images import dataset, encode, gray, grays, load, noise, open_stored, write_parquet, zipped
from tests.support.hub_server import Hub, hub_environment
from tests.support.recipe_runs import finish
from tests.support.tables import cases

# The digits of the package


def test_the_digits_are_those_of_scikit_learn_as_gray_images_in_that_order():
    scans, (images, labels) = load_digits(), read_digits()
    assert (images.dtype, labels.dtype) == (np.uint8, scans.target.dtype)
    rows = open_stored("digits").splits["train"]
    assert rows["label"][:] == scans.target.tolist()
    stretched = np.round(scans.images * (255 / 16))
    assert all(np.array_equal(image, expected) for image, expected in zip(rows["image"], stretched, strict=True))
    assert rows[0]["image"].mode == "L"


def test_the_digits_are_small_and_have_their_license_beside_them():
    assert DIGITS_FILE.stat().st_size < 60_000
    text = DIGITS_FILE.with_name("digits.LICENSE.md").read_text(encoding="utf-8")
    for part in ("Alpaydin", "Kaynak", "https://doi.org/10.24432/C50P49", "CC-BY-4.0", "licenses/by/4.0", "changed"):
        assert part in text


# Splits


@pytest.mark.parametrize(("names", "train", "origin"), cases(__file__, "splits_by_rule.yaml"))
def test_splits_by_rule(tmp_path, names, train, origin, caplog):
    splits = {"train": 20, "extra": 20, "test": 6, "validation": 8, "eval": 5}
    folder = write_parquet(tmp_path / "set", **{name: grays(splits[name]) for name in names})
    data = load(folder, validation_fraction=0)
    assert data.test_split_origin == origin
    assert len(data.train) == train
    assert len(data.test) == splits.get(origin, 20 - train)
    assert ("none of the splits 'extra' is for testing by its name" in caplog.text) == (names == ["train", "extra"])
    assert data.validation is None


def test_splits_by_name(tmp_path):
    folder = write_parquet(tmp_path / "set", train=grays(20), test=grays(6), validation=grays(8))
    data = load(folder, train_split="validation", test_split="train", validation_fraction=0.25)
    assert (len(data.train), len(data.validation or []), len(data.test)) == (6, 2, 20)


def text_alone(size):
    return grays(size).remove_columns("image").add_column("text", ["a"] * size)


def unlabeled(size):
    return grays(size).remove_columns("label")


NO_TRAIN = {"one": grays, "two": grays}
TWO_SPLITS = {"train": grays, "test": grays}


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (NO_TRAIN, {}, "no split is called 'train': choose one of 'one', 'two' with --train_split"),
        (TWO_SPLITS, {"train_split": "trian"}, "--train_split trian: .* did you mean 'train'"),
        (TWO_SPLITS, {"test_split": "val"}, "--test_split val: .* no such split; there are 'train', 'test'"),
        (TWO_SPLITS, {"test_split": "train"}, "--test_split train is the training split"),
        (TWO_SPLITS, {"dataset_config_name": "v2"}, "--dataset_config_name v2: .*/set' has no configurations"),
        (TWO_SPLITS, {"image_column": "imag"}, "--image_column imag: .* did you mean 'image'"),
        (TWO_SPLITS, {"image_column": "label"}, "--image_column label: expected images or encoded bytes"),
        (TWO_SPLITS, {"label_column": "labels"}, "--label_column labels: .* did you mean 'label'"),
        (TWO_SPLITS, {"label_column": "image"}, "--label_column image: expected one class label"),
        ({"train": text_alone}, {}, "no image column; .*'label', 'text' with --image_column"),
        ({"train": unlabeled}, {}, "no label column; .*'image' with --label_column"),
        ({"train": grays, "test": unlabeled}, {}, "split 'test' has no column 'label', only 'image'"),
    ],
)
def test_splits_and_columns_that_do_not_fit(tmp_path, splits, options, message):
    datasets.DatasetDict({name: make(6) for name, make in splits.items()}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "set"), **options)


# Columns


def test_odd_column_names(tmp_path):
    examples = grays(10, image="picture of it", label="what it is")
    examples = examples.add_column("note", ["x"] * 10)
    data = load(write_parquet(tmp_path / "set", train=examples))
    assert data.class_names == ("c0", "c1")


def test_fine_label_goes_before_coarse_label(tmp_path):
    coarse = datasets.ClassLabel(names=["all", "none"])
    examples = grays(12, 3, label="fine_label").add_column("coarse_label", [0] * 12, feature=coarse)
    folder = write_parquet(tmp_path / "set", train=examples)
    assert load(folder).class_names == ("c0", "c1", "c2")
    with pytest.raises(ValueError, match=r"--label_column coarse_label: .*has 1 class"):
        load(write_parquet(tmp_path / "one", train=grays(4, 1, label="coarse_label")), label_column="coarse_label")


def test_several_images_or_labels_have_to_be_named(tmp_path):
    examples = grays(10, image="left", label="kind")
    right = grays(10, image="right").remove_columns("label")
    examples = datasets.concatenate_datasets([examples, right], axis=1)
    examples = examples.add_column("mood", [0, 1] * 5, feature=datasets.ClassLabel(names=["sad", "glad"]))
    folder = write_parquet(tmp_path / "set", train=examples)
    with pytest.raises(ValueError, match=r"several image columns, 'left', 'right'; .* with --image_column"):
        load(folder)
    with pytest.raises(ValueError, match=r"several label columns, 'kind', 'mood'; .* with --label_column"):
        load(folder, image_column="left")
    assert load(folder, image_column="left", label_column="mood").class_names == ("sad", "glad")


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_encoded_bytes_without_an_image_feature(tmp_path, kind):
    binary = datasets.Value("binary")
    feature = binary if kind == "binary" else {"bytes": binary, "path": datasets.Value("string")}
    plain = grays(10).cast_column("image", datasets.Image(decode=False))
    stored = [example["image"]["bytes"] if kind == "binary" else example["image"] for example in plain]
    folder = write_parquet(tmp_path / "set", train=dataset(stored, plain["label"][:], image_feature=feature))
    data = load(folder, validation_fraction=0)
    assert data.image_size == 8
    assert len(data.train) + len(data.test) == 10


# Labels


@pytest.mark.parametrize(
    ("dtype", "values", "names"),
    [
        ("int64", [7, 3, 100, 3], ("3", "7", "100")),
        ("uint8", [7, 3, 100, 3], ("3", "7", "100")),
        ("string", ["dog", "cat", "ape", "cat"], ("ape", "cat", "dog")),
        ("bool", [True, False, True, False], ("False", "True")),
    ],
)
def test_labels_become_0_to_c(tmp_path, dtype, values, names):
    examples = dataset([gray(index) for index in range(8)], values * 2, label_feature=datasets.Value(dtype))
    data = load(write_parquet(tmp_path / "set", train=examples, test=examples), validation_fraction=0)
    assert data.class_names == names
    assert [names[label] for label in data.train.labels.tolist()] == [str(value) for value in values * 2]
    assert data.test.labels.tolist() == data.train.labels.tolist()


def test_all_names_of_a_class_label_are_kept(tmp_path, caplog):
    names = datasets.ClassLabel(names=["cat", "ghost", "dog"])
    train = dataset([gray(index) for index in range(8)], [0, 2] * 4, label_feature=names)
    test = dataset([gray(9), gray(10)], [1, 2], label_feature=names)
    data = load(write_parquet(tmp_path / "set", train=train, test=test), validation_fraction=0)
    assert data.class_names == ("cat", "ghost", "dog")
    assert data.test.labels.tolist() == [1, 2]
    assert "1 of 3 classes have no example in train: 'ghost'" in caplog.text
    assert "1 of 3 classes have no example in test: 'cat'" in caplog.text
    caplog.clear()
    load(str(tmp_path / "set"), validation_fraction=0, limit_train_examples=3)  # as an evaluation does
    assert "in train" not in caplog.text


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize(("dtype", "train", "test", "message"), cases(__file__, "bad_labels.yaml"))
def test_labels_that_do_not_fit(tmp_path, dtype, train, test, message):
    images, feature = [gray(1), gray(2)], {"label_feature": datasets.Value(dtype)}
    splits = {"train": dataset(images, train, **feature), "test": dataset(images, test, **feature)}
    folder = write_parquet(tmp_path / "set", **splits)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_empty_split(tmp_path):
    splits = datasets.DatasetDict(train=grays(4), test=grays(4).select([]))
    with pytest.raises(ValueError, match=r"split 'test' is empty"):
        read_labels(splits, "label", "train", "test")
    # From files, datasets is the first to object.
    with pytest.raises(ValueError, match=r'--dataset_name .*"test" corresponds to no data'):
        load(write_parquet(tmp_path / "set", **splits))


# Folders


def test_folders_that_do_not_fit(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.parquet").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"--dataset_name .*empty: this folder cannot be read as parquet"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"file.parquet: is a file; give the folder"):
        load(str(tmp_path / "file.parquet"))
    with pytest.raises(ValueError, match=r"--dataset_name .*none: there is no such folder, and it is not a Hub id"):
        load(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"broken: this folder cannot be read .*[Pp]arquet") as caught:
        load(str(tmp_path / "broken"))
    assert caught.value.__cause__ is not None
    with pytest.raises(ValueError, match=r"--dataset_revision v1: only datasets of the Hub have revisions"):
        load(str(tmp_path / "empty"), dataset_revision="v1")
    with pytest.raises(ValueError, match=r"--dataset_config_name x: 'digits' has no configurations"):
        load("digits", dataset_config_name="x")


# The Hub

LOAD = """
import json, sys
from tests.support.example_images import load

for options in json.load(sys.stdin):
    try:
        data = load(**options)
        result = [data.config_name, data.revision, len(data.train), len(data.test), data.class_names]
    except ValueError as error:
        result = [str(error), type(error.__cause__).__name__]
    print("RESULT", json.dumps(result))
"""


TABLE = "file_name,label\n" + "".join(
    f"{split}/train_{number}.png,{('NA', 'dog')[number % 2]}\n" for split in ("train", "test") for number in range(4)
)


DECLARED = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: a/**
  - split: test
    path: b/**
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    grays(10).to_parquet(folder / "a.parquet")
    rows = (folder / "a.parquet").read_bytes()

    def add(hub, name, *configs, private=False):
        tree = {f"{config}/{split}-0.parquet": rows for config in configs for split in ("train", "test")}
        if len(configs) > 1:
            lines = [f"- config_name: {config}\n  data_dir: {config}" for config in configs]
            tree["README.md"] = "\n".join(["---", "configs:", *lines, "---"]).encode()
        if name == "me/one":
            tree["data/photos-0.parquet"] = rows  # in no split
        hub.add("dataset", name, tree, private=private)

    with Hub(tokens={"hf_me": "me", "hf_you": "you"}) as hub:
        add(hub, "me/one", "data")
        add(hub, "me/many", "small", "large")
        add(hub, "me/secret", "data", private=True)
        add(hub, "me/empty")
        picture = encode(noise(0))
        archived = {f"{name}/test {number}.PNG": picture for name in ("bus", "train") for number in range(2)}
        folders = {
            f"{split}/{name}/{word} [{number}] a:b 50%.PNG": picture
            for split in ("train", "test")
            for name in ("bus", "train", "stress test")
            for word in ("shot", "val")
            for number in range(3 if split == "train" else 1)
        }
        for name, tree in {
            "folders": {**folders, "logo.png": picture, ".hidden.png": picture},
            "flat": {path.removeprefix("train/"): picture for path in folders if path.startswith("train/")},
            "tables": {
                **{f"{split}/train_{number}.png": picture for split in ("train", "test") for number in range(4)},
                "metadata.csv": TABLE.encode(),
            },
            "declared": {
                **{
                    f"{folder}/{name}/{number} [1] 50%.png": picture
                    for folder in ("a", "b", "more")
                    for name in ("test", "train")
                    for number in range(3)
                },
                "README.md": DECLARED.encode(),
            },
            "archives": {f"{split}.zip": zipped(archived) for split in ("train", "test")},
            "loose": {**{path.partition("/")[2]: picture for path in folders}, "logo.png": picture},
        }.items():
            hub.add("dataset", f"me/{name}", tree)
        yield hub


@pytest.mark.slow
def test_datasets_of_the_hub(hub, tmp_path):
    def commit(name):
        return hub.repos["dataset", name].refs["main"]

    whole = {"validation_fraction": 0}
    cases = [
        ("me/one", {}, ["default", commit("me/one"), 8, 10, ["c0", "c1"]]),
        ("me/many", {"dataset_config_name": "large"}, ["large", commit("me/many"), 8, 10, ["c0", "c1"]]),
        ("me/many", {}, ("--dataset_config_name (not given), of --dataset_name me/many", "'small', 'la")),
        ("me/many", {"dataset_config_name": "huge"}, ("--dataset_config_name huge", "'small', 'la")),
        ("me/none", {}, ("--dataset_name me/none", "hf auth login", "DatasetNotFoundError")),
        ("me/secret", {}, ("--dataset_name me/secret", "hf auth login")),
        ("me/one", {"dataset_revision": "v9"}, ("--dataset_revision v9", "Revision 'v9'")),
        ("me/empty", {}, ("--dataset_name me/empty cannot be loaded", "contain any data files")),
        ("me/one", {"test_split": "tset"}, ("--test_split tset", "did you mean 'test'")),
        ("me/folders", {}, ["default", commit("me/folders"), 14, 6, ["bus", "stress test", "train"]]),
        ("me/flat", {}, ["default", commit("me/flat"), 11, 4, ["bus", "stress test", "train"]]),
        ("me/tables", whole, ["default", commit("me/tables"), 4, 4, ["NA", "dog"]]),
        ("me/declared", whole, ["default", commit("me/declared"), 6, 6, ["test", "train"]]),
        ("me/archives", whole, ["default", commit("me/archives"), 4, 4, ["bus", "train"]]),
        ("me/loose", {}, ("--dataset_name me/loose", "beside the class folders", "'logo.png'")),
    ]
    asked = [{"dataset_name": name, "validation_fraction": 0.2} | options for name, options, _ in cases]
    env = hub_environment(hub, tmp_path, token="hf_you")
    process = finish([sys.executable, "-c", LOAD], env, input=json.dumps(asked), cwd=ROOT)
    results = [json.loads(line[7:]) for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(cases), process.stderr
    for (*case, expected), result in zip(cases, results, strict=True):
        if isinstance(expected, list):
            assert result == expected, case
        else:
            assert all(part in " ".join(result) for part in expected), (case, result)
    unread = "1 files belong to no split by their names and are not read, such as 'data/photos-0.parquet'"
    assert unread in process.stderr
    unread = "6 image files are in no data_files of README.md and are not read, such as 'more/test/0 [1] 50%.png'"
    assert unread in process.stderr


@pytest.mark.faults(quick=True)
def test_hub_cannot_be_reached(monkeypatch):
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"--dataset_name me/far: .* the Hub cannot be reached .*HF_HUB_OFFLINE"):
        load("me/far")
