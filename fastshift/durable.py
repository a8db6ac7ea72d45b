"""Bytes in, files that survive a crash out: durable writes, atomic replacement, the score log."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastshift.errors import CheckpointError

__all__ = [
    "TEMPORARY",
    "ScoreLog",
    "naming",
    "read_file",
    "replace_file",
    "sync_folder",
    "truncate_log",
    "write_file",
]

# What a killed program may leave behind starts with this; nothing reads it.
TEMPORARY = ".tmp-"


@contextmanager
def naming(path: Path, verb: str) -> Iterator[None]:
    """Turn a failure of the file system into a `CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be {verb}: {error}") from error


def read_file(path: Path) -> bytes:
    """Read a whole file; `CheckpointError` where that fails."""
    with naming(path, "read"):
        return path.read_bytes()


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk; `OSError` where that fails."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk; `OSError` where that fails."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def replace_file(path: str | Path, data: bytes) -> None:
    """Write a file, or replace an older one by one rename: a reader finds the old or the new bytes.

    Args:
        path: in a folder that exists.
        data: the contents.

    Raises:
        CheckpointError: the file cannot be written; an older one is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with naming(path, "written"):
        try:
            write_file(temporary, data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def truncate_log(path: str | Path, length: int) -> None:
    """Cut a log back to the byte length that a checkpoint recorded.

    Args:
        path: the log; may be missing where `length` is 0.
        length: bytes to keep.

    Raises:
        CheckpointError: the log is shorter than `length`, or `length` is not the end of a line.
    """
    path = Path(path)
    if length == 0 and not path.exists():
        return
    with naming(path, f"cut to {length} bytes"), path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size < length:
            raise CheckpointError(f"{path} has {size} bytes, expected at least {length}")
        file.seek(max(length - 1, 0))
        if length and file.read(1) != b"\n":
            raise CheckpointError(f"{path} has no end of line at byte {length}, as recorded")
        file.truncate(length)
        os.fsync(file.fileno())


class ScoreLog:
    """An append-only file of JSON lines, whose byte length a checkpoint records.

    Every `append` reaches the operating system at once; `flush` makes it durable.

    Args:
        path: made where it is missing; otherwise it must end with a whole line (`truncate_log`).

    Raises:
        CheckpointError: the file cannot be opened, or its last line is not whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with naming(self.path, "opened"):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._file).st_size
            sync_folder(self.path.parent)
            is_whole = size == 0 or os.pread(self._file, 1, size - 1) == b"\n"
        if not is_whole:
            self.close()
            raise CheckpointError(f"{self.path} ends within a line, at byte {size}")

    def append(self, row: dict[str, Any]) -> None:
        """Add one line; `CheckpointError` where it cannot be written.

        A float that is not finite, such as the error of a failed score, stands as null.
        """
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        with naming(self.path, "written"):
            _write_all(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")

    def flush(self) -> int:
        """Make all lines durable and return the file's length in bytes."""
        with naming(self.path, "written"):
            os.fsync(self._file)
            return os.fstat(self._file).st_size

    def close(self) -> None:
        """Close the file; twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> ScoreLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
