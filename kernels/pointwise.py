"""Pointwise and dense convolutions as matrix products: a tile of each of the three.

    raw[p, o] = sum over taps and i of x[p', i] * w[o, i, tap]
    d_x[p', i] = sum over taps and o of d_raw[p, o] * w[o, i, tap]
    d_w[o, i, tap] = sum over nodes and p of d_raw[p, o] * x[p', i]

`x` is made of raw rows as it is read (the batch norm and activation of the unit before), `d_raw` of
the gradient and the raw rows (batch norm's backward), so neither is ever stored. Operands have the
rows' type, sums are float32. `convolution` and `convolution_gradients` have the launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.norm import (
    is_last,
    load_d_norm,
    load_d_raw,
    load_input,
    load_source_norm,
    store_gradient,
    store_norm_gradients,
)
from fastshift.kernels.pixels import read_at, read_base, reading_at, reading_base, sizes_of
from fastshift.kernels.record import (
    ACTIVE,
    BLOCK_NODES,
    LAST,
    RAW,
    RECORD,
    RELU,
    SOURCE_RELU,
    WEIGHT,
    d_y_of,
    node_span,
    parameter_at,
    raw_of,
    reads_odd,
    source_of,
)

__all__ = ["product", "product_d_input", "product_d_weight"]


@triton.jit
def _multiply(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    a, b = a.to(DTYPE), b.to(DTYPE)
    if UPCAST:  # rounded to the operands' type, but multiplied in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _taps(sizes, MOVES: tl.constexpr):
    taps = 1
    if MOVES:
        taps = sizes[4] * sizes[4]
    return taps


@triton.jit
def product(
    b,
    record,
    node,
    sizes,
    x_ptr,
    x_stride,
    offs_p,
    offs_o,
    PART: tl.constexpr,
    CONTINUES: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Raw rows `[P, O]` of some output pixels and channels."""
    c_in, c_out = sizes[0], sizes[1]
    mask_o = (offs_o < c_out)[None, :]
    taps = _taps(sizes, MOVES)
    relu = tl.load(record + SOURCE_RELU)
    w_ptr = parameter_at(b.addresses, tl.load(record + WEIGHT))
    w_ptr += (offs_o.to(tl.int64) * (c_in * taps))[None, :]
    base = read_base(sizes, offs_p, MOVES)
    acc = tl.zeros([offs_p.shape[0], offs_o.shape[0]], tl.float32)
    for tap in range(taps):
        pixel, inside = read_at(sizes, base, tap, MOVES)
        for k in range(0, c_in, BLOCK_K):
            offs_i = k + tl.arange(0, BLOCK_K)
            mask_i = offs_i < c_in
            norm = 0
            if CONTINUES:
                norm = load_source_norm(b, record, node, c_in, offs_i, mask_i)
            x = load_input(
                x_ptr, x_stride, pixel, inside, k, c_in, norm, relu, BLOCK_K, PART, CONTINUES
            )
            mask = mask_i[:, None] & mask_o
            w = tl.load(w_ptr + (offs_i * taps + tap)[:, None], mask=mask, other=0.0)
            acc = _multiply(x, w, acc, b.raw.dtype.element_ty, PRECISION, UPCAST)
    return acc


