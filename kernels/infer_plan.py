"""The launches of a population layer's inference, from what its choices compute and the rows' size.

A chain of units is cut into stages: a product (pointwise or dense), a depthwise convolution with
the pointwise product behind it, or a depthwise convolution alone. Step `s` of the layer is one
launch that does stage `s` of every node, whatever its choice, shortcut chains and copied channels
along with it. What differs between choices is in a table with one line for each of a choice's jobs
in a step, so a launch is the same for all populations of a size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

from fastshift.kernels.described import Layer, Op, Unit
from fastshift.kernels.infer_jobs import (
    ADD_OUTPUT,
    ADD_ROW,
    COLUMNS,
    KINDS,
    UNIT_COLUMNS,
    InferStep,
    Job,
)
from fastshift.kernels.plan_records import LINE, MOST_POSITIONS

__all__ = ["InferPlan", "plan_infer"]

_POINTWISE, _DENSE, _PAIR, _DEPTHWISE, _COPY = range(len(KINDS))

# Of one image: offsets within a tile of positions, whose images are few, are 32 bits wide.
_MOST_ELEMENTS = 2**28


@dataclass(frozen=True, eq=False)
class InferPlan:
    """The launches of one layer at one size.

    Attributes:
        hidden: elements of a node in each of the two hidden buffers, which steps write in turn.
    """

    steps: tuple[InferStep, ...]
    hidden: tuple[int, int]
    images: int


@dataclass(frozen=True)
class _Placed:
    """A unit, and what its columns are."""

    unit: Unit
    columns: tuple[int, ...]


@dataclass
class _Chain:
    """Units in stages, the channels they read and where in the output they write."""

    stages: list[tuple[_Placed | None, _Placed | None]]
    part: int
    target_at: int
    add: int = 0
    first_step: int = 0


@dataclass
class _Draft:
    """Jobs as they are found, by step and choice."""

    choices: int
    jobs: dict[tuple[int, int], list[Job]] = field(default_factory=dict)
    hidden: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, step: int, choice: int, **values: int) -> None:
        missing = dict.fromkeys(COLUMNS, 0) | {name: -1 for name in COLUMNS if "weight" in name}
        self.jobs.setdefault((step, choice), []).append(Job(missing | values))


@cache
def plan_infer(layer: Layer, images: int, height: int, width: int, channels: int) -> InferPlan:
    """Plan a layer's inference.

    Args:
        layer: hashed by identity.
        images, height, width, channels: of the rows above, `[R, N, H, W, C]`.

    Raises:
        ValueError: rows have more positions, or an image more elements, than 32 bits hold.
    """
    draft = _Draft(len(layer.ops))
    for choice, op in enumerate(layer.ops):
        if op is None:
            _copy(draft, choice, (height, width, channels), 0, channels)
        else:
            _add_op(draft, choice, op, layer.first_parameter[choice], (images, height, width))
    count = max((step for step, _ in draft.jobs), default=-1) + 1
    steps = tuple(
        InferStep(
            tuple(tuple(draft.jobs.get((step, choice), ())) for choice in range(draft.choices))
        )
        for step in range(count)
    )
    for step in steps:
        for job in step.all_jobs:
            _check(job, images)
    return InferPlan(steps, (draft.hidden[0], draft.hidden[1]), images)


def _check(job: Job, images: int) -> None:
    positions = images * job["out_height"] * job["out_width"]
    if positions >= MOST_POSITIONS:
        raise ValueError(f"rows: {positions} positions; expected under {MOST_POSITIONS}")
    sizes = (
        job["height"] * job["width"] * job["source_row"],
        job["out_height"] * job["out_width"] * job["target_row"],
        job["in_channels"] * job["out_channels"] * job.taps,
    )
    if max(sizes) >= _MOST_ELEMENTS:
        raise ValueError(f"rows: {max(sizes)} elements an image; expected under {_MOST_ELEMENTS}")


def _copy(
    draft: _Draft, choice: int, row: tuple[int, int, int], part: int, target_row: int
) -> None:
    """Copy a row's channels, or the even ones of them, to the front of the output's."""
    height, width, channels = row
    draft.add(
        0,
        choice,
        variant=2 * _COPY + part,
        source_row=channels,
        height=height,
        width=width,
        out_height=height,
        out_width=width,
        kernel=1,
        stride=1,
        in_channels=channels // (1 + part),
        out_channels=channels // (1 + part),
        target_row=target_row,
        times=1,
        reach=1,
    )


def _add_op(
    draft: _Draft, choice: int, op: Op, first_parameter: int, images: tuple[int, int, int]
) -> None:
    placed = _place(op.units, first_parameter)
    passed = op.out_channels - op.units[op.main - 1].out_channels
    main = _Chain(_stages(placed[: op.main]), int(op.splits), passed)
    chains = [main]
    if op.main < len(op.units):
        aside = _Chain(_stages(placed[op.main :]), 0, 0)
        chains.append(aside)
        if op.frame == "residual":
            main.add = ADD_OUTPUT
            main.first_step = max(0, len(aside.stages) + 1 - len(main.stages))
    elif op.frame == "residual":
        main.add = ADD_ROW
    used = [0, 0]
    for chain in chains:
        _add_chain(draft, choice, op, chain, images, used)
    draft.hidden = [max(pair) for pair in zip(draft.hidden, used, strict=True)]
    if op.splits:
        _copy(draft, choice, (*images[1:], op.in_channels), 1, op.out_channels)


def _place(units: Sequence[Unit], parameter: int) -> list[_Placed]:
    starts = accumulate((2 * unit.out_channels for unit in units), initial=0)
    found = []
    for unit, moments in zip(units, starts, strict=False):
        scale = parameter + 1 if unit.scale else -1
        shift = parameter + 1 + unit.scale if unit.shift else -1
        (eps,) = struct.unpack("<i", struct.pack("<f", unit.eps))
        found.append(_Placed(unit, (parameter, scale, shift, moments, int(unit.relu), eps)))
        parameter += 1 + unit.scale + unit.shift
    return found


def _stages(placed: Sequence[_Placed]) -> list[tuple[_Placed | None, _Placed | None]]:
    """Depthwise unit and product of each stage."""
    found: list[tuple[_Placed | None, _Placed | None]] = []
    waiting = None
    for one in placed:
        if waiting is not None and not one.unit.depthwise and one.unit.kernel == 1:
            found.append((waiting, one))
            waiting = None
            continue
        if waiting is not None:
            found.append((waiting, None))
        waiting = one if one.unit.depthwise else None
        if waiting is None:
            found.append((None, one))
    return found if waiting is None else [*found, (waiting, None)]


def _needed_rows(stages: Sequence[tuple[_Placed | None, _Placed | None]]) -> list[dict[str, int]]:
    """Which rows of each stage's result a band needs, as columns."""
    times, before, reach = 1, 0, 1
    found = []
    for stage in reversed(stages):
        found.append({"times": times, "before": before, "reach": reach})
        kernel, stride = _taken(stage)
        times, before = times * stride, before * stride + kernel // 2
        reach = (reach - 1) * stride + kernel
    return found[::-1]


