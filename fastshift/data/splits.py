"""Labels -> positions: seeded stratified selections, and checks of the labels themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastshift.errors import DataError

__all__ = ["check_classes", "check_labels", "keep_classes", "stratified"]


def check_labels(labels: np.ndarray, num_images: int, name: str) -> np.ndarray:
    """Return labels as int64 after checking dtype, shape and sign.

    Args:
        labels: one integer per image, `[n]`.
        num_images: `n` of the images they belong to.
        name: what the message calls them.

    Raises:
        DataError: they are not non-negative integers of shape `[num_images]`.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name}: dtype {labels.dtype}, expected integer labels")
    if labels.ndim != 1:
        raise DataError(f"{name}: shape {list(labels.shape)}, expected [n]")
    if len(labels) != num_images:
        raise DataError(f"{name}: {len(labels)} labels for {num_images} images, expected as many")
    if len(labels) and labels.min() < 0:
        raise DataError(f"{name}: label {labels.min()}, expected labels of 0 and more")
    return labels.astype(np.int64)


def check_classes(train: np.ndarray, test: np.ndarray | None) -> int:
    """Return the number of classes after checking that a search can use these labels.

    Args:
        train: training labels, `[n]` int64.
        test: test labels, or None.

    Raises:
        DataError: no images, one class only, a class without an image or with a single one, or a
            test label that no training image has.
    """
    if not len(train):
        raise DataError("training set: 0 images, expected at least two of each class")
    present = np.unique(train)
    if len(present) < 2:
        raise DataError(
            f"training labels: all {len(train)} are {present[0]}, expected at least two classes"
        )
    if present[-1] >= len(present):
        missing = np.setdiff1d(np.arange(len(present)), present)[0]
        raise DataError(
            f"training labels: highest {train.max()} but none is {missing}, "
            f"expected every class from 0 to the highest to have images"
        )
    counts = np.bincount(train)
    if counts.min() < 2:
        raise DataError(
            f"training labels: class {counts.argmin()} has 1 image, expected at least 2 "
            f"(one is held out for scoring)"
        )
    if test is not None and not len(test):
        raise DataError("test set: 0 images, expected at least one")
    if test is not None and test.max() >= len(counts):
        raise DataError(
            f"test labels: highest {test.max()}, expected at most {len(counts) - 1} as in training"
        )
    return len(counts)


def keep_classes(labels: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Select the images of some classes and number those classes anew, in the order given.

    Returns:
        Positions `[m]` and their new labels `[m]`, both int64.
    """
    match = labels[:, None] == np.asarray(classes, dtype=np.int64)
    positions = np.flatnonzero(match.any(axis=1))
    return positions, match[positions].argmax(axis=1).astype(np.int64)


def stratified(
    labels: np.ndarray, size: int, rng: np.random.Generator, *, at_least: int = 0, spare: int = 0
) -> np.ndarray:
    """Draw positions so that each class is represented in proportion (largest remainders).

    Args:
        labels: `[n]` int64, every class from 0 present.
        size: positions to draw.
        rng: the source of randomness.
        at_least: positions of each class that must be drawn.
        spare: positions of each class that must not be drawn.

    Returns:
        `[size]` int64 positions in random order.

    Raises:
        ValueError: no selection satisfies `at_least` and `spare`.
    """
    counts = np.bincount(labels)
    highest = counts - spare
    lowest = np.minimum(at_least, counts)
    if not lowest.sum() <= size <= highest.sum() or (lowest > highest).any():
        raise ValueError(f"size={size}: expected {lowest.sum()} to {highest.sum()}")
    wanted = size * counts / len(labels)
    quota = np.clip(np.floor(wanted).astype(np.int64), lowest, highest)
    while quota.sum() < size:
        quota[np.where(quota < highest, wanted - quota, -np.inf).argmax()] += 1
    while quota.sum() > size:
        quota[np.where(quota > lowest, wanted - quota, np.inf).argmin()] -= 1
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, random inside a class
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rng.permutation(order[rank < np.repeat(quota, counts)])
