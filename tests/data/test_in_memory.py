"""Datasets in memory, of tensors or rows of `datasets`: taken as they are, or refused with the item's number."""

from __future__ import annotations

import datasets
import pytest
import torch

from ham_hf.data import image_data_from
from tests.support.example_images import dataset, everything, gray, grays
from tests.support.exports import preprocessing
from tests.support.training import tensors


def test_pixels_and_labels_are_those_given() -> None:
    given = tensors(12)
    data = image_data_from(given, grays(8, 4), inputs=preprocessing(), validation_fraction=0.0)
    torch.testing.assert_close(everything(data.train), (given.tensors[0] * 255).round() / 255)
    assert torch.equal(data.train.labels, given.tensors[1])
    assert (data.image_size, data.class_names, len(data.test)) == (8, ("0", "1", "2", "3"), 8)


def test_labels_of_test_go_by_name_and_the_model_says_how_images_are_cut() -> None:
    def animals(names: list[str], rows: list[str]) -> datasets.Dataset:
        feature = datasets.ClassLabel(names=names)
        return dataset([gray(40 * len(name), (16, 8)) for name in rows], rows, label_feature=feature)

    train, rows = animals(["cat", "horse", "rat"], ["cat", "horse", "rat"]), ["rat", "cat"]
    inputs = preprocessing(8, crop_pct=0.9, crop_mode="squash")
    data = image_data_from(train, animals(["rat", "cat", "ox"], rows), inputs=inputs, validation_fraction=0.0)
    assert [data.class_names[label] for label in data.test.labels] == rows
    assert (data.crop_mode, data.crop_pct) == ("squash", 0.9)
    with pytest.raises(
        ValueError, match=r"\['cat', 'horse', 'rat'\], and test \['rat', 'ox'\]: \['ox'\] is in test only"
    ):
        image_data_from(train, animals(["rat", "ox"], ["ox"]), inputs=inputs)


def test_names_given_in_the_call_are_those_of_a_train_that_has_others() -> None:
    class Named(list):
        classes: object = None

    train, test = Named((torch.zeros(3, 8, 8), label % 2) for label in range(8)), Named([(torch.zeros(3, 8, 8), 2)])
    train.classes, test.classes = ["cat", "dog"], ["bird", "cat", "dog"]
    assert image_data_from(train, test, inputs=preprocessing(), validation_fraction=0.0).test.labels.tolist() == [1]
    given = {"class_names": ["cat", "dog"], "inputs": preprocessing(), "validation_fraction": 0.0}
    train.classes = ["n01", "n02"]
    assert image_data_from(train, test, **given).test.labels.tolist() == [1]
    train.classes = 2
    test[0] = (torch.zeros(3, 8, 8), 1)
    assert image_data_from(train, test, **given).test.labels.tolist() == [1]


def _with(image: object, label: object = 0) -> list:
    return [(image, label)] * 8


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (_with(torch.zeros(3, 8, 8) - 1), r"train\[0\]: pixels must lie in \[0, 1\]"),
        (_with(torch.zeros(1, 8, 8)), r"train\[0\]: expected a PIL image or a tensor \(3, H, W\)"),
        (_with(torch.zeros(3, 8, 8), 0.5), r"train\[0\]: expected a class number"),
        (_with(torch.zeros(3, 8, 8), -1), r"expected a class number of at least 0 as label, got -1"),
        ([*_with(torch.zeros(3, 8, 8)), (torch.zeros(3, 9, 9), 0)], r"train\[8\]: a tensor of 9x9 pixels"),
        ([{"image": 1}], r"train\[0\]: expected \(image, label\), got dict"),
        (iter([]), "expected a dataset with a length"),
    ],
)
def test_data_are_refused_with_a_reason(train: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_data_from(train, tensors(8), inputs=preprocessing())
