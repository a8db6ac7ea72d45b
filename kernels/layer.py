"""A population layer in training, launch by launch: buffers, grids and the order of the kernels.

Forward: one launch for each step of the plan, one for the frames. Backward: one for the frames,
then one for each step in reverse, which has both its convolution's gradients. Beside them one
memset each, of the counters. Nothing here depends on a device value, and there is no transfer but
the first time that a layer, a size or a parameter's place is seen, so all of it can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from fastshift.kernels._launch import Launch, ceil_div, warps_of
from fastshift.kernels.addresses import address_table
from fastshift.kernels.convolution import convolution_fwd_kernel
from fastshift.kernels.convolution_gradients import convolution_bwd_kernel
from fastshift.kernels.frames import frame_bwd_kernel, frame_fwd_kernel
from fastshift.kernels.layer_shares import (
    FRAME_PIXELS,
    ForwardShares,
    FrameGradientShares,
    GradientShares,
    Shares,
    frame_block,
)
from fastshift.kernels.plan import LayerPlan, Step
from fastshift.kernels.record import Backward, Forward

__all__ = ["backward", "backward_launches", "is_interpreted", "train", "train_launches"]

FEW_REGISTERS, MANY_REGISTERS = 128, 224  # of a thread: 512 threads fit, or 256


@cache
def is_interpreted() -> bool:
    """Whether `TRITON_INTERPRET=1` was set when the kernels were loaded."""
    return not isinstance(convolution_fwd_kernel, triton.runtime.jit.JITFunction)


def _raw_rows(plan: LayerPlan, nodes: int, elements: int, rows: Tensor) -> Tensor:
    """Uninitialised hidden rows of all nodes, as floats."""
    floats = nodes * elements * rows.element_size() // 4
    return torch.empty(floats, dtype=torch.float32, device=rows.device)


def train(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    plan: LayerPlan,
    keep: bool,
    precision: str = "ieee",
    into: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a layer with each batch norm normalising by its node's own moments.

    Args:
        rows: of the level above, `[R, N, H, W, C]`, contiguous.
        parent, choice: of each node, `[M]` int32, on the same device; a choice below 0 is padding.
        parameters: contiguous, float32.
        plan: of the layer, for rows of this size.
        keep: whether a backward pass may follow.
        precision: of a product of float32: `ieee`, or `tf32`.
        into: memory for what is returned, contiguous; of the last only where `keep`.

    Returns:
        The nodes' rows, `[M, N, H', W', C']`, those of padding left as they were; statistics,
        `[M, K]` float32, zeros for padding; and the raw rows, flat float32, empty unless kept.
    """
    nodes, device = choice.shape[0], rows.device
    out, statistics, raw = into or (None, None, None)
    if into is None:
        shape = (nodes, plan.images, *plan.out_size, plan.channels[1])
        out = torch.empty(shape, dtype=rows.dtype, device=device)
        statistics = torch.empty(nodes, plan.statistics_floats, dtype=torch.float32, device=device)
    if raw is None:
        elements = plan.kept_elements if keep else plan.passing_elements
        raw = _raw_rows(plan, nodes, elements, rows)
    if out.numel():
        table, frames = plan.tables(device, kept=keep)
        addresses, _ = address_table(parameters, device)
        steps = [ForwardShares(plan, step, nodes, rows.dtype) for step in plan.steps]
        partial = max((step.partial_floats for step in steps), default=0)
        buffers = Forward(
            rows=rows,
            parent=parent,
            choice=choice,
            table=table,
            frames=frames,
            addresses=addresses,
            raw=raw.view(rows.dtype),
            statistics=statistics,
            partial=torch.empty(partial, dtype=torch.float32, device=device),
            counters=_counters(steps, device),
            out=out,
        )
        for launch in train_launches(buffers, plan, precision):
            launch()
    return out, statistics, raw if keep else raw.new_empty(0)


def _counters(shares: Sequence[Shares], device: torch.device) -> Tensor:
    """Of all launches, one after the other."""
    return torch.zeros(sum(s.counters for s in shares), dtype=torch.int32, device=device)


