"""Which pixels a convolution's taps join, and the share of a row that a program has."""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.record import (
    IMAGES,
    IN_HEIGHT,
    IN_WIDTH,
    KERNEL,
    OUT_HEIGHT,
    OUT_WIDTH,
    STRIDE,
)


@triton.jit
def in_pixels(b, record):
    """Of the rows that a unit reads."""
    return tl.load(b.table + IMAGES) * tl.load(record + IN_HEIGHT) * tl.load(record + IN_WIDTH)


@triton.jit
def out_pixels(b, record):
    """Of the rows that a unit writes."""
    return tl.load(b.table + IMAGES) * tl.load(record + OUT_HEIGHT) * tl.load(record + OUT_WIDTH)


@triton.jit
def pixels_read(b, record, offs_p, tap, MOVES: tl.constexpr):
    """Pixels that output pixels read through a tap, and whether they are inside of the image."""
    height, width = tl.load(record + OUT_HEIGHT), tl.load(record + OUT_WIDTH)
    inside = offs_p < out_pixels(b, record)
    pixel = offs_p
    if MOVES:
        kernel, stride = tl.load(record + KERNEL), tl.load(record + STRIDE)
        in_height, in_width = tl.load(record + IN_HEIGHT), tl.load(record + IN_WIDTH)
        y = offs_p // width % height * stride + tap // kernel - kernel // 2
        x = offs_p % width * stride + tap % kernel - kernel // 2
        inside &= (y >= 0) & (y < in_height) & (x >= 0) & (x < in_width)
        pixel = (offs_p // (height * width) * in_height + y) * in_width + x
    return pixel.to(tl.int64), inside


@triton.jit
def pixels_reading(b, record, offs_p, tap, MOVES: tl.constexpr):
    """Output pixels that read input pixels through a tap, and whether there are any."""
    in_height, in_width = tl.load(record + IN_HEIGHT), tl.load(record + IN_WIDTH)
    inside = offs_p < in_pixels(b, record)
    pixel = offs_p
    if MOVES:
        kernel, stride = tl.load(record + KERNEL), tl.load(record + STRIDE)
        height, width = tl.load(record + OUT_HEIGHT), tl.load(record + OUT_WIDTH)
        y = offs_p // in_width % in_height + kernel // 2 - tap // kernel
        x = offs_p % in_width + kernel // 2 - tap % kernel
        inside &= (y >= 0) & (x >= 0) & (y % stride == 0) & (x % stride == 0)
        y, x = y // stride, x // stride
        inside &= (y < height) & (x < width)
        pixel = (offs_p // (in_height * in_width) * height + y) * width + x
    return pixel.to(tl.int64), inside
