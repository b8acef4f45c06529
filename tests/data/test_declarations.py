"""Class names that files declare: labels are matched by name or refused with both lists, whatever the layout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ham_hf.data import BatchRequest, TrainingStream, UpdateLayout
from ham_hf.data.columns import read_labels
from tests.support.example_images import dataset, encode, gray, load, open_stored
from tests.support.tables import cases

CPU = torch.device("cpu")


Rows = list[tuple[int, str]]  # gray value, class


def split(names, rows, order=()):
    """Images with these values and classes; ``order`` is what a split that declares nothing counts."""
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    labels = [(names or order).index(name) for _, name in rows]
    return dataset([gray(value) for value, _ in rows], labels, label_feature=feature)


def write(folder, files, order, readme=None):
    """One parquet or Arrow file per entry; see `split` for ``order``."""
    (folder / "data").mkdir(parents=True)
    for file, (names, rows) in files.items():
        images = split(names, rows, order)
        if file.endswith(".arrow"):
            new = pa.ipc.new_file if file.startswith("test") else pa.ipc.new_stream
            with new(str(folder / "data" / file), images.features.arrow_schema) as opened:
                opened.write_table(images.data.table)
        else:
            images.to_parquet(folder / "data" / file)
    if readme:
        names = "".join(f"          '{place}': {name}\n" for place, name in enumerate(readme))
        (folder / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
            f"      class_label:\n        names:\n{names}---\n"
        )
    return str(folder)


def pairs(data):
    """Class of every image by part."""
    found = {}
    for part, images in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if images is None:
            continue
        if isinstance(images, TrainingStream):
            layout = UpdateLayout(batch_size=1, accumulation=1, world=1, rank=0, seed=0)
            batches = list(images.batches(layout, epoch=0, first_update=0, device=CPU))
        else:
            batches = list(images.batches([BatchRequest(torch.arange(len(images)), None)], device=CPU))
        found[part] = {
            round(float(x[0, 0, 0]) * 255): data.class_names[int(y)]
            for batch in batches
            for x, y in zip(batch.x, batch.y, strict=True)
        }
    return found


def random_case(rng):
    """Files that declare the classes in their own order, some of them only, some nothing or one that no other has."""
    everything = rng.sample(["cat", "dog", "owl", "ape", "bee", "1", "0"], rng.randint(2, 5))
    readme = rng.sample(everything, len(everything)) if rng.random() < 0.25 else None
    value = iter(range(250))
    files = {}
    num_train = rng.randint(1, 3)
    for number in range(num_train + 1):
        split = "train" if number < num_train else "test"
        kind = rng.choice(["same", "same", "permuted", "fewer", "none", "other"] if number else ["same", "permuted"])
        names = list(everything)
        if kind == "permuted":
            names = rng.sample(everything, len(everything))
        elif kind == "fewer":
            names = rng.sample(everything, rng.randint(1, len(everything)))
        elif kind == "other":
            names = [*rng.sample(everything, len(everything) - 1), "new"]
        elif kind == "none":
            names = None
        usable = names or readme or next(iter(files.values()))[0] or everything
        rows = [(next(value), rng.choice(usable)) for _ in range(rng.randint(3, 9))]
        files[f"{split}-{number:05d}.parquet"] = (names, rows)
    return files, readme or next(iter(files.values()))[0] or everything, readme


def refusal(files, readme):
    """Naive oracle: whether some image's class cannot be told, or is none that train declares."""
    train = [names for file, (names, _) in files.items() if file.startswith("train")]
    declared = [names for names, _ in files.values() if names]
    silent = any(names is None for names, _ in files.values())
    known = set(readme or max((names for names in train if names), key=len))
    if any(names and not set(names) <= known for names in train):
        return True
    if silent and not readme and any(names != declared[0] for names in declared):
        return True
    return any(name not in known for file, (_, rows) in files.items() if file.startswith("test") for _, name in rows)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_every_label_of_200_sets_of_declarations_keeps_its_name(seed, tmp_path):
    outcomes = {False: 0, True: 0}
    for number in range(25):
        files, order, readme = random_case(random.Random(1000 * seed + number))
        folder = write(tmp_path / f"set{number}", files, order, readme)
        refused = refusal(files, readme)
        outcomes[refused] += 1
        if refused:
            with pytest.raises(ValueError, match=r"declare"):
                labels_of(folder)
            continue
        expected = {
            split: [name for file, (_, rows) in files.items() if file.startswith(split) for _, name in rows]
            for split in ("train", "test")
        }
        assert labels_of(folder) == expected, (files, readme)
    assert min(outcomes.values()) >= 3


def labels_of(folder):
    source = open_stored(folder)
    train, test, names = read_labels(source.splits, "label", "train", "test", source.declared)
    return {"train": [names[label] for label in train], "test": [names[label] for label in test]}


CLASSES = ["cat", "dog", "owl"]
PERMUTED = {
    "train-00000-of-00002.parquet": (["owl", "cat"], [(10 + i, ["owl", "cat"][i % 2]) for i in range(10)]),
    "train-00001-of-00002.parquet": (CLASSES, [(30 + i, ["dog", "owl", "cat"][i % 3]) for i in range(12)]),
    "test-00000-of-00001.parquet": (["dog", "owl"], [(60 + i, ["owl", "dog"][i % 2]) for i in range(8)]),
}


