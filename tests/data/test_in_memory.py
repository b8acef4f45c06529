"""Datasets in memory, of tensors or rows of `datasets`: taken as they are, or refused with the item's number."""

from __future__ import annotations

import pytest
import torch

from ham_hf.data import image_data_from
from tests.support.example_images import everything, grays
from tests.support.training import tensors


def test_pixels_and_labels_are_those_given() -> None:
    given = tensors(12)
    data = image_data_from(given, grays(8, 4), validation_fraction=0.0)
    torch.testing.assert_close(everything(data.train), (given.tensors[0] * 255).round() / 255)
    assert torch.equal(data.train.labels, given.tensors[1])
    assert (data.image_size, data.class_names, len(data.test)) == (8, ("0", "1", "2", "3"), 8)


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
        image_data_from(train, tensors(8))
