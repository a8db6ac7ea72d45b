"""Batch norm inside other kernels: as a prologue, and moments and totals as an epilogue.

    y = (x - mean) * scale + shift                  x of the unit before, as it is stored
    d_x = scale * (d_y - S1 / n - (x - mean) * S2 / (deviation^2 * n))
    S1 = sum of d_y, S2 = sum of d_y * (x - mean)

Each place of a program's tile has the moments of its own pixels, one of each tile (Welford 1962:
sums of squares would cancel far from zero); behind its last tile the program merges the places
(Chan, Golub and LeVeque 1979) and leaves one partial result, and the program that finishes last for
a node's channels merges all in their order. No bit depends on which one that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.record import (
    C_OUT,
    CHANNEL,
    EPS,
    FIRST,
    SCALE,
    SHIFT,
    SOURCE_CHANNEL,
    SOURCE_SHIFT,
    STATISTICS,
    parameter_at,
    statistics_of,
    totals_of,
)

BLOCK_PARTS = tl.constexpr(32)  # partial results that are merged at a time


@triton.jit
def load_norm(b, node, channel, shift, count, offs_c, mask_c):
    """Mean, scale and shift of a batch norm, `[1, C]`; 0, 1 and 0 outside of the mask."""
    at = statistics_of(b, node) + channel * STATISTICS + offs_c
    mean = tl.load(at, mask=mask_c, other=0.0)
    scale = tl.load(at + 2 * count, mask=mask_c, other=1.0)
    given = parameter_at(b.addresses, shift) + offs_c
    beta = tl.load(given, mask=mask_c & (shift >= 0), other=0.0)
    return mean[None, :], scale[None, :], beta[None, :]


@triton.jit
def normalise(x, norm):
    """Apply a batch norm; the mean goes first, since scale * x + shift would cancel."""
    mean, scale, shift = norm
    return (x - mean) * scale + shift


@triton.jit
def activate(y, relu):
    """Apply a ReLU where there is one; NaN stays NaN."""
    return tl.where((y < 0.0) & (relu != 0), 0.0, y)


@triton.jit
def load_source_norm(b, record, node, c_in, offs_c, mask_c):
    """Mean, scale and shift of the unit before; 0, 1 and 0 where there is none."""
    channel, shift = tl.load(record + SOURCE_CHANNEL), tl.load(record + SOURCE_SHIFT)
    mask = mask_c & (tl.load(record + FIRST) == 0)
    return load_norm(b, node, channel, shift, c_in, offs_c, mask)


@triton.jit
def load_channels(x_ptr, offs, inside, start, count, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Channels `[P, BLOCK]` from `start` on of `count`, of rows at offsets `[P]`.

    Of the even (`PART` 0) and the odd ones (1), not of all (2), both are read, in whole vectors,
    and one is dropped: every other one for itself would take an access each.
    """
    if PART == 2:
        offs_c = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (offs_c < count)[None, :]
        return tl.load(x_ptr + (offs[:, None] + offs_c[None, :]), mask=mask, other=0.0)
    else:
        offs_c = 2 * start + tl.arange(0, 2 * BLOCK)
        mask = inside[:, None] & (offs_c < 2 * count)[None, :]
        pairs = tl.load(x_ptr + (offs[:, None] + offs_c[None, :]), mask=mask, other=0.0)
        even, odd = tl.split(tl.reshape(pairs, (offs.shape[0], BLOCK, 2)))
        return odd if PART == 1 else even


