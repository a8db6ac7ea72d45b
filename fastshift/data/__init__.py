"""Data sets: a spec or arrays -> `Data`, the batches a run trains, calibrates and scores on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastshift.data.arrays import ArraySource, read_npz
from fastshift.data.batches import FixedBatches, TrainBatches
from fastshift.data.dali import read_dali
from fastshift.data.dataset import Data, assemble
from fastshift.data.digits import read_digits
from fastshift.data.image_folder import read_folder
from fastshift.data.options import Options
from fastshift.data.torchvision import read_cifar
from fastshift.errors import DataError

__all__ = ["Data", "FixedBatches", "Options", "TrainBatches", "from_arrays", "load"]

SPECS = ("digits", "cifar10:DIR", "cifar100:DIR", "npz:FILE", "folder:DIR", "dali:DIR")


def load(spec: str, **options: Any) -> Data:
    """Load a data set and cut it into training part, scoring set, calibration batches and test set.

    Args:
        spec: `digits`, `cifar10:DIR`, `cifar100:DIR` (torchvision's layout; downloaded where
            missing), `npz:FILE` (`x_train y_train x_test y_test`, uint8 NHWC and integers),
            `folder:DIR` (`train/` and `val/` of class folders) or `dali:DIR` (the same, decoded and
            augmented by NVIDIA DALI).
        **options: the fields of `Options`: `batch_size`, `seed`, `validation_size`, ...

    Returns:
        The data set; images are normalised by mean and deviation of its training part.

    Raises:
        DataError: the spec, a file, a label or an option cannot be used.
        MissingExtraError: an optional package is needed and not installed.

    Example:
        >>> data = load("digits", batch_size=64)
        >>> images, labels = data.train.batch(0)
        >>> tuple(images.shape), data.num_classes
        ((64, 1, 8, 8), 10)
    """
    chosen = Options(**options)
    kind, _, place = spec.partition(":")
    if kind == "dali" and place:
        train, test, class_names = read_dali(place, chosen)
        return assemble(train, test, chosen, spec=spec, class_names=class_names)
    if spec == "digits":
        return _from_members(read_digits(), chosen, spec=spec, flip=False)
    if kind == "npz" and place:
        return _from_members(read_npz(place), chosen, spec=spec)
    if kind in ("cifar10", "cifar100") and place:
        members, class_names = read_cifar(kind, place)
        return _from_members(members, chosen, spec=spec, class_names=class_names)
    if kind == "folder" and place:
        train, test, class_names = read_folder(place, chosen.image_size)
        return assemble(train, test, chosen, spec=spec, class_names=class_names)
    raise DataError(f"data {spec!r}: not a known spec, expected one of {', '.join(SPECS)}")


def from_arrays(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    *,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Data:
    """Cut arrays into training part, scoring set, calibration batches and test set.

    Args:
        x_train: training images, `[n, H, W, C]` uint8, C of 1 or 3.
        y_train: their labels, `[n]` of any integer type, every class from 0 present.
        x_test: test images, or None.
        y_test: their labels; given exactly where `x_test` is.
        class_names: a name per label.
        **options: the fields of `Options`: `batch_size`, `seed`, `validation_size`, ...

    Returns:
        The data set.

    Raises:
        DataError: an array or an option cannot be used.
    """
    chosen = Options(**options)
    if (x_test is None) != (y_test is None):
        given = "y_test" if x_test is None else "x_test"
        raise DataError(f"{given}: given alone, expected x_test and y_test or neither")
    members = {"x_train": x_train, "y_train": y_train}
    if x_test is not None:
        members |= {"x_test": x_test, "y_test": y_test}
    return _from_members(members, chosen, spec="arrays", class_names=class_names)


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
        name: ArraySource.from_arrays(
            members[f"x_{name}"], members[f"y_{name}"], name, options.image_size
        )
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
