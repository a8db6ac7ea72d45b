"""What the batch norms of a level's nodes met, in one tensor, and its sums over batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastshift.population_layer import STATISTICS, PopulationLayer

__all__ = ["LevelMoments", "LevelSums"]

Moments = tuple[Tensor, Tensor]


class LevelMoments:
    """What the batch norms of a level's nodes met.

    Attributes:
        layer: of the level.
        choice: of each node.
        statistics: of each node, as `layer_train` gives them.
    """

    def __init__(self, layer: PopulationLayer, choice: Sequence[int], statistics: Tensor) -> None:
        self.layer, self.choice, self.statistics = layer, choice, statistics

    def packed(self) -> list[tuple[Tensor, list[int]]]:
        """Of each node as `MovingAverages.add_packed` takes them."""
        known = _parts(self.layer)
        parts = [known[choice] for choice in self.choice]
        rows = zip(self.statistics.unbind(), parts, strict=True)
        return [(row[: sum(own)], own) for row, own in rows]

    def each(self) -> list[list[Moments]]:
        """Of each node the mean and the unbiased variance, `[C]` each, of every batch norm.

        Nothing for an identity.
        """
        return [_pairs(row, own) for row, own in self.packed()]

    def has(self, index: int) -> bool:
        """Whether a node has batch norms: all but identities have."""
        return self.layer.ops[self.choice[index]] is not None

    def is_of(self, layer: PopulationLayer, choice: Sequence[int]) -> bool:
        """Whether these are of such nodes."""
        return self.layer is layer and list(self.choice) == list(choice)


class LevelSums:
    """Sums of a level's moments over calibration batches, in float64 from the second on.

    Args:
        moments: of the first batch; nothing may write to them afterwards.
    """

    def __init__(self, moments: LevelMoments) -> None:
        self.first = moments
        self.count = 1
        self._total = moments.statistics

    def add(self, moments: LevelMoments) -> bool:
        """Add those of another batch, if they are of nodes alike."""
        if not moments.is_of(self.first.layer, self.first.choice):
            return False
        self._total = self._total.double() + moments.statistics
        self.count += 1
        return True

    def node(self, index: int) -> list[Moments]:
        """The sums of one node."""
        parts = _parts(self.first.layer)[self.first.choice[index]]
        return _pairs(self._total[index, : sum(parts)], parts)

    def mean(self) -> Tensor:
        """Averages `[M, moments_floats]`, as `Level.infer` takes them."""
        index, beyond = _places(self.first.layer)
        choice = torch.tensor(self.first.choice, device=index.device)
        found = self._total.gather(1, index[choice])
        found = (found if self.count == 1 else found / self.count).float()
        return found if beyond is None else found.masked_fill(beyond[choice], 0.0)


def _pairs(row: Tensor, parts: Sequence[int]) -> list[Moments]:
    """Mean and variance of each unit from a node's statistics."""
    split = row.split(parts)
    return list(zip(split[::3], split[1::3], strict=True))


@cache
def _places(layer: PopulationLayer) -> tuple[Tensor, Tensor | None]:
    """Of each choice, where in a node's statistics `infer`'s moments stand, and which it lacks."""
    index = np.full((len(layer.ops), layer.moments_floats), -1)
    for row, parts in zip(index, _parts(layer), strict=True):
        start = end = 0
        for position, size in enumerate(parts):
            if position % 3 < 2:
                row[end : end + size] = range(start, start + size)
                end += size
            start += size
    # Inference tensors that were kept could not be used outside of that mode.
    with torch.inference_mode(False):
        beyond = torch.from_numpy(index < 0) if (index < 0).any() else None
        return torch.from_numpy(index.clip(0)), beyond


@cache
def _parts(layer: PopulationLayer) -> list[list[int]]:
    """How a node's statistics are made up: mean, variance and the rest of each unit."""
    found = []
    for op in layer.ops:
        own = []
        for unit in op.units if op else ():
            own += (unit.out_channels, unit.out_channels, (STATISTICS - 2) * unit.out_channels)
        found.append(own)
    return found
