"""How the work of a population layer's launches in training is shared among programs."""

from __future__ import annotations

import torch

from fastshift.kernels._launch import (
    MOST_PARTS,
    blocks_of,
    ceil_div,
    power_of_2,
    share,
    splits_of,
)
from fastshift.kernels.plan import LayerPlan, Step

__all__ = [
    "FRAME_PIXELS",
    "ForwardShares",
    "FrameGradientShares",
    "GradientShares",
    "Shares",
    "frame_block",
]

FRAME_PIXELS, FRAME_CHANNELS = 32, 64


class ForwardShares:
    """Shares of a step's forward launch."""

    def __init__(self, plan: LayerPlan, step: Step, nodes: int, dtype: torch.dtype) -> None:
        self.blocks = blocks_of(
            step.depthwise, False, step.out_pixels, step.c_in, step.c_out, dtype
        )
        tiles = ceil_div(step.out_pixels, self.blocks.pixels)
        self.chunk, self.parts = share(tiles, MOST_PARTS)
        self.items = nodes * step.lanes
        self.tiles = ceil_div(step.c_out, self.blocks.channels)
        self.counters = self.items * self.tiles
        self.partial_floats = self.items * self.parts * 2 * step.c_out


def frame_block(plan: LayerPlan) -> int:
    """Channels of a frame's tile."""
    return power_of_2(max(plan.channels), FRAME_CHANNELS)


class GradientShares:
    """Shares of a step's backward launch."""

    def __init__(
        self, plan: LayerPlan, step: Step, nodes: int, rows: int, dtype: torch.dtype
    ) -> None:
        self.blocks = blocks_of(step.depthwise, True, step.in_pixels, step.c_out, step.c_in, dtype)
        blocks = self.blocks
        self.chunk, self.parts = share(ceil_div(step.in_pixels, blocks.pixels), MOST_PARTS)
        self.tiles = ceil_div(step.c_in, blocks.channels)
        self.row_tiles = ceil_div(plan.channels[0], blocks.channels)
        self.items = nodes * step.lanes if step.continues else 0
        self.node_programs = self.items * self.tiles * self.parts
        self.row_programs = rows * self.row_tiles * self.parts if step.enters else 0
        self.taps_most = step.kernel**2
        self.weight_out = blocks.weight_out
        self.o_tiles = ceil_div(step.c_out, self.weight_out)
        self.i_tiles = 1 if step.depthwise else ceil_div(step.c_in, blocks.weight_in)
        per_slot = self.o_tiles * self.i_tiles * self.taps_most
        self.splits = splits_of(per_slot, ceil_div(step.out_pixels, blocks.weight_pixels))
        self.weight_tiles = plan.num_choices * step.lanes * per_slot
        inner = 1 if step.depthwise else blocks.weight_in
        self.weight_floats = self.weight_tiles * self.splits * self.weight_out * inner
        self.programs = self.node_programs + self.row_programs + self.weight_tiles * self.splits
        self.counters = self.items * self.tiles + self.weight_tiles
        self.partial_floats = self.items * self.parts * 2 * step.c_in


class FrameGradientShares:
    """Shares of the frames' backward launch."""

    def __init__(self, plan: LayerPlan, nodes: int, rows: int) -> None:
        self.chunk, self.parts = share(ceil_div(plan.out_pixels, FRAME_PIXELS), MOST_PARTS)
        self.width = plan.channels[1] if plan.steps else 0
        self.block = frame_block(plan)
        self.tiles = ceil_div(self.width, self.block)
        self.node_programs = nodes * 2 * self.tiles * self.parts
        self.row_parts = ceil_div(plan.row_pixels, FRAME_PIXELS)
        self.row_tiles = ceil_div(plan.channels[0], self.block)
        self.row_programs = rows * self.row_parts * self.row_tiles
        if plan.steps:  # the first launch whose units read rows begins their gradients
            self.row_programs = 0
        self.counters = nodes * 2 * self.tiles
        self.partial_floats = nodes * 2 * self.parts * 2 * self.width


Shares = ForwardShares | GradientShares | FrameGradientShares
