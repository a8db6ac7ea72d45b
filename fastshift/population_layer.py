"""A population layer as data: what each choice of a level computes, and as the text an op takes.

The text is JSON, a list with one entry a choice: null for an identity, else `frame`, `main` (units
of the main chain; those after them are the shortcut's) and `units`, each of them `[depthwise,
in_channels, out_channels, kernel, stride, relu, eps, scale, shift]`, the last two being whether its
batch norm has them. Everything here is a function of the text, and nothing knows torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import pairwise

__all__ = [
    "STATISTICS",
    "LayerOp",
    "LayerUnit",
    "PopulationLayer",
    "describe_layer",
    "describe_op",
    "parse_layer",
]

# Of a unit's statistics, each `[C]`: mean, unbiased variance, scale, shift, 1 / deviation.
STATISTICS = 5


@dataclass(frozen=True)
class LayerUnit:
    """A convolution without bias (padding `kernel // 2`), a batch norm, and perhaps a ReLU.

    Attributes:
        scale, shift: whether the batch norm has them; each is a parameter behind the weight.
    """

    depthwise: bool
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    relu: bool
    eps: float
    scale: bool = True
    shift: bool = True

    @property
    def num_parameters(self) -> int:
        """The weight, and what its batch norm has."""
        return 1 + self.scale + self.shift

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its parameters."""
        inside = 1 if self.depthwise else self.in_channels
        weight = (self.out_channels, inside, self.kernel, self.kernel)
        return [weight, *[(self.out_channels,)] * (self.scale + self.shift)]


@dataclass(frozen=True)
class LayerOp:
    """A candidate op: a main chain and perhaps a shortcut, in a frame (`ops.Frame`)."""

    units: tuple[LayerUnit, ...]
    main: int
    frame: str

    @cached_property
    def splits(self) -> bool:
        """Whether every other channel passes and the rest go through the units."""
        return self.frame == "shuffle" and self.main == len(self.units)

    @cached_property
    def in_channels(self) -> int:
        """Channels of the row it reads."""
        return self.units[0].in_channels * (2 if self.splits else 1)

    @cached_property
    def out_channels(self) -> int:
        """Channels of the row it writes."""
        channels = self.units[self.main - 1].out_channels
        if self.frame == "shuffle":
            channels += self.units[0].in_channels if self.splits else self.units[-1].out_channels
        return channels

    @cached_property
    def channels(self) -> int:
        """Channels of all batch norms together."""
        return sum(unit.out_channels for unit in self.units)

    def __post_init__(self) -> None:
        chains = self.units[: self.main], self.units[self.main :]
        fits = (
            self.frame in ("plain", "residual", "shuffle")
            and 0 < self.main <= len(self.units)
            and all(
                unit.in_channels > 0
                and unit.out_channels > 0
                and unit.kernel % 2 == 1
                and unit.stride > 0
                and (not unit.depthwise or unit.in_channels == unit.out_channels)
                for unit in self.units
            )
            and all(
                before.out_channels == after.in_channels
                for chain in chains
                for before, after in pairwise(chain)
            )
            and (not chains[1] or chains[1][0].in_channels == self.units[0].in_channels)
        )
        if fits:
            main, aside = (math.prod(unit.stride for unit in chain) for chain in chains)
            fits = main == aside or (self.frame == "plain" and not chains[1])
            fits = fits and (self.frame != "plain" or not chains[1])
        if fits and self.frame == "residual":
            ends = chains[1][-1].out_channels if chains[1] else self.units[0].in_channels
            fits = ends == chains[0][-1].out_channels
        if not fits:
            raise ValueError(f"op: units that do not follow each other in a frame: {self}")

    @cached_property
    def num_parameters(self) -> int:
        """Tensors that it takes."""
        return sum(unit.num_parameters for unit in self.units)

    @cached_property
    def stride(self) -> int:
        """Height and width of the row it reads over those of the row it writes."""
        return math.prod(unit.stride for unit in self.units[: self.main])


@dataclass(frozen=True, eq=False)
class PopulationLayer:
    """The candidate ops of a level; equal texts give the same object.

    Attributes:
        ops: of each choice; None for an identity.
    """

    ops: tuple[LayerOp | None, ...]

    @cached_property
    def first_parameter(self) -> tuple[int, ...]:
        """Of each choice, where its tensors begin in the list of all; one more entry: how many."""
        starts = [0]
        for op in self.ops:
            starts.append(starts[-1] + (op.num_parameters if op else 0))
        return tuple(starts)

    @property
    def num_parameters(self) -> int:
        """Tensors that the layer takes."""
        return self.first_parameter[-1]

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors that the layer takes."""
        return [shape for op in self.ops if op for unit in op.units for shape in unit.shapes]

    @cached_property
    def statistics_floats(self) -> int:
        """Of a node, whatever its choice: `[STATISTICS, C]` of each unit, one after the other."""
        return STATISTICS * self._most_channels

    @cached_property
    def moments_floats(self) -> int:
        """Of a node, whatever its choice: mean and variance of each unit, one after the other."""
        return 2 * self._most_channels

    @cached_property
    def _most_channels(self) -> int:
        return max((op.channels for op in self.ops if op), default=0)

    @cached_property
    def _maps(self) -> tuple[int, int, int] | None:
        """Channels in, channels out and stride of every choice; None where all are identities."""
        found = {(op.in_channels, op.out_channels, op.stride) for op in self.ops if op}
        if None in self.ops:
            found |= {(channels, channels, 1) for channels, _, _ in found}
        if len(found) > 1:
            raise ValueError(
                f"layer: its choices map {sorted(found)} (channels in, out, stride); expected one"
            )
        return found.pop() if found else None

    def output_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        """Height, width and channels of every node's row.

        Raises:
            ValueError: a row of these channels does not fit, or the choices differ in shape.
        """
        if self._maps is None:
            return height, width, channels
        expected, out, stride = self._maps
        if channels != expected:
            raise ValueError(f"rows: {channels} channels; expected {expected}")
        if height < 1 or width < 1:
            raise ValueError(f"rows: {height} x {width} pixels; expected some")
        return (height - 1) // stride + 1, (width - 1) // stride + 1, out


def describe_op(op: LayerOp | None) -> str:
    """The text of one choice; None for an identity."""
    if op is None:
        return "null"
    units = [list(asdict(unit).values()) for unit in op.units]
    return json.dumps({"frame": op.frame, "main": op.main, "units": units})


def describe_layer(choices: Iterable[str]) -> str:
    """The text of a layer from those of its choices."""
    return f"[{','.join(choices)}]"


@cache
def parse_layer(text: str) -> PopulationLayer:
    """Read a layer's text.

    Raises:
        ValueError: it is not one.
    """
    try:
        return PopulationLayer(
            tuple(
                entry
                and LayerOp(
                    tuple(LayerUnit(*unit) for unit in entry["units"]),
                    entry["main"],
                    entry["frame"],
                )
                for entry in json.loads(text)
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"layer: {text[:60]!r}; expected the text of a layer") from error
