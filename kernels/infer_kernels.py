"""The kernels of a population layer with fixed batch norms: a step of all nodes, or all of them.

`infer_step_kernel` does one stage of every node, a program a tile. `infer_bands_kernel` does all
stages, a program many bands of rows: hidden rows go through a scratch of its own, behind whose
writes a barrier stands. What a node's choice does is read from a table in both (`infer_jobs`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.infer_jobs import ADD_OUTPUT, COLUMNS, KINDS
from fastshift.kernels.infer_stage import stage_tile

__all__ = ["infer_bands_kernel", "infer_step_kernel"]

_LINE = tl.constexpr(len(COLUMNS))
_VARIANTS = tl.constexpr(2 * len(KINDS))
_ADD_OUTPUT = tl.constexpr(ADD_OUTPUT)
_DEPTHWISE = tl.constexpr(KINDS.index("depthwise"))
_VARIANT = tl.constexpr(COLUMNS.index("variant"))
_FROM_HIDDEN = tl.constexpr(COLUMNS.index("from_hidden"))
_SOURCE_AT = tl.constexpr(COLUMNS.index("source_at"))
_SOURCE_ROW = tl.constexpr(COLUMNS.index("source_row"))
_HEIGHT = tl.constexpr(COLUMNS.index("height"))
_WIDTH = tl.constexpr(COLUMNS.index("width"))
_OUT_HEIGHT = tl.constexpr(COLUMNS.index("out_height"))
_OUT_WIDTH = tl.constexpr(COLUMNS.index("out_width"))
_KERNEL = tl.constexpr(COLUMNS.index("kernel"))
_STRIDE = tl.constexpr(COLUMNS.index("stride"))
_IN_CHANNELS = tl.constexpr(COLUMNS.index("in_channels"))
_OUT_CHANNELS = tl.constexpr(COLUMNS.index("out_channels"))
_TO_HIDDEN = tl.constexpr(COLUMNS.index("to_hidden"))
_TARGET_AT = tl.constexpr(COLUMNS.index("target_at"))
_TARGET_ROW = tl.constexpr(COLUMNS.index("target_row"))
_ADD = tl.constexpr(COLUMNS.index("add"))
_TIMES = tl.constexpr(COLUMNS.index("times"))
_BEFORE = tl.constexpr(COLUMNS.index("before"))
_REACH = tl.constexpr(COLUMNS.index("reach"))
_BAND_IMAGES = tl.constexpr(COLUMNS.index("band_images"))
_BAND_ROWS = tl.constexpr(COLUMNS.index("band_rows"))
_BANDS_DOWN = tl.constexpr(COLUMNS.index("bands_down"))


@triton.jit
def _tile(
    job,
    variant,
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
    VARIANTS: tl.constexpr,
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
    """One tile of a job, by its variant's code."""
    for index in tl.static_range(_VARIANTS):
        # Of the two conditions the first is decided when compiling.
        if (VARIANTS >> index) & 1:  # noqa: SIM102
            if variant == index:
                stage_tile(
                    job, source_ptr, target_ptr, add_ptr, moments_ptr, address_ptr, low, rows,
                    source_low, source_rows, first, start_n, positions, in_channels, out_channels,
                    index // 2, index % 2, ADDS, ALIGN, ADDRESS_ALIGN,
                    BLOCK_P, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION, UPCAST,
                )  # fmt: skip


