"""What the kernels of inference read of a job: the places of its columns, and their values."""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.infer_jobs import COLUMNS, KINDS

LINE = tl.constexpr(len(COLUMNS))

POINTWISE, DENSE, PAIR, DEPTHWISE, COPY = (tl.constexpr(i) for i in range(len(KINDS)))

VARIANT = tl.constexpr(COLUMNS.index("variant"))
FROM_HIDDEN = tl.constexpr(COLUMNS.index("from_hidden"))
SOURCE_AT = tl.constexpr(COLUMNS.index("source_at"))
SOURCE_ROW = tl.constexpr(COLUMNS.index("source_row"))
HEIGHT = tl.constexpr(COLUMNS.index("height"))
WIDTH = tl.constexpr(COLUMNS.index("width"))
OUT_HEIGHT = tl.constexpr(COLUMNS.index("out_height"))
OUT_WIDTH = tl.constexpr(COLUMNS.index("out_width"))
KERNEL = tl.constexpr(COLUMNS.index("kernel"))
STRIDE = tl.constexpr(COLUMNS.index("stride"))
IN_CHANNELS = tl.constexpr(COLUMNS.index("in_channels"))
OUT_CHANNELS = tl.constexpr(COLUMNS.index("out_channels"))
TO_HIDDEN = tl.constexpr(COLUMNS.index("to_hidden"))
TARGET_AT = tl.constexpr(COLUMNS.index("target_at"))
TARGET_ROW = tl.constexpr(COLUMNS.index("target_row"))
ADD = tl.constexpr(COLUMNS.index("add"))
SPATIAL = tl.constexpr(COLUMNS.index("spatial_weight"))
PRODUCT = tl.constexpr(COLUMNS.index("weight"))
TIMES = tl.constexpr(COLUMNS.index("times"))
BEFORE = tl.constexpr(COLUMNS.index("before"))
REACH = tl.constexpr(COLUMNS.index("reach"))
BAND_IMAGES = tl.constexpr(COLUMNS.index("band_images"))
BAND_ROWS = tl.constexpr(COLUMNS.index("band_rows"))
BANDS_DOWN = tl.constexpr(COLUMNS.index("bands_down"))
JOBS_BEHIND = tl.constexpr(COLUMNS.index("jobs_behind"))


@triton.jit
def number(job, COLUMN: tl.constexpr):
    """A column that 32 bits hold."""
    return tl.load(job + COLUMN).to(tl.int32)


@triton.jit
def multiple(job, COLUMN: tl.constexpr, ALIGN: tl.constexpr):
    """A column that 32 bits hold, known to be a multiple."""
    # Of a call's result the compiler would forget it.
    return tl.multiple_of(tl.load(job + COLUMN).to(tl.int32), ALIGN)


@triton.jit
def place(job, COLUMN: tl.constexpr, ALIGN: tl.constexpr):
    """A column of 64 bits: elements before what a job reads or writes, known to be a multiple."""
    return tl.multiple_of(tl.load(job + COLUMN), ALIGN)
