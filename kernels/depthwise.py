"""Depthwise convolutions: a tile of each of the three.

    raw[p, c] = sum over taps of x[p', c] * w[c, tap]
    d_x[p', c] = sum over taps of d_raw[p, c] * w[c, tap]
    d_w[c, tap] = sum over nodes and p of d_raw[p, c] * x[p', c]

`x` and `d_raw` are made as they are read, as in `pointwise`; taps read neighbours from cache. Any
odd kernel and any stride, each node its own. A program of a weight's gradient has one tap of some
channels, and adds over its pixels once, behind all of them. `convolution` and
`convolution_gradients` have the launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.norm import (
    BLOCK_PARTS,
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

__all__ = ["depthwise", "depthwise_d_input", "depthwise_d_weight"]


@triton.jit
def depthwise(
    b,
    record,
    node,
    sizes,
    x_ptr,
    x_stride,
    offs_p,
    first_c,
    BLOCK_C: tl.constexpr,
    PART: tl.constexpr,
    CONTINUES: tl.constexpr,
    MOVES: tl.constexpr,
):
    """Raw rows `[P, C]` of some output pixels and channels."""
    c, kernel = sizes[1], sizes[4]
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    relu = tl.load(record + SOURCE_RELU)
    norm = 0
    if CONTINUES:
        norm = load_source_norm(b, record, node, c, offs_c, mask_c)
    w_ptr = parameter_at(b.addresses, tl.load(record + WEIGHT))
    w_ptr += offs_c.to(tl.int64) * (kernel * kernel)
    base = read_base(sizes, offs_p, MOVES)
    acc = tl.zeros([offs_p.shape[0], BLOCK_C], tl.float32)
    for tap in range(kernel * kernel):
        pixel, inside = read_at(sizes, base, tap, MOVES)
        x = load_input(
            x_ptr, x_stride, pixel, inside, first_c, c, norm, relu, BLOCK_C, PART, CONTINUES
        )
        w = tl.load(w_ptr + tap, mask=mask_c, other=0.0)
        acc += x * w[None, :]
    return acc


@triton.jit
def depthwise_d_input(
    acc, b, record, node, offs_p, offs_c, mask_c, MOVES: tl.constexpr, ALIGN: tl.constexpr
):
    """Add the gradient `[P, C]` of what a unit reads at some input pixels and channels."""
    sizes = sizes_of(b, record, ALIGN)
    c, positions, kernel = sizes[1], sizes[3], sizes[4]
    g_ptr, g_stride = d_y_of(b, record, node, ALIGN)
    raw_ptr = raw_of(b, node, tl.load(record + RAW))
    masks = tl.load(record + RELU) * tl.load(record + LAST)
    d_norm = load_d_norm(b, record, node, positions, c, offs_c, mask_c)
    w_ptr = parameter_at(b.addresses, tl.load(record + WEIGHT))
    w_ptr += offs_c.to(tl.int64) * (kernel * kernel)
    base = reading_base(sizes, offs_p, MOVES)
    for tap in range(kernel * kernel):
        pixel, inside = reading_at(sizes, base, tap, MOVES)
        mask = inside[:, None] & mask_c[None, :]
        d_raw = load_d_raw(g_ptr, g_stride, raw_ptr, c, pixel, offs_c, mask, d_norm, masks)
        w = tl.load(w_ptr + tap, mask=mask_c, other=0.0)
        acc += d_raw * w[None, :]
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
    first_c,
    BLOCK_C: tl.constexpr,
    PART: tl.constexpr,
    CONTINUES: tl.constexpr,
    MOVES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of all nodes of a choice, in their order, and a range of their pixels: `[C]`."""
    c, positions = sizes[1], sizes[3]
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    relu = tl.load(record + SOURCE_RELU)
    masks = tl.load(record + RELU) * tl.load(record + LAST)
    acc = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for node in range(begin, stop):
        if tl.load(b.choice + node) == choice:
            x_ptr, x_stride = source_of(b, record, node, ALIGN)
            g_ptr, g_stride = d_y_of(b, record, node, ALIGN)
            raw_ptr = raw_of(b, node, tl.load(record + RAW))
            d_norm = load_d_norm(b, record, node, positions, c, offs_c, mask_c)
            norm = 0
            if CONTINUES:
                norm = load_source_norm(b, record, node, c, offs_c, mask_c)
            for start in range(first_pixel, stop_pixel, BLOCK_D):
                offs_p = start + tl.arange(0, BLOCK_D)
                pixel, inside = read_at(sizes, read_base(sizes, offs_p, MOVES), tap, MOVES)
                inside &= offs_p < stop_pixel
                d_raw = load_d_raw(
                    g_ptr, g_stride, raw_ptr, c, offs_p.to(tl.int64), offs_c,
                    inside[:, None] & mask_c[None, :], d_norm, masks,
                )  # fmt: skip
                acc += d_raw * load_input(
                    x_ptr, x_stride, pixel, inside, first_c, c, norm, relu,
                    BLOCK_C, PART, CONTINUES,
                )  # fmt: skip
    return tl.sum(acc, 0)