@triton.jit
def load_input(
    x_ptr,
    x_stride,
    pixel,
    inside,
    start,
    count,
    norm,
    relu,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    """What a unit reads at some pixels and channels, `[P, BLOCK]` float32, zero outside.

    Rows of a parent are as they are; those of the unit before get its batch norm and its ReLU.
    """
    x = load_channels(x_ptr, pixel * x_stride, inside, start, count, BLOCK, PART).to(tl.float32)
    if CONTINUES:
        mask = inside[:, None] & (start + tl.arange(0, BLOCK) < count)[None, :]
        x = tl.where(mask, activate(normalise(x, norm), relu), 0.0)
    return x


@triton.jit
def add_moments(mean, square, x, inside, tiles):
    """Add a tile's rows `[P, C]`, the `tiles`-th, to each place's mean and square about it."""
    apart = tl.where(inside[:, None], x - mean, 0.0)
    mean += apart * (1.0 / tiles.to(tl.float32))
    square += apart * (x - mean)
    return mean, square


@triton.jit
def merge_moments(mean, square, offs_p, num, BLOCK_P: tl.constexpr):
    """Merge the moments `[P, C]` of places in tiles that hold `num` pixels: `[C]` each."""
    own = tl.cdiv(tl.maximum(num - offs_p, 0), BLOCK_P).to(tl.float32)[:, None]
    num = num.to(tl.float32)
    rough = tl.sum(own * mean, 0) / num
    # Far from zero a sum has more rounding than the mean may: what it missed is small, and exact.
    apart = mean - rough[None, :]
    missed = tl.sum(own * apart, 0) / num
    square = tl.sum(square + own * apart * apart, 0) - num * missed * missed
    return rough + missed, square


@triton.jit
def is_last(counter, parts):
    """Whether all other programs that share this counter have left their partial results."""
    # Every thread's stores come before the counter's release.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1


@triton.jit
def finish_moments(b, record, node, sizes, partial_ptr, parts, width, part, offs_c, mask_c):
    """Merge a unit's partial moments `[parts, 2, width]`, of `part` pixels each, and store all."""
    _, c_out, _, positions, _, _, _, _, _, _ = sizes
    num_all = positions.to(tl.float32)
    at = partial_ptr + offs_c
    # About the first part's mean, so that what is added is small.
    middle = tl.load(at, mask=mask_c, other=0.0, cache_modifier=".cg")
    apart = tl.zeros_like(middle)
    for start in range(0, parts, BLOCK_PARTS):
        k = start + tl.arange(0, BLOCK_PARTS)
        mask = (k < parts)[:, None] & mask_c[None, :]
        num = tl.minimum(positions - k * part, part).to(tl.float32)
        place = at[None, :] + (k * 2 * width)[:, None]
        means = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        apart += tl.sum(tl.where(mask, num[:, None] * (means - middle[None, :]), 0.0), 0)
    mean = middle + apart / num_all
    square = tl.zeros_like(middle)
    for start in range(0, parts, BLOCK_PARTS):
        k = start + tl.arange(0, BLOCK_PARTS)
        mask = (k < parts)[:, None] & mask_c[None, :]
        num = tl.minimum(positions - k * part, part).to(tl.float32)
        place = at[None, :] + (k * 2 * width)[:, None]
        means = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        squares = tl.load(place + width, mask=mask, other=0.0, cache_modifier=".cg")
        delta = means - mean[None, :]
        square += tl.sum(tl.where(mask, squares + num[:, None] * delta * delta, 0.0), 0)
    eps = tl.load(record + EPS).to(tl.float32, bitcast=True)
    inverse = 1.0 / tl.sqrt_rn(square / num_all + eps)
    scale_at, shift_at = tl.load(record + SCALE), tl.load(record + SHIFT)
    given = parameter_at(b.addresses, scale_at) + offs_c
    scale = inverse * tl.load(given, mask=mask_c & (scale_at >= 0), other=1.0)
    given = parameter_at(b.addresses, shift_at) + offs_c
    shift = tl.load(given, mask=mask_c & (shift_at >= 0), other=0.0)
    to = statistics_of(b, node) + tl.load(record + CHANNEL) * STATISTICS + offs_c
    tl.store(to, mean, mask=mask_c)
    tl.store(to + c_out, square / (num_all - 1.0), mask=mask_c)
    tl.store(to + 2 * c_out, scale, mask=mask_c)
    tl.store(to + 3 * c_out, shift - mean * scale, mask=mask_c)
    tl.store(to + 4 * c_out, inverse, mask=mask_c)


@triton.jit
def finish_totals(to, partial_ptr, parts, width, count, offs_c, mask_c):
    """Add up a unit's partial totals `[parts, 2, width]` into `[2, count]`."""
    at = partial_ptr + offs_c
    first = tl.zeros_like(offs_c).to(tl.float32)
    second = first
    for start in range(0, parts, BLOCK_PARTS):
        k = start + tl.arange(0, BLOCK_PARTS)
        mask = (k < parts)[:, None] & mask_c[None, :]
        place = at[None, :] + (k * 2 * width)[:, None]
        first += tl.sum(tl.load(place, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        second += tl.sum(tl.load(place + width, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    tl.store(to + offs_c, first, mask=mask_c)
    tl.store(to + count + offs_c, second, mask=mask_c)


@triton.jit
def load_d_norm(b, record, node, positions, c_out, offs_c, mask_c):
    """What batch norm's backward needs of channels, `[1, C]` each: its norm, offset and slope."""
    channel = tl.load(record + CHANNEL)
    norm = load_norm(b, node, channel, tl.load(record + SHIFT), c_out, offs_c, mask_c)
    own = statistics_of(b, node) + channel * STATISTICS + 4 * c_out + offs_c
    inverse = tl.load(own, mask=mask_c, other=0.0)
    total = totals_of(b, node) + 2 * channel + offs_c
    count = positions.to(tl.float32)
    offset = tl.load(total, mask=mask_c, other=0.0) / count
    slope = tl.load(total + c_out, mask=mask_c, other=0.0) * inverse * inverse / count
    return norm, offset[None, :], slope[None, :]


@triton.jit
def load_d_raw(g_ptr, g_stride, raw_ptr, c_out, pixel, offs_c, mask, d_norm, masks):
    """The gradient of a unit's raw rows at some pixels and channels, `[P, C]` float32.

    That of its output is masked by its ReLU already, unless it is the node's own (`masks`).
    """
    norm, offset, slope = d_norm
    mean, scale, _ = norm
    at = pixel[:, None]
    g = tl.load(g_ptr + (at * g_stride + offs_c[None, :]), mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(raw_ptr + (at * c_out + offs_c[None, :]), mask=mask, other=0.0).to(tl.float32)
    g = tl.where((normalise(raw, norm) <= 0.0) & (masks != 0), 0.0, g)
    return tl.where(mask, scale * (g - offset - (raw - mean) * slope), 0.0)


@triton.jit
def store_gradient(to, value, mask, ADDS: tl.constexpr):
    """Write a parameter's gradient, or add it to what is there; a place has one program."""
    if ADDS:
        value += tl.load(to, mask=mask, other=0.0)
    tl.store(to, value, mask=mask)


@triton.jit
def store_norm_gradients(b, record, choice, begin, stop, offs_c, mask_c, ADDS: tl.constexpr):
    """Add the totals of a choice's nodes up in their order: gradients of scale and shift."""
    c_out, channel = tl.load(record + C_OUT), tl.load(record + CHANNEL)
    d_scale = tl.zeros_like(offs_c).to(tl.float32)
    d_shift = d_scale
    for node in range(begin, stop):
        mask = mask_c & (tl.load(b.choice + node) == choice)
        own = statistics_of(b, node) + channel * STATISTICS + 4 * c_out + offs_c
        inverse = tl.load(own, mask=mask, other=0.0)
        total = totals_of(b, node) + 2 * channel + offs_c
        d_shift += tl.load(total, mask=mask, other=0.0)
        d_scale += tl.load(total + c_out, mask=mask, other=0.0) * inverse
    scale_at, shift_at = tl.load(record + SCALE), tl.load(record + SHIFT)
    to = parameter_at(b.destinations, scale_at) + offs_c
    store_gradient(to, d_scale, mask_c & (scale_at >= 0), ADDS)
    to = parameter_at(b.destinations, shift_at) + offs_c
    store_gradient(to, d_shift, mask_c & (shift_at >= 0), ADDS)
