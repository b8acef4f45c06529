"""Tables with labels beside images, zip archives, splits that README.md declares: no image lost, no label moved."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.example_images import (
    encode,
    in_class_folders,
    load,
    noise,
    open_stored,
    pictures,
    write_files,
    zipped,
)


def table(rows, kind="csv", label="label"):
    if kind == "jsonl":
        return "".join(json.dumps({"file_name": name, label: value}) + "\n" for name, value in rows).encode()
    if kind == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.table({"file_name": [name for name, _ in rows], label: [v for _, v in rows]}), buffer)
        return buffer.getvalue()
    text = io.StringIO()
    csv.writer(text).writerows([("file_name", label), *rows])
    return text.getvalue().encode()


def found(root):
    """Of each split every image, as the bytes of its file, with the name of its class."""
    splits = {}
    for split, rows in open_stored(root).splits.items():
        names = getattr(rows.features["label"], "names", None)
        splits[split] = sorted(
            (Path(row["image"]["path"]).read_bytes(), names[row["label"]] if names else row["label"])
            for row in rows.cast_column("image", datasets.Image(decode=False))
        )
    return splits


def classes_in(*classes, first=0):
    return pictures(*in_class_folders(*classes), first=first)


FOLDERS = ["", "", "train/", "images/train/", "my test set/", "val.d/"]
FILES = ["{}.png", "train_{}.png", "{} test.PNG", "a:b {}.jpg", "val{}.png", "[{}].png"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("archived", [False, True])
def test_every_row_of_random_tables_is_read_with_its_label(kind, archived, tmp_path):
    for number in range(8):
        rng = random.Random(f"{kind} {archived} {number}")
        names = rng.sample(["cat", "NA", "null", "train", "test", "dog 1", "nan", "x,y"], 3)
        splits = rng.choice([["train"], ["train", "test"], ["train", "val", "test"]])
        common = rng.random() < 0.5
        files, expected, rows = {}, {split: [] for split in splits}, []
        for split in splits:
            top = f"{split}/" if len(splits) > 1 else ""
            # Beside a folder at the top that is named like a split, images of no split would be refused.
            inside = FOLDERS if top else [folder for folder in FOLDERS if folder != "train/"]
            own = []
            for image in range(9):
                path = rng.choice(inside) + rng.choice(FILES).format(image)
                files[top + path] = encode(noise(rng.randrange(2**30)))
                own.append((path, names[image % 3]))
                expected[split].append((files[top + path], names[image % 3]))
            rows += [(top + path, name) for path, name in own]
            if not common:
                files[f"{top}metadata.{kind}"] = table(own, kind)
        if common:
            files[f"metadata.{kind}"] = table(rows, kind)
        root = write_files(tmp_path / f"{number}", {"data.zip": zipped(files)} if archived else files)
        called = {"val": "validation"}
        assert found(root) == {called.get(split, split): sorted(own) for split, own in expected.items()}, root


def test_words_in_names_decide_nothing_beside_a_table(tmp_path):
    """Each of these lost all but the images with the word in their path, or the labels of the table."""
    for number, path in enumerate(["train {}.png", "images/train/{}.png", "test_{}.png"]):
        paths = [path.format(image) for image in range(5)] + [f"images/other/{image}.png" for image in range(15)]
        rows = [(path, ("cat", "dog")[image % 2]) for image, path in enumerate(paths)]
        root = write_files(tmp_path / str(number), {**pictures(*paths), "metadata.csv": table(rows)})
        data = load(root, validation_fraction=0)
        assert (data.class_names, len(data.train) + len(data.test)) == (("cat", "dog"), 20)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.csv": table([("a.png", "x"), ("b.png", "y"), ("c.png", "y")])}, r"1 rows .* such as 'c\.png'"),
        ({"metadata.csv": table([("a.png", "x"), ("b.png", "y"), ("./a.png", "y")])}, "listed twice, such as 'a.png"),
        ({"metadata.csv": table([("../b.png", "x")])}, r"'metadata.csv', row 0: '\.\./b\.png' is not a path"),
        ({"metadata.csv": table([("/etc/b.png", "x")])}, "row 0: '/etc/b.png' is not a path"),
        ({"metadata.csv": b"name,label\na.png,x\n"}, "has no column 'file_name' .* only 'name', 'label'"),
        ({"metadata.jsonl": b"{"}, "the table 'metadata.jsonl' cannot be read"),
        ({"metadata.csv": table([("a.png", 1)], label="image")}, "images are called 'image', rename that column"),
        (
            {"metadata.csv": table([("a.png", "x")]), "more/metadata.jsonl": table([("c.png", 1)], kind="jsonl")},
            "'metadata.csv' and 'more/metadata.jsonl' have columns of different types",
        ),
        (
            {"metadata.csv": table([("train/c.png", "x"), ("a.png", "y")]), "train/c.png": encode(noise(7))},
            r"1 images with a row lie outside of the split folders, such as 'a\.png'",
        ),
        (
            {"metadata.csv": table([("val/c.png", "x"), ("dev/d.png", "y")]), **pictures("val/c.png", "dev/d.png")},
            "folders 'dev' and 'val' are both the split 'validation'",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(files, message, tmp_path):
    root = write_files(tmp_path / "set", {**pictures("a.png", "b.png", "more/c.png"), **files})
    with pytest.raises(ValueError, match=message):
        open_stored(root)


def test_tables_declare_classes_alike_or_are_refused(tmp_path):
    def declared(path, names):
        columns = {"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        features, buffer = datasets.Features(columns), io.BytesIO()
        datasets.Dataset.from_dict({"file_name": [path], "label": [0]}, features=features).to_parquet(buffer)
        return buffer.getvalue()

    files = pictures("train/a.png", "test/a.png")
    files["train/metadata.parquet"] = declared("a.png", ["cat", "dog"])
    files["test/metadata.parquet"] = declared("a.png", ["dog", "cat"])
    with pytest.raises(ValueError, match=r"column 'label': .*\['dog', 'cat'\].*\['cat', 'dog'\]"):
        open_stored(write_files(tmp_path / "set", files))
    files["test/metadata.parquet"] = files["train/metadata.parquet"]
    splits = open_stored(write_files(tmp_path / "set", files)).splits
    assert splits["test"].features["label"].names == ["cat", "dog"]


WRITTEN = [("007", "010"), ("true", "false"), ("7", "10"), ("1", "x"), ("2020-01-02", "2020-01-03")]


@pytest.mark.parametrize("written", WRITTEN)
def test_a_class_is_called_what_the_table_says(written, tmp_path):
    rows = [(f"{number}.png", written[number % 2]) for number in range(10)]
    root = write_files(tmp_path / "set", {**pictures(*(name for name, _ in rows)), "metadata.csv": table(rows)})
    assert set(load(root, validation_fraction=0).class_names) == set(written)


@pytest.mark.parametrize(
    ("trained", "tested", "names"),
    [
        ((" 7", "8"), ("8", "7"), ["8", "7"]),
        (("07", "10"), ("10", "10"), ["10", "10"]),
        (("1", "x"), ("1", "1"), ["1", "1"]),
        (("true", "false"), ("True", "false"), ["True", "False"]),
    ],
)
def test_a_class_has_one_name_in_all_tables(trained, tested, names, tmp_path):
    files = pictures(*(f"{split}/{number}.png" for split in ("train", "test") for number in range(8)))
    for split, written in (("train", trained), ("test", tested)):
        files[f"{split}/metadata.csv"] = table([(f"{number}.png", written[number % 2]) for number in range(8)])
    data = load(write_files(tmp_path / "set", files), validation_fraction=0)
    assert [data.class_names[label] for label in data.test.labels] == names * 4


def test_images_without_a_row_are_counted_aloud(tmp_path, caplog):
    rows = [(f"{number}.png", "xy"[number % 2]) for number in range(10)]
    images = pictures(*(name for name, _ in rows), "more/1.png")
    root = write_files(tmp_path / "set", {**images, "metadata.csv": table(rows)})
    sentence = "1 image files have no row in 'metadata.csv' and are not read, such as 'more/1.png'"
    assert sentence in load(root, validation_fraction=0).notes
    assert sentence in caplog.text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"photos.zip": classes_in("cat", "test", "train")}, {"train": 12}),
        ({"photos.zip": {f"all/{path}": image for path, image in classes_in("cat", "dog").items()}}, {"train": 8}),
        ({"train.zip": classes_in("cat", "dog"), "test.zip": classes_in("cat", first=50)}, {"train": 8, "test": 4}),
        (
            {"x.zip": {f"{split}/{path}": image for split in ("train", "val") for path, image in
                       classes_in("cat", "dog", first=ord(split[0])).items()}},
            {"train": 8, "validation": 8},
        ),
        ({f"{name}.zip": pictures("1.png", f"{name}.PNG", "a test.png") for name in ("cat", "dog")}, {"train": 6}),
    ],
)  # fmt: skip
def test_an_archive_is_a_folder_of_its_name(files, expected, tmp_path):
    root = write_files(tmp_path / "set", {name: zipped(content) for name, content in files.items()})
    splits = found(root)
    assert {split: len(rows) for split, rows in splits.items()} == expected
    flat = {f"{name[:-4]}/{path}": image for name, content in files.items() for path, image in content.items()}
    write_files(tmp_path / "set", pictures("assets/banner.png") if "test.zip" in files else {})
    assert found(root) == splits, "a picture beside the archives"
    # The class is the folder that an image is in.
    everything = sorted(row for rows in splits.values() for row in rows)
    assert everything == sorted((image, path.split("/")[-2]) for path, image in flat.items())


def test_pictures_that_readme_leaves_out_hide_no_archive(tmp_path):
    files = {"data.zip": zipped(classes_in("cat", "dog")), "README.md": readme(train="data.zip")}
    root = write_files(tmp_path / "set", {**files, **pictures("assets/1.png", "assets/2.png")})
    assert len(found(root)["train"]) == 8


def test_a_new_archive_under_an_old_name_is_read(tmp_path):
    for number in range(2):
        files = classes_in("cat", "dog", first=50 * number)
        root = write_files(tmp_path / "set", {"photos.zip": zipped(files)})
        os.utime(tmp_path / "set" / "photos.zip", ns=(number, number))
        assert found(root)["train"] == sorted((image, path.split("/")[0]) for path, image in files.items())


def test_archives_that_do_not_fit_are_refused(tmp_path):
    one, other = zipped(classes_in("cat", "dog")), zipped(classes_in("cat", "dog", first=50))
    with pytest.raises(ValueError, match=r"the folders 'a/cat' and 'latest test/cat' have one name"):
        open_stored(write_files(tmp_path / "two", {"a.zip": one, "latest test.zip": other}))
    with pytest.raises(ValueError, match=r"the archive 'a.zip' cannot be unpacked"):
        open_stored(write_files(tmp_path / "cut", {"a.zip": one[:-80], "train.zip": other}))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("cat/1.png", encode(noise(1)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            opened.writestr("cat/1.png", encode(noise(2)))
    with pytest.raises(ValueError, match=r"1 files are listed twice, such as 'a\.zip/cat/1\.png'"):
        open_stored(write_files(tmp_path / "twice", {"a.zip": buffer.getvalue()}))


def readme(**patterns):
    lines = [f"  - split: {split}\n    path: '{pattern}'\n" for split, pattern in patterns.items()]
    return ("---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(lines) + "---\n").encode()


def below(folder, files):
    return {f"{folder}/{path}": content for path, content in files.items()}


def test_readme_decides_the_splits_of_image_files(tmp_path, caplog):
    files = {**below("a", classes_in("cat", "dog", "train")), **below("b", classes_in("dog", first=50))}
    files |= below("forgotten", classes_in("owl"))
    splits = found(write_files(tmp_path / "set", {**files, "README.md": readme(train="a/**", test="b/**")}))
    for split, folder in (("train", "a/"), ("test", "b/")):
        assert splits[split] == sorted((f, p.split("/")[1]) for p, f in files.items() if p.startswith(folder))
    assert "4 image files are in no data_files of README.md and are not read, such as 'forgotten/owl/0." in caplog.text
    tables = {f"{top}/metadata.csv": table([("x/train.png", "dog"), ("0.png", "cat")]) for top in ("a", "b")}
    files = {**tables, **pictures(*(f"{top}/{name}.png" for top in ("a", "b") for name in ("0", "x/train")))}
    splits = found(write_files(tmp_path / "tables", {**files, "README.md": readme(train="a/**", test="b/**")}))
    for split, folder in (("train", "a"), ("test", "b")):
        rows = [(files[f"{folder}/0.png"], "cat"), (files[f"{folder}/x/train.png"], "dog")]
        assert splits[split] == sorted(rows)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (pictures("train/1.png", "test/1.png"), "1 of 1 images lie beside the class folders, in "),
        (
            {**below("train", classes_in("cat", "dog")), **pictures("test/1.png", "train/cat/old/1.png")},
            "class folders are not equally deep|lie beside",
        ),
    ],
)
def test_split_folders_are_no_classes(files, message, tmp_path):
    """``datasets`` called every image of the split test a ``test``."""
    with pytest.raises(ValueError, match=message):
        open_stored(write_files(tmp_path / "set", {**files, "README.md": readme(train="train/**", test="test/**")}))
