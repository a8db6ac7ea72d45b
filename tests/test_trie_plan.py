"""The trie plan of sorted architectures: nodes by level, and the cut into segments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastshift import _core
from fastshift._population_ref import build_trie_ref

BUILDERS = [pytest.param(_core.build_trie, id="cpp"), pytest.param(build_trie_ref, id="python")]


@st.composite
def sorted_archs(draw):
    num_blocks = draw(st.integers(1, 6))
    rows = st.tuples(*[st.integers(0, 2)] * num_blocks)
    return np.array(sorted(draw(st.sets(rows, min_size=1, max_size=40))), np.uint8)


def plan_of(builder, archs, subtrie_size):
    parent, choice, leaves, segments = builder(np.array(archs, np.uint8), subtrie_size)
    return [[level.tolist() for level in part] for part in (parent, choice, leaves)], segments


@pytest.mark.parametrize("builder", BUILDERS)
def test_nodes_of_a_plan_worked_out_by_hand(builder):
    archs = [[0, 0, 0], [0, 0, 2], [0, 1, 0], [2, 1, 1]]
    (parent, choice, leaves), segments = plan_of(builder, archs, 10)
    assert parent == [[0, 0], [0, 0, 1], [0, 0, 1, 2]]
    assert choice == [[0, 2], [0, 1, 1], [0, 2, 0, 1]]
    assert leaves == [[0, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert segments.tolist() == [[-1, 0, 3, 0, 4]]


@pytest.mark.parametrize("builder", BUILDERS)
def test_cut_of_a_plan_worked_out_by_hand(builder):
    archs = [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 1],
        [1, 0, 1, 0],
        [1, 0, 2, 0],
        [2, 0, 0, 0],
        [2, 1, 0, 0],
        [3, 0, 0, 0],
    ]
    _, segments = plan_of(builder, archs, 2)
    assert segments.tolist() == [
        [-1, 0, 4, 0, 1],  # 0...: the next would be too big
        [-1, 0, 2, 1, 5],  # the trunk 10: branches on level 2
        [1, 2, 4, 1, 3],  # 100.
        [1, 2, 4, 3, 5],  # 101. and 102. together
        [-1, 0, 4, 5, 7],  # 2...
        [-1, 0, 4, 7, 8],  # 3...: does not fit beside 2...
    ]


@settings(max_examples=150, deadline=None)
@given(sorted_archs(), st.integers(1, 45))
def test_compiled_plan_equals_its_twin(archs, subtrie_size):
    compiled = _core.build_trie(archs, subtrie_size)
    reference = build_trie_ref(archs, subtrie_size)
    for got, expected in zip(compiled[:3], reference[:3], strict=True):
        assert len(got) == len(expected) == archs.shape[1]
        for level, expected_level in zip(got, expected, strict=True):
            assert level.dtype == expected_level.dtype == np.int32
            np.testing.assert_array_equal(level, expected_level)
    np.testing.assert_array_equal(compiled[3], reference[3])


@settings(max_examples=100, deadline=None)
@given(sorted_archs())
def test_every_prefix_is_one_node_and_leads_back_to_its_architectures(archs):
    parent, choice, leaves, _ = _core.build_trie(archs, 4)
    for level in range(archs.shape[1]):
        prefixes = np.unique(archs[:, : level + 1], axis=0)
        assert len(choice[level]) == len(prefixes)
        for node, prefix in enumerate(prefixes):
            walk = node
            for above in range(level, -1, -1):
                assert choice[above][walk] == prefix[above]
                walk = parent[above][walk]
            rows = slice(leaves[level][node], leaves[level][node + 1])
            assert (archs[rows, : level + 1] == prefix).all()
        assert leaves[level][0] == 0
        assert leaves[level][-1] == len(archs)


@settings(max_examples=100, deadline=None)
@given(sorted_archs(), st.integers(1, 12))
def test_segments_own_every_node_once_and_keep_to_their_size(archs, subtrie_size):
    _, choice, leaves, segments = _core.build_trie(archs, subtrie_size)
    num_blocks = archs.shape[1]
    owners = [np.zeros(len(nodes), int) for nodes in choice]
    for index, (parent, start, stop, first, last) in enumerate(segments.tolist()):
        assert parent < index
        above_stop = 0 if parent < 0 else segments[parent][2]
        assert start == above_stop  # it hangs under the last level of its parent
        if parent >= 0:
            assert segments[parent][3] <= first < last <= segments[parent][4]
        for level in range(start, stop):
            owned = (leaves[level][:-1] >= first) & (leaves[level][1:] <= last)
            owners[level] += owned
            if stop < num_blocks:
                assert owned.sum() == 1  # a trunk does not branch
        if stop == num_blocks:
            assert last - first <= subtrie_size
        else:
            assert last - first > subtrie_size
    for counts in owners:
        np.testing.assert_array_equal(counts, 1)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(
    ("archs", "subtrie_size", "match"),
    [
        ([[0, 1], [0, 0]], 1, "row 1 does not follow row 0"),
        ([[0, 0], [0, 1], [0, 1]], 1, "row 2 does not follow row 1"),
        (np.zeros((0, 3)), 1, "at least one row"),
        ([[0, 1]], 0, "subtrie_size: at least 1 expected, got 0"),
    ],
)
def test_a_plan_of_unusable_rows_is_refused(builder, archs, subtrie_size, match):
    with pytest.raises(ValueError, match=match):
        builder(np.array(archs, np.uint8), subtrie_size)


def test_rows_of_another_type_are_refused_not_converted():
    with pytest.raises(TypeError):
        _core.build_trie(np.array([[0, 1]]), 1)
