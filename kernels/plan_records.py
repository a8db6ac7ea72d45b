"""A layer's plan as the records that kernels read: int32, found by the node's choice."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastshift.kernels.described import Op
    from fastshift.kernels.plan import LayerPlan, Placed

__all__ = [
    "CHAIN_FIELDS",
    "FIELDS",
    "FRAME_FIELDS",
    "HEADER",
    "LINE",
    "MOST_POSITIONS",
    "frame_records",
    "passed_row",
    "step_records",
]

# Of a row's images together: kernels count them, and those of the tiles behind, in 32 bits.
MOST_POSITIONS = 2**30
LINE = 32  # elements; a hidden unit's rows begin at a multiple of it

# Of the layer, before all records: `raw_lines` and `gradient_lines` are those of a node.
HEADER = (
    "images",
    "row_pixels",
    "row_channels",
    "out_pixels",
    "out_channels",
    "raw_lines",
    "gradient_lines",
    "statistics_floats",
    "totals_floats",
)

# Of a unit. Places of rows are in lines, `channel` and `source_channel` in channels of the batch
# norms before, parameters are indices into the layer's list and -1 for none, `eps` the bits of a
# float32. `source` is the unit before; where `first` there is none, and the parent's row is read,
# where `split` its odd channels. `last`: the gradient is the node's own from channel `y_offset` on.
FIELDS = (
    "active",
    "c_in",
    "c_out",
    "kernel",
    "stride",
    "in_height",
    "in_width",
    "out_height",
    "out_width",
    "first",
    "split",
    "last",
    "y_offset",
    "raw",
    "channel",
    "relu",
    "weight",
    "scale",
    "shift",
    "eps",
    "gradient",
    "source_raw",
    "source_channel",
    "source_relu",
    "source_shift",
    "source_gradient",
)

# Of a choice: which channels of the parent's row are copied or added (0 none, 1 all, 2 the even
# ones), channels of all batch norms, and the last units of the main chain and of the shortcut.
CHAIN_FIELDS = ("there", "raw", "channel", "relu", "shift", "c", "y_offset")
FRAME_FIELDS = (
    "row",
    "channels",
    *(f"main_{name}" for name in CHAIN_FIELDS),
    *(f"aside_{name}" for name in CHAIN_FIELDS),
)


def _record(plan: LayerPlan, placed: Placed, chain: Sequence[Placed], *, kept: bool) -> list[int]:
    raw = plan.kept if kept else plan.passing
    key = (placed.choice, placed.chain)
    op, unit = plan.ops[placed.choice], placed.unit
    weight, scale, shift = placed.parameters
    source = chain[placed.index - 1] if placed.index else None
    values = {
        "active": 1,
        "c_in": unit.in_channels,
        "c_out": unit.out_channels,
        "kernel": unit.kernel,
        "stride": unit.stride,
        "in_height": placed.in_size[0],
        "in_width": placed.in_size[1],
        "out_height": placed.out_size[0],
        "out_width": placed.out_size[1],
        "first": source is None,
        "split": source is None and op.splits,
        "last": placed.index == placed.length - 1,
        "y_offset": 0 if placed.chain else plan.y_offset(op),
        "raw": raw[(*key, placed.index)] // LINE,
        "channel": placed.channel,
        "relu": unit.relu,
        "weight": weight,
        "scale": scale,
        "shift": shift,
        "eps": struct.unpack("<i", struct.pack("<f", unit.eps))[0],
        "gradient": plan.gradients[(*key, placed.index)] // LINE,
        "source_raw": raw[(*key, source.index)] // LINE if source else 0,
        "source_channel": source.channel if source else 0,
        "source_relu": source.unit.relu if source else 0,
        "source_shift": source.parameters[2] if source else -1,
        "source_gradient": plan.gradients[(*key, source.index)] // LINE if source else 0,
    }
    return [int(values[name]) for name in FIELDS]


def _header(plan: LayerPlan, *, kept: bool) -> list[int]:
    values = {
        "images": plan.images,
        "row_pixels": plan.row_pixels,
        "row_channels": plan.channels[0],
        "out_pixels": plan.out_pixels,
        "out_channels": plan.channels[1],
        "raw_lines": (plan.kept_elements if kept else plan.passing_elements) // LINE,
        "gradient_lines": plan.gradient_elements // LINE,
        "statistics_floats": plan.statistics_floats,
        "totals_floats": plan.totals_floats,
    }
    return [values[name] for name in HEADER]


def step_records(plan: LayerPlan, *, kept: bool) -> list[int]:
    """The header, then of all steps `[choices, lanes, FIELDS]`, zeros for a choice without."""
    found = _header(plan, kept=kept)
    chain_of = {(c[0].choice, c[0].chain): c for c in plan.chains}
    for step, at in zip(plan.steps, plan.placed, strict=True):
        for choice in range(plan.num_choices):
            own = [p for p in at if p.choice == choice]
            for placed in own:
                chain = chain_of[choice, placed.chain]
                found += _record(plan, placed, chain, kept=kept)
            found += [0] * (len(FIELDS) * (step.lanes - len(own)))
    return found


def passed_row(op: Op | None) -> int:
    """Which channels of the parent's row an op copies or adds: 0 none, 1 all, 2 the even ones."""
    if op is None:
        return 1
    if op.splits:
        return 2
    return int(op.frame == "residual" and len(op.units) == op.main)


def frame_records(plan: LayerPlan, *, kept: bool) -> list[int]:
    """Of all choices, `[choices, FRAME_FIELDS]`."""
    raw = plan.kept if kept else plan.passing
    found: list[int] = []
    for choice, op in enumerate(plan.ops):
        if op is None:
            found += [passed_row(op), 0] + [0] * (2 * len(CHAIN_FIELDS))
            continue
        found += [passed_row(op), op.channels]
        for chain in (0, 1):
            last = next(
                (c[-1] for c in plan.chains if (c[0].choice, c[0].chain) == (choice, chain)),
                None,
            )
            if last is None:
                found += [0] * len(CHAIN_FIELDS)
                continue
            place = raw[choice, chain, last.index] // LINE
            unit = last.unit
            y_offset = 0 if chain else plan.y_offset(op)
            found += [1, place, last.channel, int(unit.relu), last.parameters[2]]
            found += [unit.out_channels, y_offset]
    return found
