"""Arrays in memory, or the four arrays of an npz file -> a source of uint8 images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastshift.backends import why_no_triton
from fastshift.data.batches import Normalisation, Source, TrainBatches
from fastshift.data.options import Options
from fastshift.data.splits import check_labels
from fastshift.data.uploaded import MOST_BYTES, UploadedTrainBatches
from fastshift.errors import DataError

__all__ = ["ArraySource", "read_npz"]

MEMBERS = ("x_train", "y_train", "x_test", "y_test")
CHUNK = 1024  # images converted at a time


class ArraySource(Source):
    """Labelled images held in memory.

    Args:
        images: `[n, C, S, S]` uint8.
        labels: `[n]` int64.
    """

    is_in_memory = True

    def __init__(self, images: Tensor, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels
        self.in_channels, self.image_size = images.shape[1:3]

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray, name: str, image_size: int | None = None
    ) -> ArraySource:
        """Check arrays as a caller or a file has them, and copy them into a source.

        Args:
            images: `[n, H, W, C]` uint8, C of 1 or 3; square unless `image_size` is given.
            labels: `[n]` of any integer type.
            name: what error messages call the set; `x_` and `y_` stand before it.
            image_size: side to bring the images to once, now: an average over areas where it
                divides their side, else antialiased bilinear; of an oblong image the middle stays.

        Raises:
            DataError: shape, dtype or length is not as described.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise DataError(f"x_{name}: dtype {images.dtype}, expected uint8")
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
            raise DataError(
                f"x_{name}: shape {list(images.shape)}, expected [n, H, W, C] with C of 1 or 3"
            )
        _, height, width, _ = images.shape
        if image_size is None and height != width:
            raise DataError(
                f"x_{name}: images of {height}x{width}, expected square ones (or an image_size)"
            )
        labels = check_labels(labels, len(images), f"y_{name}")
        return cls(_planar(images, height if image_size is None else image_size), labels)

    @property
    def num_bytes(self) -> int:
        """Size of the images in memory, in bytes."""
        return self.images.numel()

    def in_memory(self) -> ArraySource:
        """Return the source itself."""
        return self

    def take(self, positions: np.ndarray) -> Tensor:
        """Return the images at `positions`, `[n, C, S, S]` uint8, a copy."""
        # index_select: 0.07 ms for 128 images of 3 kB, where self.images[...] takes 0.75 ms
        return self.images.index_select(0, torch.from_numpy(positions))

    def subset(self, positions: np.ndarray, labels: np.ndarray) -> ArraySource:
        """Return a source of these images alone, with these labels."""
        return ArraySource(self.take(positions), labels)

    def train_batches(
        self, positions: np.ndarray, *, options: Options, normalise: Normalisation, flip: bool
    ) -> TrainBatches:
        """Return the images at `positions` as an endless stream, on a GPU where that is the device.

        They stay on the host, and say why, where they are too many for the GPU or its kernels
        cannot run.

        Raises:
            DataError: as the other sources.
        """
        plain = super().train_batches(positions, options=options, normalise=normalise, flip=flip)
        device = options.parsed_device()
        if device.type != "cuda":
            return plain
        if why := self._why_on_host(len(positions), device):
            plain.augmented = f"on the host: {why}"
            return plain
        return UploadedTrainBatches(
            device=device,
            source=self,
            positions=positions,
            batch_size=options.batch_size,
            seed=options.seed,
            normalise=normalise,
            augmentation=plain.augmentation,
        )

    def _why_on_host(self, num: int, device: torch.device) -> str | None:
        """Why so many images cannot be augmented on a GPU; None where they can."""
        num_bytes = num * self.images[:1].numel()
        if num_bytes > MOST_BYTES:
            return (
                f"{num_bytes / 2**30:.2f} GiB of images, more than the {MOST_BYTES / 2**30:.2f} "
                "that are kept on a GPU"
            )
        lacking = why_no_triton(device)
        return lacking and f"without the Triton kernels: {lacking}"

    def digest(self) -> str:
        """Return a sha256 over shape, pixels and labels, as hexadecimal digits."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.numpy())
        digest.update(self.labels)
        return digest.hexdigest()


def _planar(images: np.ndarray, image_size: int) -> Tensor:
    """Turn `[n, H, W, C]` uint8 into `[n, C, image_size, image_size]` uint8, a copy."""
    num, height, width, channels = images.shape
    planar = torch.empty((num, channels, image_size, image_size), dtype=torch.uint8)
    for start in range(0, num, CHUNK):
        chunk = torch.from_numpy(np.array(images[start : start + CHUNK], order="C"))
        chunk = chunk.permute(0, 3, 1, 2)
        if (height, width) != (image_size, image_size):
            chunk = _resized(chunk, image_size)
        planar[start : start + CHUNK] = chunk
    return planar


def _resized(images: Tensor, image_size: int) -> Tensor:
    """Scale the middle square of `[n, C, H, W]` uint8 to `image_size`."""
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
        DataError: the file is missing, damaged, of another layout, or holds Python objects.
    """
    where = f"npz:{path}"
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{where}: no such file, expected an npz with {', '.join(MEMBERS)}")
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(
                    f"{where}: a single array, expected an npz with {', '.join(MEMBERS)}"
                )
            _check_members(where, archive.files)
            return {name: archive[name] for name in MEMBERS}
    except DataError:
        raise
    except Exception as error:  # damage surfaces as a dozen types, from zlib's to tokenize's
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{where}: cannot be read ({reason}), expected a whole npz of plain arrays"
        ) from error


def _check_members(where: str, names: list[str]) -> None:
    if {"meta", "train_0"} <= set(names):
        raise DataError(
            f"{where}: a pixpack container, expected the plain arrays that "
            f"`python pixpack.py {where.removeprefix('npz:')} OUT.npz` writes"
        )
    if sorted(names) != sorted(MEMBERS):
        raise DataError(f"{where}: members {sorted(names)}, expected {sorted(MEMBERS)}")
