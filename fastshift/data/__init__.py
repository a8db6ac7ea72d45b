"""Data sets: a spec or arrays -> `Data`, the batches a run trains, calibrates and scores on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastshift.data.arrays import ArraySource, read_npz
from fastshift.data.batches import FixedBatches, TrainBatches
from fastshift.data.dataset import Data, Options, assemble
from fastshift.data.digits import read_digits
from fastshift.errors import DataError

__all__ = ["Data", "FixedBatches", "TrainBatches", "from_arrays", "load"]

SPECS = ("digits", "cifar10:DIR", "cifar100:DIR", "npz:FILE", "folder:DIR")
MEMORY_BYTES = 4 * 2**30


def load(
    spec: str,
    *,
    batch_size: int = 128,
    seed: int = 0,
    validation_size: int | float | None = None,
    calibration_batches: int | None = None,
    calibration_batch_size: int | None = None,
    validation_batch_size: int = 500,
    image_size: int | None = None,
    augment: bool = True,
    flip: bool | None = None,
    classes: Sequence[int] | None = None,
    limit: int | None = None,
    max_memory_bytes: int = MEMORY_BYTES,
) -> Data:
    """Load a data set and cut it into training part, scoring set, calibration batches and test set.

    Args:
        spec: `digits`, `cifar10:DIR`, `cifar100:DIR` (torchvision's layout; downloaded where
            missing), `npz:FILE` (`x_train y_train x_test y_test`, uint8 NHWC and integers) or
            `folder:DIR` (`train/` and `val/` of class folders).
        batch_size: images in a training batch.
        seed: fixes what is held out, the order of the training stream and its augmentation.
        validation_size: images held out of the training set for scoring, a count or a fraction
            below 1; if None a tenth, at most 5,000, and of small sets up to a quarter.
        calibration_batches: number of calibration batches; if None 8, or as many as there are.
        calibration_batch_size: images in one; if None 128, or the whole of a smaller part.
        validation_batch_size: images in a batch of the scoring and the test set.
        image_size: side to bring the images to, in pixels; as they are if None.
        augment: whether training batches are augmented (random crop padded by an eighth, flip).
        flip: whether augmentation flips; if None all data sets but `digits`.
        classes: keep the images with these labels only, relabelled from 0 in this order.
        limit: keep this many training images only, stratified.
        max_memory_bytes: the size up to which decoded images are held in memory.

    Returns:
        The data set; images of `train` are normalised by the mean and deviation of that part.

    Raises:
        DataError: the spec, a file, a label or an option cannot be used.
        MissingExtraError: an optional package is needed and not installed.

    Example:
        >>> data = load("digits", batch_size=64)
        >>> images, labels = data.train.batch(0)
        >>> tuple(images.shape), data.num_classes
        ((64, 1, 8, 8), 10)
    """
    options = Options(
        batch_size=batch_size,
        seed=seed,
        validation_size=validation_size,
        calibration_batches=calibration_batches,
        calibration_batch_size=calibration_batch_size,
        validation_batch_size=validation_batch_size,
        image_size=image_size,
        augment=augment,
        flip=flip,
        classes=classes,
        limit=limit,
        max_memory_bytes=max_memory_bytes,
    )
    kind, _, place = spec.partition(":")
    if spec == "digits":
        return _from_members(read_digits(), options, spec=spec, flip=False)
    if kind == "npz" and place:
        return _from_members(read_npz(place), options, spec=spec)
    if kind == "dali":
        raise DataError(f"data {spec!r}: not available in this version, expected folder:DIR")
    raise DataError(f"data {spec!r}: not a known spec, expected one of {', '.join(SPECS)}")


def from_arrays(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    *,
    batch_size: int = 128,
    seed: int = 0,
    validation_size: int | float | None = None,
    calibration_batches: int | None = None,
    calibration_batch_size: int | None = None,
    validation_batch_size: int = 500,
    image_size: int | None = None,
    augment: bool = True,
    flip: bool | None = None,
    classes: Sequence[int] | None = None,
    limit: int | None = None,
    max_memory_bytes: int = MEMORY_BYTES,
    class_names: Sequence[str] | None = None,
) -> Data:
    """Cut arrays into training part, scoring set, calibration batches and test set.

    Args:
        x_train: training images, `[n, H, W, C]` uint8, C of 1 or 3.
        y_train: their labels, `[n]` of any integer type, every class from 0 present.
        x_test: test images, or None.
        y_test: their labels; given exactly where `x_test` is.
        batch_size: as `load`, like all that follow.
        seed: see `load`.
        validation_size: see `load`.
        calibration_batches: see `load`.
        calibration_batch_size: see `load`.
        validation_batch_size: see `load`.
        image_size: see `load`.
        augment: see `load`.
        flip: see `load`.
        classes: see `load`.
        limit: see `load`.
        max_memory_bytes: see `load`; bounds only what is kept besides the arrays.
        class_names: a name per label.

    Returns:
        The data set.

    Raises:
        DataError: an array or an option cannot be used.
    """
    options = Options(
        batch_size=batch_size,
        seed=seed,
        validation_size=validation_size,
        calibration_batches=calibration_batches,
        calibration_batch_size=calibration_batch_size,
        validation_batch_size=validation_batch_size,
        image_size=image_size,
        augment=augment,
        flip=flip,
        classes=classes,
        limit=limit,
        max_memory_bytes=max_memory_bytes,
    )
    if (x_test is None) != (y_test is None):
        given = "y_test" if x_test is None else "x_test"
        raise DataError(f"{given} alone is given, expected x_test and y_test or neither")
    members = {"x_train": x_train, "y_train": y_train}
    if x_test is not None:
        members |= {"x_test": x_test, "y_test": y_test}
    return _from_members(members, options, spec="arrays", class_names=class_names)


def _from_members(
    members: dict[str, np.ndarray],
    options: Options,
    *,
    spec: str,
    flip: bool = True,
    class_names: Sequence[str] | None = None,
) -> Data:
    """Build the data set from `x_train`, `y_train` and, where present, `x_test`, `y_test`."""
    sources = {
        name: ArraySource(members[f"x_{name}"], members[f"y_{name}"], name, options.image_size)
        for name in ("train", "test")
        if f"x_{name}" in members
    }
    return assemble(
        sources["train"],
        sources.get("test"),
        options,
        spec=spec,
        class_names=class_names,
        flip=flip,
    )
