"""Every access of a kernel under Triton's interpreter: its bytes counted, its addresses checked.

The bytes are those that the programs ask for, without caches: what several programs or lanes read
is counted each time. Of a tensor that a kernel calls `scratch_ptr` each program has a part of its
own: what two of them touch is no less wrong than what stands outside.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from interpreter_scalars import take_scalars
from torch import Tensor
from torch.nn import Parameter
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

__all__ = ["Accesses", "watch"]

_LEAST_ADDRESS = 2**24  # of what a table of int64 may hold; labels and counts are below


@dataclass
class Accesses:
    """What the kernels under a watch did.

    Attributes:
        loaded_bytes, stored_bytes: of all lanes that no mask stopped; an atomic counts as both.
        programs: that ran.
        violations: a line for each access outside of the tensors that its launch was given (or
            reaches by a table of addresses), across two of them, or in another program's scratch,
            with kernel and program.
    """

    loaded_bytes: int = 0
    stored_bytes: int = 0
    programs: int = 0
    violations: list[str] = field(default_factory=list)
    _ranges: np.ndarray | None = None
    _kernel: str = ""
    _scratch: tuple[int, int] = (0, 0)
    _owners: np.ndarray | None = None  # of each two bytes of it: a program's number, 0 of none

    def enter(self, kernel: str, tensors: Iterable[Tensor], scratch: Tensor | None) -> None:
        """Note what the next launch may touch: its tensors, and those in its address tables."""
        self._kernel = kernel
        self._scratch = _range(scratch) if scratch is not None else (0, 0)
        self._owners = np.zeros((self._scratch[1] - self._scratch[0]) // 2, np.int32)
        tensors = list(tensors)
        found = sorted({_range(tensor) for tensor in (*tensors, *_reached(tensors))})
        allowed: list[list[int]] = []
        for start, end in found:
            if allowed and start < allowed[-1][1]:  # one tensor within another
                allowed[-1][1] = max(allowed[-1][1], end)
            elif end > start:
                allowed.append([start, end])
        self._ranges = np.array(allowed, dtype=np.int64).reshape(-1, 2)

    def check(self, what: str, handle: TensorHandle, mask: np.ndarray) -> np.ndarray:
        """Note lanes that are where their program must not be and return the mask without them.

        Args:
            what: the kind of access, for the message.
            handle: the addresses.
            mask: lanes that are accessed.
        """
        size = _itemsize(handle)
        address, mask = np.broadcast_arrays(handle.data.astype(np.int64), mask.astype(bool))
        starts, ends = self._ranges[:, 0], self._ranges[:, 1]
        owner = np.searchsorted(starts, address, side="right") - 1
        inside = (owner >= 0) & (address + size <= ends[np.maximum(owner, 0)])
        outside = mask & ~inside
        if outside.any():
            self._violation(what, address[outside], "outside of every tensor")
        elif len(np.unique(owner[mask])) > 1:
            self._violation(what, address[mask], "across several tensors")
        return self._in_own_scratch(what, address, mask & inside)

    def _in_own_scratch(self, what: str, address: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Note lanes in another program's scratch and return the mask without them."""
        first, end = self._scratch
        there = mask & (address >= first) & (address < end)
        if not there.any():
            return mask
        places = np.where(there, address - first, 0) // 2
        owners = self._owners[places]
        strange = there & (owners != 0) & (owners != self.programs)
        if strange.any():
            self._violation(what, address[strange], "in another program's scratch")
        self._owners[places[there & ~strange]] = self.programs
        return mask & ~strange

    def _violation(self, what: str, addresses: np.ndarray, where: str) -> None:
        program = interpreter.interpreter_builder.grid_idx
        starts, ends = self._ranges[:, 0], self._ranges[:, 1]
        first = int(addresses.min())
        before = int(ends[ends <= first].max(initial=0))
        gap = f", {first - before} bytes behind a tensor" if before else ""
        self.violations.append(
            f"{self._kernel}, program {program}: {what} of {addresses.size} lanes {where}, "
            f"the first at {first:#x}{gap}; {len(starts)} tensors"
        )


def _range(tensor: Tensor) -> tuple[int, int]:
    """From a tensor's first element to behind its last, whatever else its storage holds."""
    start, steps = tensor.data_ptr(), zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((size - 1) * stride for size, stride in steps) + 1 if tensor.numel() else 0
    return start, start + reach * tensor.element_size()


def _reached(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Find the living tensors whose addresses stand in tables of int64."""
    tables = [t.flatten() for t in tensors if t.dtype is torch.int64 and t.numel()]
    values = {v for table in tables for v in table.tolist() if v >= _LEAST_ADDRESS}
    if not values:
        return []
    living = (t for t in gc.get_objects() if type(t) in (Tensor, Parameter))
    return [t for t in living if t.layout is torch.strided and t.data_ptr() in values]


def _itemsize(handle: TensorHandle) -> int:
    return max(1, handle.get_element_ty().primitive_bitwidth // 8)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def watch() -> Iterator[Accesses]:
    """Watch every launch inside; an access that a violation notes does not happen.

    Yields:
        What was found, complete at the end.
    """
    take_scalars()
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, program = builder.create_atomic_rmw, builder.create_atomic_cas, builder.set_grid_idx
    run, call = InterpretedFunction.run, InterpretedFunction.__call__
    entered = set()
    found = Accesses()

    def watched_load(ptrs, mask, *rest):
        allowed = found.check("load", ptrs, mask.data)
        found.loaded_bytes += int(allowed.sum()) * _itemsize(ptrs)
        return load(ptrs, TensorHandle(allowed, mask.dtype), *rest)

    def watched_store(ptrs, value, mask, *rest):
        allowed = found.check("store", ptrs, mask.data)
        found.stored_bytes += int(allowed.sum()) * _itemsize(ptrs)
        return store(ptrs, value, TensorHandle(allowed, mask.dtype), *rest)

    def watched_rmw(op, ptr, value, mask, *rest):
        allowed = found.check("atomic", ptr, mask.data)
        found.loaded_bytes += int(allowed.sum()) * _itemsize(ptr)
        found.stored_bytes += int(allowed.sum()) * _itemsize(ptr)
        return rmw(op, ptr, value, TensorHandle(allowed, mask.dtype), *rest)

    def watched_cas(ptr, *rest):
        everywhere = np.ones(ptr.data.shape, dtype=bool)
        if not found.check("atomic", ptr, everywhere).all():
            raise IndexError(found.violations[-1])  # it takes no mask, so it cannot be skipped
        found.loaded_bytes += ptr.data.size * _itemsize(ptr)
        found.stored_bytes += ptr.data.size * _itemsize(ptr)
        return cas(ptr, *rest)

    def watched_program(*index):
        found.programs += 1
        program(*index)

    def call_again(self, *args, **kwargs):
        # Of itself it patches the language anew at each call, which takes most of a kernel's time.
        if self.fn in entered or self.fn.__module__.startswith("fastshift."):
            return self.rewrite()(*args, **kwargs)
        entered.add(self.fn)
        return call(self, *args, **kwargs)

    def watched_run(self, *args, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        found.enter(self.fn.__name__, _tensors(named.values()), named.get("scratch_ptr"))
        return run(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
        mock.patch.object(builder, "create_atomic_rmw", watched_rmw),
        mock.patch.object(builder, "create_atomic_cas", watched_cas),
        mock.patch.object(builder, "set_grid_idx", watched_program),
        mock.patch.object(InterpretedFunction, "run", watched_run),
        mock.patch.object(InterpretedFunction, "__call__", call_again),
    ):
        yield found
