"""A population layer with fixed batch norms: every node of a level in one launch, or one a stage.

In one launch (`infer_bands`) a node's hidden rows never leave the second-level cache. Where that
would compute too much anew, launch `s` does stage `s` of every node, whatever its choice: two
launches, or three (`infer_plan`). Batch norms, activations, the residual, the concatenation and the
channel shuffle are folded in (`infer_stage`): of an inverted residual, which one operator at a time
writes and reads eight tensors of hidden or of row size, no hidden tensor is left, or one. Choice
and parent of a node are read from device memory, so one launch serves every population of its size.
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
from fastshift.kernels.cards import card_of
from fastshift.kernels.infer_bands import BandPlan, Machine, choose_bands
from fastshift.kernels.infer_jobs import InferStep
from fastshift.kernels.infer_kernels import infer_bands_kernel, infer_step_kernel
from fastshift.kernels.infer_plan import InferPlan, plan_infer
from fastshift.kernels.infer_tiles import Blocks, block_sizes, num_tiles
from fastshift.kernels.plan import Layer, refuse_capture

__all__ = ["infer", "scratch_bytes"]


def _constants(step: InferStep, blocks: Blocks, wide: bool, precision: str) -> dict[str, Any]:
    """What a launch is compiled for, its warps too.

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
        "UPCAST": not isinstance(infer_step_kernel, triton.JITFunction),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }


@dataclass(frozen=True)
class _Stage:
    """A launch of a step, ready to start: its table on the device, and tiles of each job."""

    table: Tensor
    tiles: int
    num_jobs: int
    constants: dict[str, Any]


@dataclass(frozen=True)
class _Whole:
    """A launch of all steps, ready to start."""

    table: Tensor
    plan: BandPlan
    constants: dict[str, Any]


def _machine(device: torch.device, dtype: torch.dtype, precision: str) -> Machine:
    rates = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    rate = rates.get(dtype, "tf32" if precision == "tf32" else "vector")
    return Machine(*card_of(device), dtype.itemsize, rate)


# Never emptied, as `_launches` is not: a captured graph goes on reading a table where it was.
@cache
def _bands(
    plan: InferPlan, device: torch.device, dtype: torch.dtype, precision: str
) -> BandPlan | None:
    return choose_bands(plan, _machine(device, dtype, precision))


@cache
def _launches(
    plan: InferPlan, device: torch.device, dtype: torch.dtype, wide: bool, precision: str
) -> _Whole | list[_Stage]:
    refuse_capture(device, "a layer's plan")

    def table_of(step: InferStep) -> Tensor:
        with torch.inference_mode(False):
            return torch.tensor(step.table, dtype=torch.int64, device=device)

    whole = _bands(plan, device, dtype, precision)
    if whole is not None:
        constants = _constants(whole.step, whole.blocks, wide, precision)
        return _Whole(table_of(whole.step), whole, constants)
    machine = _machine(device, dtype, precision)
    found = []
    for step in plan.steps:
        blocks = block_sizes(step, plan.images, dtype.itemsize, machine.tensor_cores)
        tiles = num_tiles(step, plan.images, blocks)
        constants = _constants(step, blocks, wide, precision)
        found.append(_Stage(table_of(step), tiles, step.num_jobs, constants))
    return found


def scratch_bytes(
    layer: Layer,
    images: int,
    height: int,
    width: int,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "ieee",
) -> int:
    """Bytes of all programs' scratches together, whatever the population: 0 for a launch a stage.

    Args:
        layer: hashed by identity.
        images, height, width, channels: of the rows above, `[R, N, H, W, C]`.
        device, dtype: of the rows.
        precision: as `infer`'s.
    """
    plan = plan_infer(layer, images, height, width, channels)
    whole = _bands(plan, device, dtype, precision)
    return whole.programs * whole.scratch * dtype.itemsize if whole else 0


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
    if out is None:
        size = (choice.shape[0], rows.shape[1], *shape)
        out = torch.empty(size, dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    rows, moments = rows.contiguous(), moments.contiguous()
    parent, choice = parent.contiguous(), choice.contiguous()
    plan = plan_infer(layer, *rows.shape[1:])
    addresses, wide = address_table(parameters, rows.device)
    launches = _launches(plan, rows.device, rows.dtype, wide, precision)
    start = _start_whole if isinstance(launches, _Whole) else _start_stages
    start(launches, plan, rows, out, moments, parent, choice, addresses)
    return out


def _start_whole(
    launch: _Whole,
    plan: InferPlan,
    rows: Tensor,
    out: Tensor,
    moments: Tensor,
    parent: Tensor,
    choice: Tensor,
    addresses: Tensor,
) -> None:
    """Start the one launch of all steps."""
    bands = launch.plan
    size = bands.programs * bands.scratch
    scratch = torch.empty(size, dtype=rows.dtype, device=rows.device)
    infer_bands_kernel[(bands.programs,)](
        rows,
        scratch,
        out,
        moments,
        parent,
        choice,
        launch.table,
        addresses,
        plan.images,
        choice.shape[0],
        bands.bands,
        rows[0].numel(),
        bands.scratch,
        out[0].numel(),
        moments.shape[1],
        **launch.constants,
    )


def _start_stages(
    launches: Sequence[_Stage],
    plan: InferPlan,
    rows: Tensor,
    out: Tensor,
    moments: Tensor,
    parent: Tensor,
    choice: Tensor,
    addresses: Tensor,
) -> None:
    """Start the launches of all steps, one after the other."""
    nodes = choice.shape[0]
    hidden = [
        torch.empty(nodes * size, dtype=rows.dtype, device=rows.device) for size in plan.hidden
    ]
    for index, launch in enumerate(launches):
        infer_step_kernel[(nodes * launch.num_jobs * launch.tiles,)](
            rows,
            hidden[1 - index % 2],
            hidden[index % 2],
            out,
            moments,
            parent,
            choice,
            launch.table,
            addresses,
            plan.images,
            launch.tiles,
            rows[0].numel(),
            plan.hidden[1 - index % 2],
            plan.hidden[index % 2],
            out[0].numel(),
            moments.shape[1],
            **launch.constants,
        )
