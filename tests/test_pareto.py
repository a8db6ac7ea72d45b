"""Non-dominated ranks and crowding distances, beside their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from fastshift import pareto
from fastshift._population_ref import crowding_distance_ref, non_dominated_sort_ref

NAN, INF = np.nan, np.inf


def grids():
    """Tables with ties, equal rows, infinities and rows with a NaN."""
    generator = np.random.default_rng(0)
    for num_objectives in (1, 2, 3, 5):
        for num_rows, levels in ((1, 3), (2, 2), (40, 5), (60, 1000)):
            table = generator.integers(0, levels, (num_rows, num_objectives)).astype(float)
            yield table
            table = table.copy()
            table[generator.random(table.shape) < 0.05] = NAN
            table[generator.random(table.shape) < 0.05] = INF
            table[generator.random(table.shape) < 0.05] = -INF
            yield table


def test_fronts_of_a_table_worked_out_by_hand():
    table = [[1, 5], [2, 3], [4, 1], [2, 6], [4, 4], [5, 5], [1, 5], [NAN, 0]]
    assert pareto.non_dominated_sort(table).tolist() == [0, 0, 0, 1, 1, 2, 0, 3]
    assert pareto.pareto_front(table).tolist() == [0, 1, 2, 6]


def test_crowding_of_a_front_worked_out_by_hand():
    table = [[0, 10], [4, 2], [10, 0], [1, 6]]
    ranks = pareto.non_dominated_sort(table)
    assert ranks.tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(
        pareto.crowding_distance(table, ranks), [INF, 0.9 + 0.6, INF, 0.4 + 0.8], rtol=1e-15
    )


@pytest.mark.parametrize("table", list(grids()), ids=lambda table: f"{table.shape}")
def test_compiled_ranks_and_distances_equal_their_twins(table):
    ranks = pareto.non_dominated_sort(table)
    np.testing.assert_array_equal(ranks, non_dominated_sort_ref(table))
    distances = pareto.crowding_distance(table, ranks)
    np.testing.assert_array_equal(distances, crowding_distance_ref(table, ranks))
    assert not np.isnan(distances).any()


def test_a_row_with_a_nan_ranks_last_and_is_on_no_front():
    table = [[NAN, 0], [3, 3], [2, 2], [0, NAN]]
    assert pareto.non_dominated_sort(table).tolist() == [2, 1, 0, 2]
    assert pareto.pareto_front(table).tolist() == [2]
    assert pareto.pareto_front([[NAN, 1]]).tolist() == []
    assert pareto.crowding_distance(table, [2, 1, 0, 2]).tolist() == [0, INF, INF, 0]


def test_ranks_do_not_depend_on_the_order_of_rows():
    generator = np.random.default_rng(1)
    table = generator.integers(0, 12, (80, 3)).astype(float)
    order = generator.permutation(80)
    np.testing.assert_array_equal(
        pareto.non_dominated_sort(table)[order], pareto.non_dominated_sort(table[order])
    )


def test_an_empty_table_has_no_front():
    table = np.empty((0, 2))
    assert pareto.non_dominated_sort(table).shape == (0,)
    assert pareto.pareto_front(table).shape == (0,)
    assert pareto.crowding_distance(table, []).shape == (0,)


def test_a_table_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"objectives must have shape \[P, M\]"):
        pareto.non_dominated_sort([1.0, 2.0])
    with pytest.raises(ValueError, match="ranks: 2 values expected, got 1"):
        pareto.crowding_distance([[1.0], [2.0]], [0])
