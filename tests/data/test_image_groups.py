"""Groups of images by another column than the label: which column, which groups, and which image is in which."""

from __future__ import annotations

import datasets
import pytest
import torch

from ham_hf.data.image_groups import MAX_GROUPS, ImageGroups, make_groups
from tests.support.example_images import dataset, gray, load_to_evaluate, write_parquet

LABELED = {"label_column": "label"}
LIGHT = datasets.ClassLabel(names=["dark", "dusk", "noon"])
COLUMNS = {
    "site": (["b", "a", "b", None, "a", "b"], None, ("a", "b", "(missing)"), [1, 0, 1, 2, 0, 1]),
    "light": ([2, 0, 0, 2, -1, 2], LIGHT, ("dark", "dusk", "noon", "(missing)"), [2, 0, 0, 2, 3, 2]),
    "year": ([2010, 9, -1, 9, 2010, 9], datasets.Value("int32"), ("-1", "9", "2010"), [2, 1, 0, 1, 2, 1]),
    "flash": ([True, False, True, True, None, True], None, ("False", "True", "(missing)"), [1, 0, 1, 1, 2, 1]),
    "full": (["x", "y", "x", "y", "x", "y"], None, ("x", "y"), [0, 1, 0, 1, 0, 1]),
}
COMPLETE = ("year", "full")


def folder_with_columns(path, *, damaged=None):
    images = [b"no image" if number == damaged else gray(number) for number in range(6)]
    split = dataset(images, [0, 1, 0, 1, 0, 1])
    for name, (values, feature, _, _) in COLUMNS.items():
        split = split.add_column(name, values) if feature is None else split.add_column(name, values, feature=feature)
    return write_parquet(path, test=split)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", COLUMNS)
def test_groups_of_each_kind_of_column(column, streaming, tmp_path, caplog):
    folder = folder_with_columns(tmp_path / "set")
    data = load_to_evaluate(folder, group_column=column, **LABELED, dataset_streaming=streaming)
    _, _, names, groups = COLUMNS[column]
    assert (data.groups.column, data.groups.names, data.groups.of_image.tolist()) == (column, names, groups)
    assert data.groups.num_missing == (column not in COMPLETE)
    told = "1 of 6 images have no value; they are a group of their own, (missing)" in caplog.text
    assert told == (column not in COMPLETE)


@pytest.mark.parametrize("streaming", [False, True])
def test_groups_follow_the_images_that_are_left(streaming, tmp_path):
    folder, options = folder_with_columns(tmp_path / "set", damaged=1), {**LABELED, "dataset_streaming": streaming}
    whole = load_to_evaluate(folder, group_column="site", **options, skip_corrupt=True)
    assert whole.num_skipped == 1
    assert whole.groups.of_image.tolist() == [1, 1, 2, 0, 1]
    assert len(whole.test) == 5
    more = folder_with_columns(tmp_path / "more")
    limited = load_to_evaluate(more, group_column="light", **options, limit_test_examples=2)
    assert len(limited.groups.of_image) == len(limited.test) == 2
    assert load_to_evaluate(folder, **LABELED, skip_corrupt=True).groups is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("sight", r"column sight: the dataset has no such column; did you mean 'light'\? There are 'image', 'label'"),
        ("image", "--group_column image: expected one class label, integer, string or boolean per image"),
    ],
)
def test_columns_that_are_no_groups(column, message, streaming, tmp_path):
    folder = folder_with_columns(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        load_to_evaluate(folder, group_column=column, **LABELED, dataset_streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_groups_are_matched_by_name_where_files_declare_other_orders(streaming, tmp_path):
    (tmp_path / "data").mkdir()
    for number, names in enumerate((["dark", "noon"], ["noon", "dark"])):
        light = datasets.ClassLabel(names=names)
        split = dataset([gray(number), gray(10 + number)], [0, 1]).add_column("light", [0, 1], feature=light)
        split.to_parquet(tmp_path / "data" / f"test-{number}.parquet")
    groups = load_to_evaluate(str(tmp_path), group_column="light", **LABELED, dataset_streaming=streaming).groups
    assert groups.values() == ["dark", "noon", "noon", "dark"]


def test_too_many_values_are_no_groups():
    assert len(make_groups("c", list(range(MAX_GROUPS))).names) == MAX_GROUPS
    with pytest.raises(ValueError, match=f"{MAX_GROUPS + 1} different values, at most {MAX_GROUPS} can be groups"):
        make_groups("c", list(range(MAX_GROUPS + 1)))


def test_missing_values_have_a_name_that_no_group_has():
    groups = make_groups("c", ["(missing)", None, "((missing))"])
    assert groups.names == ("((missing))", "(missing)", "(((missing)))")
    assert groups.values() == ["(missing)", None, "((missing))"]
    kept = groups.only(torch.tensor([True, False, True]))
    assert isinstance(kept, ImageGroups)
    assert (kept.names, kept.num_missing) == (("((missing))", "(missing)"), 0)
