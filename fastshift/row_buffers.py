"""The memory of a supernet's rows: one arena, laid out for scoring or for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from fastshift.static_levels import StaticLevel

__all__ = ["Arena", "InferRows", "TrainRows"]

LINE = 256  # bytes; what CUDA allocations are aligned to


class Arena:
    """One stretch of device memory that layouts take turns in.

    Its memory moves when it grows, so that graphs of it are stale: those who hold such graphs are
    told before.

    Attributes:
        users: whose `clear` is called before it grows.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.users: WeakSet = WeakSet()

    def reserve(self, num_bytes: int) -> None:
        """Make sure of so many bytes."""
        if num_bytes > self.memory.numel():
            for user in list(self.users):
                user.clear()
            # What was there goes before the larger one comes.
            self.memory = torch.empty(0, dtype=torch.uint8, device=self.memory.device)
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.memory.device)


class _Layout:
    """Places in the arena, given out one after the other."""

    def __init__(self, levels: Sequence[StaticLevel], images: int, dtype: torch.dtype) -> None:
        self.levels, self.images, self.dtype = levels, images, dtype
        self.num_bytes = 0
        self._arena: Arena | None = None

    def _place(self, elements: int, dtype: torch.dtype | None = None) -> tuple[int, int]:
        first = self.num_bytes
        size = elements * (dtype or self.dtype).itemsize
        self.num_bytes += -(-size // LINE) * LINE
        return first, size

    def bind(self, arena: Arena) -> None:
        """Take an arena that has at least `num_bytes`."""
        self._arena = arena

    def _view(self, place: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        first, size = place
        return self._arena.memory[first : first + size].view(dtype or self.dtype)

    def _row(self, position: int) -> int:
        """Elements of a row of a position's level."""
        return self.images * math.prod(self.levels[position].out_size)

    def _rows(self, place: tuple[int, int], position: int, nodes: int) -> Tensor:
        flat = self._view(place)[: nodes * self._row(position)]
        return flat.view(nodes, self.images, *self.levels[position].out_size)

    def source_rows(self, position: int, nodes: int) -> int:
        """Rows of the level above that so many nodes may read: no more than there are nodes."""
        return min(nodes, self.levels[position - 1].capacity)


class InferRows(_Layout):
    """Rows of a pass without gradients: one of each trunk level, and two levels side by side.

    Args:
        levels: of the supernet.
        images: of a batch.
        dtype: of the rows.
    """

    def __init__(self, levels: Sequence[StaticLevel], images: int, dtype: torch.dtype) -> None:
        super().__init__(levels, images, dtype)
        self._trunk = [self._place(self._row(p)) for p in range(len(levels))]
        most = [0, 0]
        for p, level in enumerate(levels):
            most[p % 2] = max(most[p % 2], level.capacity * self._row(p))
        self._side = [self._place(elements) for elements in most]

    def out(self, position: int, nodes: int, trunk: bool) -> Tensor:
        """Where a level's rows go, `[M, N, H, W, C]`."""
        place = self._trunk[position] if trunk else self._side[position % 2]
        return self._rows(place, position, nodes)

    def source(self, position: int, nodes: int, trunk: bool) -> Tensor:
        """The rows that a level reads."""
        return self.out(position - 1, self.source_rows(position, nodes), trunk)

    def enter(self, position: int) -> None:
        """Put the trunk's last row where a leaf segment that starts at a position reads it."""
        self.out(position - 1, 1, False).copy_(self.out(position - 1, 1, True))


class TrainRows(_Layout):
    """Rows of a training pass, and what its backward pass needs: all levels of one sub-trie.

    Args:
        levels, images, dtype: as for `InferRows`.
        saved: floats that a node of each level keeps.
        wide: type of what is kept.
    """

    def __init__(
        self,
        levels: Sequence[StaticLevel],
        images: int,
        dtype: torch.dtype,
        saved: Sequence[int],
        wide: torch.dtype,
    ) -> None:
        super().__init__(levels, images, dtype)
        self._wide, self._saved_floats = wide, list(saved)
        self._out = [self._place(v.capacity * self._row(p)) for p, v in enumerate(levels)]
        self._saved = [
            self._place(level.capacity * floats, wide)
            for level, floats in zip(levels, saved, strict=True)
        ]
        # A gradient lives from its level's children to its level.
        most = [0, 0]
        for p, level in enumerate(levels):
            most[p % 2] = max(most[p % 2], level.capacity * self._row(p))
        self._side = [self._place(elements) for elements in most]
        self._sums = [self._place(self._row(p)) for p in range(len(levels))]

    def out(self, position: int, nodes: int, trunk: bool = False) -> Tensor:
        """Where a level's rows go, `[M, N, H, W, C]`."""
        return self._rows(self._out[position], position, nodes)

    def source(self, position: int, nodes: int, trunk: bool = False) -> Tensor:
        """The rows that a level reads."""
        return self.out(position - 1, self.source_rows(position, nodes))

    def saved(self, position: int, nodes: int) -> Tensor:
        """Where a level's nodes keep what their backward pass needs, flat."""
        floats = nodes * self._saved_floats[position]
        return self._view(self._saved[position], self._wide)[:floats]

    def gradient(self, position: int, nodes: int) -> Tensor:
        """The gradient of a level's rows."""
        return self._rows(self._side[position % 2], position, nodes)

    def sum(self, position: int) -> Tensor:
        """Of a trunk's last row, the gradients that came back from segments below."""
        return self._rows(self._sums[position], position, 1)
