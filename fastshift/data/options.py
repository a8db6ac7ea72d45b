"""What a caller chooses about a data set: the fields of `Options`, checked when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastshift.device import parse_device
from fastshift.errors import DataError

__all__ = ["Options", "check_at_least"]

LOWEST = {
    "batch_size": 1,
    "seed": 0,
    "split_seed": 0,
    "calibration_batches": 1,
    "calibration_batch_size": 2,  # one image may leave a batch norm a single value, so no moments
    "validation_batch_size": 1,
    "image_size": 1,
    "limit": 1,
    "max_memory_bytes": 0,
}
REQUIRED = (
    "batch_size",
    "seed",
    "split_seed",
    "validation_batch_size",
    "max_memory_bytes",
)  # never None


def check_at_least(name: str, value: int, lowest: int) -> int:
    """Return an option as a plain integer, or raise `DataError` unless it is at least `lowest`."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < lowest:
        raise DataError(f"{name}={value!r}: expected an integer of at least {lowest}")
    return int(value)  # a numpy integer would not go into JSON


@dataclass(frozen=True)
class Options:
    """What a caller chooses about a data set, whatever its source.

    Attributes:
        batch_size: images in a training batch.
        seed: fixes the order of the training stream and its augmentation.
        split_seed: fixes what is held out. It does not follow `seed`: a supernet that was trained
            with one seed and is searched with another must not meet its scoring images before.
        validation_size: images held out of the training set for scoring, a count or a fraction
            below 1; by default a tenth, at most 5,000, and of small sets up to a quarter.
        calibration_batches: number of batches that batch norms are calibrated on; by default 8, or
            as many as there are.
        calibration_batch_size: images in one, at least 2; by default 128, or the whole of a smaller
            part.
        validation_batch_size: images in a batch of the scoring and the test set.
        image_size: side to bring the images to, in pixels; by default they stay as they are.
        augment: augment training batches: a random crop of the image padded by an eighth of its
            size, and a flip; `dali` crops a part of random area and aspect ratio instead, and
            scales it.
        flip: let augmentation flip; by default it does, but not for `digits`.
        classes: keep the images with these labels only, relabelled from 0 in this order.
        limit: keep this many training images only, stratified.
        max_memory_bytes: size up to which images from files are decoded once and held in memory.
        crop_area: of `dali` alone: smallest share of an image's area that a random crop takes,
            above 0, at most 1; by default 0.08.
        color_jitter: of `dali` alone: how far augmentation moves brightness, contrast and
            saturation: by 0.4, each is multiplied by a factor drawn from 0.6 to 1.4, as
            torchvision's functions do it, in this order.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`, a GPU where there is one unless
            `FASTSHIFT_DEVICE` names another. Of `dali` it decodes and holds the batches. Of images
            in memory a GPU holds a training part of up to 1 GiB, and augments it.
    """

    batch_size: int = 128
    seed: int = 0
    split_seed: int = 0
    validation_size: int | float | None = None
    calibration_batches: int | None = None
    calibration_batch_size: int | None = None
    validation_batch_size: int = 500
    image_size: int | None = None
    augment: bool = True
    flip: bool | None = None
    classes: Sequence[int] | None = None
    limit: int | None = None
    max_memory_bytes: int = 4 * 2**30
    crop_area: float | None = None
    color_jitter: float = 0.0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, lowest in LOWEST.items():
            value = getattr(self, name)
            if value is not None or name in REQUIRED:
                object.__setattr__(self, name, check_at_least(name, value, lowest))
        if self.crop_area is not None and not 0 < self.crop_area <= 1:
            raise DataError(f"crop_area={self.crop_area!r}: expected a share above 0, at most 1")
        if not 0 <= self.color_jitter <= 1:
            raise DataError(f"color_jitter={self.color_jitter!r}: expected 0 to 1")
        if self.classes is not None:
            classes = list(self.classes)
            if len(set(classes)) < max(2, len(classes)):
                raise DataError(f"classes={classes}: expected at least two distinct labels")

    def parsed_device(self) -> torch.device:
        """Return the device that `device` means here.

        Raises:
            DataError: it means none, or a GPU that is not there.
        """
        try:
            return parse_device(self.device)
        except ValueError as error:
            raise DataError(f"device={self.device!r}: {error}") from error
