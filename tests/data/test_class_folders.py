"""Class folders: every image file is in its split and class, or refused, or counted; no word of a name decides."""

from __future__ import annotations

import logging
import os
import random
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch

from ham_hf.data.class_folders import sort_into_classes
from tests.support.example_images import (
    encode,
    grays,
    in_class_folders,
    load,
    noise,
    open_stored,
    pictures,
    write_files,
    write_parquet,
)

SPLIT_NAMES = {"train": ["train", "Training", "TRAIN"], "validation": ["val", "valid", "dev", "validation"]}
SPLIT_NAMES |= {"test": ["test", "Testing", "eval"]}
CLASS_NAMES = [
    "cat", "train", "test", "bus test", "val-set", "dev.tools", "a[1]", "x:y", "50%", "%20", "v1.2.3", "犬", "café",
    "Zebra", "zebra", "__background__", "a::b", "q?*", "training wheels", "eval_2", "data", "hash#tag", "-", "[!a]",
]  # fmt: skip
STEMS = [
    "stress test {}", "train_{}", "shot {}", "val.{}", "[{}]", "a:b {}", "{}%41", "x.y.z.{}", "dev-{}", "日本 {}",
    "{}#1", "test{}", "a::b{}", "~{}", "{} copy",
]  # fmt: skip
ENDINGS = [".png", ".PNG", ".Png", ".jpg", ".JPEG", ".Jpg", ".webp", ".bmp", ".tif", ".GIF"]


class Tree:
    """A random folder that is written to disk, and where each image belongs: known because it was put there."""

    def __init__(self, root, rng):
        self.root, self.rng, self.number = root, rng, 0
        self.expected: dict[str, tuple[str, str]] = {}
        self.hidden = 0
        self.refused = False
        self.outside = root.parent / f"{root.name} elsewhere"
        root.mkdir()
        self.outside.mkdir()
        wrapper = rng.choice(["", "", "", "photos/", "data/raw/"])
        splits = rng.sample(list(SPLIT_NAMES), rng.randint(1, 3)) if rng.random() < 0.6 else []
        classes = rng.sample(CLASS_NAMES, rng.randint(2, 5))
        group = rng.choice(["", "", "", "group/"])
        for split in splits or [""]:
            folder = wrapper + (f"{rng.choice(SPLIT_NAMES[split])}/" if split else "") + group
            for name in classes:
                self.add_class(folder + name, split or "train", name)
        self.add_noise(wrapper)
        if not splits:
            # Not split folders only, or there would be no telling.
            self.add_class(wrapper + group + "plain class", "train", "plain class")
        first = next(iter(self.expected)).removeprefix(wrapper).split("/")[0]
        self.add_defect(f"{wrapper}{first}/" if splits else wrapper)

    def write(self, path):
        self.number += 1
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(b"image %d" % self.number)

    def add_class(self, folder, split, name):
        place, linked = folder, self.rng.random() < 0.15
        for _ in range(self.rng.randint(1, 4)):
            self.number += 1
            file = self.rng.choice(STEMS).format(self.number) + self.rng.choice(ENDINGS)
            if linked:
                target = self.outside / folder.replace("/", "_")
                target.mkdir(exist_ok=True)
                (target / file).write_bytes(b"image %d" % self.number)
                if not (self.root / place).is_symlink():
                    (self.root / place).parent.mkdir(parents=True, exist_ok=True)
                    (self.root / place).symlink_to(target)
            elif self.rng.random() < 0.2:
                (self.root / place).mkdir(parents=True, exist_ok=True)
                (self.outside / f"{self.number}").write_bytes(b"image %d" % self.number)
                (self.root / place / file).symlink_to(self.outside / f"{self.number}")
            else:
                self.write(f"{place}/{file}")
            self.expected[f"{place}/{file}"] = (split, name)

    def add_noise(self, wrapper):
        somewhere = self.rng.choice(list(self.expected)).rpartition("/")[0]
        for path in ["README.md", "labels.txt", f"{wrapper}notes.csv", "empty.json", f"{somewhere}/Thumbs.db"]:
            if self.rng.random() < 0.5:
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (self.root / path).write_text("no image")
        if self.rng.random() < 0.4:
            (self.root / wrapper / "empty class").mkdir(parents=True, exist_ok=True)
        for path in [f"{somewhere}/.hidden.png", ".cache/x.jpg", f"__MACOSX/{self.number}.png"]:
            if self.rng.random() < 0.3:
                self.write(path)
                self.hidden += 1
        if self.rng.random() < 0.2:
            (self.root / somewhere / "loop").symlink_to(self.root)

    def add_defect(self, top):
        defect = self.rng.choice([None] * 6 + ["loose", "deeper", "same name"])
        if defect == "loose":
            self.write(f"{top}loose.png")
        elif defect == "deeper":
            self.write(f"{next(iter(self.expected)).rpartition('/')[0]}/old/1.png")
        elif defect == "same name":
            first = next(iter(self.expected)).split("/")[-2]
            self.write(f"{top}another group/{first}/1.png")
        self.refused = defect is not None


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_every_image_of_200_trees_is_accounted_for(seed, tmp_path, caplog):
    outcomes = {"read": 0, "refused": 0}
    for number in range(25):
        tree = Tree(tmp_path / f"set [{number}] a:b 100%", random.Random(1000 * seed + number))
        caplog.clear()
        if tree.refused:
            with pytest.raises(ValueError, match=r"--dataset_name .* (put|rename)"):
                open_stored(str(tree.root))
            outcomes["refused"] += 1
            continue
        source = open_stored(str(tree.root))
        found = {}
        for split, rows in source.splits.items():
            names = rows.features["label"].names
            for row in rows.cast_column("image", datasets.Image(decode=False)):
                path = os.path.relpath(row["image"]["path"], tree.root)
                assert path not in found
                found[path] = (split, names[row["label"]])
        assert found == tree.expected, tree.root
        hidden = [note for note in source.notes if "hidden" in note]
        assert [int(note.split()[0]) for note in hidden] == ([tree.hidden] if tree.hidden else [])
        assert all(note in caplog.text for note in source.notes)
        outcomes["read"] += 1
    assert min(outcomes.values()) >= 3


