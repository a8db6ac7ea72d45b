"""The kernel of a population layer's inference in one launch: all stages, a program many bands.

Hidden rows go through a scratch of the program's own, behind whose writes a barrier stands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.infer_fields import (
    BAND_IMAGES,
    BAND_ROWS,
    BANDS_DOWN,
    BEFORE,
    FROM_HIDDEN,
    HEIGHT,
    JOBS_BEHIND,
    KERNEL,
    LINE,
    OUT_HEIGHT,
    OUT_WIDTH,
    REACH,
    STRIDE,
    TIMES,
    number,
)
from fastshift.kernels.infer_step_kernel import job_tile, tiles_across

__all__ = ["infer_bands_kernel"]


@triton.jit
def _band_of(job, band, images):
    """What a band needs of a job: first image, how many; first row, there or not, and last, too."""
    down, band_rows = number(job, BANDS_DOWN), number(job, BAND_ROWS)
    per_band = number(job, BAND_IMAGES)
    first_image, first_row = (band // down) * per_band, (band % down) * band_rows
    times, begin = number(job, TIMES), -number(job, BEFORE)
    begin += first_row * times
    end = begin + (band_rows - 1) * times + number(job, REACH)
    return first_image, tl.minimum(per_band, images - first_image), begin, end


@triton.jit
def _band_tile(
    job,
    tile,
    band,
    images,
    rows_ptr,
    scratch_ptr,
    out_ptr,
    moments_ptr,
    address_ptr,
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
    """A tile of what a band needs of a job's rows, where there are such rows."""
    height = number(job, HEIGHT)
    first_image, band_images, begin, end = _band_of(job, band, images)
    low = tl.maximum(begin, 0)
    rows = tl.minimum(end, number(job, OUT_HEIGHT)) - low
    # What the job before has written for this band.
    from_hidden = tl.load(job + FROM_HIDDEN) != 0
    stride, kernel = number(job, STRIDE), number(job, KERNEL)
    source_low = tl.maximum(begin * stride - kernel // 2, 0)
    source_stop = tl.minimum((end - 1) * stride - kernel // 2 + kernel, height)
    source_low = tl.where(from_hidden, source_low, 0)
    source_rows = tl.where(from_hidden, source_stop - source_low, height)
    # A depthwise convolution's chunks are as wide as in front of a product: others would spill.
    job_tile(
        job, tile, rows_ptr, scratch_ptr, scratch_ptr, out_ptr, moments_ptr, address_ptr,
        first_image.to(tl.int64), band_images, low, rows, source_low, source_rows, VARIANTS, ADDS,
        ALIGN, ADDRESS_ALIGN, BLOCK_P, BLOCK_N, BLOCK_K, BLOCK_K, PRECISION, UPCAST,
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

    Sizes are elements of a node in each tensor, of a program in the scratch. A node that is padding
    is left at once, as are the bands that its choice has not of the most that any has, and no
    program goes through jobs that a choice has not.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    scratch_ptr += tl.multiple_of(program.to(tl.int64) * scratch_size, ALIGN)
    stop = nodes * bands * NUM_JOBS
    item = program * NUM_JOBS
    # One loop of both bands and jobs: what two would keep from job to job would spill.
    while item < stop:
        node, band = item // NUM_JOBS // bands, item // NUM_JOBS % bands
        choice = tl.load(choice_ptr + node)
        job = table_ptr + (tl.maximum(choice, 0) * NUM_JOBS + item % NUM_JOBS) * LINE
        _, band_images, begin, end = _band_of(job, band, images)
        rows = tl.minimum(end, number(job, OUT_HEIGHT)) - tl.maximum(begin, 0)
        positions = band_images * rows * number(job, OUT_WIDTH)
        across, _ = tiles_across(job, BLOCK_N, BLOCK_K)
        there = (choice >= 0) & (band_images > 0) & (rows > 0)
        tiles = tl.where(there, tl.cdiv(positions, BLOCK_P) * across, 0)
        # Found now, since it alone is then kept for the next pass.
        last = tl.load(job + JOBS_BEHIND) == 0
        passed = tl.where(there, programs, tl.cdiv(bands - band, programs) * programs)
        next_band = (item // NUM_JOBS + passed) * NUM_JOBS
        item = tl.where(there & (not last), item + 1, next_band)
        wide = node.to(tl.int64)
        # A tile loads what it needs of the job for itself: kept, it would spill.
        for tile in range(tiles):
            row_at = tl.multiple_of(tl.load(parent_ptr + node).to(tl.int64) * row_size, ALIGN)
            _band_tile(
                job, tile, band, images, rows_ptr + row_at, scratch_ptr,
                out_ptr + tl.multiple_of(wide * out_size, ALIGN),
                moments_ptr + wide * moments_size, address_ptr, VARIANTS, ADDS, ALIGN,
                ADDRESS_ALIGN, BLOCK_P, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
        # Other threads read next what a thread has written, and overwrite what it has read.
        tl.debug_barrier()
