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

from fastshift.kernels._launch import Launch
from fastshift.kernels.addresses import ALIGNMENT, address_table
from fastshift.kernels.cards import Card, card_of
from fastshift.kernels.described import Layer
from fastshift.kernels.infer_bands import BandPlan, Machine, choose_bands
from fastshift.kernels.infer_bands_kernel import infer_bands_kernel
from fastshift.kernels.infer_jobs import InferStep
from fastshift.kernels.infer_plan import InferPlan, plan_infer
from fastshift.kernels.infer_step_kernel import infer_step_kernel
from fastshift.kernels.infer_tiles import Blocks, num_tiles
from fastshift.kernels.plan import refuse_capture

__all__ = ["hidden_bytes", "infer", "scratch_bytes"]


@dataclass(frozen=True)
class _Compiled:
    """What a launch is compiled for, and its table on the device.

    Attributes:
        tiles: of each job, where a program is a tile.
        bands: the plan, where a program goes through bands.
    """

    table: Tensor
    blocks: Blocks
    constants: dict[str, Any]
    num_jobs: int
    tiles: int = 0
    bands: BandPlan | None = None

    def launch(self, kernel: Any, programs: int, *positional: Any) -> None:
        """Start it."""
        Launch(
            kernel,
            (programs,),
            positional,
            self.constants,
            num_warps=self.blocks.warps,
            num_stages=self.blocks.stages,
            max_registers=self.blocks.registers,
        )()


def _compiled(
    step: InferStep,
    blocks: Blocks,
    device: torch.device,
    wide: bool,
    precision: str,
    **rest: Any,
) -> _Compiled:
    """Copy a launch's table to the device.

    Args:
        step, blocks: the launch and its tile.
        device: of the rows.
        wide: whether all parameters begin where a wide access may.
        precision: of a product of float32: `ieee`, or `tf32`.
        rest: other fields.
    """
    constants = {
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
    }
    with torch.inference_mode(False):
        table = torch.tensor(step.table, dtype=torch.int64, device=device)
    return _Compiled(table, blocks, constants, step.num_jobs, **rest)


def _machine(
    device: torch.device, dtype: torch.dtype, precision: str, card: Card | None
) -> Machine:
    """What rows run on: the device that they are on, or a card that it stands for."""
    rates = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    rate = rates.get(dtype, "tf32" if precision == "tf32" else "vector")
    found = (card, card.multiprocessors) if card else card_of(device)
    return Machine(*found, dtype.itemsize, rate)


# Never emptied, as `_launches` is not: a captured graph goes on reading a table where it was.
@cache
def _bands(
    plan: InferPlan, device: torch.device, dtype: torch.dtype, precision: str, card: Card | None
) -> BandPlan | None:
    return choose_bands(plan, _machine(device, dtype, precision, card))


@cache
def _launches(
    plan: InferPlan,
    device: torch.device,
    dtype: torch.dtype,
    wide: bool,
    precision: str,
    card: Card | None,
) -> list[_Compiled]:
    refuse_capture(device, "a layer's plan")
    bands = _bands(plan, device, dtype, precision, card)
    if bands is not None:
        return [_compiled(bands.step, bands.blocks, device, wide, precision, bands=bands)]
    found = []
    machine = _machine(device, dtype, precision, card)
    for step in plan.steps:
        blocks = machine.blocks(step, plan.images)
        tiles = num_tiles(step, plan.images, blocks)
        found.append(_compiled(step, blocks, device, wide, precision, tiles=tiles))
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
    card: Card | None = None,
) -> int:
    """Bytes of all programs' scratches together, whatever the population: 0 for a launch a stage.

    Args:
        layer: hashed by identity.
        images, height, width, channels: of the rows above, `[R, N, H, W, C]`.
        device, dtype: of the rows.
        precision, card: as `infer`'s.
    """
    plan = plan_infer(layer, images, height, width, channels)
    whole = _bands(plan, device, dtype, precision, card)
    return whole.programs * whole.scratch * dtype.itemsize if whole else 0


def hidden_bytes(
    nodes: int,
    layer: Layer,
    images: int,
    height: int,
    width: int,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "ieee",
) -> int:
    """Bytes that `infer` takes for hidden rows: scratches, or buffers of that many nodes.

    Args:
        nodes: of a call, padding among them.
        layer, images, height, width, channels, device, dtype, precision: as `scratch_bytes`'s.
    """
    given = layer, images, height, width, channels
    in_buffers = nodes * sum(plan_infer(*given).hidden) * dtype.itemsize
    return scratch_bytes(*given, device, dtype, precision) or in_buffers


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
    card: Card | None = None,
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
        card: whose figures choose the launches; those of the rows' device without.

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
    launches = _launches(plan, rows.device, rows.dtype, wide, precision, card)
    sizes = rows[0].numel(), out[0].numel(), moments.shape[1]
    nodes = moments, parent, choice
    if launches and launches[0].bands:
        _start_bands(launches[0], plan, rows, out, nodes, addresses, sizes)
    else:
        _start_steps(launches, plan, rows, out, nodes, addresses, sizes)
    return out


def _start_bands(
    launch: _Compiled,
    plan: InferPlan,
    rows: Tensor,
    out: Tensor,
    nodes: tuple[Tensor, Tensor, Tensor],
    addresses: Tensor,
    sizes: tuple[int, int, int],
) -> None:
    """Start the one launch of all steps, with a scratch."""
    bands, (row_size, out_size, moments_size) = launch.bands, sizes
    elements = bands.programs * bands.scratch
    scratch = torch.empty(elements, dtype=rows.dtype, device=rows.device)
    launch.launch(
        infer_bands_kernel,
        bands.programs,
        rows,
        scratch,
        out,
        *nodes,
        launch.table,
        addresses,
        plan.images,
        out.shape[0],
        bands.bands,
        row_size,
        bands.scratch,
        out_size,
        moments_size,
    )


def _start_steps(
    launches: Sequence[_Compiled],
    plan: InferPlan,
    rows: Tensor,
    out: Tensor,
    nodes: tuple[Tensor, Tensor, Tensor],
    addresses: Tensor,
    sizes: tuple[int, int, int],
) -> None:
    """Start the launches of all steps, one after the other, with two buffers for hidden rows."""
    row_size, out_size, moments_size = sizes
    hidden = [
        torch.empty(len(out) * size, dtype=rows.dtype, device=rows.device) for size in plan.hidden
    ]
    for index, launch in enumerate(launches):
        launch.launch(
            infer_step_kernel,
            len(out) * launch.num_jobs * launch.tiles,
            rows,
            hidden[1 - index % 2],
            hidden[index % 2],
            out,
            *nodes,
            launch.table,
            addresses,
            plan.images,
            launch.tiles,
            row_size,
            plan.hidden[1 - index % 2],
            plan.hidden[index % 2],
            out_size,
            moments_size,
        )