def write(root, *paths):
    return write_files(root, pictures(*paths))


classes_in = partial(in_class_folders, count=6)


def test_words_in_file_and_class_names_decide_nothing(tmp_path):
    paths = [f"{name}/{word} {number}.png" for name in ("cat", "dog") for word in ("stress test", "val", "shot")
             for number in range(10)]  # fmt: skip
    data = load(write(tmp_path / "words", *paths), validation_fraction=0.1)
    assert data.test_split_origin.startswith("held out of train")
    assert len(data.train) + len(data.validation or []) + len(data.test) == 60
    vehicles = [f"{split}/{path}" for split in ("train", "test") for path in classes_in("bus", "train", "tram")]
    data = load(write(tmp_path / "vehicles", *vehicles), validation_fraction=0)
    assert (data.class_names, len(data.train), len(data.test)) == (("bus", "train", "tram"), 18, 18)
    data = load(write(tmp_path / "flat", *classes_in("bus", "train", "tram")), validation_fraction=0)
    assert (data.class_names, data.test_split_origin[:17]) == (("bus", "train", "tram"), "held out of train")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([*classes_in("cat", "dog"), "logo.png"], r"1 of 13 images lie beside the class .*such as 'logo.png'"),
        ([*classes_in("train/cat", "train/dog"), "test/1.png"], r"lie beside .* folders, in test, .*'test/1.png'"),
        (["train/1.png", "test/2.png"], r"1 images lie in the split folder 'test' itself"),
        (classes_in("val/a", "val/b", "dev/a", "dev/b"), "folders 'dev' and 'val' are both the split 'validation'"),
        (classes_in("cat/2020", "dog/2020"), "the folders 'cat/2020' and 'dog/2020' have one name"),
        ([*classes_in("cat", "dog"), "dog/old/1.png"], "class folders are not equally deep"),
    ],
)
def test_what_does_not_say_its_class_is_refused_by_name(paths, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "set", *paths))


def test_what_lies_beside_splits_is_counted_aloud(tmp_path, caplog):
    inside = [f"{split}/{path}" for split in ("train", "test") for path in classes_in("cat", "dog")]
    root = tmp_path / "set"
    write(root, *inside, "assets/logo.png", "sample.png", "train/cat/.hidden.png")
    (root / "train" / "cat" / "no extension").write_bytes(encode(noise(99)))
    (root / "raw.tar").write_bytes(b"")
    data = load(str(root), validation_fraction=0)
    assert (len(data.train), len(data.test)) == (12, 12)
    for part in (
        "2 image files lie outside of the split folders and are not read, such as 'assets/logo.png'",
        "1 image files are hidden",
        "1 files hold images by their first bytes and have no image's extension; they are not read, such as "
        "'train/cat/no extension'",
        "1 archives and data files lie beside class folders and are not read, such as 'raw.tar'",
    ):
        assert part in caplog.text
        assert any(part in note for note in data.notes)


