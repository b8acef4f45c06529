"""The handwritten digits that come with the package, so that the first run needs neither network nor download.

They are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998; CC BY 4.0): see ``digits.LICENSE.md`` beside the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

FILE = Path(__file__).with_name("digits.npz")
LARGEST = 16
"""The largest value of a pixel: each counts the black dots of a block of 4 x 4."""


def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (1797, 8, 8) with values 0..16, and labels (1797,) 0..9; the order is that of scikit-learn's copy."""
    with np.load(FILE) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)
