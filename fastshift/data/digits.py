"""scikit-learn's handwritten digits (real 8x8 images that ship in a package) -> arrays.

Source: E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI (test part).
"""

from __future__ import annotations

import numpy as np

from fastshift.data.splits import stratified
from fastshift.errors import missing_extra

__all__ = ["read_digits"]

TEST_FRACTION = 0.2


def read_digits() -> dict[str, np.ndarray]:
    """Load the 1,797 images, with a fixed stratified fifth of them set aside as the test part.

    Returns:
        `x_train`, `x_test`: `[n, 8, 8, 1]` uint8 (values 0..16 scaled to 0..255); `y_train`,
        `y_test`: `[n]` int64.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("sklearn", "digits") from error
    digits = load_digits()
    images = (digits.images.astype(np.int64) * 255 // 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    held = stratified(labels, int(TEST_FRACTION * len(labels)), np.random.default_rng(0))
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[held] = True
    return {
        "x_train": images[~is_test],
        "y_train": labels[~is_test],
        "x_test": images[is_test],
        "y_test": labels[is_test],
    }