def test_a_class_that_is_not_read_or_is_there_twice_is_told(tmp_path, caplog):
    root = tmp_path / "set"
    write(root, *classes_in("cat", "Cat ", "owl"))
    (root / "dog").mkdir()
    for number in range(3):
        (root / "dog" / f"{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    notes = " ".join(load(str(root), validation_fraction=0).notes)
    assert "3 files hold images by their first bytes and have no image's extension" in notes
    assert "1 folders beside class folders hold no image that can be read and are no classes, such as 'dog'" in notes
    assert "the classes 'Cat ' and 'cat' differ in case, spaces or the form of their Unicode alone" in caplog.text


def test_test_is_not_trained_on_where_the_training_folder_has_another_name(tmp_path):
    for name in ("trainval", "learning"):
        write(
            tmp_path / name, *(f"{top}/{path}" for top in (name, "test") for path in classes_in("cat", "dog", "owl"))
        )
    assert load(str(tmp_path / "trainval"), validation_fraction=0).test_split_origin == "test"
    with pytest.raises(ValueError, match="18 images lie outside of the split folders 'test', such as"):
        load(str(tmp_path / "learning"))
    write(tmp_path / "trainval", *(f"train/{path}" for path in classes_in("cat", "dog", "owl")), "devkit/doc/1.png")
    assert load(str(tmp_path / "trainval"), validation_fraction=0).test_split_origin == "test"


def test_a_broken_link_is_an_image_that_cannot_be_read(tmp_path):
    root = tmp_path / "set"
    write(root, *classes_in("cat", "dog"))
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"cat/gone.png: the image cannot be read"):
        load(str(root))
    assert load(str(root), skip_corrupt=True).num_skipped == 1


def test_a_path_that_is_listed_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1 files are listed twice, such as 'cat/1\.png'"):
        sort_into_classes(["cat/1.png", "dog/1.png", "cat/1.png"])
    folder = Path(write_parquet(tmp_path / "set", train=grays(6)))
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*\n"
    (folder / "README.md").write_text(f"---\n{card}  - split: test\n    path: data/train*\n---\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet is listed in 'train' and 'test'"):
            load(str(folder), dataset_streaming=streaming)


def test_parquet_files_that_no_split_takes_are_counted_aloud(tmp_path, caplog):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train", "more"):
        grays(10).to_parquet(folder / f"{name}.parquet")
    data = load(str(folder), validation_fraction=0)
    assert len(data.train) + len(data.test) == 10
    assert "1 files belong to no split by their names and are not read, such as 'more.parquet'" in caplog.text


@pytest.mark.parametrize("linked", [False, True])
def test_images_in_train_and_test_are_counted(linked, tmp_path, caplog):
    root = tmp_path / "set"
    write(root, *classes_in("train/cat", "train/dog", "test/cat", "test/dog"))
    for number in range(3):
        copy, original = root / f"test/cat/again {number}.png", root / f"train/dog/{number}.png"
        copy.symlink_to(original) if linked else copy.write_bytes(original.read_bytes())
    data = load(str(root), validation_fraction=0.2)
    assert data.num_test_in_train == 3
    assert "3 of 15 test images are training images too" in caplog.text
    assert load(str(root), cache_images="none", augmentation="none").num_test_in_train is None
    assert load(str(root), cache_images="none", augmentation="none", skip_corrupt=True).num_test_in_train == 3


def test_the_order_of_images_is_that_of_their_paths(tmp_path):
    """As before, so that the held-out parts of earlier runs are found again."""
    root = write(tmp_path / "set", *classes_in("b", "a 1", "a"))
    rows = open_stored(root).splits["train"].cast_column("image", datasets.Image(decode=False))
    paths = [row["image"]["path"] for row in rows]
    assert paths == sorted(paths)
    before = datasets.load_dataset(root, split="train").cast_column("image", datasets.Image(decode=False))
    assert paths == [row["image"]["path"] for row in before]
    assert torch.equal(torch.tensor(rows["label"][:]), torch.tensor(before["label"][:]))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    folder = write_parquet(tmp_path / "set", train=grays(6))
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"^the cache folder .*file/cache cannot be written .*HF_HOME") as caught:
            load(folder, dataset_streaming=streaming)
        assert "this folder cannot be read" not in str(caught.value)


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)
