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

from fastshift.kernels.infer_plan import ADD_OUTPUT, COLUMNS, KINDS

__all__ = ["infer_kernel"]

_LINE = tl.constexpr(len(COLUMNS))
_VARIANTS = tl.constexpr(2 * len(KINDS))
_POINTWISE, _DENSE, _PAIR, _DEPTHWISE, _COPY = (tl.constexpr(i) for i in range(len(KINDS)))
(
    _VARIANT,
    _FROM_HIDDEN,
    _SOURCE_AT,
    _SOURCE_ROW,
    _HEIGHT,
    _WIDTH,
    _OUT_HEIGHT,
    _OUT_WIDTH,
    _KERNEL,
    _STRIDE,
    _IN_CHANNELS,
    _OUT_CHANNELS,
    _TO_HIDDEN,
    _TARGET_AT,
    _TARGET_ROW,
    _ADD,
    _SPATIAL,
    _,
    _,
    _,
    _,
    _,
    _PRODUCT,
    *_,
) = (tl.constexpr(i) for i in range(len(COLUMNS)))
# From a unit's first column on.
_SCALE, _SHIFT, _MOMENTS, _RELU, _EPS = (tl.constexpr(i) for i in range(1, 6))
_ADD_OUTPUT = tl.constexpr(ADD_OUTPUT)


@triton.jit
def _parameter(address_ptr, index, ALIGN: tl.constexpr):
    """The float32 parameter at a place of the list; the first where there is none."""
    address = tl.load(address_ptr + tl.maximum(index, 0))
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN)


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
    gamma_ptr = _parameter(address_ptr, index, ADDRESS_ALIGN)
    gamma = tl.load(gamma_ptr + offs_c, mask=mask & (index >= 0), other=1.0)
    values *= (gamma * tl.rsqrt(variance + eps))[None, :]
    index = tl.load(unit + _SHIFT)
    beta_ptr = _parameter(address_ptr, index, ADDRESS_ALIGN)
    values += tl.load(beta_ptr + offs_c, mask=mask & (index >= 0), other=0.0)[None, :]
    # A maximum would turn a NaN to zero.
    return tl.where((values < 0.0) & (tl.load(unit + _RELU) != 0), 0.0, values)