@triton.jit
def depthwise_d_weight(
    b,
    program,
    first,
    nodes,
    splits,
    tiles,
    taps_most,
    counters,
    LANES: tl.constexpr,
    MOVES: tl.constexpr,
    SPLITS: tl.constexpr,
    CONTINUES: tl.constexpr,
    ADDS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Programs `(choice and lane, tap, tile of channels, share of the pixels)`."""
    split, place = program % splits, program // splits
    tile, rest = place % tiles, place // tiles
    tap, slot = rest % taps_most, rest // taps_most
    record = b.table + first + slot * RECORD
    if tl.load(record + ACTIVE) != 0:
        sizes = sizes_of(b, record, ALIGN)
        c_out, positions, kernel = sizes[1], sizes[3], sizes[4]
        taps = kernel * kernel
        choice = slot // LANES
        begin, stop = node_span(b.choice, choice, nodes, BLOCK_NODES)
        share = tl.maximum(tl.cdiv(tl.cdiv(positions, BLOCK_D), splits), 1) * BLOCK_D
        # A choice without nodes has zeros, which one program knows.
        parts = tl.where(begin < stop, tl.cdiv(positions, share), 1)
        first_c = tile * BLOCK_C
        if (first_c < c_out) & (tap < taps) & (split < parts):
            offs_c = first_c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < c_out
            low = split * share
            high = tl.minimum(low + share, positions)
            if reads_odd(record, SPLITS):
                acc = _sum_d_weight(
                    b, record, sizes, choice, begin, stop, low, high, tap, first_c,
                    BLOCK_C, 1, False, MOVES, ALIGN, BLOCK_D,
                )  # fmt: skip
            else:
                acc = _sum_d_weight(
                    b, record, sizes, choice, begin, stop, low, high, tap, first_c,
                    BLOCK_C, 2, CONTINUES, MOVES, ALIGN, BLOCK_D,
                )  # fmt: skip
            if (split == 0) & (tap == 0):
                store_norm_gradients(b, record, choice, begin, stop, offs_c, mask_c, ADDS)
            inner = tl.arange(0, BLOCK_C)
            partial = b.partial_weights + place.to(tl.int64) * splits * BLOCK_C + inner
            tl.store(partial + split * BLOCK_C, acc)
            if is_last(b.counters + counters + place, parts):
                total = tl.zeros([BLOCK_C], tl.float32)
                for start in range(0, parts, BLOCK_PARTS):
                    part = start + tl.arange(0, BLOCK_PARTS)[:, None]
                    at = partial[None, :] + part * BLOCK_C
                    found = tl.load(at, mask=part < parts, other=0.0, cache_modifier=".cg")
                    total += tl.sum(found, 0)
                to = parameter_at(b.destinations, tl.load(record + WEIGHT))
                store_gradient(to + offs_c.to(tl.int64) * taps + tap, total, mask_c, ADDS)
