"""The kernel of a population layer with fixed batch norms: one tile of one node's stage.

A stage is (`infer_plan`)

    y = act(norm(W act(norm(depthwise(x))))) [+ shortcut],
    norm(v) = (v - mean) gamma rsqrt(var + eps) + beta,

with the depthwise convolution computed for each chunk of channels as the product asks for it, from
the rows it reads: it never leaves registers. What a node's choice does is read from a table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.infer_fields import (
    ADD,
    COPY,
    DEPTHWISE,
    HEIGHT,
    KERNEL,
    OUT_WIDTH,
    PAIR,
    POINTWISE,
    PRODUCT,
    SOURCE_ROW,
    SPATIAL,
    STRIDE,
    TARGET_ROW,
    WIDTH,
    multiple,
    number,
)
from fastshift.kernels.norm import load_channels
from fastshift.kernels.record import parameter_at

__all__ = ["stage_tile"]

# From a unit's first column on.
_SCALE, _SHIFT, _MOMENTS, _RELU, _EPS = (tl.constexpr(i) for i in range(1, 6))


@triton.jit
def _normalise(
    values, unit, moments_ptr, address_ptr, offs_c, channels, ADDRESS_ALIGN: tl.constexpr
):
    """Batch norm by given moments, and the activation, of `[P, C]` raw values."""
    mask = offs_c < channels
    at = tl.load(unit + _MOMENTS)
    # One vector of channels after the other: held together they would spill beside the values. And
    # the mean goes first, since scale * raw + shift would cancel far from zero.
    values -= tl.load(moments_ptr + at + offs_c, mask=mask, other=0.0)[None, :]
    # One where there is no channel, so that an epsilon of zero makes no NaN there.
    variance = tl.load(moments_ptr + at + channels + offs_c, mask=mask, other=1.0)
    eps = tl.load(unit + _EPS).to(tl.int32).to(tl.float32, bitcast=True)
    index = tl.load(unit + _SCALE)
    gamma_ptr = parameter_at(address_ptr, index, ADDRESS_ALIGN)
    gamma = tl.load(gamma_ptr + offs_c, mask=mask & (index >= 0), other=1.0)
    values *= (gamma * tl.rsqrt(variance + eps))[None, :]
    index = tl.load(unit + _SHIFT)
    beta_ptr = parameter_at(address_ptr, index, ADDRESS_ALIGN)
    values += tl.load(beta_ptr + offs_c, mask=mask & (index >= 0), other=0.0)[None, :]
    # As `norm.activate`, but loaded behind the comparison, where it does not spill.
    return tl.where((values < 0.0) & (tl.load(unit + _RELU) != 0), 0.0, values)


@triton.jit
def _depthwise(
    job,
    source_ptr,
    moments_ptr,
    address_ptr,
    corner,
    y,
    x,
    mask,
    height,
    width,
    row,
    kernel,
    start,
    channels,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    ADDRESS_ALIGN: tl.constexpr,
):
    """`[P, BLOCK]` channels from `start` on of a depthwise unit, normalised and activated."""
    unit = job + SPATIAL
    weight_ptr = parameter_at(address_ptr, tl.load(unit), ADDRESS_ALIGN)
    offs_c = start + tl.arange(0, BLOCK)
    weight_ptrs = weight_ptr + offs_c * (kernel * kernel)
    sums = tl.zeros((corner.shape[0], BLOCK), tl.float32)
    for dy in range(kernel):
        mask_y = mask & (y + dy >= 0) & (y + dy < height)
        offs_y = (corner + dy * width) * row
        for dx in range(kernel):
            inside = mask_y & (x + dx >= 0) & (x + dx < width)
            values = load_channels(
                source_ptr, offs_y + dx * row, inside, start, channels, BLOCK, PART
            )
            weight = tl.load(weight_ptrs, mask=offs_c < channels, other=0.0)
            weight_ptrs += 1
            sums += values.to(tl.float32) * weight[None, :]
    return _normalise(sums, unit, moments_ptr, address_ptr, offs_c, channels, ADDRESS_ALIGN)


@triton.jit
def _dot(values, weight, sums, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`sums + values weight`, weights rounded to the type of the values."""
    weight = weight.to(values.dtype)
    if UPCAST:
        return tl.dot(values.to(tl.float32), weight.to(tl.float32), sums)
    return tl.dot(values, weight, sums, input_precision=PRECISION)