def train_launches(b: Forward, plan: LayerPlan, precision: str) -> Iterator[Launch]:
    """The launches of a forward pass, in their order."""
    nodes, dtype = b.choice.shape[0], b.rows.dtype
    counters = 0
    for step in plan.steps:
        own = ForwardShares(plan, step, nodes, dtype)
        yield Launch(
            convolution_fwd_kernel,
            (own.items * own.parts * own.tiles,),
            (b,),
            {
                "first": step.first,
                "width": step.c_out,
                "chunk": own.chunk,
                "parts": own.parts,
                "tiles": own.tiles,
                "counters": counters,
                **_options(plan, step, dtype, precision),
                "BLOCK_P": own.blocks.pixels,
                "BLOCK_C": own.blocks.channels,
                "BLOCK_K": own.blocks.depth,
            },
            num_warps=own.blocks.warps,
            num_stages=own.blocks.stages,
            max_registers=_registers(step, dtype),
        )
        counters += own.counters
    parts, block = ceil_div(plan.out_pixels, FRAME_PIXELS), frame_block(plan)
    tiles = ceil_div(plan.channels[1], block)
    yield Launch(
        frame_fwd_kernel,
        (nodes * parts * tiles,),
        (b,),
        {
            "parts": parts,
            "tiles": tiles,
            "ALIGN": plan.align,
            "BLOCK_P": FRAME_PIXELS,
            "BLOCK_C": block,
        },
        num_warps=warps_of(FRAME_PIXELS, block, 4),
    )


def _registers(step: Step, dtype: torch.dtype) -> int:
    """The most of a thread, forward: few where nothing is spilled then."""
    few = step.depthwise or not (step.continues or dtype is torch.float32)
    return FEW_REGISTERS if few else MANY_REGISTERS


def _options(plan: LayerPlan, step: Step, dtype: torch.dtype, precision: str) -> dict:
    """What both kernels of a step have in common."""
    return {
        "LANES": step.lanes,
        "DEPTHWISE": step.depthwise,
        "MOVES": step.moves,
        "SPLITS": step.splits,
        "CONTINUES": step.continues,
        "ALIGN": plan.align,
        "PRECISION": precision,
        "UPCAST": is_interpreted() and dtype is torch.bfloat16,
    }


