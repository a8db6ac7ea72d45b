"""The static launch plan of a population layer: what each launch does, as tables the kernels read.

The chains of all choices (main and shortcut) are laid along one sequence of steps, each of
pointwise and dense convolutions or of depthwise ones. A step is one launch for every node that has
a unit there. What a unit reads, computes and writes is one record of int32, found by the node's
choice; two populations of a layer differ in device buffers alone.

Rows of units lie in one buffer, as many elements to each node as the choice has that needs most;
where in it, in lines of `LINE` elements, is in the records. `kept` rows have places of their own;
others, and the gradients of hidden units, take turns in two places for each chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from fastshift.kernels.described import Layer, Op, Unit
from fastshift.kernels.plan_records import (
    FIELDS,
    HEADER,
    LINE,
    MOST_POSITIONS,
    frame_records,
    passed_row,
    step_records,
)

__all__ = [
    "LayerPlan",
    "Placed",
    "Step",
    "plan_layer",
    "refuse_capture",
    "supersequence",
]


def supersequence(words: Sequence[str]) -> str:
    """Find a shortest sequence that every word can be read from, leaving letters out.

    Args:
        words: of the letters D and P.
    """
    words = sorted({word for word in words if word})
    pending = [("", (0,) * len(words))]
    seen = set()
    for found, at in pending:
        if all(i == len(word) for i, word in zip(at, words, strict=True)):
            return found
        for letter in "PD":
            then = tuple(i + (word[i : i + 1] == letter) for i, word in zip(at, words, strict=True))
            if then != at and then not in seen:
                seen.add(then)
                pending.append((found + letter, then))
    raise AssertionError("unreachable: reading one letter at a time ends")


@dataclass(frozen=True)
class Placed:
    """A unit in its chain: where it stands, and the sizes of its rows."""

    choice: int
    chain: int
    index: int  # within the chain
    length: int  # of the chain
    unit: Unit
    channel: int
    parameter: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]

    @property
    def letter(self) -> str:
        return "D" if self.unit.depthwise else "P"

    @property
    def parameters(self) -> tuple[int, int, int]:
        """Weight, scale and shift, -1 for none."""
        scale = self.parameter + 1 if self.unit.scale else -1
        shift = self.parameter + 1 + self.unit.scale if self.unit.shift else -1
        return self.parameter, scale, shift


@dataclass(frozen=True)
class Step:
    """One launch: all nodes that have a unit of one kind at this place.

    Attributes:
        depthwise: the kind; else pointwise, or dense.
        lanes: units that a node may have here: 2 where a main chain and a shortcut meet.
        first: where the step's records begin in the table, `[choices, lanes, FIELDS]`.
        c_in, c_out, kernel: the largest.
        in_pixels, out_pixels: of a node's rows before and behind, the largest.
        moves: the stride of all units, -1 where they differ, and 0 where each unit reads the one
            pixel that it writes.
        enters: whether some unit reads the parent's row.
        splits: whether some unit reads every other channel of it.
        continues: whether some unit reads another unit's rows.
    """

    depthwise: bool
    lanes: int
    first: int
    c_in: int
    c_out: int
    kernel: int
    in_pixels: int
    out_pixels: int
    moves: int
    enters: bool
    splits: bool
    continues: bool


class LayerPlan:
    """The launches of a layer for rows of one size.

    Args:
        layer: its candidate ops.
        images, height, width, channels: of a row.

    Attributes:
        ops, num_choices: candidate ops.
        chains: their units, and `placed`: those of each step.
        kept, passing: where a unit's rows begin, by choice, chain and index, where all are kept
            and where they take turns.
        gradients: where the gradient of what a hidden unit gives begins, likewise.
        passes: what goes straight from a node's gradient to its parent's row, whatever the choice:
            0 nothing, 1 whole rows, 2 halves of them too.
        channels: of a row and of a node's.
        steps: in order of the forward pass; the backward pass goes through them in reverse.
        out_size: height and width of a node's rows.
        kept_elements, passing_elements, gradient_elements: of a node, where its choice has most.
        align: a power of two, up to 16, that divides every number of channels.
    """

    def __init__(self, layer: Layer, images: int, height: int, width: int, channels: int) -> None:
        self.images, self.size = images, (height, width)
        self.num_choices = len(layer.ops)
        self.channels = channels, next((op.out_channels for op in layer.ops if op), channels)
        self.ops = layer.ops
        self.chains = [
            chain
            for choice, op in enumerate(layer.ops)
            if op
            for chain in self._placed(choice, op, layer.first_parameter[choice])
        ]
        kinds = supersequence(["".join(p.letter for p in chain) for chain in self.chains])
        self.placed: list[list[Placed]] = [[] for _ in kinds]
        for chain in self.chains:
            step = -1
            for placed in chain:
                step = kinds.index(placed.letter, step + 1)
                self.placed[step].append(placed)
        self.out_size = next((chain[-1].out_size for chain in self.chains), self.size)
        self.longest_chain = max(map(len, self.chains), default=0)
        self.kept, self.kept_elements = self._places(turns=False, hidden=False)
        self.passing, self.passing_elements = self._places(turns=True, hidden=False)
        self.gradients, self.gradient_elements = self._places(turns=True, hidden=True)
        self.align = math.gcd(16, *self._channel_counts())
        self.passes = max(map(passed_row, self.ops), default=0)
        self.steps = self._steps()
        self.row_pixels, self.out_pixels = (
            images * math.prod(s) for s in (self.size, self.out_size)
        )
        most = max((op.channels for op in layer.ops if op), default=0)
        self.statistics_floats, self.totals_floats = 5 * most, 2 * most
        self._tables: dict[tuple[torch.device, bool], tuple[Tensor, Tensor]] = {}

    def _placed(self, choice: int, op: Op, parameter: int) -> list[list[Placed]]:
        chains, channel = [], 0
        for chain, units in enumerate((op.units[: op.main], op.units[op.main :])):
            size, found = self.size, []
            for index, unit in enumerate(units):
                out = tuple((s - 1) // unit.stride + 1 for s in size)
                found.append(
                    Placed(choice, chain, index, len(units), unit, channel, parameter, size, out)
                )
                size = out
                channel += unit.out_channels
                parameter += 1 + unit.scale + unit.shift
            if found:
                chains.append(found)
        return chains

    def _elements(self, placed: Placed) -> int:
        """Of a unit's rows, in whole lines."""
        return (
            -(-self.images * math.prod(placed.out_size) * placed.unit.out_channels // LINE) * LINE
        )

    def _places(self, turns: bool, hidden: bool) -> tuple[dict[tuple[int, int, int], int], int]:
        """Where a unit's rows begin, by choice, chain and index; and the elements of a node.

        Args:
            turns: whether a chain's rows take turns in two places.
            hidden: whether its last ones lie elsewhere (they have place 0, which is not used).
        """
        found: dict[tuple[int, int, int], int] = {}
        ends: dict[int, int] = {}
        for chain in self.chains:
            choice, kind = chain[0].choice, chain[0].chain
            end = ends.get(choice, 0)
            units = chain[:-1] if hidden else chain
            sizes = [self._elements(placed) for placed in units]
            if turns:
                rooms = [max(sizes[0::2], default=0), max(sizes[1::2], default=0)]
                places = [end + index % 2 * rooms[0] for index in range(len(units))]
                ends[choice] = end + sum(rooms)
            else:
                places = [end + before for before in accumulate(sizes, initial=0)][: len(units)]
                ends[choice] = end + sum(sizes)
            places += [0] * (len(chain) - len(units))
            found |= {(choice, kind, index): place for index, place in enumerate(places)}
        return found, max(ends.values(), default=0)

    def _channel_counts(self) -> list[int]:
        found = [*self.channels]
        for op in self.ops:
            if op:
                found += [op.in_channels, op.out_channels, self.y_offset(op)]
                found += [c for u in op.units for c in (u.in_channels, u.out_channels)]
        return found

    @staticmethod
    def y_offset(op: Op) -> int:
        """Where the main chain's channels begin in the node's row."""
        last = op.units[op.main - 1].out_channels
        return op.out_channels - last if op.frame == "shuffle" else 0

    def _steps(self) -> list[Step]:
        found, first = [], len(HEADER)
        for at in self.placed:
            units = [p.unit for p in at]
            strides = {u.stride for u in units}
            stays = strides == {1} and all(u.kernel == 1 for u in units)
            lanes = max(sum(p.choice == q.choice for q in at) for p in at)
            found.append(
                Step(
                    depthwise=units[0].depthwise,
                    lanes=lanes,
                    first=first,
                    c_in=max(u.in_channels for u in units),
                    c_out=max(u.out_channels for u in units),
                    kernel=max(u.kernel for u in units),
                    in_pixels=self.images * max(math.prod(p.in_size) for p in at),
                    out_pixels=self.images * max(math.prod(p.out_size) for p in at),
                    moves=0 if stays else strides.pop() if len(strides) == 1 else -1,
                    enters=any(p.index == 0 for p in at),
                    splits=any(p.index == 0 and self.ops[p.choice].splits for p in at),
                    continues=any(p.index > 0 for p in at),
                )
            )
            first += self.num_choices * lanes * len(FIELDS)
        return found

    def tables(self, device: torch.device, *, kept: bool) -> tuple[Tensor, Tensor]:
        """The records of all steps and those of the frames, flat int32, copied there once.

        Raises:
            RuntimeError: they are not there yet and a CUDA graph is being captured.
        """
        key = (device, kept)
        if key not in self._tables:
            refuse_capture(device, "a layer's plan")
            # An inference tensor that was kept could not be saved for a backward pass later on.
            with torch.inference_mode(False):
                self._tables[key] = tuple(
                    torch.tensor(values, dtype=torch.int32, device=device)
                    for values in (step_records(self, kept=kept), frame_records(self, kept=kept))
                )
        return self._tables[key]


@cache
def plan_layer(layer: Layer, images: int, height: int, width: int, channels: int) -> LayerPlan:
    """The plan of a layer for rows `[images, height, width, channels]`, made once.

    Raises:
        ValueError: rows have more positions than 32 bits hold.
    """
    positions = images * height * width  # no unit has more
    if positions >= MOST_POSITIONS:
        raise ValueError(f"rows: {positions} positions; expected under {MOST_POSITIONS}")
    return LayerPlan(layer, images, height, width, channels)


def refuse_capture(device: torch.device, what: str) -> None:
    """Refuse to copy to a device while a CUDA graph is being captured.

    Raises:
        RuntimeError: one is.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} is not on {device} yet, and a CUDA graph is being captured, which cannot "
            "copy it there; call the function once before the capture, with the same tensors"
        )
