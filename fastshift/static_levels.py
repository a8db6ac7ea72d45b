"""A supernet as levels for static buffers: the stem, every choice block, the head's features.

Each is one population layer of all its choices, whatever a population uses of them, so that a
step's buffers and functions depend on sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fastshift.errors import UnsupportedError
from fastshift.layers import ConvUnit, HeadModule, OpModule, UnitChain
from fastshift.population_layer import (
    STATISTICS,
    LayerOp,
    LayerUnit,
    PopulationLayer,
    describe_layer,
    describe_op,
    parse_layer,
)
from fastshift.supernet import Supernet
from fastshift.tracing import is_changed

__all__ = [
    "StaticLevel",
    "StaticNorm",
    "buckets",
    "in_plain_memory",
    "levels_of",
]

ALIGNMENT = 16  # bytes, of the kernels' widest access


@dataclass(frozen=True)
class StaticNorm:
    """One batch norm of a level.

    Attributes:
        name: in the supernet's state dict.
        module: itself.
        choice: of the candidate op that it belongs to.
        first: where its mean begins among a node's moments; its variance follows.
        channels: of it.
    """

    name: str
    module: nn.BatchNorm2d
    choice: int
    first: int
    channels: int


@dataclass(frozen=True, eq=False)
class StaticLevel:
    """One level: what its operators take, whatever the population.

    Attributes:
        name: of the part of the supernet.
        text: of the layer, `population_layer.describe_layer`.
        parameters: of all choices, in the layer's order.
        norms: of all choices.
        in_size, out_size: height, width and channels of the rows it reads and writes.
        capacity: most nodes of a sub-trie.
    """

    name: str
    text: str
    parameters: tuple[Tensor, ...]
    norms: tuple[StaticNorm, ...]
    in_size: tuple[int, int, int]
    out_size: tuple[int, int, int]
    capacity: int

    @cached_property
    def layer(self) -> PopulationLayer:
        """What its choices compute."""
        return parse_layer(self.text)

    @property
    def num_choices(self) -> int:
        """Candidate ops."""
        return len(self.layer.ops)

    def moments_index(self) -> list[list[int]]:
        """Of each choice, where in a node's statistics its moments are, 0 where it has none."""
        found = []
        for op in self.layer.ops:
            own, first = [], 0
            for unit in op.units if op else ():
                own += range(first, first + 2 * unit.out_channels)
                first += STATISTICS * unit.out_channels
            found.append(own + [0] * (self.layer.moments_floats - len(own)))
        return found


def buckets(capacity: int) -> list[int]:
    """Numbers of nodes that steps are made for: 1, 2, 4, 8, 16, 24, ... and the capacity."""
    sizes = [1, 2, 4, *range(8, capacity, 8)]
    return [size for size in sizes if size < capacity] + [capacity]


def levels_of(
    supernet: nn.Module, image_size: tuple[int, int, int], subtrie_size: int
) -> list[StaticLevel]:
    """Describe a supernet's levels: the stem, each choice block, and the head's units if any.

    Args:
        supernet: made of a described space.
        image_size: height, width and channels of an image.
        subtrie_size: leaves of a sub-trie.

    Raises:
        UnsupportedError: a part is no built-in op, or was changed into what the kernels lack.
    """
    if type(supernet) is not Supernet:
        raise UnsupportedError(f"{type(supernet).__name__}: its modules have no kernels")
    head = supernet.head
    if type(head) is not HeadModule or type(head.classifier) is not nn.Linear:
        raise UnsupportedError(f"head: {type(head).__name__}; expected a described head")
    for name in ("dropout", "classifier"):
        _check_module(f"head.{name}", getattr(head, name))
    if type(head.dropout) is not nn.Dropout:
        raise UnsupportedError(f"head.dropout: {type(head.dropout).__name__}; expected Dropout")
    _check_module("head", head)
    found = [_level("stem", [supernet.stem], ["stem"], image_size, 1)]
    capacity = 1
    for block, ops in enumerate(supernet.blocks):
        capacity = min(subtrie_size, capacity * len(ops))
        name = f"blocks.{block}"
        chosen = [None if supernet.identities[block][o] else op for o, op in enumerate(ops)]
        prefixes = [f"{name}.{choice}" for choice in range(len(ops))]
        found.append(_level(name, chosen, prefixes, found[-1].out_size, capacity))
    if head.features.num_units:
        prefix = "head.features"
        found.append(_level(prefix, [head.features], [prefix], found[-1].out_size, capacity))
    return found


