"""The gradients of one convolution of every node of a level, in one launch.

Programs of the first range compute the gradients of nodes' hidden rows, masked by the ReLU before,
and their totals for its batch norm; those of the second the gradients of parents' rows, what frames
pass on among them, each summed over its nodes in their order by the one program that owns a tile;
those of the third the weights' gradients. No atomics but counters: results repeat to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.depthwise import depthwise_d_input, depthwise_d_weight
from fastshift.kernels.frames import add_passed
from fastshift.kernels.norm import (
    finish_totals,
    is_last,
    load_source_norm,
    normalise,
)
from fastshift.kernels.pixels import sizes_of
from fastshift.kernels.pointwise import product_d_input, product_d_weight
from fastshift.kernels.record import (
    ACTIVE,
    BLOCK_NODES,
    C_IN,
    FIRST,
    RECORD,
    ROW_CHANNELS,
    ROW_PIXELS,
    SOURCE_CHANNEL,
    SOURCE_GRADIENT,
    SOURCE_RAW,
    SOURCE_RELU,
    gradient_of,
    node_span,
    raw_of,
    reads_odd,
    sized,
    totals_of,
)

__all__ = ["convolution_bwd_kernel"]


@triton.jit
def _add_d_input(
    acc,
    b,
    record,
    node,
    offs_p,
    offs_c,
    mask_c,
    DEPTHWISE: tl.constexpr,
    MOVES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    if DEPTHWISE:
        acc = depthwise_d_input(acc, b, record, node, offs_p, offs_c, mask_c, MOVES, ALIGN)
    else:
        acc = product_d_input(
            acc, b, record, node, offs_p, offs_c, mask_c,
            MOVES, ALIGN, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    return acc


@triton.jit
def _node_gradient(
    b,
    program,
    first,
    width,
    chunk,
    parts,
    tiles,
    counters,
    LANES: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    MOVES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Programs `(node and lane, tile of input channels, part of the pixels)`."""
    part, place = program % parts, program // parts
    tile, item = place % tiles, place // tiles
    node = item // LANES
    choice = tl.load(b.choice + node)
    record = b.table + first + (tl.maximum(choice, 0) * LANES + item % LANES) * RECORD
    sizes = sizes_of(b, record, ALIGN)
    c_in, positions = sizes[0], sizes[2]
    begin = part * chunk * BLOCK_P
    there = (choice >= 0) & (tl.load(record + ACTIVE) != 0) & (tl.load(record + FIRST) == 0)
    if there & (begin < positions) & (tile * BLOCK_C < c_in):
        offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < c_in
        x_ptr = raw_of(b, node, tl.load(record + SOURCE_RAW))
        to = gradient_of(b, node, tl.load(record + SOURCE_GRADIENT))
        relu = tl.load(record + SOURCE_RELU)
        norm = load_source_norm(b, record, node, c_in, offs_c, mask_c)
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        along = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in range(begin, tl.minimum(begin + chunk * BLOCK_P, positions), BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            acc = _add_d_input(
                acc, b, record, node, offs_p, offs_c, mask_c,
                DEPTHWISE, MOVES, ALIGN, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            mask = (offs_p < positions)[:, None] & mask_c[None, :]
            at = offs_p.to(tl.int64)[:, None] * c_in + offs_c[None, :]
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            stops = (normalise(x, norm) <= 0.0) & (relu != 0)
            g = tl.where(stops | (not mask), 0.0, acc).to(b.gradient.dtype.element_ty)
            tl.store(to + at, g, mask=mask)
            g = g.to(tl.float32)
            total += g
            along += g * (x - norm[0])
        partial = b.partial + item.to(tl.int64) * parts * 2 * width
        at = partial + part * 2 * width + offs_c
        tl.store(at, tl.sum(total, 0), mask=mask_c)
        tl.store(at + width, tl.sum(along, 0), mask=mask_c)
        own_parts = tl.cdiv(positions, chunk * BLOCK_P)
        if is_last(b.counters + counters + place, own_parts):
            totals = totals_of(b, node) + 2 * tl.load(record + SOURCE_CHANNEL)
            finish_totals(totals, partial, own_parts, width, c_in, offs_c, mask_c)


@triton.jit
def _row_gradient(
    b,
    program,
    first,
    nodes,
    chunk,
    parts,
    tiles,
    LANES: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    MOVES: tl.constexpr,
    SPLITS: tl.constexpr,
    STARTS: tl.constexpr,
    PASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Programs `(row, tile of its channels, part of the pixels)`; adds to the sums so far.

    The first launch that has such programs (`STARTS`) begins with what nodes' frames pass on.
    """
    part, place = program % parts, program // parts
    tile, row = place % tiles, place // tiles
    channels = sized(b.table, ROW_CHANNELS, ALIGN)
    positions = tl.load(b.table + ROW_PIXELS)
    offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    place_of_row = row.to(tl.int64) * positions * channels
    begin_node, stop_node = node_span(b.parent, row, nodes, BLOCK_NODES)
    begin = part * chunk * BLOCK_P
    for start in range(begin, tl.minimum(begin + chunk * BLOCK_P, positions), BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < positions)[:, None] & (offs_c < channels)[None, :]
        at = place_of_row + (offs_p.to(tl.int64)[:, None] * channels + offs_c[None, :])
        if STARTS:
            acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        else:
            acc = tl.load(b.sums + at, mask=mask, other=0.0).to(tl.float32)
        for node in range(begin_node, stop_node):
            choice = tl.load(b.choice + node)
            if (tl.load(b.parent + node) == row) & (choice >= 0):
                if STARTS and PASSES > 0:
                    acc = add_passed(
                        acc, b, node, choice, offs_p.to(tl.int64), offs_p < positions, tile,
                        channels, PASSES, ALIGN, BLOCK_P, BLOCK_C,
                    )  # fmt: skip
                for lane in tl.static_range(LANES):
                    record = b.table + first + (choice * LANES + lane) * RECORD
                    if (tl.load(record + ACTIVE) != 0) & (tl.load(record + FIRST) != 0):
                        if reads_odd(record, SPLITS):
                            # Odd channels alone have a gradient; side by side they are read in
                            # whole vectors.
                            offs_h = tile * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
                            odd = tl.zeros([BLOCK_P, BLOCK_C // 2], tl.float32)
                            odd = _add_d_input(
                                odd, b, record, node, offs_p, offs_h,
                                offs_h < sized(record, C_IN, ALIGN),
                                DEPTHWISE, MOVES, ALIGN, BLOCK_K, PRECISION, UPCAST,
                            )  # fmt: skip
                            pairs = tl.join(tl.zeros_like(odd), odd)
                            acc += tl.reshape(pairs, (BLOCK_P, BLOCK_C))
                        else:
                            acc = _add_d_input(
                                acc, b, record, node, offs_p, offs_c, offs_c < channels,
                                DEPTHWISE, MOVES, ALIGN, BLOCK_K, PRECISION, UPCAST,
                            )  # fmt: skip
        tl.store(b.d_rows + at, acc.to(b.d_rows.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "first", "nodes", "width", "chunk", "parts", "tiles", "row_tiles", "node_programs",
        "row_programs", "splits", "o_tiles", "i_tiles", "taps_most", "counters",
    ]
)  # fmt: skip
def convolution_bwd_kernel(
    b,
    first,
    nodes,
    width,
    chunk,
    parts,
    tiles,
    row_tiles,
    node_programs,
    row_programs,
    splits,
    o_tiles,
    i_tiles,
    taps_most,
    counters,
    LANES: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    MOVES: tl.constexpr,
    ENTERS: tl.constexpr,
    STARTS: tl.constexpr,
    PASSES: tl.constexpr,
    SPLITS: tl.constexpr,
    CONTINUES: tl.constexpr,
    ADDS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the gradients of what a step's units read, and of their parameters.

    Args:
        b: `Backward`.
        first, width, chunk, parts: as forward, of the pixels that are read.
        nodes: how many, padding among them.
        tiles, row_tiles: of `BLOCK_C` channels, in nodes' hidden rows and in parents' rows.
        node_programs, row_programs: of the first two ranges; the rest is for weights.
        splits: shares of a node's pixels in a weight's gradient.
        o_tiles, i_tiles, taps_most: of a weight, `BLOCK_O` and `BLOCK_I` channels each.
        counters: where the launch's own begin, the first range's and then the third's.
        ENTERS: whether gradients of parents' rows are wanted, and some unit reads one.
        STARTS: whether no launch before has added to these.
        PASSES: what goes to them straight from nodes' gradients, which that launch adds.
        ADDS: whether parameters' gradients are added to what is there.
        BLOCK_D: pixels of a step of a weight's sum.
    """
    program = tl.program_id(0)
    if program < node_programs:
        if CONTINUES:
            _node_gradient(
                b, program, first, width, chunk, parts, tiles, counters, LANES, DEPTHWISE, MOVES,
                ALIGN, BLOCK_P, BLOCK_C, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
    elif program < node_programs + row_programs:
        if ENTERS:
            _row_gradient(
                b, program - node_programs, first, nodes, chunk, parts, row_tiles, LANES,
                DEPTHWISE, MOVES, SPLITS, STARTS, PASSES, ALIGN, BLOCK_P, BLOCK_C, BLOCK_K,
                PRECISION, UPCAST,
            )  # fmt: skip
    else:
        program -= node_programs + row_programs
        counters += node_programs // parts
        if DEPTHWISE:
            depthwise_d_weight(
                b, program, first, nodes, splits, o_tiles, taps_most, counters, LANES, MOVES,
                SPLITS, CONTINUES, ADDS, ALIGN, BLOCK_O, BLOCK_D,
            )  # fmt: skip
        else:
            product_d_weight(
                b, program, first, nodes, splits, o_tiles, i_tiles, taps_most, counters, LANES,
                MOVES, SPLITS, CONTINUES, ADDS, ALIGN, BLOCK_O, BLOCK_I, BLOCK_D, PRECISION, UPCAST,
            )  # fmt: skip