@triton.jit
def _read(source_ptr, offs, mask, start, channels, BLOCK: tl.constexpr, PART: tl.constexpr):
    """`[P, BLOCK]` channels from `start` on at offsets `[P]`: all, the odd (1) or even (2) ones.

    Of a pair both are read, in whole vectors, and one is dropped: every other one for itself would
    take an access each.
    """
    if PART == 0:
        offs_c = start + tl.arange(0, BLOCK)
        inside = mask[:, None] & (offs_c < channels)[None, :]
        return tl.load(source_ptr + offs[:, None] + offs_c[None, :], mask=inside, other=0.0)
    else:
        offs_c = 2 * start + tl.arange(0, 2 * BLOCK)
        inside = mask[:, None] & (offs_c < 2 * channels)[None, :]
        pairs = tl.load(source_ptr + offs[:, None] + offs_c[None, :], mask=inside, other=0.0)
        even, odd = tl.split(tl.reshape(pairs, (offs.shape[0], BLOCK, 2)))
        return odd if PART == 1 else even


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
    unit = job + _SPATIAL
    weight_ptr = _parameter(address_ptr, tl.load(unit), ADDRESS_ALIGN)
    offs_c = start + tl.arange(0, BLOCK)
    weight_ptrs = weight_ptr + offs_c * (kernel * kernel)
    sums = tl.zeros((corner.shape[0], BLOCK), tl.float32)
    for dy in range(kernel):
        mask_y = mask & (y + dy >= 0) & (y + dy < height)
        offs_y = (corner + dy * width) * row
        for dx in range(kernel):
            inside = mask_y & (x + dx >= 0) & (x + dx < width)
            values = _read(source_ptr, offs_y + dx * row, inside, start, channels, BLOCK, PART)
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
def _stage(
    job,
    source_ptr,
    target_ptr,
    add_ptr,
    moments_ptr,
    address_ptr,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one job: positions from `first` on, output channels from `start_n` on."""
    height, width = tl.load(job + _HEIGHT).to(tl.int32), tl.load(job + _WIDTH).to(tl.int32)
    out_width = tl.load(job + _OUT_WIDTH).to(tl.int32)
    out_size = tl.load(job + _OUT_HEIGHT).to(tl.int32) * out_width
    kernel, stride = tl.load(job + _KERNEL).to(tl.int32), tl.load(job + _STRIDE).to(tl.int32)
    row = tl.multiple_of(tl.load(job + _SOURCE_ROW).to(tl.int32), ALIGN)
    target_row = tl.multiple_of(tl.load(job + _TARGET_ROW).to(tl.int32), ALIGN)

    # Offsets count from the tile's first image on, where 32 bits do.
    first_image = first // out_size
    begin = first_image.to(tl.int64) * height * width * row
    source_ptr += tl.multiple_of(begin, ALIGN)
    offs_p = first + tl.arange(0, BLOCK_P)
    mask_p = offs_p < positions
    image = offs_p // out_size
    inside = offs_p - image * out_size
    out_y = inside // out_width
    y = out_y * stride - kernel // 2
    x = (inside - out_y * out_width) * stride - kernel // 2
    corner = ((image - first_image) * height + y) * width + x

    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < out_channels
    if KIND == _COPY:
        # Of a split the even channels pass; `_read` calls them part 2.
        out = _read(source_ptr, corner * row, mask_p, start_n, out_channels, BLOCK_N, 2 * PART)
    elif KIND == _DEPTHWISE:
        out = _depthwise(
            job, source_ptr, moments_ptr, address_ptr, corner, y, x, mask_p, height, width, row,
            kernel, start_n, out_channels, BLOCK_N, PART, ADDRESS_ALIGN,
        )  # fmt: skip
    else:
        weight_ptr = _parameter(address_ptr, tl.load(job + _PRODUCT), ADDRESS_ALIGN)
        sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        offs_k = tl.arange(0, BLOCK_K)
        if KIND == _PAIR:
            for start in range(0, in_channels, BLOCK_K):
                values = _depthwise(
                    job, source_ptr, moments_ptr, address_ptr, corner, y, x, mask_p, height, width,
                    row, kernel, start, in_channels, BLOCK_K, PART, ADDRESS_ALIGN,
                ).to(source_ptr.dtype.element_ty)  # fmt: skip
                at = offs_n[None, :] * in_channels + start + offs_k[:, None]
                mask = (start + offs_k < in_channels)[:, None] & mask_n[None, :]
                weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
                sums = _dot(values, weight, sums, PRECISION, UPCAST)
        elif KIND == _POINTWISE:
            for start in range(0, in_channels, BLOCK_K):
                values = _read(source_ptr, corner * row, mask_p, start, in_channels, BLOCK_K, PART)
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
                    values = _read(source_ptr, offs, mask_x, start, in_channels, BLOCK_K, PART)
                    at = offs_n[None, :] * in_channels + start + offs_k[:, None]
                    mask = (start + offs_k < in_channels)[:, None] & mask_n[None, :]
                    weight = tl.load(weight_ptr + at * kernel * kernel + tap, mask=mask, other=0.0)
                    sums = _dot(values, weight, sums, PRECISION, UPCAST)
        unit = job + _PRODUCT
        out = _normalise(sums, unit, moments_ptr, address_ptr, offs_n, out_channels, ADDRESS_ALIGN)

    begin = tl.multiple_of(first.to(tl.int64) * target_row, ALIGN)
    offs = tl.arange(0, BLOCK_P)[:, None] * target_row + offs_n[None, :]
    mask = mask_p[:, None] & mask_n[None, :]
    if ADDS and KIND != _COPY:
        wanted = tl.load(job + _ADD) != 0
        out += tl.load(add_ptr + begin + offs, mask=mask & wanted, other=0.0).to(tl.float32)
    tl.store(target_ptr + begin + offs, out.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "tiles"])
def infer_kernel(
    rows_ptr,
    hidden_in_ptr,
    hidden_out_ptr,
    out_ptr,
    moments_ptr,
    parent_ptr,
    choice_ptr,
    table_ptr,
    address_ptr,
    images,
    tiles,
    row_size,
    hidden_in_size,
    hidden_out_size,
    out_size,
    moments_size,
    NUM_JOBS: tl.constexpr,
    VARIANTS: tl.constexpr,
    ADDS: tl.constexpr,
    ALIGN: tl.constexpr,
    ADDRESS_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A step of all nodes: program `(node, job, tile)`, which leaves where its job has no tile.

    Sizes are elements of a node in each tensor. `VARIANTS` are the bits of those that occur, so
    that code of no other is there; the job's own picks among them.
    """
    program = tl.program_id(0)
    tile = program % tiles
    node = (program // tiles) // NUM_JOBS
    choice = tl.load(choice_ptr + node)
    if choice < 0:
        return
    job = table_ptr + (choice * NUM_JOBS + (program // tiles) % NUM_JOBS) * _LINE
    variant = tl.load(job + _VARIANT)
    if variant < 0:
        return
    in_channels = tl.multiple_of(tl.load(job + _IN_CHANNELS).to(tl.int32), ALIGN)
    out_channels = tl.multiple_of(tl.load(job + _OUT_CHANNELS).to(tl.int32), ALIGN)
    positions = images * (tl.load(job + _OUT_HEIGHT) * tl.load(job + _OUT_WIDTH)).to(tl.int32)
    # Tiles of the same positions follow each other, and find their rows in a cache.
    across = tl.cdiv(out_channels, BLOCK_N)
    first = (tile // across) * BLOCK_P
    if first >= positions:
        return
    start_n = (tile % across) * BLOCK_N

    wide = node.to(tl.int64)
    row_at = tl.multiple_of(tl.load(parent_ptr + node).to(tl.int64) * row_size, ALIGN)
    out_at = tl.multiple_of(wide * out_size, ALIGN)
    at = tl.multiple_of(tl.load(job + _SOURCE_AT), ALIGN)
    source_ptr = rows_ptr + row_at
    if tl.load(job + _FROM_HIDDEN) != 0:
        source_ptr = hidden_in_ptr + tl.multiple_of(wide * hidden_in_size + at, ALIGN)
    at = tl.multiple_of(tl.load(job + _TARGET_AT), ALIGN)
    target_ptr = out_ptr + tl.multiple_of(out_at + at, ALIGN)
    if tl.load(job + _TO_HIDDEN) != 0:
        target_ptr = hidden_out_ptr + tl.multiple_of(wide * hidden_out_size + at, ALIGN)
    add_ptr = rows_ptr + row_at
    if tl.load(job + _ADD) == _ADD_OUTPUT:
        add_ptr = out_ptr + out_at
    for index in tl.static_range(_VARIANTS):
        # Of the two conditions the first is decided when compiling.
        if (VARIANTS >> index) & 1:  # noqa: SIM102
            if variant == index:
                _stage(
                    job, source_ptr, target_ptr, add_ptr, moments_ptr + wide * moments_size,
                    address_ptr, first, start_n, positions, in_channels, out_channels,
                    index // 2, index % 2, ADDS, ALIGN, ADDRESS_ALIGN,
                    BLOCK_P, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
                )  # fmt: skip
