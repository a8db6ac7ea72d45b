"""Which modules the compiled kernels take, and whether one is still what it was made of."""

from __future__ import annotations

from operator import is_, itemgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastshift.layers import ConvUnit, HeadModule, OpModule, UnitChain
from fastshift.tracing import has_global_hooks, is_changed

__all__ = ["MadeOf", "norm_of", "weight_of"]

_FLOAT32 = torch.float32
_UNIT = itemgetter(
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "activation"),
)


class MadeOf:
    """The parts of a module of units, and the values of theirs that a compiled form depends on.

    Looked at anew at each call, past `nn.Module.__getattr__` and `modules()`, which cost more than
    all else at the kernels' smallest sizes.

    Args:
        op: an `OpModule`, a `HeadModule` or a `UnitChain`.
    """

    def __init__(self, op: nn.Module) -> None:
        # Not the module itself, which would then never go.
        self._parts = _parts_of(op)
        self._types = list(map(type, self._parts))
        self._chains = [part for part in self._parts if isinstance(part, UnitChain)]
        self._units = [part for part in self._parts if isinstance(part, ConvUnit)]
        self._values = self._look(op)
        self._is_plain = all(map(_is_plain_chain, (op, *self._chains)))

    def _look(self, op: nn.Module) -> list[tuple]:
        found = [_chain_values(op), *map(_chain_values, self._chains)]
        return found + [_UNIT(unit.__dict__) for unit in self._units]

    def is_still(self, op: nn.Module) -> bool:
        """Whether the module has just these parts, as they were, and memory that kernels read."""
        parts = _parts_of(op)
        return (
            len(parts) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and list(map(type, parts)) == self._types
            and self._look(op) == self._values
            and all(map(_is_readable, self._units))
        )

    def is_built_in(self, op: nn.Module) -> bool:
        """Whether the kernels have it: its units, and no batch norm but theirs, in their order."""
        own = _units_of(op) if self._is_plain else []
        norms = [m for m in op.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        return (
            bool(own)
            and len(own) == len(self._units) == len(norms)
            and all(norm_of(unit) is norm for unit, norm in zip(own, norms, strict=True))
            and all(type(unit).forward is ConvUnit.forward for unit in self._units)
            and all(_is_built_in(unit) and _is_readable(unit) for unit in self._units)
        )

    def runs_as_written(self, op: nn.Module) -> bool:
        """Whether nothing hangs on the module and its parts, or stands in for a forward of theirs.

        What does expects them to be called.
        """
        return not (has_global_hooks() or is_changed(op) or any(map(is_changed, self._parts)))


def norm_of(unit: ConvUnit) -> nn.Module | None:
    """A unit's batch norm."""
    return unit._modules.get("norm")


def weight_of(unit: ConvUnit) -> Tensor:
    """A unit's weight; a parametrised one is computed."""
    found = unit._parameters.get("weight")
    return unit.weight if found is None else found


def _parts_of(op: nn.Module) -> list[nn.Module]:
    """All below a module."""
    found = [child for child in op._modules.values() if child is not None]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def _units_of(op: nn.Module) -> list[ConvUnit]:
    """The units of a plain module in the kernels' order."""
    chains = [op.features] if type(op) is HeadModule else [op, op._modules.get("shortcut")]
    return [
        chain._modules[str(index)]
        for chain in chains
        if chain is not None
        for index in range(chain.num_units)
    ]


def _chain_values(chain: nn.Module) -> tuple:
    own = chain.__dict__
    return own.get("frame"), own.get("num_units")


def _is_plain_chain(chain: nn.Module) -> bool:
    if type(chain) is HeadModule:
        return type(chain.features) is UnitChain
    if type(chain) not in (UnitChain, OpModule):
        return False
    units = (chain._modules.get(str(index)) for index in range(chain.num_units))
    aside = chain._modules.get("shortcut")
    return all(isinstance(u, ConvUnit) for u in units) and type(aside) in (UnitChain, type(None))


def _is_built_in(unit: ConvUnit) -> bool:
    kernel, stride = unit.kernel_size[0], unit.stride[0]
    depthwise = unit.groups == unit.in_channels == unit.out_channels
    return (
        unit.kernel_size == (kernel, kernel)
        and unit.stride == (stride, stride)
        and unit.padding == (kernel // 2, kernel // 2)
        and unit.padding_mode == "zeros"
        and unit.dilation == (1, 1)
        and (unit.groups == 1 or (depthwise and kernel in (3, 5, 7) and stride in (1, 2)))
    )


def _is_readable(unit: ConvUnit) -> bool:
    norm = unit._modules.get("norm")
    if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats:
        return False
    own, plain = norm._parameters, unit.__dict__
    out = plain["out_channels"]
    shape = (out, plain["in_channels"] // plain["groups"], *plain["kernel_size"])
    for parameter, expected in (
        (weight_of(unit), shape),
        (own.get("weight"), (out,)),
        (own.get("bias"), (out,)),
    ):
        if parameter is not None and not (
            parameter.dtype is _FLOAT32 and parameter.is_cpu and parameter.shape == expected
        ):
            return False
    return unit._parameters.get("bias") is None