def backward(
    d_out: Tensor,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    statistics: Tensor,
    saved: Tensor,
    plan: LayerPlan,
    needs_rows: bool,
    precision: str = "ieee",
    d_rows: Tensor | None = None,
    sums: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Compute the gradients of `train`'s rows.

    Args:
        d_out: of the nodes' rows, contiguous; those of padding are not read.
        rows, parent, choice, parameters, plan, precision: as for `train`.
        statistics, saved: as it returned them.
        needs_rows: whether the rows' gradient is wanted.
        d_rows: memory for it, contiguous.
        sums: what the parameters' gradients are added to, float32 and contiguous.

    Returns:
        The gradient of `rows`, empty where not wanted, and those of all parameters, each a tensor
        of its own, or the sums.
    """
    device, nodes = rows.device, choice.shape[0]
    if not d_out.numel():
        d_rows = torch.zeros_like(rows) if needs_rows else rows.new_empty(0)
        return d_rows, [torch.zeros_like(p) for p in parameters] if sums is None else sums
    if d_rows is None:
        d_rows = torch.empty(rows.shape if needs_rows else 0, dtype=rows.dtype, device=device)
    gradients = sums
    if sums is None:
        gradients = [torch.empty(p.shape, dtype=torch.float32, device=device) for p in parameters]
    row_sums = d_rows
    if rows.dtype is not torch.float32 and any(step.enters for step in plan.steps):
        row_sums = torch.empty(d_rows.shape, dtype=torch.float32, device=device)
    table, frames = plan.tables(device, kept=True)
    addresses, _ = address_table(parameters, device)
    shares = _shares(plan, nodes, rows.shape[0] if needs_rows else 0, rows.dtype)
    weight_floats = max((own.weight_floats for own in shares[1:]), default=0)
    floats = max(own.partial_floats for own in shares)
    totals = plan.totals_floats * nodes
    buffers = Backward(
        rows=rows,
        parent=parent,
        choice=choice,
        table=table,
        frames=frames,
        addresses=addresses,
        raw=saved.view(rows.dtype),
        statistics=statistics,
        partial=torch.empty(floats, dtype=torch.float32, device=device),
        counters=_counters(shares, device),
        destinations=torch.empty(max(len(gradients), 1), dtype=torch.int64, device=device),
        totals=torch.empty(totals, dtype=torch.float32, device=device),
        d_out=d_out,
        gradient=_raw_rows(plan, nodes, plan.passing_elements, rows).view(rows.dtype),
        sums=row_sums,
        d_rows=d_rows,
        partial_weights=torch.empty(weight_floats, dtype=torch.float32, device=device),
    )
    adds = sums is not None
    for launch in backward_launches(buffers, gradients, plan, needs_rows, precision, adds):
        launch()
    return d_rows, gradients


def _shares(
    plan: LayerPlan, nodes: int, rows: int, dtype: torch.dtype
) -> list[FrameGradientShares | GradientShares]:
    """Of all launches of a backward pass, in their order."""
    steps = [GradientShares(plan, step, nodes, rows, dtype) for step in reversed(plan.steps)]
    return [FrameGradientShares(plan, nodes, rows), *steps]


def backward_launches(
    b: Backward,
    gradients: Sequence[Tensor],
    plan: LayerPlan,
    needs_rows: bool,
    precision: str,
    adds: bool,
) -> Iterator[Launch]:
    """The launches of a backward pass, in their order."""
    nodes, dtype = b.choice.shape[0], b.rows.dtype
    frame, *steps = _shares(plan, nodes, b.rows.shape[0] if needs_rows else 0, dtype)
    yield Launch(
        frame_bwd_kernel,
        (frame.node_programs + frame.row_programs,),
        (b, tuple(gradients)),
        {
            "nodes": nodes,
            "width": frame.width,
            "chunk": frame.chunk,
            "parts": frame.parts,
            "tiles": frame.tiles,
            "row_parts": frame.row_parts,
            "row_tiles": frame.row_tiles,
            "node_programs": frame.node_programs,
            "ROWS": needs_rows,
            "ALIGN": plan.align,
            "BLOCK_P": FRAME_PIXELS,
            "BLOCK_C": frame.block,
        },
        num_warps=warps_of(FRAME_PIXELS, frame.block, 4),
    )
    counters = frame.counters
    # Sums in float32 go on until the last launch that adds to them, which rounds them once.
    entering = [step for step in plan.steps if step.enters]
    for own, step in zip(steps, reversed(plan.steps), strict=True):
        ends = step is entering[0]
        yield Launch(
            convolution_bwd_kernel,
            (own.programs,),
            (b if ends else b._replace(d_rows=b.sums),),
            {
                "first": step.first,
                "nodes": nodes,
                "width": step.c_in,
                "chunk": own.chunk,
                "parts": own.parts,
                "tiles": own.tiles,
                "row_tiles": own.row_tiles,
                "node_programs": own.node_programs,
                "row_programs": own.row_programs,
                "splits": own.splits,
                "o_tiles": own.o_tiles,
                "i_tiles": own.i_tiles,
                "taps_most": own.taps_most,
                "counters": counters,
                **_options(plan, step, dtype, precision),
                "ENTERS": step.enters and needs_rows,
                "ADDS": adds,
                "BLOCK_P": own.blocks.pixels,
                "BLOCK_C": own.blocks.channels,
                "BLOCK_K": own.blocks.depth,
                "BLOCK_O": own.weight_out,
                "BLOCK_I": own.blocks.weight_in,
                "BLOCK_D": own.blocks.weight_pixels,
            },
            num_warps=own.blocks.warps,
            num_stages=own.blocks.stages,
            max_registers=MANY_REGISTERS,
        )
        counters += own.counters
