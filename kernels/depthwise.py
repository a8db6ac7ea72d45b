"""Depthwise convolutions: a tile of each of the three.

    raw[p, c] = sum over taps of x[p', c] * w[c, tap]
    d_x[p', c] = sum over taps of d_raw[p, c] * w[c, tap]
    d_w[c, tap] = sum over nodes and p of d_raw[p, c] * x[p', c]

`x` and `d_raw` are made as they are read, as in `pointwise`; taps read neighbours from cache. Any
odd kernel and any stride, each node its own. `convolution` has the launches.
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
    SPLIT,
    WEIGHT,
    d_y_of,
    node_span,
    parameter_at,
    raw_of,
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
    offs_c,
    X_STEP: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    """Raw rows `[P, C]` of some output pixels and channels."""
    c, kernel = sizes[1], sizes[4]
    mask_c = offs_c < c
    relu = tl.load(record + SOURCE_RELU)
    norm = 0
    if CONTINUES:
        norm = load_source_norm(b, record, node, c, offs_c, mask_c)
    w_ptr = parameter_at(b.addresses, tl.load(record + WEIGHT))
    w_ptr += offs_c.to(tl.int64) * (kernel * kernel)
    base = read_base(sizes, offs_p, True)
    acc = tl.zeros([offs_p.shape[0], offs_c.shape[0]], tl.float32)
    for tap in range(kernel * kernel):
        pixel, inside = read_at(sizes, base, tap, True)
        mask = inside[:, None] & mask_c[None, :]
        x = load_input(x_ptr, x_stride, pixel, offs_c * X_STEP, mask, norm, relu, CONTINUES)
        w = tl.load(w_ptr + tap, mask=mask_c, other=0.0)
        acc += x * w[None, :]
    return acc


@triton.jit
def depthwise_d_input(acc, b, record, node, offs_p, offs_c, mask_c, ALIGN: tl.constexpr):
    """Add the gradient `[P, C]` of what a unit reads at some input pixels and channels."""
    sizes = sizes_of(b, record, ALIGN)
    c, positions, kernel = sizes[1], sizes[3], sizes[4]
    g_ptr, g_stride = d_y_of(b, record, node, ALIGN)
    raw_ptr = raw_of(b, node, tl.load(record + RAW))
    masks = tl.load(record + RELU) * tl.load(record + LAST)
    d_norm = load_d_norm(b, record, node, positions, c, offs_c, mask_c)
    w_ptr = parameter_at(b.addresses, tl.load(record + WEIGHT))
    w_ptr += offs_c.to(tl.int64) * (kernel * kernel)
    base = reading_base(sizes, offs_p, True)
    for tap in range(kernel * kernel):
        pixel, inside = reading_at(sizes, base, tap, True)
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
    offs_c,
    mask_c,
    X_STEP: tl.constexpr,
    CONTINUES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Of all nodes of a choice, in their order, and a range of their pixels: `[TAPS, C]`."""
    c, positions, kernel = sizes[1], sizes[3], sizes[4]
    relu = tl.load(record + SOURCE_RELU)
    masks = tl.load(record + RELU) * tl.load(record + LAST)
    row = tl.arange(0, TAPS)[:, None]
    acc = tl.zeros([TAPS, offs_c.shape[0]], tl.float32)
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
                own = (offs_p < stop_pixel)[:, None] & mask_c[None, :]
                d_raw = load_d_raw(
                    g_ptr, g_stride, raw_ptr, c, offs_p.to(tl.int64), offs_c, own, d_norm, masks
                )
                base = read_base(sizes, offs_p, True)
                for tap in range(kernel * kernel):
                    pixel, inside = read_at(sizes, base, tap, True)
                    x = load_input(
                        x_ptr + (X_STEP - 1), x_stride, pixel, offs_c * X_STEP,
                        own & inside[:, None], norm, relu, CONTINUES,
                    )  # fmt: skip
                    acc += tl.where(row == tap, tl.sum(d_raw * x, 0)[None, :], 0.0)
    return acc


@triton.jit
def depthwise_d_weight(
    b,
    program,
    first,
    nodes,
    splits,
    tiles,
    counters,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    CONTINUES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Programs `(choice and lane, tile of channels, share of the pixels)`; `TAPS` rows."""
    split, place = program % splits, program // splits
    tile, slot = place % tiles, place // tiles
    record = b.table + first + slot * RECORD
    if tl.load(record + ACTIVE) != 0:
        sizes = sizes_of(b, record, ALIGN)
        c_out, positions, kernel = sizes[1], sizes[3], sizes[4]
        choice = slot // LANES
        begin, stop = node_span(b.choice, choice, nodes, BLOCK_NODES)
        share = tl.maximum(tl.cdiv(tl.cdiv(positions, BLOCK_D), splits), 1) * BLOCK_D
        # A choice without nodes has zeros, which one program knows.
        parts = tl.where(begin < stop, tl.cdiv(positions, share), 1)
        if (tile * BLOCK_C < c_out) & (split < parts):
            offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < c_out
            low = split * share
            high = tl.minimum(low + share, positions)
            if SPLITS:
                if tl.load(record + SPLIT):
                    acc = _sum_d_weight(
                        b, record, sizes, choice, begin, stop, low, high, offs_c, mask_c,
                        2, False, ALIGN, BLOCK_D, TAPS,
                    )  # fmt: skip
                else:
                    acc = _sum_d_weight(
                        b, record, sizes, choice, begin, stop, low, high, offs_c, mask_c,
                        1, CONTINUES, ALIGN, BLOCK_D, TAPS,
                    )  # fmt: skip
            else:
                acc = _sum_d_weight(
                    b, record, sizes, choice, begin, stop, low, high, offs_c, mask_c,
                    1, CONTINUES, ALIGN, BLOCK_D, TAPS,
                )  # fmt: skip
            if split == 0:
                store_norm_gradients(b, record, choice, begin, stop, offs_c, mask_c)
            rows = tl.arange(0, TAPS)
            inner = rows[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            partial = b.partial_weights + place.to(tl.int64) * splits * (TAPS * BLOCK_C) + inner
            tl.store(partial + split * (TAPS * BLOCK_C), acc)
            if is_last(b.counters + counters + place, parts):
                total = tl.zeros([TAPS, BLOCK_C], tl.float32)
                for part in range(parts):
                    total += tl.load(partial + part * (TAPS * BLOCK_C), cache_modifier=".cg")
                taps = kernel * kernel
                to = parameter_at(b.destinations, tl.load(record + WEIGHT))
                to += (offs_c.to(tl.int64) * taps)[None, :] + rows[:, None]
                tl.store(to, total, mask=(rows < taps)[:, None] & mask_c[None, :])