def _level(
    name: str,
    ops: Sequence[nn.Module | None],
    prefixes: Sequence[str],
    in_size: tuple[int, int, int],
    capacity: int,
) -> StaticLevel:
    texts: list[str] = []
    parameters: list[Tensor] = []
    norms: list[StaticNorm] = []
    for choice, (op, prefix) in enumerate(zip(ops, prefixes, strict=True)):
        if op is None:
            texts.append(describe_op(None))
            continue
        units = _units_of(op, prefix)
        frame = op.frame if isinstance(op, OpModule) else "plain"
        described = tuple(_unit(unit) for _, unit in units)
        texts.append(describe_op(LayerOp(described, op.num_units, frame)))
        first = 0
        for unit_name, unit in units:
            norm, channels = unit.norm, unit.out_channels
            own = (unit.weight, norm.weight, norm.bias)
            parameters += [p for p in own if p is not None]
            norms.append(StaticNorm(f"{unit_name}.norm", norm, choice, first, channels))
            first += 2 * channels
    text = describe_layer(texts)
    try:
        out_size = parse_layer(text).output_shape(*in_size)
    except ValueError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    return StaticLevel(
        name, text, tuple(parameters), tuple(norms), tuple(in_size), out_size, capacity
    )


def _units_of(op: nn.Module, name: str) -> list[tuple[str, ConvUnit]]:
    """Names and units of a candidate op, the main chain's and then the shortcut's."""
    if type(op) not in (OpModule, UnitChain):
        raise UnsupportedError(f"{name}: {type(op).__name__} has no kernel")
    _check_module(name, op)
    found = [(f"{name}.{index}", op._modules[str(index)]) for index in range(op.num_units)]
    shortcut = getattr(op, "shortcut", None)
    if shortcut is not None:
        found += _units_of(shortcut, f"{name}.shortcut")
    if not found:
        raise UnsupportedError(f"{name}: it has no units")
    for unit_name, unit in found:
        _check_unit(unit_name, unit)
    return found


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse what hangs on a module that is not called."""
    if is_changed(module):
        raise UnsupportedError(
            f"{name}: it has hooks or a forward of its own, which no kernel calls"
        )
    if hasattr(module, "parametrizations"):
        raise UnsupportedError(f"{name}: its weight is computed by a parametrization")


def _check_unit(name: str, unit: nn.Module) -> None:
    if type(unit) is not ConvUnit:
        raise UnsupportedError(f"{name}: {type(unit).__name__} has no kernel")
    norm = unit.norm
    if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats:
        raise UnsupportedError(f"{name}: it has no batch norm that keeps statistics")
    if norm.momentum is None:
        raise UnsupportedError(f"{name}: its batch norm averages over all steps (momentum None)")
    _check_module(name, unit)
    _check_module(f"{name}.norm", norm)
    size = unit.kernel_size[0]
    if (
        unit.bias is not None
        or unit.padding_mode != "zeros"
        or unit.kernel_size != (size, size)
        or unit.padding != (size // 2, size // 2)
        or unit.dilation != (1, 1)
        or unit.stride[0] != unit.stride[1]
        or unit.groups not in (1, unit.in_channels)
    ):
        raise UnsupportedError(f"{name}: it was changed into a convolution without a kernel")


def _unit(unit: ConvUnit) -> LayerUnit:
    norm = unit.norm
    return LayerUnit(
        unit.groups > 1,
        unit.in_channels,
        unit.out_channels,
        unit.kernel_size[0],
        unit.stride[0],
        unit.activation == "relu",
        norm.eps,
        norm.weight is not None,
        norm.bias is not None,
    )


def in_plain_memory(parameters: Sequence[Tensor]) -> None:
    """Move weights that lie in another order of dimensions into the plain one, in place.

    So are those that begin where no wide access may, as views of a flat buffer do. A captured step
    reads them where they are, and the kernels would copy them at each call; values and the
    parameters themselves stay the same. Strides count, also of dimensions of one value, by which
    `is_contiguous` does not go: gradients and momenta have the plain ones.
    """
    with torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            plain = torch.empty(parameter.shape, device="meta").stride()
            if parameter.stride() != plain or parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
