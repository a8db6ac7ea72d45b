"""Tiles of the launches of a layer's inference: functions of sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from fastshift.kernels.infer_jobs import InferStep

__all__ = ["REGISTERS", "Blocks", "block_sizes", "num_tiles"]

REGISTERS = 65536  # of a multiprocessor
_SHARED = 96 * 1024  # bytes of shared memory that any card since sm_80 gives a program


@dataclass(frozen=True)
class Blocks:
    """A launch's tile, `[positions, channels]` in chunks of `depth` channels, and what it runs on.

    Attributes:
        registers: most of a thread: at 128 a multiprocessor holds 16 warps.
        stages: chunks that the loop of a product alone has in shared memory.
        shared: bytes that these take.
    """

    positions: int
    channels: int
    depth: int
    warps: int
    registers: int
    stages: int
    shared: int = 0


def block_sizes(
    step: InferStep,
    images: int,
    item_size: int,
    tensor_cores: bool,
    few_sums: bool,
    apart: bool = False,
) -> Blocks:
    """Choose a step's tile: a function of sizes alone.

    Each tile of output channels computes the depthwise convolution anew: a wide one does so less
    often, one that fits the channels multiplies less padding. In units of one column's products, a
    tap costs what its loads do: 16 columns on tensor cores, 1 without. Estimates from what the
    hardware moves a cycle, not measured.

    Args:
        step: the launch.
        images: of a row.
        item_size: bytes of a value of the rows.
        tensor_cores: whether products run on them (float32 at full precision does not).
        few_sums: as a card's.
        apart: whether the launch has depthwise convolutions too, of tiles of their own.
    """
    kinds = {job.kind_name for job in step.all_jobs}
    products = [job for job in step.all_jobs if job.kind_name in ("pointwise", "dense", "pair")]
    per_tap = 16 if tensor_cores else 1
    registers, most = 128, 256
    if kinds & {"dense", "depthwise"}:
        registers, most = 255, 64  # they hold more addresses or sums, and would spill
    elif "pointwise" in kinds or not tensor_cores:
        most = 128  # the loop of a pointwise product keeps several chunks in shared memory

    def cost(channels: int) -> int:
        return sum(
            triton.cdiv(job["out_channels"], channels)
            * (channels + per_tap * (job.taps if job.kind_name == "pair" else 1))
            * job["in_channels"]
            for job in products
        )

    widest = max(job["out_channels"] for job in step.all_jobs)
    limit = min(most, max(16, triton.next_power_of_2(widest)))
    widths = [width for width in (256, 128, 64, 32, 16) if width <= limit]
    channels = min(widths, key=cost)
    positions = images * max(job["out_height"] * job["out_width"] for job in step.all_jobs)
    positions = min(64, max(16, triton.next_power_of_2(positions)))
    # Sums that a thread holds: 32 would spill in narrower tiles, whose launches do more kinds of
    # jobs, and beside a depthwise convolution's in all but the widest.
    holds_32 = channels == 256 or (channels == 128 and "pair" not in kinds)
    sums = 32 if tensor_cores and holds_32 else 16
    warps = max(4, positions * channels // (32 * sums))
    if few_sums and tensor_cores and apart and channels > 32:
        channels //= 2  # as many warps, or products would be the older tensor cores'
    elif few_sums and not tensor_cores and len(kinds) + apart > 2:
        warps = min(2 * warps, 16)
    registers = min(registers, REGISTERS // (32 * warps))  # or no program could start
    deepest = max((job["in_channels"] for job in products), default=16)
    # Enough for each thread to read 16 bytes of a chunk at a time.
    depth = max(64 // item_size, 32 * warps * 16 // (64 * item_size))
    depth = min(depth, max(16, triton.next_power_of_2(deepest)))
    chunk = 2 * positions * depth * item_size + 4 * depth * channels  # bytes; twice for a split
    stages = 3 if 3 * chunk <= _SHARED else 2
    return Blocks(positions, channels, depth, warps, registers, stages, stages * chunk)


def num_tiles(step: InferStep, images: int, blocks: Blocks) -> int:
    """Tiles of the largest job of a step: the programs of each job."""
    return max(
        triton.cdiv(images * job["out_height"] * job["out_width"], blocks.positions)
        * triton.cdiv(job["out_channels"], blocks.channels)
        for job in step.all_jobs
    )
