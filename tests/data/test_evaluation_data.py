"""Evaluation data of a finished model: a split as a whole, unless the model was trained on it."""

from __future__ import annotations

import shutil

import datasets
import pytest

from ham_hf.data.evaluation_data import TrainedOn, choose_evaluation_split
from tests.support.example_images import dataset, gray, gray_values, grays, load, load_to_evaluate, write_parquet
from tests.support.tables import cases


@pytest.mark.parametrize(("names", "asked", "expected"), cases(__file__, "evaluation_splits.yaml"))
def test_split_to_evaluate_on(names, asked, expected):
    assert list(choose_evaluation_split(names, asked.get("train_split"), asked.get("test_split"))) == expected


@pytest.mark.parametrize(
    ("names", "test_split", "message"),
    [
        (["one", "two"], None, "none of the splits 'one', 'two' is for testing by its name: .* --test_split"),
        (["test"], "tset", "--test_split tset: .* did you mean 'test'"),
        (["validation", "test"], "tset", "--test_split tset"),
    ],
)
def test_splits_that_cannot_be_chosen(names, test_split, message):
    with pytest.raises(ValueError, match=message):
        choose_evaluation_split(names, None, test_split)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_only_or_named_split_is_taken_whole(streaming, tmp_path):
    only = write_parquet(tmp_path / "only", test=grays(20))
    data = load_to_evaluate(only, dataset_streaming=streaming)
    assert (gray_values(data.test), data.test_split_origin) == (list(range(20)), "test")
    both = write_parquet(tmp_path / "both", validation=grays(6), test=grays(20, first=100))
    assert gray_values(load_to_evaluate(both, dataset_streaming=streaming).test) == list(range(100, 120))
    named = load_to_evaluate(both, test_split="validation", dataset_streaming=streaming)
    assert (gray_values(named.test), named.test_split_origin) == (list(range(6)), "validation")
    limited = load_to_evaluate(both, limit_test_examples=4, dataset_streaming=streaming)
    assert len(limited.test) == 4
    with_train = write_parquet(tmp_path / "train", train=grays(9, 3), test=grays(6, first=50))
    data = load_to_evaluate(with_train, dataset_streaming=streaming)
    assert (gray_values(data.test), data.class_names) == (list(range(50, 56)), ("c0", "c1", "c2"))


def record_of(folder, **options):
    data = load(folder, **options)
    return TrainedOn(record=data.provenance, class_names=data.class_names)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_renamed_copy_of_the_training_data_gives_the_held_out_part(streaming, tmp_path, caplog):
    """Also where the split has another name and its classes another order."""
    names = ["c0", "c1", "c2"]
    labels = [index * 7 % 3 if index % 4 else 0 for index in range(41)]
    train = dataset([gray(i) for i in range(41)], labels, label_feature=datasets.ClassLabel(names=names))
    folder = write_parquet(tmp_path / "set", train=train)
    trained = record_of(folder, test_fraction=0.3)
    expected = gray_values(load(folder, test_fraction=0.3).test)
    assert gray_values(load_to_evaluate(folder, trained, dataset_streaming=streaming).test) == expected
    moved = datasets.ClassLabel(names=["c2", "c0", "c1"])
    again = [moved.str2int(names[label]) for label in labels]
    copy = dataset([gray(i) for i in range(41)], again, label_feature=moved)
    data = load_to_evaluate(write_parquet(tmp_path / "copy", test=copy), trained, dataset_streaming=streaming)
    assert gray_values(data.test) == expected
    assert data.test_split_origin == "held out of test (30 %, stratified, seed 0)"
    assert "is set, which the model was trained on" in caplog.text
    with pytest.raises(ValueError, match=r"--test_fraction 0.5 would test on images .* with --test_fraction 0.3"):
        load_to_evaluate(folder, trained, test_fraction=0.5, dataset_streaming=streaming)


def test_training_images_of_a_model_with_a_test_split_are_refused(tmp_path):
    folder = write_parquet(tmp_path / "set", train=grays(40), test=grays(8, first=100))
    trained = record_of(folder)
    assert gray_values(load_to_evaluate(folder, trained).test) == list(range(100, 108))
    with pytest.raises(ValueError, match=r"split 'train' holds the 40 images of set that the model was trained on"):
        load_to_evaluate(folder, trained, test_split="train")
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"it was tested on split 'test': choose that or another with --test_split"):
        load_to_evaluate(str(tmp_path / "copy"), trained, test_split="train")
    assert len(load_to_evaluate(folder, TrainedOn(), test_split="train").test) == 40


def test_other_images_with_the_same_labels_are_no_copy_if_labels_only_count_classes(tmp_path):
    def by_class(first):
        return dataset([gray(first + index) for index in range(20)], [0] * 10 + [1] * 10)

    trained = record_of(write_parquet(tmp_path / "set", train=by_class(0)))
    other = write_parquet(tmp_path / "other", test=by_class(100))
    assert len(load_to_evaluate(other, trained).test) == 20
    same = write_parquet(tmp_path / "same", test=by_class(0))
    assert len(load_to_evaluate(same, trained).test) == 4


def test_models_of_earlier_versions_are_known_by_the_name_of_their_data(tmp_path):
    folder = write_parquet(tmp_path / "set", train=grays(40))
    old = TrainedOn(dataset="set", test_fraction=0.3)
    assert len(load_to_evaluate(folder, old).test) == 12
    assert len(load_to_evaluate(folder, TrainedOn(dataset="another", test_fraction=0.3)).test) == 40
    streamed = load(write_parquet(tmp_path / "far", train=grays(40), test=grays(6)), dataset_streaming=True)
    with pytest.raises(ValueError, match="that the model was trained on"):
        load_to_evaluate(str(tmp_path / "far"), TrainedOn(record=streamed.provenance), test_split="train")
