"""The block description: what a candidate op computes, as data; costs follow from it.

A `Unit` is one convolution with its batch norm and activation, a `Frame` says how a chain of units
is joined to its input, and an `Op` is a chain in a frame. The modules, the multiply-adds, the
parameters, the kernels' plans and the exported network are all derived from these three, so nothing
here knows torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

from fastshift.errors import SpaceError

__all__ = [
    "Frame",
    "Head",
    "Op",
    "Unit",
    "chain_flops",
    "chain_output_size",
    "chain_params",
    "check_positive",
    "check_units",
    "conv",
    "identity",
    "inverted_residual",
    "projection",
    "scale_channels",
    "shuffle_unit",
    "shuffle_xception",
    "trace_channels",
]

UNIT_KINDS = ("pointwise", "depthwise", "dense")
FRAME_KINDS = ("plain", "residual", "shuffle")
ACTIVATIONS = ("relu", None)


def check_positive(owner: str, **values: int) -> None:
    """Raise `SpaceError` naming the first value that is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise SpaceError(f"{owner}: {name} must be a positive integer, got {value!r}")


def check_units(owner: str, units: Iterable[Unit]) -> tuple[Unit, ...]:
    """Return units as a tuple, or raise `SpaceError` where one is something else."""
    units = tuple(units)
    for unit in units:
        if not isinstance(unit, Unit):
            raise SpaceError(f"{owner} must hold units, got {unit!r}")
    return units


def scale_channels(channels: int, width: float) -> int:
    """Return `channels * width` rounded to a multiple of 8, at least 8.

    Raises:
        SpaceError: `width` is not a positive finite number.
    """
    is_number = isinstance(width, Real) and not isinstance(width, bool)
    if not is_number or not 0 < width < math.inf:
        raise SpaceError(f"width must be a positive number, got {width!r}")
    return max(8, round(channels * width / 8) * 8)


@dataclass(frozen=True)
class Unit:
    """A bias-free convolution with padding `kernel // 2`, then batch norm, then an activation.

    Args:
        kind: `"pointwise"` (1x1), `"depthwise"` (one filter a channel) or `"dense"`.
        in_channels: channels of the input.
        out_channels: channels of the output; equal to `in_channels` where depthwise.
        kernel: odd kernel size.
        stride: step of the convolution.
        activation: `"relu"` or None.
        norm: whether a batch norm follows the convolution.

    Raises:
        SpaceError: a value is out of range, or two contradict each other.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    activation: str | None = "relu"
    norm: bool = True

    def __post_init__(self) -> None:
        if self.kind not in UNIT_KINDS:
            raise SpaceError(f"unit kind must be one of {', '.join(UNIT_KINDS)}, got {self.kind!r}")
        owner = f"{self.kind} unit"
        check_positive(
            owner,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel=self.kernel,
            stride=self.stride,
        )
        if self.kernel % 2 == 0:
            raise SpaceError(f"{owner}: kernel must be odd, got {self.kernel}")
        if self.kind == "pointwise" and self.kernel != 1:
            raise SpaceError(f"{owner}: kernel must be 1, got {self.kernel}")
        if self.kind == "depthwise" and self.in_channels != self.out_channels:
            raise SpaceError(
                f"{owner}: out_channels must equal in_channels {self.in_channels}, "
                f"got {self.out_channels}"
            )
        if self.activation not in ACTIVATIONS:
            raise SpaceError(f"{owner}: activation must be 'relu' or None, got {self.activation!r}")

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self.in_channels if self.kind == "depthwise" else 1

    @property
    def num_weights(self) -> int:
        """Weights of the convolution, without the batch norm."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel**2

    def output_size(self, size: int) -> int:
        """Return the output's height and width for an input of height and width `size`."""
        return (size - 1) // self.stride + 1

    def flops(self, size: int) -> int:
        """Return the multiply-adds of one image of height and width `size`."""
        return self.num_weights * self.output_size(size) ** 2

    def params(self, affine: bool = True) -> int:
        """Return the number of parameters; `affine` counts the batch norm's scale and shift."""
        return self.num_weights + (2 * self.out_channels if self.norm and affine else 0)


def chain_output_size(units: Iterable[Unit], size: int) -> int:
    """Return the height and width that leave a chain of units entered with `size`."""
    for unit in units:
        size = unit.output_size(size)
    return size


def chain_flops(units: Iterable[Unit], size: int) -> int:
    """Return the multiply-adds of a chain of units on one image of height and width `size`."""
    flops = 0
    for unit in units:
        flops += unit.flops(size)
        size = unit.output_size(size)
    return flops


def chain_params(units: Iterable[Unit], affine: bool = True) -> int:
    """Return the parameters of a chain of units."""
    return sum(unit.params(affine) for unit in units)


