"""What a supernet's steps over static buffers share, whatever the size of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastshift.graphs import shared_pool
from fastshift.node_tables import NodePacking, Nodes, NodeTables
from fastshift.row_buffers import Arena
from fastshift.static_levels import StaticLevel, in_plain_memory, levels_of
from fastshift.supernet import Supernet
from fastshift.trie import Plan

__all__ = ["StaticState"]


class StaticState:
    """Buffers of one supernet on its device: nodes, statistics, moments, results.

    Args:
        supernet: described, its weights where they stay.
        image_size: channels, height and width of an image.
        subtrie_size: leaves of a sub-trie; bounds what is held side by side.
        candidates: most distinct candidates of a plan.
        dtype: of the rows.

    Attributes:
        levels: the stem, the blocks, and the head's features if it has units.
        current: what a segment's nodes are, flat int32; the steps read it.
        sums: of each level's moments over calibration batches, `[slots, K]` float64.
        means: what scoring normalises by, `[slots, K]`.
        count: calibration batches summed, `[1]` float64.
        losses, wrong: summed over images, of each candidate, float64 and int64.

    Raises:
        UnsupportedError: a part of the supernet has no kernel.
    """

    def __init__(
        self,
        supernet: Supernet,
        image_size: tuple[int, int, int],
        subtrie_size: int,
        candidates: int,
        dtype: torch.dtype,
    ) -> None:
        channels, height, width = image_size
        self.levels = levels_of(supernet, (height, width, channels), subtrie_size)
        self.image_size = (height, width, channels)
        in_plain_memory(list(supernet.parameters()))
        reference = next(supernet.parameters())
        self.device, self.wide, self.dtype = reference.device, reference.dtype, dtype
        self.classifier = supernet.head.classifier
        self.num_blocks = len(supernet.blocks)
        blocks = self.levels[: 1 + self.num_blocks]
        self.packing = NodePacking(
            [level.capacity for level in blocks],
            [level.num_choices for level in blocks],
            candidates,
        )
        self.subtrie_size, self.candidates = subtrie_size, candidates
        # Buffers of an inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._neutral = self._on_device(torch.from_numpy(self.packing.empty()).view(-1))
            self.current = self._neutral.clone()
            self._allocate()
            self.arena = Arena(self.device)
            self.pool = shared_pool(self.device)

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self.device)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def _allocate(self) -> None:
        levels, leaves = self.levels, self.packing.capacities[-1]
        self.statistics = [
            self._zeros(v.capacity, v.layer.statistics_floats, dtype=self.wide) for v in levels
        ]
        self.index = [self._on_device(torch.tensor(v.moments_index())) for v in levels]
        slots = [s + v.capacity for s, v in zip(self.packing.slots, levels, strict=False)]
        shapes = [(s, v.layer.moments_floats) for s, v in zip(slots, levels, strict=True)]
        total = sum(rows * floats for rows, floats in shapes)
        self._sums = self._zeros(total, dtype=torch.float64)
        self._means = self._zeros(total, dtype=self.wide)
        self.sums = _views(self._sums, shapes)
        self.means = _views(self._means, shapes)
        self.count = self._zeros(1, dtype=torch.float64)
        self._one = torch.ones(1, dtype=torch.float64, device=self.device)
        self.losses = self._zeros(self.candidates + leaves, dtype=torch.float64)
        self.wrong = self._zeros(self.candidates + leaves, dtype=torch.int64)

    @property
    def has_features(self) -> bool:
        """Whether the head has units before its pool."""
        return len(self.levels) > 1 + self.num_blocks

    @property
    def last(self) -> int:
        """Position of the rows that the pool reads."""
        return len(self.levels) - 1

    def level(self, position: int) -> StaticLevel:
        """The level of a position: 0 the stem, then the blocks, then the head's features."""
        return self.levels[position]

    def nodes(self, position: int, nodes: int) -> Nodes:
        """The static buffers of a level's nodes."""
        return self.packing.view(self.current, position, nodes)

    def tables(self, plan: Plan, *, by_choice: bool = False) -> NodeTables:
        """A plan's segments for `current`."""
        return NodeTables(plan, self.packing, self.device, by_choice=by_choice)

    def clear_nodes(self) -> None:
        """Leave no node in the static buffers, so that a step has no effect."""
        self.current.copy_(self._neutral)

    def clear_scores(self) -> None:
        """Begin an evaluation."""
        self._sums.zero_()
        self.count.zero_()
        self.losses.zero_()
        self.wrong.zero_()

    def count_batch(self) -> None:
        """Note that a calibration batch was summed."""
        self.count.add_(self._one)

    def average(self) -> None:
        """Score by the averages over the calibration batches from here on."""
        torch.div(self._sums, self.count, out=self._sums)
        self._means.copy_(self._sums)

    def keep(self, moments: dict[str, Tensor]) -> None:
        """Score by the statistics of each (block, choice) from here on.

        Args:
            moments: by name, `NAME.running_mean` and `NAME.running_var` of every batch norm.
        """
        targets, values = [], []
        for level, means in zip(self.levels, self.means, strict=True):
            for norm in level.norms:
                own = means[norm.choice, norm.first : norm.first + 2 * norm.channels]
                targets += own.split(norm.channels)
                values += (moments[f"{norm.name}.running_{kind}"] for kind in ("mean", "var"))
        torch._foreach_copy_(targets, values)


def _views(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