@triton.jit
def stage_tile(
    job,
    source_ptr,
    target_ptr,
    add_ptr,
    moments_ptr,
    address_ptr,
    low,
    rows,
    source_low,
    source_rows,
    first,
    start_n,
    positions,
    in_channels,
    out_channels,
    KIND: tl.constexpr,
    PART: tl.constexpr,
    ADDS: tl.constexpr,
    ALIGN: tl.constexpr,
    ADDRESS_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one job: positions from `first` on, output channels from `start_n` on.

    The channels are `BLOCK_N`, of a depthwise job `BLOCK_D`.

    Positions count through `rows` rows of each image, from row `low` of the result on; of the
    source `source_rows` rows of each image are there, from row `source_low` on.
    """
    height, width, out_width = number(job, HEIGHT), number(job, WIDTH), number(job, OUT_WIDTH)
    out_size = rows * out_width
    kernel, stride = number(job, KERNEL), number(job, STRIDE)
    row = multiple(job, SOURCE_ROW, ALIGN)

    # Offsets count from the tile's first image on, where 32 bits do.
    first_image = first // out_size
    begin = first_image.to(tl.int64) * source_rows * width * row
    source_ptr += tl.multiple_of(begin, ALIGN)
    offs_p = first + tl.arange(0, BLOCK_P)
    mask_p = offs_p < positions
    image = offs_p // out_size
    inside = offs_p - image * out_size
    out_y = inside // out_width
    y = (low + out_y) * stride - kernel // 2
    x = (inside - out_y * out_width) * stride - kernel // 2
    corner = ((image - first_image) * source_rows + y - source_low) * width + x

    BLOCK_C: tl.constexpr = BLOCK_D if KIND == DEPTHWISE else BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_C)
    mask_n = offs_n < out_channels
    if KIND == COPY:
        # Of a split the even channels pass.
        out = load_channels(
            source_ptr, corner * row, mask_p, start_n, out_channels, BLOCK_C, 2 - 2 * PART
        )
    elif KIND == DEPTHWISE:
        out = _depthwise(
            job, source_ptr, moments_ptr, address_ptr, corner, y, x, mask_p, height, width, row,
            kernel, start_n, out_channels, BLOCK_C, 2 - PART, ADDRESS_ALIGN,
        )  # fmt: skip
    else:
        weight_ptr = parameter_at(address_ptr, tl.load(job + PRODUCT), ADDRESS_ALIGN)
        sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        offs_k = tl.arange(0, BLOCK_K)
        if KIND == PAIR:
            for start in range(0, in_channels, BLOCK_K):
                values = _depthwise(
                    job, source_ptr, moments_ptr, address_ptr, corner, y, x, mask_p, height, width,
                    row, kernel, start, in_channels, BLOCK_K, 2 - PART, ADDRESS_ALIGN,
                ).to(source_ptr.dtype.element_ty)  # fmt: skip
                at = offs_n[None, :] * in_channels + start + offs_k[:, None]
                mask = (start + offs_k < in_channels)[:, None] & mask_n[None, :]
                weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
                sums = _dot(values, weight, sums, PRECISION, UPCAST)
        elif KIND == POINTWISE:
            for start in range(0, in_channels, BLOCK_K):
                values = load_channels(
                    source_ptr, corner * row, mask_p, start, in_channels, BLOCK_K, 2 - PART
                )
                at = offs_n[None, :] * in_channels + start + offs_k[:, None]
                mask = (start + offs_k < in_channels)[:, None] & mask_n[None, :]
                weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
                sums = _dot(values, weight, sums, PRECISION, UPCAST)
        else:
            for tap in range(kernel * kernel):
                dy, dx = tap // kernel, tap % kernel
                mask_x = mask_p & (y + dy >= 0) & (y + dy < height)
                mask_x = mask_x & (x + dx >= 0) & (x + dx < width)
                offs = (corner + dy * width + dx) * row
                for start in range(0, in_channels, BLOCK_K):
                    values = load_channels(
                        source_ptr, offs, mask_x, start, in_channels, BLOCK_K, 2 - PART
                    )
                    at = offs_n[None, :] * in_channels + start + offs_k[:, None]
                    mask = (start + offs_k < in_channels)[:, None] & mask_n[None, :]
                    weight = tl.load(weight_ptr + at * kernel * kernel + tap, mask=mask, other=0.0)
                    sums = _dot(values, weight, sums, PRECISION, UPCAST)
        unit = job + PRODUCT
        out = _normalise(sums, unit, moments_ptr, address_ptr, offs_n, out_channels, ADDRESS_ALIGN)

    target_row = multiple(job, TARGET_ROW, ALIGN)
    begin = tl.multiple_of(first.to(tl.int64) * target_row, ALIGN)
    offs = tl.arange(0, BLOCK_P)[:, None] * target_row + offs_n[None, :]
    mask = mask_p[:, None] & mask_n[None, :]
    if ADDS and KIND != COPY:
        wanted = tl.load(job + ADD) != 0
        out += tl.load(add_ptr + begin + offs, mask=mask & wanted, other=0.0).to(tl.float32)
    tl.store(target_ptr + begin + offs, out.to(target_ptr.dtype.element_ty), mask=mask)
