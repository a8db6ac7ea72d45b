"""A population layer with fixed batch norms: every node of a level in two launches, or three.

Launch `s` does stage `s` of every node, whatever its choice (`infer_plan`); batch norms,
activations, the residual, the concatenation and the channel shuffle are folded into it
(`infer_stage`). Of an inverted residual, which one operator at a time writes and reads eight
tensors of hidden or of row size, one hidden tensor is written and read. Choice and parent of a node
are read from device memory, so one launch serves every population of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastshift.kernels.addresses import ALIGNMENT, address_table
from fastshift.kernels.infer_plan import KINDS, InferPlan, InferStep, plan_infer
from fastshift.kernels.infer_stage import infer_kernel
from fastshift.kernels.plan import Layer, refuse_capture

__all__ = ["Blocks", "block_sizes", "infer"]


_SHARED = 96 * 1024  # bytes of shared memory that any card since sm_80 gives a program


@dataclass(frozen=True)
class Blocks:
    """A launch's tile, `[positions, channels]` in chunks of `depth` channels, and what it runs on.

    Attributes:
        registers: most of a thread: at 128 a multiprocessor holds 16 warps.
        stages: chunks that the loop of a product alone has in shared memory.
    """

    positions: int
    channels: int
    depth: int
    warps: int
    registers: int
    stages: int


def block_sizes(step: InferStep, images: int, item_size: int, tensor_cores: bool) -> Blocks:
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
    """
    kinds = {KINDS[job.kind] for job in step.all_jobs}
    products = [job for job in step.all_jobs if KINDS[job.kind] in ("pointwise", "dense", "pair")]
    per_tap = 16 if tensor_cores else 1
    registers, most = 128, 256
    if kinds & {"dense", "depthwise"}:
        registers, most = 255, 64  # they hold more addresses or sums, and would spill
    elif "pointwise" in kinds or not tensor_cores:
        most = 128  # the loop of a pointwise product keeps several chunks in shared memory

    def cost(channels: int) -> int:
        return sum(
            triton.cdiv(job["out_channels"], channels)
            * (channels + per_tap * (job.taps if KINDS[job.kind] == "pair" else 1))
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
    deepest = max((job["in_channels"] for job in products), default=16)
    # Enough for each thread to read 16 bytes of a chunk at a time.
    depth = max(64 // item_size, 32 * warps * 16 // (64 * item_size))
    depth = min(depth, max(16, triton.next_power_of_2(deepest)))
    chunk = 2 * positions * depth * item_size + 4 * depth * channels  # bytes; twice for a split
    stages = 3 if 3 * chunk <= _SHARED else 2
    return Blocks(positions, channels, depth, warps, registers, stages)


def num_tiles(step: InferStep, images: int, blocks: Blocks) -> int:
    """Tiles of the largest job of a step: the programs of each job."""
    return max(
        triton.cdiv(images * job["out_height"] * job["out_width"], blocks.positions)
        * triton.cdiv(job["out_channels"], blocks.channels)
        for job in step.all_jobs
    )


def step_constants(step: InferStep, blocks: Blocks, wide: bool, precision: str) -> dict[str, Any]:
    """What a step's launch is compiled for, its warps too.

    Args:
        step, blocks: the launch and its tile.
        wide: whether all parameters begin where a wide access may.
        precision: of a product of float32: `ieee`, or `tf32`.
    """
    return {
        "NUM_JOBS": step.num_jobs,
        "VARIANTS": step.variants,
        "ADDS": step.adds,
        "ALIGN": step.align,
        "ADDRESS_ALIGN": ALIGNMENT if wide else 4,
        "BLOCK_P": blocks.positions,
        "BLOCK_N": blocks.channels,
        "BLOCK_K": blocks.depth,
        "PRECISION": precision,
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        "UPCAST": not isinstance(infer_kernel, triton.JITFunction),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }


@dataclass(frozen=True)
class _Launch:
    """A step, ready to start: its table on the device, tiles of each job, and constants."""

    table: Tensor
    tiles: int
    num_jobs: int
    constants: dict[str, Any]


# Never emptied: a captured graph goes on reading a table where it was.
@cache
def _launches(
    plan: InferPlan, device: torch.device, dtype: torch.dtype, wide: bool, precision: str
) -> list[_Launch]:
    refuse_capture(device, "a layer's plan")
    found = []
    for step in plan.steps:
        blocks = block_sizes(
            step, plan.images, dtype.itemsize, precision == "tf32" or dtype is not torch.float32
        )
        with torch.inference_mode(False):
            table = torch.tensor(step.table, dtype=torch.int64, device=device)
        found.append(
            _Launch(
                table,
                num_tiles(step, plan.images, blocks),
                step.num_jobs,
                step_constants(step, blocks, wide, precision),
            )
        )
    return found


def infer(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    moments: Tensor,
    layer: Layer,
    shape: Sequence[int],
    *,
    precision: str = "ieee",
    out: Tensor | None = None,
) -> Tensor:
    """Compute a level's nodes with batch norms that normalise by given moments.

    Args:
        rows: of the level above, `[R, N, H, W, C]` float32, float16 or bfloat16.
        parent: index into `rows` of each node, `[M]` int32.
        choice: candidate op of each node, `[M]` int32; the row of a negative one is not written.
        parameters: of all choices, in order, contiguous float32.
        moments: mean and variance of each unit's channels, of each node, `[M, K]` float32.
        layer: what its choices compute.
        shape: of a node's row: height, width, channels.
        precision: of a product of float32: `ieee`, or `tf32`, on tensor cores.
        out: memory for what is returned, contiguous.

    Returns:
        The nodes' rows, `[M, N, H', W', C']`, of the type of `rows`.

    Raises:
        ValueError: rows have more positions, or an image more elements, than 32 bits hold.
        RuntimeError: a graph is being captured, and tables that a call before it would have made
            are not there.
    """
    nodes, images = choice.shape[0], rows.shape[1]
    if out is None:
        out = torch.empty((nodes, images, *shape), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    rows, moments = rows.contiguous(), moments.contiguous()
    parent, choice = parent.contiguous(), choice.contiguous()
    plan = plan_infer(layer, *rows.shape[1:])
    addresses, wide = address_table(parameters, rows.device)
    hidden = [
        torch.empty(nodes * size, dtype=rows.dtype, device=rows.device) for size in plan.hidden
    ]
    launches = _launches(plan, rows.device, rows.dtype, wide, precision)
    for index, launch in enumerate(launches):
        infer_kernel[(nodes * launch.num_jobs * launch.tiles,)](
            rows,
            hidden[1 - index % 2],
            hidden[index % 2],
            out,
            moments,
            parent,
            choice,
            launch.table,
            addresses,
            images,
            launch.tiles,
            rows[0].numel(),
            plan.hidden[1 - index % 2],
            plan.hidden[index % 2],
            out[0].numel(),
            moments.shape[1],
            **launch.constants,
        )
    return out
