"""The kernel of a population layer's inference by stages: one stage of all nodes, a program a tile.

What a node's choice does is read from a table (`infer_jobs`), here and in the kernel that does all
stages (`infer_bands_kernel`), whose tiles are these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.infer_fields import (
    ADD,
    DEPTHWISE,
    FROM_HIDDEN,
    HEIGHT,
    IN_CHANNELS,
    LINE,
    OUT_CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    SOURCE_AT,
    SOURCE_ROW,
    TARGET_AT,
    TARGET_ROW,
    TO_HIDDEN,
    VARIANT,
    WIDTH,
    multiple,
    number,
    place,
)
from fastshift.kernels.infer_jobs import ADD_OUTPUT, KINDS
from fastshift.kernels.infer_stage import stage_tile

__all__ = ["infer_step_kernel", "job_tile", "tiles_across"]

_VARIANTS = tl.constexpr(2 * len(KINDS))
_ADD_OUTPUT = tl.constexpr(ADD_OUTPUT)


@triton.jit
def tiles_across(job, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A job's tiles side by side, and the channels of each: `BLOCK_D` of a depthwise one."""
    is_depthwise = tl.load(job + VARIANT) // 2 == DEPTHWISE
    width = tl.where(is_depthwise, BLOCK_D, BLOCK_N)
    return tl.cdiv(number(job, OUT_CHANNELS), width), width


@triton.jit
def job_tile(
    job,
    tile,
    rows_ptr,
    hidden_in_ptr,
    hidden_out_ptr,
    out_ptr,
    moments_ptr,
    address_ptr,
    first_image,
    images,
    low,
    rows,
    source_low,
    source_rows,
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
    """A tile of a job, by its variant's code: `rows` rows from row `low` on, of some images.

    Pointers are a node's. Of hidden rows `source_rows` are there, from row `source_low` on, of
    these images alone.
    """
    out_height, out_width = number(job, OUT_HEIGHT), number(job, OUT_WIDTH)
    image_size = number(job, HEIGHT) * number(job, WIDTH)
    row_at = first_image * image_size * tl.load(job + SOURCE_ROW)
    source_ptr = rows_ptr + tl.multiple_of(row_at, ALIGN)
    if tl.load(job + FROM_HIDDEN) != 0:
        source_ptr = hidden_in_ptr + place(job, SOURCE_AT, ALIGN)
    target_row = tl.load(job + TARGET_ROW)
    at = tl.multiple_of((first_image * out_height + low) * out_width * target_row, ALIGN)
    target_at = place(job, TARGET_AT, ALIGN)
    target_ptr = out_ptr + tl.multiple_of(at + target_at, ALIGN)
    if tl.load(job + TO_HIDDEN) != 0:
        target_ptr = hidden_out_ptr + target_at
    add_ptr = rows_ptr + at
    if tl.load(job + ADD) == _ADD_OUTPUT:
        add_ptr = out_ptr + at
    across, width = tiles_across(job, BLOCK_N, BLOCK_D)
    first, start_n = (tile // across) * BLOCK_P, (tile % across) * width
    positions = images * rows * out_width
    in_channels = multiple(job, IN_CHANNELS, ALIGN)
    out_channels = multiple(job, OUT_CHANNELS, ALIGN)
    variant = tl.load(job + VARIANT)
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
    job = table_ptr + (choice * NUM_JOBS + (program // tiles) % NUM_JOBS) * LINE
    if tl.load(job + VARIANT) < 0:
        return
    out_height = number(job, OUT_HEIGHT)
    # Tiles of the same positions follow each other, and find their rows in a cache.
    across, _ = tiles_across(job, BLOCK_N, BLOCK_N)
    if (tile // across) * BLOCK_P >= images * out_height * number(job, OUT_WIDTH):
        return
    wide = node.to(tl.int64)
    row_at = tl.multiple_of(tl.load(parent_ptr + node).to(tl.int64) * row_size, ALIGN)
    job_tile(
        job, tile, rows_ptr + row_at,
        hidden_in_ptr + tl.multiple_of(wide * hidden_in_size, ALIGN),
        hidden_out_ptr + tl.multiple_of(wide * hidden_out_size, ALIGN),
        out_ptr + tl.multiple_of(wide * out_size, ALIGN), moments_ptr + wide * moments_size,
        address_ptr, 0, images, 0, out_height, 0, number(job, HEIGHT), VARIANTS, ADDS, ALIGN,
        ADDRESS_ALIGN, BLOCK_P, BLOCK_N, BLOCK_K, BLOCK_N, PRECISION, UPCAST,
    )  # fmt: skip