@pytest.mark.parametrize(("kind", "streaming"), [("parquet", False), ("arrow", False), ("parquet", True)])
def test_every_image_keeps_its_class_stored_and_streamed(kind, streaming, tmp_path):
    folder = write(tmp_path / "set", {file.replace("parquet", kind): rows for file, rows in PERMUTED.items()}, [])
    options = {"dataset_streaming": True, "dataloader_num_workers": 0} if streaming else {}
    data = load(folder, validation_fraction=0.2, augmentation="none", **options)
    assert data.class_names == ("cat", "dog", "owl")
    found = pairs(data)
    truth = {value: name for _, rows in PERMUTED.values() for value, name in rows}
    assert found["test"] == {value: truth[value] for value in range(60, 68)}
    assert found["train"] | found["validation"] == {value: name for value, name in truth.items() if value < 60}
    if isinstance(data.train, TrainingStream):
        counts = data.train.shards.class_counts()
        trained = list(found["train"].values())
        assert counts.tolist() == [trained.count(name) for name in data.class_names]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_do_not_match_are_refused_with_both_files_and_lists(streaming, tmp_path):
    files = {**PERMUTED, "train-00000-of-00002.parquet": (["owl", "ape"], [(1, "ape"), (2, "owl")])}
    both = r"train-00001-of-00002.parquet declares the 3 classes \['cat', 'dog', 'owl'\], and .*train-00000-of-00002"
    with pytest.raises(ValueError, match=both + r".parquet the 2 classes \['owl', 'ape'\]: \['ape'\] of the second"):
        load(write(tmp_path / "train", files, []), dataset_streaming=streaming)
    files = {**PERMUTED, "test-00000-of-00001.parquet": (["ape", "owl"], [(1, "owl"), (2, "ape")])}
    named = r"row 1.*'ape'.*'owl'\].* \['cat', 'dog', 'owl'\]|row 1: label 'ape' .*test-"
    with pytest.raises(ValueError, match=named):
        load(write(tmp_path / "test", files, []), dataset_streaming=streaming)
    with pytest.raises(ValueError, match=r"README.md declares the 2 classes \['owl', 'cat'\], and .*train-00001"):
        load(write(tmp_path / "readme", PERMUTED, [], ["owl", "cat"]), dataset_streaming=streaming)


def test_a_label_beyond_its_own_files_names_is_refused(tmp_path):
    folder = Path(write(tmp_path / "set", PERMUTED, []))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "cat"])})
    images = [{"bytes": encode(gray(value)), "path": None} for value in range(3)]
    rows = pa.table({"image": images, "label": [0, 1, 2]}, schema=features.arrow_schema)
    pq.write_table(rows, folder / "data" / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"row 2: label 2, and column 'label' declares 2 classes"):
        load(str(folder))
    with pytest.raises(ValueError, match=r"row 2: the label is number 2 of 2"):
        load(str(folder), dataset_streaming=True, validation_fraction=0)


def test_files_without_names_are_warned_of(tmp_path, caplog):
    files = {
        "train-00000-of-00001.parquet": (["cat", "dog"], [(i, ["cat", "dog"][i % 2]) for i in range(10)]),
        "test-00000-of-00001.parquet": (None, [(20, "dog"), (21, "cat")]),
    }
    data = load(write(tmp_path / "set", files, ["cat", "dog"]), validation_fraction=0)
    assert pairs(data)["test"] == {20: "dog", 21: "cat"}
    assert "1 of 1 files of split 'test' declare no class names in column 'label'" in caplog.text
    caplog.clear()
    load(write(tmp_path / "readme", files, ["cat", "dog"], ["cat", "dog"]), validation_fraction=0)
    assert "declare no class names" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_names_already_are_those_of_the_readme(streaming, tmp_path):
    files = {f"{part}-0.parquet": (None, [(i, CLASSES[i % 3]) for i in range(9)]) for part in ("train", "test")}
    folder = write(tmp_path / "set", files, ["cat", "dog", "owl"], ["owl", "cat", "dog"])
    for file in (tmp_path / "set" / "data").iterdir():
        table = pq.read_table(file).replace_schema_metadata()
        names = [CLASSES[label] for label in table["label"].to_pylist()]
        pq.write_table(table.drop_columns(["label"]).append_column("label", [names]), file)
    data = load(folder, validation_fraction=0, dataset_streaming=streaming, augmentation="none")
    assert data.class_names == ("owl", "cat", "dog")
    assert pairs(data)["train"] == pairs(data)["test"] == dict(files["test-0.parquet"][1])


def test_names_of_a_saved_dataset_are_matched_by_split(tmp_path):
    train = split(CLASSES, [(i, CLASSES[i % 3]) for i in range(9)])
    test = split(["owl", "cat"], [(20, "owl"), (21, "cat")])
    datasets.DatasetDict(train=train, test=test).with_format("torch").save_to_disk(tmp_path / "set")
    assert pairs(load(str(tmp_path / "set"), validation_fraction=0))["test"] == {20: "owl", 21: "cat"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("names", "said"), cases(__file__, "names_that_yaml_changes.yaml"))
def test_names_that_yaml_reads_as_something_else_are_refused(names, said, streaming, tmp_path):
    rows = [(i, "ab"[i % 2]) for i in range(6)]
    files = {f"{split}-00000-of-00001.parquet": (None, rows) for split in ("train", "test")}
    folder = write(tmp_path / "set", files, ["a", "b"], names)
    with pytest.raises(ValueError, match=said):
        load(folder, dataset_streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_classes_of_one_name_are_refused(streaming, tmp_path):
    rows = [(i, "ab"[i % 2]) for i in range(6)]
    folder = Path(write(tmp_path / "set", {"train-0.parquet": (None, rows)}, ["a", "b"]))
    file = folder / "data" / "train-0.parquet"
    features = {"image": {"_type": "Image"}, "label": {"names": ["crane", "dog", "crane"], "_type": "ClassLabel"}}
    declared = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pq.read_table(file).replace_schema_metadata(declared), file)
    with pytest.raises(ValueError, match=r"column 'label': .*train-0.parquet declares 2 classes called 'crane'"):
        load(str(folder), dataset_streaming=streaming)
