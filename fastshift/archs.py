"""Architectures as users give them -> checked rows of choices `[P, L]` uint8; their strings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastshift.errors import ArchError, SpaceError

__all__ = ["ChoiceBlocks"]

MAX_CHOICES = 256  # an architecture is a row of uint8


class ChoiceBlocks:
    """How many choices each block has, and so which rows are architectures.

    Args:
        name: what reports call the space.
        num_choices: candidate ops of each choice block, `[L]`.

    Attributes:
        num_choices: the same, int32, read-only.

    Raises:
        SpaceError: no block, or one of more than 256 choices.
    """

    def __init__(self, name: str, num_choices: Sequence[int]) -> None:
        self.name = name
        if not len(num_choices):
            raise SpaceError(f"space {name!r} has no choice blocks")
        self.num_choices = np.array(num_choices, dtype=np.int32)
        if self.num_choices.max() > MAX_CHOICES:
            block = int(self.num_choices.argmax())
            raise SpaceError(
                f"space {name!r}: choice block {block} has {self.num_choices[block]} choices, "
                f"at most {MAX_CHOICES} are possible"
            )
        self.num_choices.flags.writeable = False
        self._counts: list[int] = self.num_choices.tolist()

    @property
    def num_blocks(self) -> int:
        """Choice blocks, `L`."""
        return len(self.num_choices)

    @property
    def size(self) -> int:
        """The number of architectures."""
        return math.prod(self._counts)

    @property
    def _is_dotted(self) -> bool:
        return max(self._counts) > 10

    def parse(self, text: str) -> np.ndarray:
        """Return the architecture that a string names, `[L]` uint8.

        Args:
            text: one digit a choice block (`22212220`); numbers separated by dots in a space where
                some block has more than ten choices. Surrounding white space is ignored.

        Raises:
            ArchError: wrong length, not a number, or a choice out of range.
        """
        if not isinstance(text, str):
            raise ArchError(f"arch must be a string, got {text!r}")
        stripped = text.strip()
        parts = stripped.split(".") if self._is_dotted else list(stripped)
        for part in parts:
            if not (part.isascii() and part.isdigit()) or (part[0] == "0" and part != "0"):
                form = "numbers separated by dots" if self._is_dotted else "digits"
                raise ArchError(f"arch {text!r}: {part!r} is not a choice; expected {form}")
        if len(parts) != self.num_blocks:
            raise ArchError(f"arch {text!r}: {len(parts)} choices, expected {self.num_blocks}")
        choices = [int(part) for part in parts]
        for block, (choice, count) in enumerate(zip(choices, self._counts, strict=True)):
            if choice >= count:
                raise ArchError(
                    f"arch {text!r}: choice {choice} of block {block} is out of range; "
                    f"expected 0 to {count - 1}"
                )
        return np.array(choices, dtype=np.uint8)

    def format(self, arch: Any) -> str:
        """Return the string of one architecture, the inverse of `parse`."""
        texts = self.format_all(arch)
        if len(texts) != 1:
            raise ArchError(f"format takes one architecture, got {len(texts)}")
        return texts[0]

    def format_all(self, archs: Any) -> list[str]:
        """Return the strings of architectures, in order."""
        archs = self.as_archs(archs)
        if self._is_dotted:
            return [".".join(map(str, row)) for row in archs.tolist()]
        return (archs + np.uint8(ord("0"))).view(f"S{self.num_blocks}").ravel().astype(str).tolist()

    def as_archs(self, archs: Any) -> np.ndarray:
        """Check architectures and return them as a new C-contiguous array.

        Args:
            archs: an integer array `[P, L]` or `[L]`, a string, or a sequence of rows, each a
                string or a sequence of integers. One architecture becomes one row.

        Returns:
            `[P, L]` uint8.

        Raises:
            ArchError: wrong length, not integers, or a choice out of range; names row and value.
        """
        if isinstance(archs, str):
            return self.parse(archs)[None]
        if isinstance(archs, np.ndarray) and archs.dtype.kind in "UO":
            archs = archs.tolist()
        if not hasattr(archs, "__array__"):
            archs = self._stacked(archs)
        array = np.asarray(archs)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or array.shape[1] != self.num_blocks:
            raise ArchError(f"archs have shape {array.shape}, expected [P, {self.num_blocks}]")
        if array.dtype.kind not in "iu":
            raise ArchError(f"archs must be integers, got {array.dtype}{_first_fraction(array)}")
        is_bad = array >= self.num_choices
        if array.dtype.kind == "i":
            is_bad |= array < 0
        if is_bad.any():
            row, block = np.argwhere(is_bad)[0].tolist()
            raise ArchError(
                f"archs row {row}: choice {array[row, block]} of block {block} is out of range; "
                f"expected 0 to {self.num_choices[block] - 1}"
            )
        return np.array(array, dtype=np.uint8, order="C")

    def _stacked(self, archs: Any) -> np.ndarray:
        """Return a sequence of rows, or one row of integers, as an array of some dtype."""
        if not isinstance(archs, Iterable):
            raise ArchError(f"archs must be rows of choices, got {archs!r}")
        rows = list(archs)
        if rows and not any(isinstance(row, Iterable) for row in rows):
            rows = [rows]
        stacked = []
        for index, row in enumerate(rows):
            if isinstance(row, str):
                try:
                    stacked.append(self.parse(row))
                except ArchError as error:
                    raise ArchError(f"archs row {index}: {error}") from None
                continue
            try:
                values = np.asarray(row)
            except (TypeError, ValueError):
                raise ArchError(f"archs row {index}: {row!r} is not a row of choices") from None
            if values.shape != (self.num_blocks,):
                raise ArchError(
                    f"archs row {index}: shape {values.shape}, expected {self.num_blocks} choices"
                )
            if values.dtype.kind not in "iu":
                raise ArchError(f"archs row {index}: {row!r} are not integers")
            stacked.append(values)
        if not stacked:
            return np.empty((0, self.num_blocks), dtype=np.uint8)
        return np.stack(stacked)


def _first_fraction(array: np.ndarray) -> str:
    """Return ` (row r: v)` of the first entry of a float array that is no whole number."""
    if array.dtype.kind != "f":
        return ""
    rows = np.argwhere(array != np.floor(array))
    return f" (row {rows[0][0]}: {array[tuple(rows[0])]})" if len(rows) else ""
