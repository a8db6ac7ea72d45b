"""What kernels take for a layer: units, candidate ops and the layer, by their attributes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Layer", "Op", "Unit"]


class Unit(Protocol):
    """A convolution, a batch norm and perhaps a ReLU."""

    depthwise: bool
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    relu: bool
    eps: float
    scale: bool
    shift: bool


class Op(Protocol):
    """A candidate op: units of a main chain, then of a shortcut, in a frame."""

    units: Sequence[Unit]
    main: int
    frame: str
    splits: bool
    in_channels: int
    out_channels: int
    channels: int


class Layer(Protocol):
    """The candidate ops of a level, None for an identity; where each one's parameters begin."""

    ops: Sequence[Op | None]
    first_parameter: Sequence[int]
