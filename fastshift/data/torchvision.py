"""CIFAR-10 and CIFAR-100 in torchvision's layout on disk -> arrays; downloaded where missing.

Source: A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images. The files are
pickles: torchvision opens them only after their published checksums have matched.
"""

from __future__ import annotations

import socket
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastshift.errors import DataError, missing_extra

__all__ = ["read_cifar"]

TIMEOUT_SECONDS = 30.0


def read_cifar(kind: str, directory: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read a CIFAR data set through torchvision, downloading it where its folder is missing.

    Args:
        kind: `cifar10` or `cifar100`.
        directory: the folder that holds, or shall hold, `cifar-10-batches-py` or
            `cifar-100-python`.

    Returns:
        `x_train`, `x_test` (`[n, 32, 32, 3]` uint8), `y_train`, `y_test` (`[n]` int64) by name, and
        the class names.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
        MissingExtraError: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise missing_extra("torchvision", "images") from error
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    root = Path(directory).expanduser()
    where = f"{kind}:{directory}"
    if root.exists() and not root.is_dir():
        raise DataError(f"{where}: a file, expected a directory")
    if not (root / dataset.base_folder).is_dir():
        _download(dataset, root, where)
    try:
        with warnings.catch_warnings():
            # the published pickles give numpy 2.4 the flag `align` as an integer
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            train, test = dataset(root, train=True), dataset(root, train=False)
    except RuntimeError as error:
        raise DataError(f"{where}: {_damage(dataset, root)}") from error
    members = {}
    for name, part in (("train", train), ("test", test)):
        members[f"x_{name}"] = part.data
        members[f"y_{name}"] = np.array(part.targets, dtype=np.int64)
    return members, tuple(train.classes)


def _download(dataset: Any, root: Path, where: str) -> None:
    is_new = not root.exists()
    try:
        with _timeout(TIMEOUT_SECONDS):
            dataset(root, download=True)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        (root / dataset.filename).unlink(missing_ok=True)
        if is_new and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        raise DataError(
            f"{where}: no folder {dataset.base_folder} and no download ({error}), "
            f"expected torchvision's layout"
        ) from error


def _damage(dataset: Any, root: Path) -> str:
    """Name the first file that is missing or has another checksum than published."""
    from torchvision.datasets.utils import check_integrity

    meta = (dataset.meta["filename"], dataset.meta["md5"])
    for name, md5 in (*dataset.train_list, *dataset.test_list, meta):
        file = root / dataset.base_folder / name
        if not file.is_file():
            return f"{dataset.base_folder}/{name} is missing, expected torchvision's layout"
        if not check_integrity(str(file), md5):
            return f"{dataset.base_folder}/{name} is damaged, expected the MD5 checksum {md5}"
    return "cannot be read, expected torchvision's layout"


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Bound every wait of a download, which torchvision leaves unbounded."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
