"""A directory of class folders of image files -> a source, decoded to memory or on access."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastshift.data.arrays import ArraySource
from fastshift.data.batches import Source
from fastshift.errors import DataError, missing_extra

__all__ = ["FolderSource", "open_image", "read_folder"]

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
MODES = frozenset({"1", "CMYK", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"})
CHUNK = 1024  # images decoded at a time


class FolderSource(Source):
    """Labelled image files, decoded to RGB each time they are taken.

    The middle square of an image is scaled to the source's size (Pillow's antialiased bilinear).

    Args:
        root: the folder that `files` are relative to.
        files: paths of the image files.
        labels: `[n]` int64.
        image_size: side of the decoded images, in pixels.
    """

    is_in_memory = False
    in_channels = 3

    def __init__(self, root: Path, files: list[str], labels: np.ndarray, image_size: int) -> None:
        self.root = root
        self.files = files
        self.labels = labels
        self.image_size = image_size

    @property
    def num_bytes(self) -> int:
        """Size of the decoded images, in bytes."""
        return len(self.files) * self.in_channels * self.image_size**2

    def in_memory(self) -> ArraySource:
        """Decode every image once and return a source that holds them."""
        num, size = len(self.files), self.image_size
        images = torch.empty((num, self.in_channels, size, size), dtype=torch.uint8)
        for start in range(0, num, CHUNK):
            positions = np.arange(start, min(start + CHUNK, num))
            images[start : start + CHUNK] = self.take(positions)
        return ArraySource(images, self.labels)

    def take(self, positions: np.ndarray) -> Tensor:
        """Decode the images at `positions`, `[n, 3, S, S]` uint8, on torch's number of threads.

        Raises:
            DataError: a file is no image of 8 bits a channel, or damaged.
        """
        paths = [self.root / self.files[position] for position in positions]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            decoded = list(pool.map(self._decode, paths))
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()

    def subset(self, positions: np.ndarray, labels: np.ndarray) -> FolderSource:
        """Return a source of these images alone, with these labels."""
        files = [self.files[position] for position in positions]
        return FolderSource(self.root, files, labels, self.image_size)

    def digest(self) -> str:
        """Return a sha256 over names, sizes in bytes and labels, as hexadecimal digits."""
        digest = hashlib.sha256(str(self.image_size).encode())
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            num_bytes = (self.root / name).stat().st_size
            digest.update(f"\0{name}\0{num_bytes}\0{label}".encode())
        return digest.hexdigest()

    def _decode(self, path: Path) -> np.ndarray:
        """Return one image as `[S, S, 3]` uint8."""
        size = (self.image_size, self.image_size)
        with open_image(path) as image:
            # a JPEG is decoded at half, a quarter or an eighth where that is twice the target
            image.draft(None, (2 * size[0], 2 * size[1]))
            pixels = image.convert("RGB")
            if pixels.size != size:
                side = min(pixels.size)
                left, top = ((length - side) // 2 for length in pixels.size)
                box = (left, top, left + side, top + side)
                pixels = pixels.resize(size, _pillow().Resampling.BILINEAR, box=box)
        return np.asarray(pixels)


@contextmanager
def open_image(path: Path) -> Iterator[Any]:
    """Open an image file as Pillow's `Image`, its pixels not yet decoded.

    Raises:
        DataError: it is no image of 8 bits a channel, or turns out damaged while it is open.
        MissingExtraError: Pillow is not installed.
    """
    image_module = _pillow()
    try:
        with image_module.open(path) as image:
            if image.mode not in MODES:
                raise DataError(f"{path}: mode {image.mode}, expected 8 bits a channel")
            yield image
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: {error}, expected a whole image file") from error


def read_folder(
    directory: str, image_size: int | None, kind: str = "folder"
) -> tuple[FolderSource, FolderSource, tuple[str, ...]]:
    """List the images of `train/` and `val/`, each a directory of class folders.

    Args:
        directory: the directory that holds both.
        image_size: side of the decoded images; if None all must be square and of one size.
        kind: what error messages call the source.

    Returns:
        The training set, the test set, and the class names, which are the folders of `train/`.

    Raises:
        DataError: a folder is missing or empty, `val/` has a class that `train/` has not, or images
            differ in size and no `image_size` is given.
        MissingExtraError: Pillow is not installed.
    """
    where = f"{kind}:{directory}"
    _pillow()
    root = Path(directory).expanduser()
    for part in (root, root / "train", root / "val"):
        if not part.is_dir():
            raise DataError(f"{where}: no directory {part}, expected train/ and val/ in it")
    classes = _class_folders(root / "train")
    unknown = sorted(set(_class_folders(root / "val")) - set(classes))
    if unknown:
        raise DataError(f"{where}: val/{unknown[0]} is no class folder of train/")
    listed = {}
    for part in ("train", "val"):
        found = [_image_files(root, f"{part}/{name}") for name in classes]
        if part == "train" and not all(found):
            empty = classes[[bool(files) for files in found].index(False)]
            raise DataError(f"{where}: train/{empty} holds no image, expected at least two")
        labels = np.repeat(np.arange(len(classes)), [len(files) for files in found])
        listed[part] = [file for files in found for file in files], labels
    if not classes or not listed["val"][0]:
        empty = "val" if classes else "train"
        raise DataError(f"{where}: {empty}/ holds no image, expected class folders of images")
    if image_size is None:
        image_size = _common_size(root, [*listed["train"][0], *listed["val"][0]])
    train, test = (FolderSource(root, *listed[part], image_size) for part in ("train", "val"))
    return train, test, tuple(classes)


def _class_folders(part: Path) -> list[str]:
    folders = (entry for entry in part.iterdir() if entry.is_dir())
    return sorted(folder.name for folder in folders if not folder.name.startswith("."))


def _image_files(root: Path, folder: str) -> list[str]:
    """Return the image files below a class folder (which may be absent), relative to `root`."""
    found = (root / folder).rglob("*")
    return sorted(
        file.relative_to(root).as_posix()
        for file in found
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def _common_size(root: Path, files: list[str]) -> int:
    """Return the side that all images have, from their headers."""
    side = None
    for name in files:
        try:
            with _pillow().open(root / name) as image:
                width, height = image.size
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{root / name}: {error}, expected an image file") from error
        side = width if side is None else side
        if not width == height == side:
            raise DataError(
                f"{root / name}: image of {height}x{width}, expected {side}x{side} as the first "
                f"image's width (or an image_size to scale all to)"
            )
    assert side is not None
    return side


def _pillow() -> ModuleType:
    """Return Pillow's `Image` module, which only this source needs."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("PIL", "images") from error
    return Image
