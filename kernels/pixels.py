"""Which pixels a convolution's taps join, in the order of a row's memory.

A unit's sizes come as the tuple of `sizes_of`. What does not depend on the tap is computed once
for a tile of pixels (`*_base`), the rest for each tap (`*_at`). `MOVES` is the stride of all units,
-1 where they differ, and 0 where each reads the pixel that it writes, and nothing is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.record import (
    C_IN,
    C_OUT,
    IMAGES,
    IN_HEIGHT,
    IN_WIDTH,
    KERNEL,
    OUT_HEIGHT,
    OUT_WIDTH,
    STRIDE,
    sized,
)


@triton.jit
def sizes_of(b, record, ALIGN: tl.constexpr):
    """Channels in and out, pixels in and out of a node, kernel, stride, and both maps' sizes."""
    images = tl.load(b.table + IMAGES)
    in_height, in_width = tl.load(record + IN_HEIGHT), tl.load(record + IN_WIDTH)
    height, width = tl.load(record + OUT_HEIGHT), tl.load(record + OUT_WIDTH)
    return (
        sized(record, C_IN, ALIGN),
        sized(record, C_OUT, ALIGN),
        images * in_height * in_width,
        images * height * width,
        tl.load(record + KERNEL),
        tl.load(record + STRIDE),
        in_height,
        in_width,
        height,
        width,
    )


@triton.jit
def _stride(sizes, MOVES: tl.constexpr):
    """A constant where it can be one, since a division by it comes for each tap."""
    stride = sizes[5]
    if MOVES > 0:
        stride = MOVES
    return stride


@triton.jit
def read_base(sizes, offs_p, MOVES: tl.constexpr):
    """Of output pixels: row, column and place that their first tap reads, and which there are."""
    _, _, _, positions, kernel, _, in_height, in_width, height, width = sizes
    stride = _stride(sizes, MOVES)
    y, x, pixel = offs_p, offs_p, offs_p
    if MOVES:
        y = offs_p // width % height * stride - kernel // 2
        x = offs_p % width * stride - kernel // 2
        pixel = (offs_p // (height * width) * in_height + y) * in_width + x
    return y, x, pixel.to(tl.int64), offs_p < positions


@triton.jit
def read_at(sizes, base, tap, MOVES: tl.constexpr):
    """Pixels that output pixels read through a tap, and whether they are inside of the image."""
    _, _, _, _, kernel, _, in_height, in_width, _, _ = sizes
    y, x, pixel, inside = base
    if MOVES:
        down, right = tap // kernel, tap % kernel
        y, x = y + down, x + right
        inside &= (y >= 0) & (y < in_height) & (x >= 0) & (x < in_width)
        pixel += down * in_width + right
    return pixel, inside


@triton.jit
def reading_base(sizes, offs_p, MOVES: tl.constexpr):
    """Of input pixels: what their row, column and image give each tap, and which there are."""
    _, _, positions, _, kernel, _, in_height, in_width, height, _ = sizes
    y, x, first = offs_p, offs_p, offs_p
    if MOVES:
        y = offs_p // in_width % in_height + kernel // 2
        x = offs_p % in_width + kernel // 2
        first = offs_p // (in_height * in_width) * height
    return y, x, first, offs_p < positions


@triton.jit
def reading_at(sizes, base, tap, MOVES: tl.constexpr):
    """Output pixels that read input pixels through a tap, and whether there are any."""
    _, _, _, _, kernel, _, _, _, height, width = sizes
    y, x, pixel, inside = base
    if MOVES:
        stride = _stride(sizes, MOVES)
        y, x = y - tap // kernel, x - tap % kernel
        inside &= (y >= 0) & (x >= 0)
        if MOVES != 1:
            inside &= (y % stride == 0) & (x % stride == 0)
            y, x = y // stride, x // stride
        inside &= (y < height) & (x < width)
        pixel = (pixel + y) * width + x
    return pixel.to(tl.int64), inside