def trace_channels(units: Iterable[Unit], channels: int, owner: str) -> tuple[int, int]:
    """Follow a chain of units and return its output channels and total stride.

    Args:
        units: the chain.
        channels: channels that enter it.
        owner: what the chain belongs to, for the message.

    Raises:
        SpaceError: a unit does not take the channels that reach it.
    """
    stride = 1
    for index, unit in enumerate(units):
        if unit.in_channels != channels:
            raise SpaceError(
                f"{owner}: unit {index} takes {unit.in_channels} channels, {channels} reach it"
            )
        channels = unit.out_channels
        stride *= unit.stride
    return channels, stride


@dataclass(frozen=True)
class Frame:
    """How a chain of units is joined to the op's input `x`.

    - `"plain"`: `y = units(x)`.
    - `"residual"`: `y = x + units(x)`, or `shortcut(x) + units(x)` with a shortcut.
    - `"shuffle"`, no shortcut: channels 0, 2, 4, ... of `x` pass, channels 1, 3, 5, ... go through
      the units, `y = cat(even, units(odd))`. With a shortcut: `y = cat(shortcut(x), units(x))`.
    """

    kind: str = "plain"
    shortcut: tuple[Unit, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in FRAME_KINDS:
            raise SpaceError(
                f"frame kind must be one of {', '.join(FRAME_KINDS)}, got {self.kind!r}"
            )
        object.__setattr__(self, "shortcut", check_units("frame shortcut", self.shortcut))
        if self.kind == "plain" and self.shortcut:
            raise SpaceError("a plain frame has no shortcut; use a residual or shuffle frame")


@dataclass(frozen=True)
class Op:
    """A candidate op: a chain of units in a frame.

    Args:
        name: what reports call it.
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: height and width of the input over those of the output.
        units: the chain; empty only for the identity.
        frame: how the chain is joined to the input.

    Raises:
        SpaceError: channels or strides of units, frame and op do not fit together.
    """

    name: str
    in_channels: int
    out_channels: int
    stride: int
    units: tuple[Unit, ...]
    frame: Frame = Frame()

    def __post_init__(self) -> None:
        owner = f"op {self.name!r}"
        check_positive(
            owner,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            stride=self.stride,
        )
        object.__setattr__(self, "units", check_units(f"{owner}: units", self.units))
        if not isinstance(self.frame, Frame):
            raise SpaceError(f"{owner}: frame must be a Frame, got {self.frame!r}")
        shortcut = self.frame.shortcut
        if self.frame.kind != "plain" and not self.units:
            raise SpaceError(f"{owner}: a {self.frame.kind} frame needs at least one unit")
        splits = self.frame.kind == "shuffle" and not shortcut
        if splits and self.in_channels % 2:
            raise SpaceError(f"{owner}: a shuffle splits an even number, not {self.in_channels}")
        entering = self.in_channels // 2 if splits else self.in_channels
        channels, stride = trace_channels(self.units, entering, owner)
        aside, aside_stride = self.in_channels, 1  # what does not go through the units
        if splits:
            aside = entering
        elif shortcut:
            aside, aside_stride = trace_channels(shortcut, self.in_channels, f"{owner} shortcut")
        if self.frame.kind == "shuffle":
            channels += aside
        elif self.frame.kind == "residual" and aside != channels:
            raise SpaceError(f"{owner}: a residual adds {aside} channels to {channels}")
        if self.frame.kind != "plain" and aside_stride != stride:
            raise SpaceError(f"{owner}: units have stride {stride}, the other path {aside_stride}")
        if channels != self.out_channels:
            raise SpaceError(
                f"{owner}: gives {channels} channels, out_channels is {self.out_channels}"
            )
        if stride != self.stride:
            raise SpaceError(f"{owner}: its units have stride {stride}, stride is {self.stride}")

    @property
    def is_identity(self) -> bool:
        """Whether the op returns its input: no units (and so equal channels and stride 1)."""
        return not self.units

    def output_size(self, size: int) -> int:
        """Return the output's height and width for an input of height and width `size`."""
        return chain_output_size(self.units, size)

    def flops(self, size: int) -> int:
        """Return the multiply-adds of one image of height and width `size`."""
        return chain_flops(self.units, size) + chain_flops(self.frame.shortcut, size)

    def params(self, affine: bool = True) -> int:
        """Return the number of parameters; `affine` counts the batch norms' scales and shifts."""
        return chain_params(self.units, affine) + chain_params(self.frame.shortcut, affine)


@dataclass(frozen=True)
class Head:
    """The end of a network: units, global average pool, dropout, linear layer.

    Args:
        in_channels: channels that leave the last choice block.
        units: what stands before the pool, such as a widening 1x1 convolution.
        num_classes: outputs of the linear layer.
        dropout: probability of dropping a pooled feature, in [0, 1).
        bias: whether the linear layer has one.

    Raises:
        SpaceError: a value is out of range, or the units do not fit together.
    """

    in_channels: int
    units: tuple[Unit, ...]
    num_classes: int
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        check_positive("head", in_channels=self.in_channels, num_classes=self.num_classes)
        if not isinstance(self.dropout, Real) or not 0.0 <= self.dropout < 1.0:
            raise SpaceError(f"head: dropout must lie in [0, 1), got {self.dropout!r}")
        object.__setattr__(self, "units", check_units("head: units", self.units))
        trace_channels(self.units, self.in_channels, "head")

    @property
    def num_features(self) -> int:
        """Inputs of the linear layer."""
        return self.units[-1].out_channels if self.units else self.in_channels

    def flops(self, size: int) -> int:
        """Return the multiply-adds of one image of height and width `size` at the head's input."""
        return chain_flops(self.units, size) + self.num_features * self.num_classes

    def params(self, affine: bool = True) -> int:
        """Return the number of parameters, the linear layer's bias included where it has one."""
        linear = (self.num_features + self.bias) * self.num_classes
        return chain_params(self.units, affine) + linear


def identity(channels: int) -> Op:
    """Return the op that gives back its input."""
    return Op("identity", channels, channels, 1, ())


def projection(in_channels: int, out_channels: int, stride: int) -> Op:
    """Return a 1x1 convolution and batch norm, linear: an identity that changes shape."""
    unit = Unit("pointwise", in_channels, out_channels, stride=stride, activation=None)
    return Op("projection", in_channels, out_channels, stride, (unit,))


def conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> Op:
    """Return a dense convolution, batch norm and ReLU."""
    kind = "pointwise" if kernel == 1 else "dense"
    unit = Unit(kind, in_channels, out_channels, kernel, stride)
    return Op(f"conv_k{kernel}", in_channels, out_channels, stride, (unit,))


def inverted_residual(
    in_channels: int, out_channels: int, stride: int, expansion: int, kernel: int
) -> Op:
    """Return MobileNetV2's block with plain ReLU: expand, depthwise, linear project.

    The input is added where the shape allows it. Source: arXiv 1801.04381, section 3.3.
    """
    hidden = in_channels * expansion
    units = (
        Unit("pointwise", in_channels, hidden),
        Unit("depthwise", hidden, hidden, kernel, stride),
        Unit("pointwise", hidden, out_channels, activation=None),
    )
    has_shortcut = stride == 1 and in_channels == out_channels
    name = f"inverted_residual_e{expansion}_k{kernel}"
    frame = Frame("residual" if has_shortcut else "plain")
    return Op(name, in_channels, out_channels, stride, units, frame)


def _shuffle_frame(in_channels: int, stride: int, kernel: int) -> tuple[Frame, int, int]:
    """Return a shuffle op's frame, and the channels that enter and those that pass its units."""
    if stride == 1:
        return Frame("shuffle"), in_channels // 2, in_channels // 2
    shortcut = (
        Unit("depthwise", in_channels, in_channels, kernel, stride, activation=None),
        Unit("pointwise", in_channels, in_channels),
    )
    return Frame("shuffle", shortcut), in_channels, in_channels


def shuffle_unit(
    in_channels: int, out_channels: int, stride: int, kernel: int, mid: int | None = None
) -> Op:
    """Return ShuffleNetV2's unit as SPOS has it: 1x1, depthwise, 1x1 beside what passes.

    Stride 1 works on half of the channels, other strides on all beside a convolved shortcut.
    Source: arXiv 1807.11164, figure 3 (c, d); arXiv 1904.00420, section 4.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the depthwise convolutions.
        kernel: kernel of the depthwise convolutions.
        mid: hidden channels; `out_channels // 2` by default.
    """
    mid = out_channels // 2 if mid is None else mid
    frame, entering, aside = _shuffle_frame(in_channels, stride, kernel)
    units = (
        Unit("pointwise", entering, mid),
        Unit("depthwise", mid, mid, kernel, stride, activation=None),
        Unit("pointwise", mid, out_channels - aside),
    )
    return Op(f"shuffle_k{kernel}", in_channels, out_channels, stride, units, frame)


def shuffle_xception(
    in_channels: int, out_channels: int, stride: int, mid: int | None = None
) -> Op:
    """Return the SPOS space's Xception-like shuffle op: three times depthwise 3x3 then 1x1.

    Source: arXiv 1904.00420, section 4. Arguments as in `shuffle_unit`.
    """
    mid = out_channels // 2 if mid is None else mid
    frame, entering, aside = _shuffle_frame(in_channels, stride, kernel=3)
    units = (
        Unit("depthwise", entering, entering, 3, stride, activation=None),
        Unit("pointwise", entering, mid),
        Unit("depthwise", mid, mid, 3, activation=None),
        Unit("pointwise", mid, mid),
        Unit("depthwise", mid, mid, 3, activation=None),
        Unit("pointwise", mid, out_channels - aside),
    )
    return Op("shuffle_xception", in_channels, out_channels, stride, units, frame)