@triton.jit(do_not_specialize=["images", "tiles"])
def infer_step_kernel(
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
    out_height = tl.load(job + _OUT_HEIGHT).to(tl.int32)
    positions = images * (out_height * tl.load(job + _OUT_WIDTH).to(tl.int32))
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
    _tile(
        job, variant, source_ptr, target_ptr, add_ptr, moments_ptr + wide * moments_size,
        address_ptr, 0, out_height, 0, tl.load(job + _HEIGHT).to(tl.int32), first, start_n,
        positions, in_channels, out_channels, VARIANTS, ADDS, ALIGN, ADDRESS_ALIGN,
        BLOCK_P, BLOCK_N, BLOCK_K, BLOCK_N, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def _rows_of_band(job, first_row, last_row):
    """First row of a job's that a band needs, and the one behind the last, there or not."""
    times, before = tl.load(job + _TIMES).to(tl.int32), tl.load(job + _BEFORE).to(tl.int32)
    reach = tl.load(job + _REACH).to(tl.int32)
    return first_row * times - before, last_row * times - before + reach


@triton.jit
def _across(job, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A job's tiles side by side, and the channels of each."""
    is_depthwise = tl.load(job + _VARIANT) // 2 == _DEPTHWISE
    width = tl.where(is_depthwise, BLOCK_D, BLOCK_N)
    return tl.cdiv(tl.load(job + _OUT_CHANNELS).to(tl.int32), width), width


@triton.jit
def _band_tile(
    job,
    tile,
    rows_ptr,
    scratch_ptr,
    out_ptr,
    moments_ptr,
    address_ptr,
    first_image,
    band_images,
    first_row,
    last_row,
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
    """A tile of a job's rows for a band: rows `first_row` to `last_row`, where there are."""
    in_channels = tl.multiple_of(tl.load(job + _IN_CHANNELS).to(tl.int32), ALIGN)
    out_channels = tl.multiple_of(tl.load(job + _OUT_CHANNELS).to(tl.int32), ALIGN)
    height = tl.load(job + _HEIGHT).to(tl.int32)
    out_height = tl.load(job + _OUT_HEIGHT).to(tl.int32)
    width, out_width = tl.load(job + _WIDTH).to(tl.int32), tl.load(job + _OUT_WIDTH).to(tl.int32)
    begin, stop = _rows_of_band(job, first_row, last_row)
    low = tl.maximum(begin, 0)
    rows = tl.minimum(stop, out_height) - low
    # What the job before has written for this band.
    from_hidden = tl.load(job + _FROM_HIDDEN) != 0
    stride, kernel = tl.load(job + _STRIDE).to(tl.int32), tl.load(job + _KERNEL).to(tl.int32)
    source_low = tl.maximum(begin * stride - kernel // 2, 0)
    source_stop = tl.minimum((stop - 1) * stride - kernel // 2 + kernel, height)
    source_low = tl.where(from_hidden, source_low, 0)
    source_rows = tl.where(from_hidden, source_stop - source_low, height)

    row = tl.load(job + _SOURCE_ROW)
    source_ptr = rows_ptr + tl.multiple_of(first_image * height * width * row, ALIGN)
    if from_hidden:
        source_ptr = scratch_ptr + tl.multiple_of(tl.load(job + _SOURCE_AT), ALIGN)
    target_row = tl.load(job + _TARGET_ROW)
    band_at = tl.multiple_of((first_image * out_height + low) * out_width * target_row, ALIGN)
    target_at = tl.multiple_of(tl.load(job + _TARGET_AT), ALIGN)
    target_ptr = out_ptr + tl.multiple_of(band_at + target_at, ALIGN)
    if tl.load(job + _TO_HIDDEN) != 0:
        target_ptr = scratch_ptr + target_at
    add_ptr = rows_ptr + band_at
    if tl.load(job + _ADD) == _ADD_OUTPUT:
        add_ptr = out_ptr + band_at
    # A depthwise convolution's chunks are as wide as in front of a product: others would spill.
    across, tile_channels = _across(job, BLOCK_N, BLOCK_K)
    _tile(
        job, tl.load(job + _VARIANT), source_ptr, target_ptr, add_ptr, moments_ptr, address_ptr,
        low, rows, source_low, source_rows, (tile // across) * BLOCK_P,
        (tile % across) * tile_channels, band_images * rows * out_width, in_channels, out_channels,
        VARIANTS, ADDS, ALIGN, ADDRESS_ALIGN,
        BLOCK_P, BLOCK_N, BLOCK_K, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["images", "nodes", "bands"])
def infer_bands_kernel(
    rows_ptr,
    scratch_ptr,
    out_ptr,
    moments_ptr,
    parent_ptr,
    choice_ptr,
    table_ptr,
    address_ptr,
    images,
    nodes,
    bands,
    row_size,
    scratch_size,
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
    """All jobs of all nodes: program `p` has bands `p`, `p + programs`, ..., `bands` to a node.

    Sizes are elements of a node in each tensor, of a program in the scratch.
    """
    program = tl.program_id(0)
    scratch_ptr += tl.multiple_of(program.to(tl.int64) * scratch_size, ALIGN)
    own = tl.cdiv(tl.maximum(nodes * bands - program, 0), tl.num_programs(0))
    # One loop of both bands and jobs: what two would keep from job to job would spill.
    for item in range(own * NUM_JOBS):
        place = program + (item // NUM_JOBS) * tl.num_programs(0)
        node, band = place // bands, place % bands
        choice = tl.load(choice_ptr + node)
        job = table_ptr + (tl.maximum(choice, 0) * NUM_JOBS + item % NUM_JOBS) * _LINE
        if (choice >= 0) & (tl.load(job + _VARIANT) >= 0):
            down = tl.load(job + _BANDS_DOWN).to(tl.int32)
            per_band = tl.load(job + _BAND_IMAGES).to(tl.int32)
            band_rows = tl.load(job + _BAND_ROWS).to(tl.int32)
            first_image, first_row = (band // down) * per_band, (band % down) * band_rows
            last_row = first_row + band_rows - 1
            begin, stop = _rows_of_band(job, first_row, last_row)
            rows = tl.minimum(stop, tl.load(job + _OUT_HEIGHT).to(tl.int32)) - tl.maximum(begin, 0)
            band_images = tl.minimum(per_band, images - first_image)  # none or less: no tiles
            positions = band_images * rows * tl.load(job + _OUT_WIDTH).to(tl.int32)
            across, _ = _across(job, BLOCK_N, BLOCK_K)
            wide = node.to(tl.int64)
            # A tile loads what it needs of the job for itself: kept, it would spill.
            for tile in range(tl.cdiv(tl.maximum(positions, 0), BLOCK_P) * across):
                row_at = tl.multiple_of(tl.load(parent_ptr + node).to(tl.int64) * row_size, ALIGN)
                _band_tile(
                    job, tile, rows_ptr + row_at, scratch_ptr,
                    out_ptr + tl.multiple_of(wide * out_size, ALIGN),
                    moments_ptr + wide * moments_size, address_ptr, first_image.to(tl.int64),
                    band_images, first_row, last_row, VARIANTS, ADDS, ALIGN, ADDRESS_ALIGN,
                    BLOCK_P, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
                )  # fmt: skip
        # Other threads read next what a thread has written, and overwrite what it has read.
        tl.debug_barrier()