@triton.jit
def product_d_input(
    acc,
    b,
    record,
    node,
    offs_p,
    offs_i,
    mask_i,
    MOVES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the gradient `[P, I]` of what a unit reads at some input pixels and channels."""
    sizes = sizes_of(b, record, ALIGN)
    c_in, c_out, positions = sizes[0], sizes[1], sizes[3]
    taps = _taps(sizes, MOVES)
    g_ptr, g_stride = d_y_of(b, record, node, ALIGN)
    raw_ptr = raw_of(b, node, tl.load(record + RAW))
    masks = tl.load(record + RELU) * tl.load(record + LAST)
    w_ptr = parameter_at(b.addresses, tl.load(record + WEIGHT))
    base = reading_base(sizes, offs_p, MOVES)
    for tap in range(taps):
        pixel, inside = reading_at(sizes, base, tap, MOVES)
        w_at = w_ptr + (offs_i * taps + tap)[None, :]
        for k in range(0, c_out, BLOCK_K):
            offs_o = k + tl.arange(0, BLOCK_K)
            mask_o = offs_o < c_out
            d_norm = load_d_norm(b, record, node, positions, c_out, offs_o, mask_o)
            mask = inside[:, None] & mask_o[None, :]
            d_raw = load_d_raw(g_ptr, g_stride, raw_ptr, c_out, pixel, offs_o, mask, d_norm, masks)
            mask = mask_o[:, None] & mask_i[None, :]
            offs_w = (offs_o.to(tl.int64) * (c_in * taps))[:, None]
            w = tl.load(w_at + offs_w, mask=mask, other=0.0)
            acc = _multiply(d_raw, w, acc, b.raw.dtype.element_ty, PRECISION, UPCAST)
    return acc


@triton.jit
def _sum_d_weight(
    b,
    record,
    sizes,
    choice,
    begin,
    stop,
    first_pixel,
    stop_pixel,
    tap,
    offs_o,
    first_i,
    BLOCK_I: tl.constexpr,
    PART: tl.constexpr,
    CONTINUES: tl.constexpr,
    MOVES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Of all nodes of a choice, in their order, and a range of their pixels: `[O, I]`."""
    c_in, c_out, positions = sizes[0], sizes[1], sizes[3]
    offs_i = first_i + tl.arange(0, BLOCK_I)
    mask_o, mask_i = offs_o < c_out, offs_i < c_in
    relu = tl.load(record + SOURCE_RELU)
    masks = tl.load(record + RELU) * tl.load(record + LAST)
    acc = tl.zeros([offs_o.shape[0], BLOCK_I], tl.float32)
    for node in range(begin, stop):
        if tl.load(b.choice + node) == choice:
            x_ptr, x_stride = source_of(b, record, node, ALIGN)
            g_ptr, g_stride = d_y_of(b, record, node, ALIGN)
            raw_ptr = raw_of(b, node, tl.load(record + RAW))
            d_norm = load_d_norm(b, record, node, positions, c_out, offs_o, mask_o)
            norm = 0
            if CONTINUES:
                norm = load_source_norm(b, record, node, c_in, offs_i, mask_i)
            for start in range(first_pixel, stop_pixel, BLOCK_D):
                offs_p = start + tl.arange(0, BLOCK_D)
                own = offs_p < stop_pixel
                d_raw = load_d_raw(
                    g_ptr, g_stride, raw_ptr, c_out, offs_p.to(tl.int64), offs_o,
                    own[:, None] & mask_o[None, :], d_norm, masks,
                )  # fmt: skip
                pixel, inside = read_at(sizes, read_base(sizes, offs_p, MOVES), tap, MOVES)
                x = load_input(
                    x_ptr, x_stride, pixel, own & inside, first_i, c_in, norm, relu,
                    BLOCK_I, PART, CONTINUES,
                )  # fmt: skip
                acc = _multiply(tl.trans(d_raw), x, acc, b.raw.dtype.element_ty, PRECISION, UPCAST)
    return acc


@triton.jit
def product_d_weight(
    b,
    program,
    first,
    nodes,
    splits,
    o_tiles,
    i_tiles,
    taps_most,
    counters,
    LANES: tl.constexpr,
    MOVES: tl.constexpr,
    SPLITS: tl.constexpr,
    CONTINUES: tl.constexpr,
    ADDS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Programs `(choice and lane, tap, tiles of output and input channels, share of pixels)`."""
    split, place = program % splits, program // splits
    i_tile, rest = place % i_tiles, place // i_tiles
    o_tile, rest = rest % o_tiles, rest // o_tiles
    tap, slot = rest % taps_most, rest // taps_most
    record = b.table + first + slot * RECORD
    if tl.load(record + ACTIVE) != 0:
        sizes = sizes_of(b, record, ALIGN)
        c_in, c_out, positions = sizes[0], sizes[1], sizes[3]
        taps = _taps(sizes, MOVES)
        choice = slot // LANES
        begin, stop = node_span(b.choice, choice, nodes, BLOCK_NODES)
        share = tl.maximum(tl.cdiv(tl.cdiv(positions, BLOCK_D), splits), 1) * BLOCK_D
        # A choice without nodes has zeros, which one program knows.
        parts = tl.where(begin < stop, tl.cdiv(positions, share), 1)
        there = (i_tile * BLOCK_I < c_in) & (o_tile * BLOCK_O < c_out) & (tap < taps)
        if there & (split < parts):
            offs_o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
            offs_i = i_tile * BLOCK_I + tl.arange(0, BLOCK_I)
            mask_o, mask_i = offs_o < c_out, offs_i < c_in
            low = split * share
            high = tl.minimum(low + share, positions)
            if reads_odd(record, SPLITS):
                acc = _sum_d_weight(
                    b, record, sizes, choice, begin, stop, low, high, tap, offs_o,
                    i_tile * BLOCK_I, BLOCK_I, 1, False, MOVES, ALIGN, BLOCK_D,
                    PRECISION, UPCAST,
                )  # fmt: skip
            else:
                acc = _sum_d_weight(
                    b, record, sizes, choice, begin, stop, low, high, tap, offs_o,
                    i_tile * BLOCK_I, BLOCK_I, 2, CONTINUES, MOVES, ALIGN, BLOCK_D,
                    PRECISION, UPCAST,
                )  # fmt: skip
            if (split == 0) & (tap == 0) & (i_tile == 0):
                store_norm_gradients(b, record, choice, begin, stop, offs_o, mask_o, ADDS)
            inner = tl.arange(0, BLOCK_O)[:, None] * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
            partial = b.partial_weights + place.to(tl.int64) * splits * (BLOCK_O * BLOCK_I) + inner
            tl.store(partial + split * (BLOCK_O * BLOCK_I), acc)
            if is_last(b.counters + counters + place, parts):
                total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
                for part in range(parts):
                    total += tl.load(partial + part * (BLOCK_O * BLOCK_I), cache_modifier=".cg")
                to = parameter_at(b.destinations, tl.load(record + WEIGHT))
                to += (offs_o.to(tl.int64) * (c_in * taps))[:, None] + (offs_i * taps + tap)[
                    None, :
                ]
                store_gradient(to, total, mask_o[:, None] & mask_i[None, :], ADDS)
