"""Block sizes and shares of the work, as functions of sizes alone, and what a launch is.

Nothing here looks at the number of nodes or of rows: a node's results are then the same bits in
whatever population it stands. The static record holds what the sizes compile to, without a spill;
on a GPU they have not been timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Blocks", "Launch", "blocks_of", "ceil_div", "power_of_2", "share", "warps_of"]

# Partial results that one program merges at the end: a level of one node has no other programs to
# fill a card with, but behind FEW_PARTS a program has up to MOST_TILES before there are more.
FEW_PARTS, MOST_PARTS, MOST_TILES = 128, 512, 4
SPLIT_PROGRAMS = 256  # for one weight, where its pixels are enough
FEWEST_SPLITS, MOST_SPLITS = 4, 64


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments, ready to be launched or compiled."""

    kernel: Any
    grid: tuple[int, ...]
    positional: tuple
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2  # chunks of a product that are in shared memory at a time
    # Of a thread. With none given the assembler aims at more programs at once and spills a few.
    max_registers: int | None = None

    def __call__(self) -> None:
        """Launch it on the current stream."""
        self.kernel[self.grid](*self.positional, **self.arguments, **self.options)

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the arguments."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found | ({"maxnreg": self.max_registers} if self.max_registers else {})


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of a convolution, each a power of two and at least 16.

    Attributes:
        pixels, channels, depth: of a product, or of a depthwise tile (which has no depth).
        weight_out, weight_in, weight_pixels: of a weight's gradient; a depthwise one has no
            `weight_in`.
        warps, stages: as a `Launch`.
    """

    pixels: int
    channels: int
    depth: int
    weight_out: int
    weight_in: int
    weight_pixels: int
    warps: int
    stages: int = 2


def ceil_div(number: int, by: int) -> int:
    """The quotient rounded up."""
    return -(-number // by)


def power_of_2(number: int, most: int) -> int:
    """The least power of two that is no less, within 16 and `most`."""
    return min(max(16, 1 << (number - 1).bit_length()), most)


def warps_of(pixels: int, channels: int, most: int) -> int:
    """Warps of a tile, whose threads each have eight values, 16 bytes of a narrow type, or more."""
    return min(max(pixels * channels // 256, 1), most)


def blocks_of(
    depthwise: bool, backward: bool, pixels: int, inner: int, outer: int, dtype: torch.dtype
) -> Blocks:
    """Tile sizes for rows of some pixels.

    Args:
        depthwise: the kind of convolution.
        backward: which pass; a backward program holds more at once.
        pixels: of a row that is written.
        inner: channels that a product sums over.
        outer: channels that it writes.
        dtype: of the rows.
    """
    if depthwise:
        tile = power_of_2(pixels, 32), power_of_2(outer, 32 if backward else 64)
        return Blocks(
            *tile,
            depth=16,
            weight_out=power_of_2(inner, 32),
            weight_in=16,
            weight_pixels=32,
            warps=warps_of(*tile, 8),
        )
    wide = dtype is torch.float32
    tile = power_of_2(pixels, 64), power_of_2(outer, 64)
    depth = power_of_2(inner, 16 if wide else 32)
    warps = 8
    if min(inner, outer) * dtype.itemsize >= 16:  # both sides can be accessed in whole vectors
        warps = warps_of(tile[0], min(tile[1], depth * dtype.itemsize // 2), 8)
    return Blocks(
        *tile,
        depth=depth,
        weight_out=power_of_2(inner, 64),
        weight_in=power_of_2(outer, 64),
        weight_pixels=16 if wide else 32,
        warps=warps,
        stages=1 if wide or inner <= depth else 2,  # a single chunk has none to wait for
    )


def share(tiles: int, most: int) -> tuple[int, int]:
    """Split tiles among programs: tiles of each, and programs, at most `most`."""
    each = max(ceil_div(tiles, most), min(ceil_div(tiles, FEW_PARTS), MOST_TILES))
    return each, ceil_div(tiles, each)


def splits_of(weight_tiles: int, pixel_tiles: int) -> int:
    """How many programs share the pixels in a weight's gradient."""
    wanted = min(max(SPLIT_PROGRAMS // weight_tiles, FEWEST_SPLITS), MOST_SPLITS)
    return max(min(wanted, pixel_tiles), 1)
