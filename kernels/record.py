"""What kernels read of a plan: the places of its fields as compile-time values, and of pointers."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastshift.kernels.plan_records import CHAIN_FIELDS, FIELDS, FRAME_FIELDS, HEADER
from fastshift.kernels.plan_records import LINE as _LINE

LINE = tl.constexpr(_LINE)
RECORD = tl.constexpr(len(FIELDS))
FRAME = tl.constexpr(len(FRAME_FIELDS))
CHAIN = tl.constexpr(len(CHAIN_FIELDS))
BLOCK_NODES = tl.constexpr(128)  # nodes that are looked through at a time
STATISTICS = tl.constexpr(5)  # mean, unbiased variance, scale, shift, 1 / deviation

IMAGES = tl.constexpr(HEADER.index("images"))
ROW_PIXELS = tl.constexpr(HEADER.index("row_pixels"))
ROW_CHANNELS = tl.constexpr(HEADER.index("row_channels"))
OUT_PIXELS = tl.constexpr(HEADER.index("out_pixels"))
OUT_CHANNELS = tl.constexpr(HEADER.index("out_channels"))
RAW_LINES = tl.constexpr(HEADER.index("raw_lines"))
GRADIENT_LINES = tl.constexpr(HEADER.index("gradient_lines"))
STATISTICS_FLOATS = tl.constexpr(HEADER.index("statistics_floats"))
TOTALS_FLOATS = tl.constexpr(HEADER.index("totals_floats"))

ACTIVE = tl.constexpr(FIELDS.index("active"))
C_IN = tl.constexpr(FIELDS.index("c_in"))
C_OUT = tl.constexpr(FIELDS.index("c_out"))
KERNEL = tl.constexpr(FIELDS.index("kernel"))
STRIDE = tl.constexpr(FIELDS.index("stride"))
IN_HEIGHT = tl.constexpr(FIELDS.index("in_height"))
IN_WIDTH = tl.constexpr(FIELDS.index("in_width"))
OUT_HEIGHT = tl.constexpr(FIELDS.index("out_height"))
OUT_WIDTH = tl.constexpr(FIELDS.index("out_width"))
FIRST = tl.constexpr(FIELDS.index("first"))
SPLIT = tl.constexpr(FIELDS.index("split"))
LAST = tl.constexpr(FIELDS.index("last"))
Y_OFFSET = tl.constexpr(FIELDS.index("y_offset"))
RAW = tl.constexpr(FIELDS.index("raw"))
CHANNEL = tl.constexpr(FIELDS.index("channel"))
RELU = tl.constexpr(FIELDS.index("relu"))
WEIGHT = tl.constexpr(FIELDS.index("weight"))
SCALE = tl.constexpr(FIELDS.index("scale"))
SHIFT = tl.constexpr(FIELDS.index("shift"))
EPS = tl.constexpr(FIELDS.index("eps"))
GRADIENT = tl.constexpr(FIELDS.index("gradient"))
SOURCE_RAW = tl.constexpr(FIELDS.index("source_raw"))
SOURCE_CHANNEL = tl.constexpr(FIELDS.index("source_channel"))
SOURCE_RELU = tl.constexpr(FIELDS.index("source_relu"))
SOURCE_SHIFT = tl.constexpr(FIELDS.index("source_shift"))
SOURCE_GRADIENT = tl.constexpr(FIELDS.index("source_gradient"))

FRAME_ROW = tl.constexpr(FRAME_FIELDS.index("row"))
FRAME_CHANNELS = tl.constexpr(FRAME_FIELDS.index("channels"))
FRAME_CHAIN = tl.constexpr(FRAME_FIELDS.index("main_there"))  # of the first of the two
CHAIN_THERE = tl.constexpr(CHAIN_FIELDS.index("there"))
CHAIN_RAW = tl.constexpr(CHAIN_FIELDS.index("raw"))
CHAIN_CHANNEL = tl.constexpr(CHAIN_FIELDS.index("channel"))
CHAIN_RELU = tl.constexpr(CHAIN_FIELDS.index("relu"))
CHAIN_SHIFT = tl.constexpr(CHAIN_FIELDS.index("shift"))
CHAIN_C = tl.constexpr(CHAIN_FIELDS.index("c"))
CHAIN_Y_OFFSET = tl.constexpr(CHAIN_FIELDS.index("y_offset"))


class Forward(NamedTuple):
    """Buffers of the forward pass.

    Attributes:
        rows: of the level above, `[R, N, H, W, C]`.
        parent, choice: of each node, `[M]` int32; a choice below 0 is no node.
        table, frames, addresses: of the plan and of the parameters.
        raw: hidden rows, `[M, raw_lines * LINE]`.
        statistics: `[M, statistics_floats]` float32.
        partial: float32, what programs leave for the last of them.
        counters: int32, zeros at first; a launch has its own.
        out: the nodes' rows, `[M, N, H', W', C']`.
    """

    rows: Any
    parent: Any
    choice: Any
    table: Any
    frames: Any
    addresses: Any
    raw: Any
    statistics: Any
    partial: Any
    counters: Any
    out: Any


class Backward(NamedTuple):
    """Buffers of the backward pass; those of the forward pass but its results, and these.

    Attributes:
        destinations: `[parameters]` int64, where their gradients go.
        totals: `[M, totals_floats]` float32.
        d_out: gradient of the nodes' rows.
        gradient: of hidden rows behind their activations, `[M, gradient_lines * LINE]`.
        sums: of the rows' gradients so far, `[R, N, H, W, C]`, float32 or the rows' type.
        d_rows: where the sums go.
        partial_weights: float32, as `partial`.
    """

    rows: Any
    parent: Any
    choice: Any
    table: Any
    frames: Any
    addresses: Any
    raw: Any
    statistics: Any
    partial: Any
    counters: Any
    destinations: Any
    totals: Any
    d_out: Any
    gradient: Any
    sums: Any
    d_rows: Any
    partial_weights: Any


@triton.jit
def parameter_at(addresses, index, ALIGN: tl.constexpr = 16):
    """Where a float32 tensor begins; the first one's place for an index of -1, not to be read.

    Tensors begin at multiples of `ALIGN` bytes: of 16 where they are `addresses.plain`.
    """
    address = tl.multiple_of(tl.load(addresses + tl.maximum(index, 0)), ALIGN)
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN)


@triton.jit
def reads_odd(record, SPLITS: tl.constexpr):
    """Whether a unit reads every other channel of a row; looked at only where some unit does."""
    odd = False
    if SPLITS:
        odd = tl.load(record + SPLIT) != 0
    return odd


@triton.jit
def node_span(values, value, nodes, BLOCK: tl.constexpr):
    """The first node with this value in its buffer, and the one behind the last."""
    first, stop = nodes, nodes * 0
    for start in range(0, nodes, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        found = tl.load(values + offs, mask=offs < nodes, other=-1) == value
        first = tl.minimum(first, tl.min(tl.where(found, offs, nodes)))
        stop = tl.maximum(stop, tl.max(tl.where(found, offs + 1, 0)))
    return first, stop


@triton.jit
def sized(record, FIELD: tl.constexpr, ALIGN: tl.constexpr):
    """A number of channels, known to be a multiple."""
    return tl.multiple_of(tl.load(record + FIELD), ALIGN)


@triton.jit
def statistics_of(b, node):
    """Where a node's statistics begin."""
    return b.statistics + tl.cast(node, tl.int64) * tl.load(b.table + STATISTICS_FLOATS)


@triton.jit
def totals_of(b, node):
    """Where a node's totals begin."""
    return b.totals + tl.cast(node, tl.int64) * tl.load(b.table + TOTALS_FLOATS)


@triton.jit
def raw_of(b, node, lines):
    """Where a unit's raw rows begin, its place given in lines."""
    return b.raw + (tl.cast(node, tl.int64) * tl.load(b.table + RAW_LINES) + lines) * LINE


@triton.jit
def gradient_of(b, node, lines):
    """Where the gradient of a unit's activations begins, its place given in lines."""
    own = tl.cast(node, tl.int64) * tl.load(b.table + GRADIENT_LINES) + lines
    return b.gradient + own * LINE


@triton.jit
def source_of(b, record, node, ALIGN: tl.constexpr):
    """Where the rows that a unit reads begin, and elements from one pixel to the next."""
    channels = sized(b.table, ROW_CHANNELS, ALIGN)
    first = tl.load(record + FIRST)
    size = tl.load(b.table + ROW_PIXELS).to(tl.int64) * channels
    if first:
        x_ptr = b.rows + tl.load(b.parent + node) * size
    else:
        x_ptr = raw_of(b, node, tl.load(record + SOURCE_RAW))
    stride = tl.where(first != 0, channels, sized(record, C_IN, ALIGN))
    return x_ptr, tl.multiple_of(stride, ALIGN)


@triton.jit
def d_y_of(b, record, node, ALIGN: tl.constexpr):
    """Where the gradient of a unit's output begins, and elements from one pixel to the next."""
    channels = sized(b.table, OUT_CHANNELS, ALIGN)
    last = tl.load(record + LAST)
    size = tl.load(b.table + OUT_PIXELS).to(tl.int64) * channels
    if last:
        g_ptr = b.d_out + (tl.cast(node, tl.int64) * size + sized(record, Y_OFFSET, ALIGN))
    else:
        g_ptr = gradient_of(b, node, tl.load(record + GRADIENT))
    stride = tl.where(last != 0, channels, sized(record, C_OUT, ALIGN))
    return g_ptr, tl.multiple_of(stride, ALIGN)
