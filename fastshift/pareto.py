"""Pareto fronts of points `[P, M]`: ranks, the first front, crowding; objectives are minimised."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastshift._native import core as _core

__all__ = ["crowding_distance", "non_dominated_sort", "pareto_front"]


def non_dominated_sort(objectives: Any) -> np.ndarray:
    """Rank points by the front they are in; every objective is minimised.

    Args:
        objectives: `[P, M]`.

    Returns:
        `[P]` int32, 0 for the Pareto front; rows with a NaN share the rank after the last front.
    """
    return _core.non_dominated_sort(_as_table(objectives))


def pareto_front(objectives: Any) -> np.ndarray:
    """Return the rows of `objectives` `[P, M]` that no other dominates, `[F]` int64, ascending."""
    table = _as_table(objectives)
    is_first = _core.non_dominated_sort(table) == 0
    return np.flatnonzero(is_first & ~np.isnan(table).any(axis=1))


def crowding_distance(objectives: Any, ranks: Any) -> np.ndarray:
    """Measure how far apart a point's neighbours in its front are (NSGA-II, section III-B).

    Args:
        objectives: `[P, M]`.
        ranks: the front of each row, `[P]`, from `non_dominated_sort`.

    Returns:
        `[P]` float64; infinite at the ends of a front, 0 for rows with a NaN.
    """
    return _core.crowding_distance(_as_table(objectives), np.ascontiguousarray(ranks, np.int32))


def _as_table(objectives: Any) -> np.ndarray:
    table = np.ascontiguousarray(objectives, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"objectives must have shape [P, M], got {table.shape}")
    return table
