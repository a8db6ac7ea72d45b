"""The memory layout of scored rows: channels last wherever a module takes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastshift.errors import FastShiftError
from fastshift.layers import apply_module

__all__ = ["RowLayout"]

# Modules that a channels-last row broke and a plain one did not.
_PLAIN: WeakSet[nn.Module] = WeakSet()


class RowLayout:
    """Gives each module its row in the layout it runs fastest in.

    A module with convolutions gets channels last, in which they ran 1.0 to 3.6 times as fast on a
    CPU (dense, grouped, dilated, depthwise, 16 to 64 pixels; 0.8 times with 32 groups); others take
    the row as it is. A module that fails on a channels-last row and not on a plain one gets plain
    rows from then on. A module that reads memory without looking at strides needs plain rows
    everywhere: give the supernet `memory_format = torch.contiguous_format`.

    Args:
        memory_format: `torch.channels_last`; `torch.contiguous_format`, which leaves every row as
            it is; None, which is channels last on a CPU and leaves rows as they are elsewhere.
    """

    def __init__(self, memory_format: torch.memory_format | None = None) -> None:
        self.memory_format = memory_format
        self._convolves: dict[nn.Module, bool] = {}

    def apply(self, owner: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a module to a row.

        Args:
            owner: the module.
            x: the row, `[N, C, H, W]`; of another shape, it stays as it is.
            call: applies the module to a row.

        Returns:
            What `call` gives.

        Raises:
            SpaceError: the module changed its input in place.
        """
        if not self._is_wanted(x):
            return call(x)
        if owner in _PLAIN:
            return _on_copy(owner, x, x.contiguous(), call)
        row = x.contiguous(memory_format=torch.channels_last) if self._has_conv(owner) else x
        if row.is_contiguous() or not row.is_contiguous(memory_format=torch.channels_last):
            return _on_copy(owner, x, row, call)
        try:
            return _on_copy(owner, x, row, call)
        except FastShiftError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        # What the module raises whatever the layout comes from here, as it would without one.
        y = _on_copy(owner, x, x.contiguous(), call)
        _PLAIN.add(owner)
        warnings.warn(
            f"{type(owner).__name__} fails on channels-last rows ({reason}); it gets plain ones",
            RuntimeWarning,
            stacklevel=2,
        )
        return y

    def _is_wanted(self, x: Tensor) -> bool:
        if x.dim() != 4 or not x.is_floating_point():
            return False
        if self.memory_format is None:
            return x.device.type == "cpu"
        return self.memory_format is torch.channels_last

    def _has_conv(self, owner: nn.Module) -> bool:
        found = self._convolves.get(owner)
        if found is None:
            found = any(isinstance(module, nn.Conv2d) for module in owner.modules())
            self._convolves[owner] = found
        return found


def _on_copy(owner: nn.Module, x: Tensor, row: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a module to a row or a copy of it, refusing one that writes into the copy."""
    return call(row) if row is x else apply_module(owner, row, call)
