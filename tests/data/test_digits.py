"""The digits of the package are those of scikit-learn, which the package itself does without."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from ham_hf.data.sources import DIGITS_FILE, open_source, read_digits


def test_the_data_set_holds_them_as_gray_images_in_that_order():
    scans, (images, labels) = load_digits(), read_digits()
    assert (images.dtype, labels.dtype) == (np.uint8, scans.target.dtype)
    rows = open_source("digits", None, None).splits["train"]
    assert rows["label"][:] == scans.target.tolist()
    stretched = np.round(scans.images * (255 / 16))
    assert all(np.array_equal(image, expected) for image, expected in zip(rows["image"], stretched, strict=True))
    assert rows[0]["image"].mode == "L"


def test_the_file_is_small_and_has_its_licence_beside_it():
    assert DIGITS_FILE.stat().st_size < 60_000
    text = DIGITS_FILE.with_name("digits.LICENSE.md").read_text(encoding="utf-8")
    for part in ("Alpaydin", "Kaynak", "https://doi.org/10.24432/C50P49", "CC-BY-4.0", "licenses/by/4.0", "changed"):
        assert part in text
