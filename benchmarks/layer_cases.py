"""The population layer's launches at named levels, for the static checks.

Compulsory bytes are those of the operator's inputs and outputs: rows above, parameters, a node's
own row, its statistics, and, in training, the row of each of its units, which the backward pass
needs. Choices that no node has do not count.

Memory that must be made goes by one rule: each convolution is computed once, and a batch norm needs
all of its rows before any is used. So these are needed: results; in training the raw rows of each
unit of a node's own choice; and backward, of each chain, the gradients of two hidden units that
follow each other, one read while the other is written, at most. What is made beyond that is missed:
room for another choice's rows, sums of another type, partial results. The least is what would do if
all that is not a result were computed again wherever it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from catalogue import DTYPES, Case, Inputs, Level, Network
from torch import Tensor

from fastshift.kernels.cards import Card
from fastshift.kernels.described import Op
from fastshift.kernels.infer import infer, scratch_bytes
from fastshift.kernels.layer import backward, train
from fastshift.kernels.plan import plan_layer

__all__ = ["catalogue"]


def catalogue(network: Network, dtype: str) -> Iterator[Case]:
    """Yield training, its backward pass and inference of each level of a network."""
    for level in network.levels:
        yield from _cases(f"{network.name} {level.name}", level, dtype)


def _cases(site: str, level: Level, dtype: str) -> Iterator[Case]:
    size = DTYPES[dtype].itemsize
    plan = plan_layer(level.layer, *level.rows[1:])
    ops = [level.layer.ops[choice] for choice in level.choice]
    own = sum(_unit_values(op, plan.images, plan.size) for op in ops if op)
    passing = sum(_passing_values(op, plan.images, plan.size) for op in ops if op)
    flops = sum(_multiply_adds(op, plan.images, plan.size) for op in ops if op)
    rows = size * math.prod(level.rows)
    out = size * len(ops) * plan.out_pixels * plan.channels[1]
    statistics = 4 * sum(5 * op.channels for op in ops if op)
    moments = 4 * sum(2 * op.channels for op in ops if op)
    used = set(level.choice)
    parameters = 4 * sum(math.prod(shape) for choice in used for shape in _shapes(level, choice))
    convolutions = max((len(op.units) for op in ops if op), default=0)
    # Where a chain has three depthwise convolutions, each with its product is a launch.
    longest = max((sum(u.depthwise for u in op.units[: op.main]) for op in ops if op), default=0)
    is_product = any(not unit.depthwise for op in ops if op for unit in op.units)
    common: dict[str, Any] = {
        "load_width": min(16, plan.align * size),
        "store_width": min(16, plan.align * size),
        "dot": is_product,
    }
    yield Case(
        "layer_train",
        site,
        dtype,
        lambda device: (*_given(level, dtype, device), plan, True),
        train,
        flops=flops,
        read_bytes=rows + parameters,
        written_bytes=out + statistics + size * own,
        launches=convolutions + 2,
        made_bytes=out + statistics + size * own,
        least_made_bytes=out + statistics,
        **common,
    )

    needs_rows = level.name != "stem"  # images have no gradient

    def after(device: str) -> tuple:
        make = Inputs(device, 1)
        given = _given(level, dtype, device)
        y, *kept = train(*given, plan, True)
        d_rows = torch.empty_like(given[0]) if needs_rows else given[0].new_empty(0)
        sums = [torch.zeros_like(parameter) for parameter in given[3]]
        d_y = make.normal(*y.shape, dtype=y.dtype)
        return d_y, *given, *kept, plan, needs_rows, d_rows, sums

    yield Case(
        "layer_backward",
        site,
        dtype,
        after,
        _backward_into,
        flops=2 * flops,
        read_bytes=out + rows + 2 * parameters + statistics + size * own,
        written_bytes=rows * needs_rows + parameters,
        launches=convolutions + 2,
        made_bytes=size * passing,
        least_made_bytes=0,
        # Where some unit reads rows, its launch has their gradients.
        no_rows=("frame_bwd_kernel",) if plan.steps else (),
        **common,
    )

    def fixed(device: str) -> tuple:
        make = Inputs(device, 1)
        most = max((op.channels for op in level.layer.ops if op), default=0)
        moments = make.normal(len(ops), 2 * most).square_()
        shape = (*plan.out_size, plan.channels[1])
        return *_given(level, dtype, device), moments, level.layer, shape

    def scratch(name: str, card: Card | None) -> int:
        precision = "tf32" if name == "tf32" else "ieee"
        device = torch.device("meta")
        return scratch_bytes(level.layer, *level.rows[1:], device, DTYPES[dtype], precision, card)

    yield Case(
        "layer_infer",
        site,
        dtype,
        fixed,
        infer,
        flops=flops,
        read_bytes=rows + parameters + moments,
        written_bytes=out,
        launches=3 if longest > 1 else 2,
        made_bytes=out,
        least_made_bytes=out,
        scratch=scratch,
        by_card=True,
        **common,
    )


def _backward_into(*given: Any, precision: str = "ieee") -> Any:
    """The backward pass into memory that is there, as captured steps want it."""
    *given, d_rows, sums = given
    return backward(*given, precision, d_rows=d_rows, sums=sums)


def _given(level: Level, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Rows, the nodes' buffers and parameters."""
    make = Inputs(device)
    return (
        make.normal(*level.rows, dtype=DTYPES[dtype]),
        make.given(level.parent, torch.int32),
        make.given(level.choice, torch.int32),
        [make.normal(*shape) for shape in level.layer.shapes],
    )


def _shapes(level: Level, choice: int) -> list[tuple[int, ...]]:
    first = level.layer.first_parameter
    return level.layer.shapes[first[choice] : first[choice + 1]]


def _chains(op: Op, size: tuple[int, int]) -> Iterator[list[tuple[Any, int]]]:
    """Each unit of the main chain, then of the shortcut, with the pixels of an image it writes."""
    for units in (op.units[: op.main], op.units[op.main :]):
        at, found = size, []
        for unit in units:
            at = tuple((side - 1) // unit.stride + 1 for side in at)
            found.append((unit, math.prod(at)))
        yield found


def _unit_values(op: Op, images: int, size: tuple[int, int]) -> int:
    chains = _chains(op, size)
    return images * sum(pixels * unit.out_channels for chain in chains for unit, pixels in chain)


def _passing_values(op: Op, images: int, size: tuple[int, int]) -> int:
    """Of the gradients that the backward pass has at a time: the last unit's is the node's own."""
    total = 0
    for chain in _chains(op, size):
        hidden = [pixels * unit.out_channels for unit, pixels in chain[:-1]]
        total += max(map(sum, pairwise([*hidden, 0])), default=0)
    return images * total


def _multiply_adds(op: Op, images: int, size: tuple[int, int]) -> int:
    return images * sum(
        pixels * unit.kernel**2 * unit.out_channels * (1 if unit.depthwise else unit.in_channels)
        for chain in _chains(op, size)
        for unit, pixels in chain
    )
