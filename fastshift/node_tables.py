"""A plan as device tables: of each segment, what its levels' static buffers hold."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastshift.static_levels import buckets
from fastshift.trie import Plan, Segment

__all__ = ["NodePacking", "NodeTables", "Nodes"]

FIELDS = ("parent", "choice", "slot", "weight")


@dataclass(frozen=True)
class Nodes:
    """Static buffers of one level, of a bucket's size, int32 on the device.

    Attributes:
        parent: index into the rows of the level above.
        choice: candidate op; -1 beyond the nodes.
        slot: row of the level's moments; beyond the nodes one that no node has.
        weight: rows of the plan below the node; 0 beyond the nodes.
    """

    parent: Tensor
    choice: Tensor
    slot: Tensor
    weight: Tensor


class NodePacking:
    """Where the levels' buffers lie in one flat buffer, of which a segment copies its part.

    Positions are 0, the stem; 1 to L, the choice blocks; L + 1, the leaves.

    Args:
        capacities: most nodes of the stem and of each block.
        choices: candidate ops of each.
        candidates: most leaves of a plan.
    """

    def __init__(self, capacities: Sequence[int], choices: Sequence[int], candidates: int) -> None:
        self.capacities = [*capacities, capacities[-1]]
        # Rows of moments: one for each node or choice, and behind them one for each of padding.
        self.slots = [max(candidates, count) for count in [*choices, 1]]
        self.candidates = candidates
        self._buckets = [buckets(capacity) for capacity in self.capacities]
        widths = [len(FIELDS) * capacity for capacity in self.capacities]
        self.offsets = np.concatenate(([0], np.cumsum(widths))).tolist()
        # Behind the levels: the number of leaves, and the candidate that each leaf is.
        self.leaves = self.offsets[-1]
        self.width = self.leaves + 1 + self.capacities[-1]

    def view(self, flat: Tensor, position: int, nodes: int) -> Nodes:
        """A level's buffers for a bucket's size."""
        start, capacity = self.offsets[position], self.capacities[position]
        starts = range(start, start + len(FIELDS) * capacity, capacity)
        return Nodes(*(flat[first : first + nodes] for first in starts))

    def leaves_of(self, flat: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """The number of leaves, `[1]`, and the candidate of each, for a bucket's size."""
        first = self.leaves + 1
        return flat[self.leaves : first], flat[first : first + nodes]

    def bucket(self, position: int, nodes: int) -> int:
        """The smallest number of nodes that a level's steps are made for and so many fit in."""
        sizes = self._buckets[position]
        return sizes[bisect_left(sizes, nodes)]

    def empty(self, rows: int = 1) -> np.ndarray:
        """Buffers without a node, `[rows, width]` int32."""
        found = np.zeros((rows, self.width), np.int32)
        for position, (start, capacity) in enumerate(
            zip(self.offsets, self.capacities, strict=False)
        ):
            fields = found[:, start : start + len(FIELDS) * capacity].reshape(rows, -1, capacity)
            fields[:, FIELDS.index("choice")] = -1
            fields[:, FIELDS.index("slot")] = self.slots[position] + np.arange(capacity)
        found[:, self.leaves + 1 :] = self.candidates + np.arange(self.capacities[-1])
        return found

    def put(self, row: np.ndarray, position: int, **values: Sequence[int]) -> None:
        """Write a level's nodes into a row of `empty`."""
        start, capacity = self.offsets[position], self.capacities[position]
        for name, given in values.items():
            first = start + FIELDS.index(name) * capacity
            row[first : first + len(given)] = given


class NodeTables:
    """The static buffers' content for every segment of a plan, on the device.

    Args:
        plan: of the candidates.
        packing: of the supernet.
        device: where the steps run.
        by_choice: the moments are those of (block, choice), and not of each node.

    Attributes:
        segments: in depth-first order; the table's rows follow the stem's.
        table: `[1 + S, width]` int32.
    """

    def __init__(
        self, plan: Plan, packing: NodePacking, device: torch.device, *, by_choice: bool = False
    ) -> None:
        self.plan, self.packing = plan, packing
        self.segments = list(_depth_first(plan.roots))
        self._row = {id(segment): 1 + i for i, segment in enumerate(self.segments)}
        self._sizes = {id(segment): self._sizes_of(segment) for segment in self.segments}
        table = packing.empty(1 + len(self.segments))
        packing.put(table[0], 0, parent=[0], choice=[0], slot=[0], weight=[1])
        for row, segment in zip(table[1:], self.segments, strict=True):
            self._fill(row, segment, by_choice)
        self.table = torch.from_numpy(table).to(device)

    def _fill(self, row: np.ndarray, segment: Segment, by_choice: bool) -> None:
        for index, level in enumerate(range(segment.start, segment.stop)):
            choice = np.asarray(segment.choice[index])
            first = segment.first_node[index]
            nodes = np.arange(first, first + len(choice))
            self.packing.put(
                row,
                1 + level,
                parent=segment.parent[index],
                choice=choice,
                slot=choice if by_choice else nodes,
                weight=self.plan.weights[level][nodes],
            )
        if not segment.children:
            leaves = np.arange(segment.first_leaf, segment.stop_leaf)
            self.packing.put(
                row,
                len(self.packing.capacities) - 1,
                parent=leaves - segment.first_leaf,
                choice=np.zeros_like(leaves),
                slot=np.zeros_like(leaves) if by_choice else leaves,
                weight=self.plan.counts[leaves],
            )
            first = self.packing.leaves
            row[first] = len(leaves)
            row[first + 1 : first + 1 + len(leaves)] = leaves

    def select(self, flat: Tensor, segment: Segment | None) -> None:
        """Copy a segment's part into the static buffers; the stem's where there is no segment."""
        offsets = self.packing.offsets
        if segment is None:
            row, start, stop = 0, 0, offsets[1]
        else:
            row, start = self._row[id(segment)], offsets[1 + segment.start]
            stop = offsets[1 + segment.stop] if segment.children else self.packing.width
        flat[start:stop].copy_(self.table[row, start:stop])

    def sizes(self, segment: Segment) -> list[int]:
        """The bucket of each level of a segment, and of its leaves where it has any."""
        return self._sizes[id(segment)]

    def _sizes_of(self, segment: Segment) -> list[int]:
        counts = [len(choice) for choice in segment.choice]
        if not segment.children:
            counts.append(segment.stop_leaf - segment.first_leaf)
        return [self.packing.bucket(p, count) for p, count in enumerate(counts, 1 + segment.start)]

    def shape(self) -> list[tuple]:
        """What populations with the same steps share: each segment's levels and buckets."""
        return [
            (segment.start, segment.stop, bool(segment.children), tuple(self.sizes(segment)))
            for segment in self.segments
        ]


def _depth_first(segments: Sequence[Segment]):
    for segment in segments:
        yield segment
        yield from _depth_first(segment.children)
