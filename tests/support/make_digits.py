"""Write the digits that the package ships, from the copy that scikit-learn has of the UCI dataset.

python -m tests.support.make_digits
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from ham_hf.data.sources import DIGITS_FILE


def main() -> None:
    """Write images and labels as bytes, in scikit-learn's order; running it again changes no byte of the file."""
    scans = load_digits()
    images, labels = scans.images.astype(np.uint8), scans.target.astype(np.uint8)
    assert np.array_equal(images, scans.images)
    assert np.array_equal(labels, scans.target)
    np.savez_compressed(DIGITS_FILE, images=images, labels=labels)


if __name__ == "__main__":
    main()
