"""What one launch of a layer's inference does for each choice: jobs, as lines of a table.

A job is a stage of a chain, or channels that are copied. Its columns say what it reads, computes
and writes, and, for a launch that goes through a chain in bands of rows, which rows of its result a
band needs: of `n` rows of the node's row from row `y` on these are `times (n - 1) + reach` rows
from `times y - before` on. A band has `band_images` images and `band_rows` rows, `bands_down` of
them are an image, and `jobs_behind` jobs of the choice follow in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "ADD_OUTPUT",
    "ADD_ROW",
    "COLUMNS",
    "KINDS",
    "UNIT_COLUMNS",
    "InferStep",
    "Job",
]

# A variant is `2 * kind + part`; with part 1 every other channel of the source is read: the odd
# ones where something is computed, the even ones where they are copied.
KINDS = ("pointwise", "dense", "pair", "depthwise", "copy")

# What is added to a job's result: nothing, the node's source row, or what the output holds.
ADD_ROW, ADD_OUTPUT = 1, 2

# Of a table's line; those of a unit are its parameters' places in the list of all (-1 where there
# is none), its place in a node's moments, its activation and its epsilon as the bits of a float32.
UNIT_COLUMNS = ("weight", "scale", "shift", "moments", "relu", "eps")
COLUMNS = (
    "variant",
    "from_hidden",
    "source_at",
    "source_row",
    "height",
    "width",
    "out_height",
    "out_width",
    "kernel",
    "stride",
    "in_channels",
    "out_channels",
    "to_hidden",
    "target_at",
    "target_row",
    "add",
    *(f"spatial_{name}" for name in UNIT_COLUMNS),
    *UNIT_COLUMNS,
    "times",
    "before",
    "reach",
    "band_images",
    "band_rows",
    "bands_down",
    "jobs_behind",
)


@dataclass(frozen=True)
class Job:
    """What a launch does for each node of a choice: `COLUMNS`, as a mapping."""

    values: dict[str, int]

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    @property
    def kind(self) -> int:
        """Index into `KINDS`."""
        return self["variant"] // 2

    @property
    def kind_name(self) -> str:
        """Of `KINDS`."""
        return KINDS[self.kind]

    @property
    def taps(self) -> int:
        """Values that a convolution reads of each channel for one position."""
        return self["kernel"] ** 2


@dataclass(frozen=True)
class InferStep:
    """One launch.

    Attributes:
        jobs: of each choice, in the order in which one launch has to do them if it does all.
    """

    jobs: tuple[tuple[Job, ...], ...]

    @property
    def all_jobs(self) -> list[Job]:
        """Of all choices."""
        return [job for own in self.jobs for job in own]

    @property
    def num_jobs(self) -> int:
        """Most jobs of a choice."""
        return max(map(len, self.jobs))

    @property
    def variants(self) -> int:
        """The variants that occur, as a set of bits."""
        return sum({1 << job["variant"] for job in self.all_jobs})

    @property
    def adds(self) -> bool:
        """Whether a job adds something to its result."""
        return any(job["add"] for job in self.all_jobs)

    @property
    def align(self) -> int:
        """Elements that every job's rows and channels are a multiple of: a power of two, to 16."""
        names = ("source_at", "source_row", "in_channels", "out_channels", "target_at")
        values = [job[name] for job in self.all_jobs for name in (*names, "target_row")]
        return math.gcd(16, *values)

    @property
    def table(self) -> list[list[list[int]]]:
        """`[choices, num_jobs, COLUMNS]`; a line's variant is -1 where there is no job."""
        empty = [-1] * len(COLUMNS)
        return [
            [[job[name] for name in COLUMNS] for job in own] + [empty] * (self.num_jobs - len(own))
            for own in self.jobs
        ]
