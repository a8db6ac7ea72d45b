"""The population core in plain Python: read it, test the compiled one against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["build_trie_ref"]


def build_trie_ref(
    archs: Sequence[Sequence[int]], subtrie_size: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Lay out the prefix tree of sorted architectures and cut it into segments.

    Level `l` has one node for each distinct prefix of length `l + 1`. A segment is a run of levels
    of a run of candidates: either whole subtrees with at most `subtrie_size` candidates together
    (down to the last level), or a trunk, the unbranched head of a subtree that has more.

    Args:
        archs: choices, `[P, L]`, strictly increasing in lexicographic order.
        subtrie_size: candidates a segment of whole subtrees may hold, at least 1.

    Returns:
        `parent` and `choice`, for each level the nodes' `[M_l]` int32; `leaves`, `[M_l + 1]`
        int32, node `m` owning the candidates `leaves[m]` to `leaves[m + 1]`; `segments`, `[S, 5]`
        int32: parent segment (or -1), start level, stop level, first and stop candidate.

    Raises:
        ValueError: no rows, rows that are not strictly increasing, `subtrie_size` below 1.
    """
    rows = [tuple(int(choice) for choice in arch) for arch in archs]
    if not rows or not rows[0]:
        raise ValueError(f"archs: at least one row and one column expected, got {rows!r}")
    if subtrie_size < 1:
        raise ValueError(f"subtrie_size: at least 1 expected, got {subtrie_size}")
    for i in range(1, len(rows)):
        if not rows[i - 1] < rows[i]:
            raise ValueError(
                "archs: strictly increasing rows (lexicographic) expected, "
                f"row {i} does not follow row {i - 1}"
            )
    num_blocks = len(rows[0])
    parents, choices, leaves = [], [], []
    above = {(): 0}
    for level in range(num_blocks):
        starts: dict[tuple[int, ...], int] = {}  # prefix -> first candidate
        for i, row in enumerate(rows):
            starts.setdefault(row[: level + 1], i)
        parents.append(np.array([above[prefix[:-1]] for prefix in starts], np.int32))
        choices.append(np.array([prefix[-1] for prefix in starts], np.int32))
        leaves.append(np.array([*starts.values(), len(rows)], np.int32))
        above = {prefix: node for node, prefix in enumerate(starts)}

    segments: list[tuple[int, int, int, int, int]] = []

    def cut(parent: int, level: int, first: int, stop: int) -> None:
        bounds = [i for i in leaves[level].tolist() if first <= i <= stop]
        packed = first  # the open group is [packed, child)
        for child, end in zip(bounds[:-1], bounds[1:], strict=True):
            is_large = end - child > subtrie_size
            if child > packed and (is_large or end - packed > subtrie_size):
                segments.append((parent, level, num_blocks, packed, child))
                packed = child
            if is_large:
                branch = next(
                    below
                    for below in range(level + 1, num_blocks)
                    if rows[child][below] != rows[end - 1][below]
                )
                segments.append((parent, level, branch, child, end))
                cut(len(segments) - 1, branch, child, end)
                packed = end
        if stop > packed:
            segments.append((parent, level, num_blocks, packed, stop))

    cut(-1, 0, 0, len(rows))
    return parents, choices, leaves, np.array(segments, np.int32).reshape(-1, 5)