def _taken(stage: tuple[_Placed | None, _Placed | None]) -> tuple[int, int]:
    """Kernel and stride of a stage."""
    units = [one.unit for one in stage if one]
    return units[0].kernel, math.prod(unit.stride for unit in units)


def _add_chain(
    draft: _Draft,
    choice: int,
    op: Op,
    chain: _Chain,
    images: tuple[int, int, int],
    used: list[int],
) -> None:
    """Add a chain's stages; `used` are the elements that the choice has in the hidden buffers."""
    count, height, width = images
    source_at, source_row = 0, op.in_channels
    needed = _needed_rows(chain.stages)
    for index, (spatial, product) in enumerate(chain.stages):
        last = index == len(chain.stages) - 1
        step = chain.first_step + index
        units = [one.unit for one in (spatial, product) if one]
        kernel, stride = _taken((spatial, product))
        out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
        channels = units[-1].out_channels
        if product is None:
            kind = _DEPTHWISE
        elif spatial is not None:
            kind = _PAIR
        else:
            kind = _POINTWISE if product.unit.kernel == 1 else _DENSE
        if last:
            target_at, target_row = chain.target_at, op.out_channels
        else:
            target_at, target_row = used[step % 2], channels
            size = count * out_height * out_width * channels
            used[step % 2] += -(-size // LINE) * LINE
        columns = {}
        for prefix, one in (("spatial_", spatial), ("", product)):
            if one is not None:
                columns |= zip((prefix + name for name in UNIT_COLUMNS), one.columns, strict=True)
        draft.add(
            step,
            choice,
            variant=2 * kind + (chain.part if index == 0 else 0),
            from_hidden=int(index > 0),
            source_at=source_at,
            source_row=source_row,
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            kernel=kernel,
            stride=stride,
            in_channels=units[0].in_channels,
            out_channels=channels,
            to_hidden=int(not last),
            target_at=target_at,
            target_row=target_row,
            add=chain.add if last else 0,
            **needed[index],
            **columns,
        )
        source_at, source_row = target_at, target_row
        height, width = out_height, out_width
