"""One convolution of every node of a level in one launch (`convolution_gradients` has the reverse).

Programs `(node and lane, part of the pixels)` x `tile of output channels` write raw rows and leave
the moments of theirs; the last one for a node's channels makes the statistics. No atomics but
counters: results repeat to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.depthwise import depthwise
from fastshift.kernels.norm import (
    add_moments,
    finish_moments,
    is_last,
    merge_moments,
)
from fastshift.kernels.pixels import sizes_of
from fastshift.kernels.pointwise import product
from fastshift.kernels.record import (
    ACTIVE,
    RAW,
    RECORD,
    raw_of,
    reads_odd,
    source_of,
)

__all__ = ["convolution_fwd_kernel"]


@triton.jit
def _raw_tile(
    b,
    record,
    node,
    sizes,
    x_ptr,
    x_stride,
    offs_p,
    first_c,
    PART: tl.constexpr,
    CONTINUES: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    if DEPTHWISE:
        acc = depthwise(
            b, record, node, sizes, x_ptr, x_stride, offs_p, first_c,
            BLOCK_C, PART, CONTINUES, MOVES,
        )  # fmt: skip
    else:
        acc = product(
            b, record, node, sizes, x_ptr, x_stride, offs_p, first_c + tl.arange(0, BLOCK_C),
            PART, CONTINUES, MOVES, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["first", "width", "chunk", "parts", "tiles", "counters"])
def convolution_fwd_kernel(
    b,
    first,
    width,
    chunk,
    parts,
    tiles,
    counters,
    LANES: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    MOVES: tl.constexpr,
    SPLITS: tl.constexpr,
    CONTINUES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the raw rows of a step's units, and their statistics.

    Args:
        b: `Forward`.
        first: where the step's records begin in the table.
        width: channels that a partial result has room for.
        chunk: tiles of `BLOCK_P` pixels that a program has.
        parts: programs for a node's pixels, at most.
        tiles: of `BLOCK_C` channels; those of the same pixels follow each other, and find what they
            read in a cache.
        counters: where the launch's own begin.
        LANES: units that a node may have in this step.
        DEPTHWISE, MOVES, SPLITS, CONTINUES: as the step.
        ALIGN: divides every number of channels.
        PRECISION: `tl.dot`'s.
        UPCAST: whether operands are multiplied in float32, which the interpreter needs of bfloat16.
    """
    tile, place = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part_index, item = place % parts, place // parts
    node = item // LANES
    choice = tl.load(b.choice + node)
    if choice < 0:
        return
    record = b.table + first + (choice * LANES + item % LANES) * RECORD
    if tl.load(record + ACTIVE) == 0:
        return
    sizes = sizes_of(b, record, ALIGN)
    c_out, positions = sizes[1], sizes[3]
    begin = part_index * chunk * BLOCK_P
    first_c = tile * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c_out
    if (begin >= positions) | (first_c >= c_out):
        return
    x_ptr, x_stride = source_of(b, record, node, ALIGN)
    y_ptr = raw_of(b, node, tl.load(record + RAW))
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    stop = tl.minimum(begin + chunk * BLOCK_P, positions)
    for start in range(begin, stop, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        if reads_odd(record, SPLITS):
            acc = _raw_tile(
                b, record, node, sizes, x_ptr, x_stride, offs_p, first_c, 1, False,
                DEPTHWISE, MOVES, BLOCK_C, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            acc = _raw_tile(
                b, record, node, sizes, x_ptr, x_stride, offs_p, first_c, 2, CONTINUES,
                DEPTHWISE, MOVES, BLOCK_C, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
        inside = offs_p < positions
        # Statistics are those of what is stored, and will be read.
        y = acc.to(b.raw.dtype.element_ty)
        at = y_ptr + (offs_p.to(tl.int64)[:, None] * c_out + offs_c[None, :])
        tl.store(at, y, mask=inside[:, None] & mask_c[None, :])
        tiles_so_far = (start - begin) // BLOCK_P + 1
        mean, square = add_moments(mean, square, y.to(tl.float32), inside, tiles_so_far)
    mean, square = merge_moments(mean, square, tl.arange(0, BLOCK_P), stop - begin, BLOCK_P)
    partial = b.partial + item.to(tl.int64) * parts * 2 * width
    to = partial + part_index * 2 * width + offs_c
    tl.store(to, mean, mask=mask_c)
    tl.store(to + width, square, mask=mask_c)
    part = chunk * BLOCK_P
    counter = b.counters + counters + item * tiles + tile
    if is_last(counter, tl.cdiv(positions, part)):
        finish_moments(
            b, record, node, sizes, partial, tl.cdiv(positions, part), width, part, offs_c, mask_c
        )
