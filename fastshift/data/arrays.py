"""Arrays in memory, or the four arrays of an npz file -> a source of uint8 images."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastshift.data.splits import check_labels
from fastshift.errors import DataError

__all__ = ["ArraySource", "read_npz"]

MEMBERS = ("x_train", "y_train", "x_test", "y_test")
CHUNK = 1024  # images converted at a time


class ArraySource:
    """Labelled images held in memory as `[n, C, H, W]` uint8.

    Args:
        images: `[n, H, W, C]` uint8, C of 1 or 3; square unless `image_size` is given.
        labels: `[n]` of any integer type.
        name: what error messages call the set; `x_` and `y_` stand before it.
        image_size: side to bring the images to once, now: an average over areas where it divides
            their size, else antialiased bilinear; of an oblong image, the middle is kept.

    Raises:
        DataError: shape, dtype or length is not as described.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, name: str, image_size: int | None = None
    ) -> None:
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise DataError(f"x_{name}: dtype {images.dtype}, expected uint8")
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DataError(
                f"x_{name}: shape {list(images.shape)}, expected [n, H, W, C] with C of 1 or 3"
            )
        _, height, width, self.in_channels = images.shape
        if not height or not width:
            raise DataError(f"x_{name}: shape {list(images.shape)}, expected images with pixels")
        if image_size is None and height != width:
            raise DataError(
                f"x_{name}: images of {height}x{width}, expected square ones (or an image_size)"
            )
        self.labels = check_labels(labels, len(images), f"y_{name}")
        self.image_size = height if image_size is None else image_size
        self.images = _planar(images, self.image_size)

    def take(self, positions: np.ndarray) -> Tensor:
        """Return the images at `positions`, `[n, C, H, W]` uint8, a copy."""
        return self.images[torch.from_numpy(positions)]

    def subset(self, positions: np.ndarray, labels: np.ndarray) -> ArraySource:
        """Return a source of these images alone, with these labels."""
        source = object.__new__(ArraySource)
        source.in_channels, source.image_size = self.in_channels, self.image_size
        source.images, source.labels = self.take(positions), labels
        return source

    def digest(self) -> str:
        """Return a sha256 over shape, pixels and labels, as hexadecimal digits."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.numpy())
        digest.update(self.labels)
        return digest.hexdigest()


def _planar(images: np.ndarray, image_size: int) -> Tensor:
    """Turn `[n, H, W, C]` uint8 into `[n, C, image_size, image_size]` uint8."""
    num, height, width, channels = images.shape
    planar = torch.empty((num, channels, image_size, image_size), dtype=torch.uint8)
    for start in range(0, num, CHUNK):
        chunk = torch.from_numpy(np.ascontiguousarray(images[start : start + CHUNK]))
        chunk = chunk.permute(0, 3, 1, 2)
        if (height, width) != (image_size, image_size):
            chunk = _resized(chunk, image_size)
        planar[start : start + CHUNK] = chunk
    return planar


def _resized(images: Tensor, image_size: int) -> Tensor:
    """Scale the shorter side of `[n, C, H, W]` to `image_size` and keep the middle square."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[:, :, top : top + side, left : left + side].float()
    size = (image_size, image_size)
    if side % image_size == 0:
        square = functional.interpolate(square, size, mode="area")
    else:
        square = functional.interpolate(square, size, mode="bilinear", antialias=True)
    return square.round_().clamp_(0, 255).to(torch.uint8)


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Read `x_train`, `y_train`, `x_test` and `y_test`, without ever unpickling.

    Args:
        path: an npz file with exactly these members.

    Returns:
        The arrays by name.

    Raises:
        DataError: the file is missing, cut short, of another layout, or holds objects.
    """
    if not Path(path).is_file():
        raise DataError(f"npz:{path}: no such file, expected an npz with {', '.join(MEMBERS)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"npz:{path}: a single array, expected an npz archive")
            _check_members(path, archive.files)
            return {name: archive[name] for name in MEMBERS}
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise DataError(
            f"npz:{path}: cannot be read ({error}), expected a whole npz of plain arrays"
        ) from error


def _check_members(path: str, names: list[str]) -> None:
    if {"meta", "train_0"} <= set(names):
        raise DataError(
            f"npz:{path}: a pixpack container, expected plain arrays: "
            f"write them with `python pixpack.py {path} OUT.npz`"
        )
    missing = [name for name in MEMBERS if name not in names]
    unknown = [name for name in names if name not in MEMBERS]
    if missing or unknown:
        raise DataError(
            f"npz:{path}: members {', '.join(names) or 'none'}, expected {', '.join(MEMBERS)}"
        )
