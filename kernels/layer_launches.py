"""The launches of a population layer in training, from its plan: kernels, grids and constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from fastshift.kernels._launch import Launch, ceil_div, warps_of
from fastshift.kernels.convolution import convolution_fwd_kernel
from fastshift.kernels.convolution_gradients import convolution_bwd_kernel
from fastshift.kernels.frames import frame_bwd_kernel, frame_fwd_kernel
from fastshift.kernels.layer_shares import (
    FRAME_PIXELS,
    ForwardShares,
    FrameGradientShares,
    GradientShares,
    frame_block,
)
from fastshift.kernels.plan import LayerPlan, Step
from fastshift.kernels.record import Backward, Forward

__all__ = ["backward_launches", "backward_shares", "train_launches"]

FEW_REGISTERS, MANY_REGISTERS = 128, 224  # of a thread: 512 threads fit, or 256
FRAME_REGISTERS = 96  # 640 threads; with no limit a few are spilled


@cache
def _is_interpreted() -> bool:
    """Whether `TRITON_INTERPRET=1` was set when the kernels were loaded."""
    return not isinstance(convolution_fwd_kernel, triton.runtime.jit.JITFunction)


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
        "PRECISION": "ieee" if step.depthwise else precision,  # of no product: one machine code
        "UPCAST": _is_interpreted() and dtype is torch.bfloat16,
    }


def backward_shares(
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
    frame, *steps = backward_shares(plan, nodes, b.rows.shape[0] if needs_rows else 0, dtype)
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
            "PASSES": needs_rows and not plan.steps,
            "ALIGN": plan.align,
            "BLOCK_P": FRAME_PIXELS,
            "BLOCK_C": frame.block,
        },
        num_warps=warps_of(FRAME_PIXELS, frame.block, 4),
        max_registers=FRAME_REGISTERS,
    )
    counters = frame.counters
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
                "STARTS": needs_rows and step is entering[-1],
                "PASSES": plan.passes,
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
