"""Every access of a kernel under Triton's interpreter: its bytes counted, its addresses checked.

The bytes are those that the programs ask for, without caches: what several programs or lanes read
is counted each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

__all__ = ["Accesses", "watch"]


@dataclass
class Accesses:
    """What the kernels under a watch did.

    Attributes:
        loaded_bytes, stored_bytes: of all lanes that no mask stopped; an atomic counts as both.
        programs: that ran.
        violations: a line for each access outside of the tensors that its launch was given, or
            across two of them, with kernel, program and address.
    """

    loaded_bytes: int = 0
    stored_bytes: int = 0
    programs: int = 0
    violations: list[str] = field(default_factory=list)
    _also: list[tuple[int, int]] = field(default_factory=list)
    _ranges: np.ndarray | None = None
    _kernel: str = ""

    def enter(self, kernel: str, tensors: Iterable[Tensor]) -> None:
        """Note what the next launch may touch."""
        self._kernel = kernel
        found = {*self._also, *map(_range, tensors)}
        merged = sorted((start, end) for start, end in found if end > start)
        self._ranges = np.array(merged, dtype=np.int64).reshape(-1, 2)

    def check(self, what: str, handle: TensorHandle, mask: np.ndarray) -> np.ndarray:
        """Note lanes outside of every tensor and return the mask without them.

        Args:
            what: the kind of access, for the message.
            handle: the addresses.
            mask: lanes that are accessed.
        """
        size = _itemsize(handle)
        address, mask = np.broadcast_arrays(handle.data.astype(np.int64), mask)
        starts, ends = self._ranges[:, 0], self._ranges[:, 1]
        owner = np.searchsorted(starts, address, side="right") - 1
        inside = (owner >= 0) & (address + size <= ends[np.maximum(owner, 0)])
        outside = mask & ~inside
        if outside.any():
            self._violation(what, address[outside], "outside of every tensor")
        elif len(np.unique(owner[mask])) > 1:
            self._violation(what, address[mask], "across several tensors")
        return mask & inside

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
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _itemsize(handle: TensorHandle) -> int:
    return max(1, handle.get_element_ty().primitive_bitwidth // 8)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def watch(also: Iterable[Tensor] = ()) -> Iterator[Accesses]:
    """Watch every launch inside; an access that a violation notes does not happen.

    Args:
        also: tensors on the CPU that kernels reach by address, besides those they are given.

    Yields:
        What was found, complete at the end.
    """
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, program = builder.create_atomic_rmw, builder.create_atomic_cas, builder.set_grid_idx
    run = InterpretedFunction.run
    found = Accesses(_also=[_range(tensor) for tensor in also])

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

    def watched_run(self, *args, **kwargs):
        found.enter(self.fn.__name__, _tensors([*args, *kwargs.values()]))
        return run(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
        mock.patch.object(builder, "create_atomic_rmw", watched_rmw),
        mock.patch.object(builder, "create_atomic_cas", watched_cas),
        mock.patch.object(builder, "set_grid_idx", watched_program),
        mock.patch.object(InterpretedFunction, "run", watched_run),
    ):
        yield found
