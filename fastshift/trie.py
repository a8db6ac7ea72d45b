"""The plan of a population: candidates that share a prefix of choices share its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastshift._native import core

__all__ = ["Plan", "Segment"]


@dataclass(frozen=True)
class Segment:
    """A part of the trie that is computed in one go, from one row that is already there.

    A trunk (`children` not empty) is a chain of single nodes down to where the trie branches; a
    leaf segment holds the whole sub-tries of some siblings, level by level down to the head.

    Attributes:
        start, stop: its levels, `[start, stop)`.
        first_leaf, stop_leaf: its candidates, `[first_leaf, stop_leaf)`, in the plan's order.
        first_node: of each level, the plan's index of its first node.
        parent: of each level, the position in the level above (within the segment) of each node's
            parent.
        choice: of each level, the candidate op of each node.
        children: segments that start from this trunk's row.
    """

    start: int
    stop: int
    first_leaf: int
    stop_leaf: int
    first_node: tuple[int, ...]
    parent: tuple[tuple[int, ...], ...]
    choice: tuple[tuple[int, ...], ...]
    children: list[Segment] = field(default_factory=list)


class Plan:
    """The trie over a population, cut into sub-tries.

    Each distinct candidate is a leaf; each node is computed once. The cut bounds memory: at most
    `subtrie_size` paths are held at a level, and one row per level above. It changes no result but
    the order of sums.

    Args:
        archs: choices, `[P, L]` uint8, in any order; equal rows become one leaf.
        subtrie_size: leaves of a sub-trie, at least 1.

    Attributes:
        archs: the distinct candidates in lexicographic order, `[D, L]`.
        inverse: leaf of each row given, `[P]`.
        counts: rows given for each leaf, `[D]`.
        weights: of each level, the number of rows given below each node, int64 `[M_l]`.
        roots: the segments that start from the stem's output.
        subtrie_size: as given.

    Raises:
        ValueError: `archs` is empty, or `subtrie_size` is below 1.
    """

    def __init__(self, archs: np.ndarray, subtrie_size: int = 8) -> None:
        archs = np.ascontiguousarray(archs, np.uint8)
        if archs.ndim != 2 or archs.shape[0] == 0:
            raise ValueError(f"archs: shape {archs.shape}; expected [P, L] with at least one row")
        self.subtrie_size = int(subtrie_size)
        self.archs, self.inverse, self.counts = np.unique(
            archs, axis=0, return_inverse=True, return_counts=True
        )
        self.inverse = self.inverse.reshape(-1)
        self.archs = np.ascontiguousarray(self.archs)
        self.parent, self.choice, self.offsets, table = core.build_trie(
            self.archs, self.subtrie_size
        )
        before = np.concatenate(([0], np.cumsum(self.counts)))
        self.weights = [before[o[1:]] - before[o[:-1]] for o in self.offsets]
        self.roots: list[Segment] = []
        made: list[Segment] = []
        for owner, start, stop, first, last in table.tolist():
            segment = self._segment(start, stop, first, last)
            made.append(segment)
            (self.roots if owner < 0 else made[owner].children).append(segment)

    def _segment(self, start: int, stop: int, first: int, last: int) -> Segment:
        nodes, parents, choices = [], [], []
        above = 0
        for level in range(start, stop):
            offsets = self.offsets[level]
            low = int(np.searchsorted(offsets, first))
            high = int(np.searchsorted(offsets, last))
            if level == start:
                parents.append((0,) * (high - low))
            else:
                parents.append(tuple((self.parent[level][low:high] - above).tolist()))
            choices.append(tuple(self.choice[level][low:high].tolist()))
            nodes.append(low)
            above = low
        return Segment(start, stop, first, last, tuple(nodes), tuple(parents), tuple(choices))

    @property
    def num_leaves(self) -> int:
        """Distinct candidates."""
        return len(self.archs)

    @property
    def num_rows(self) -> int:
        """Rows the plan was made from, repeats included."""
        return len(self.inverse)

    def sharing(self, cost_table: np.ndarray | None = None) -> float:
        """How much the trie saves: the cost of all paths' blocks over the cost of the nodes.

        Args:
            cost_table: `[L, O]`, the FLOPs table say; without it, or where all costs are zero,
                nodes count alike.

        Returns:
            At least 1.
        """
        if cost_table is None or not np.any(cost_table):
            cost_table = np.ones((len(self.choice), 256))
        paths = nodes = 0.0
        for level, (choice, weight) in enumerate(zip(self.choice, self.weights, strict=True)):
            cost = np.asarray(cost_table[level], float)[choice]
            nodes += float(cost.sum())
            paths += float((cost * weight).sum())
        return paths / nodes if nodes else 1.0
