"""Search spaces: architectures in and out, additive costs, descriptions."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from space_cases import make_space

from fastshift import ops
from fastshift.errors import ArchError, SpaceError
from fastshift.ops import Head, Unit
from fastshift.space import SearchSpace


@pytest.fixture(scope="module")
def space():
    return make_space()


def every_arch(space):
    return list(product(*map(range, space.num_choices.tolist())))


# Tables and costs


def test_tables_are_padded_with_zeros_to_the_widest_block(space):
    assert space.num_blocks == 4
    assert space.num_choices.tolist() == [2, 3, 1, 4]
    assert space.num_choices.dtype == np.int32
    assert space.size == 24
    assert isinstance(space.size, int)
    assert space.flops_table.shape == space.params_table.shape == space.identities.shape == (4, 4)
    assert space.flops_table.dtype == space.params_table.dtype == np.int64
    assert space.identities.dtype == np.bool_
    for block, count in enumerate(space.num_choices):
        assert not space.flops_table[block, count:].any()
        assert not space.identities[block, count:].any()
    assert space.identities[:, 0].all()
    assert space.identities.sum() == 4


def test_costs_of_an_arch_are_those_of_its_ops_and_of_stem_and_head(space):
    archs = every_arch(space)
    for archs_form in (archs, np.array(archs), [space.format(arch) for arch in archs]):
        flops, params = space.flops(archs_form), space.params(archs_form)
        assert flops.dtype == params.dtype == np.int64
    for arch, flop, param in zip(archs, flops, params, strict=True):
        chosen = [space.blocks[block][choice] for block, choice in enumerate(arch)]
        fixed_flops = space.stem[0].flops(8) + space.head.flops(4)
        assert flop == fixed_flops + sum(op.flops(4) for op in chosen)
        fixed_params = space.stem[0].params() + space.head.params()
        assert param == fixed_params + sum(op.params() for op in chosen)


def test_resolution_falls_along_the_chain():
    blocks = [[ops.conv(8, 8, 3, 2)], [ops.conv(8, 16, 3, 2)]]
    space = make_space(blocks=blocks, head=Head(16, (Unit("dense", 16, 16, 3),), 2), image_size=9)
    assert space.flops_table.tolist() == [[8 * 8 * 9 * 9], [8 * 16 * 9 * 4]]  # maps 9, 5, 3, 2
    assert space.fixed_flops == 3 * 8 * 9 * 25 + 16 * 16 * 9 * 4 + 16 * 2


def test_without_affine_norms_parameters_are_the_weights_alone():
    plain, affine = make_space(affine=False), make_space()
    assert plain.params("0000").item() == 3 * 8 * 9 + 9 * 5
    assert affine.params("0000").item() == plain.params("0000").item() + 16
    assert affine.params("1000").item() == plain.params("1000").item() + 32


def test_extremes_are_those_of_the_whole_space(space):
    for metric in ("flops", "params"):
        costs = space.cost(metric, every_arch(space))
        assert space.smallest(metric) == costs.min()
        assert space.largest(metric) == costs.max()
    assert space.format(space.cheapest("flops")) == "0000"
    assert space.format(space.dearest("flops")) == "1203"


def test_a_cost_of_ones_own_may_be_real_and_ragged(space):
    table = [[0.5, 1.5], [0.25, 0.5, 0.75], [2], [1, 2, 3, 4]]
    space = make_space()
    space.add_cost("latency_ms", table, fixed=0.125)
    assert space.cost("latency_ms", ["1203", "0000"]).tolist() == [8.375, 3.875]
    assert space.cost("latency_ms", "0000").dtype == np.float64
    assert (space.smallest("latency_ms"), space.largest("latency_ms")) == (3.875, 8.375)
    space.add_cost("reads", np.ones((4, 4), dtype=np.int32), fixed=2)
    assert space.cost("reads", "1203").dtype == np.int64
    assert space.cost("reads", "1203").tolist() == [6]
    assert space.costs["reads"][0].tolist()[2] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("table", "fixed", "message"),
    [
        (np.ones((3, 4)), 0, "expected 4 rows, one a choice block, got 3"),
        (np.ones((4, 3)), 0, "row 0 has 3 entries, expected 2 choices"),
        ([[1, 1], [1, 1], [1], [1] * 4], 0, "row 1 has 2 entries, expected 3 choices"),
        (np.full((4, 4), np.nan), 0, "every entry must be finite"),
        (np.ones((4, 4)), float("inf"), "every entry must be finite"),
        (-np.ones((4, 4)), 0, "no entry may be negative"),
        (np.ones((4, 4)), -1, "no entry may be negative"),
        (np.ones(4), 0, "expected one row of numbers a choice block"),
        ([["a"] * 4] * 4, 0, "the table must hold numbers"),
        ([[None] * 4] * 4, 0, "the table must hold numbers"),
        (np.full((4, 4), 2**61), 0, "does not fit in 64 bits"),
    ],
)
def test_a_cost_table_of_the_wrong_shape_or_with_unusable_entries_is_refused(
    space, table, fixed, message
):
    with pytest.raises(SpaceError, match=message):
        space.add_cost("latency_ms", table, fixed)
    assert "latency_ms" not in space.costs


def test_built_in_costs_cannot_be_replaced_and_unknown_ones_are_named(space):
    with pytest.raises(SpaceError, match="cost 'flops' follows from the description"):
        space.add_cost("flops", np.ones((4, 4)))
    with pytest.raises(SpaceError, match="unknown cost 'joules': expected one of flops, params"):
        space.cost("joules", "0000")
    with pytest.raises(SpaceError, match="unknown cost 'joules'"):
        space.largest("joules")


# Architectures


@pytest.mark.parametrize(
    "archs",
    [
        "1203",
        ["1203"],
        [" 1203\n"],
        [(1, 2, 0, 3)],
        (1, 2, 0, 3),
        [1, 2, 0, 3],
        [np.array([1, 2, 0, 3], dtype=np.uint8)],
        np.array([1, 2, 0, 3]),
        np.array([[1, 2, 0, 3]], dtype=np.int32),
        np.array(["1203"]),
        np.array([[1, 2, 0, 3]], dtype=object),
        np.array([[1, 2, 0, 3]], dtype=np.uint64),
        pytest.param((row for row in ["1203"]), id="generator"),
    ],
    ids=repr,
)
def test_architectures_come_in_many_forms_and_leave_as_rows_of_bytes(space, archs):
    rows = space.as_archs(archs)
    assert rows.dtype == np.uint8
    assert rows.flags.c_contiguous
    assert rows.tolist() == [[1, 2, 0, 3]]


def test_rows_are_a_copy_whatever_their_layout(space):
    archs = np.asfortranarray(np.zeros((3, 4), dtype=np.uint8))
    rows = space.as_archs(archs)
    rows[0, 0] = 1
    assert archs[0, 0] == 0
    assert rows.flags.c_contiguous
    contiguous = space.as_archs(rows)
    contiguous[1, 0] = 1
    assert rows[1, 0] == 0


def test_torch_tensors_are_architectures_too(space):
    torch = pytest.importorskip("torch")
    assert space.as_archs(torch.tensor([[1, 2, 0, 3]])).tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize("archs", [[], (), np.empty((0, 4), dtype=np.int64)])
def test_no_architectures_are_an_empty_population(space, archs):
    assert space.as_archs(archs).shape == (0, 4)
    assert space.flops(archs).shape == (0,)
    assert space.format_all(archs) == []


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("120", "arch '120': 3 choices, expected 4"),
        ("", "arch '': 0 choices, expected 4"),
        ("1204", "choice 4 of block 3 is out of range; expected 0 to 3"),
        ("12a3", "'a' is not a choice; expected digits"),
        ("1-03", "'-' is not a choice"),
        ("1.203", r"'\.' is not a choice"),
        ("120²", "'²' is not a choice"),
        (["0000", "1303"], "archs row 1: arch '1303': choice 3 of block 1 is out of range"),
        (["0000", "000"], "archs row 1: arch '000': 3 choices"),
        ([(0, 0, 0, 0), (0, 0, 1, 0)], "archs row 1: choice 1 of block 2 is out of range"),
        ([(0, 0, 0, 0), (0, 0, 0)], r"archs row 1: shape \(3,\), expected 4 choices"),
        ([(0, 0, 0, 0), (0, 0, 0, 1.0)], r"archs row 1: \(0, 0, 0, 1.0\) are not integers"),
        ([(0, 0, 0, 0), (True,) * 4], "archs row 1"),
        ([(0, 0, 0, None)], "archs row 0"),
        ([(0, 0, 0, (1, 2))], "archs row 0"),
        ([(0, 0, 0, 10**30)], "archs row 0"),
        ([(0, 0, 0, 2**40)], "choice 1099511627776 of block 3"),
        (np.array([[0, 0, 0, 0], [0, -1, 0, 0]]), "row 1: choice -1 of block 1 is out of range"),
        (np.array([[0, 0, 0, 256]]), "row 0: choice 256 of block 3"),
        (np.zeros((2, 5), dtype=np.uint8), r"archs have shape \(2, 5\), expected \[P, 4\]"),
        (np.zeros((1, 2, 4), dtype=np.uint8), r"archs have shape \(1, 2, 4\)"),
        (np.zeros(3, dtype=np.uint8), r"archs have shape \(1, 3\)"),
        (np.uint8(3), r"archs have shape \(\)"),
        (np.array([[0, 0, 0, 0.5]]), r"must be integers, got float64 \(row 0: 0.5\)"),
        (np.zeros((1, 4)), "must be integers, got float64"),
        (np.zeros((1, 4), dtype=bool), "must be integers, got bool"),
        (7, "archs must be rows of choices, got 7"),
        (None, "archs must be rows of choices, got None"),
        (b"0000", "archs row 0: choice 48"),
    ],
    ids=repr,
)
def test_what_is_no_architecture_is_refused_with_row_and_value(space, archs, message):
    with pytest.raises(ArchError, match=message):
        space.as_archs(archs)


def test_format_takes_one_architecture_and_parse_one_string(space):
    assert space.format(np.array([1, 2, 0, 3])) == "1203"
    with pytest.raises(ArchError, match="format takes one architecture, got 2"):
        space.format(["0000", "0001"])
    with pytest.raises(ArchError, match="arch must be a string, got 5"):
        space.parse(5)


def test_choices_of_ten_and_more_are_separated_by_dots():
    space = make_space((2, 12, 3))
    assert space.format_all([(1, 11, 2), (0, 3, 0)]) == ["1.11.2", "0.3.0"]
    assert space.parse("1.11.2").tolist() == [1, 11, 2]
    for text in ("1112", "1.11", "1..2", "1.12.0", "1.011.2", "1.-1.2", "1.11.2.", ".1.11.2"):
        with pytest.raises(ArchError):
            space.parse(text)


def test_ten_choices_still_are_digits():
    space = make_space((10, 10))
    assert space.format((9, 0)) == "90"
    assert space.parse("90").tolist() == [9, 0]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), is_dotted=st.booleans())
def test_format_and_parse_are_inverse(data, is_dotted):
    space = make_space((2, 14 if is_dotted else 3, 1, 4))
    rows = st.tuples(*(st.integers(0, count - 1) for count in space.num_choices.tolist()))
    archs = data.draw(st.lists(rows, max_size=5))
    texts = space.format_all(archs)
    assert space.as_archs(texts).tolist() == [list(arch) for arch in archs]
    assert [space.parse(text).tolist() for text in texts] == [list(arch) for arch in archs]


# Descriptions


def test_blocks_must_fit_together():
    conv, wide, down = ops.conv(8, 8, 3, 1), ops.conv(8, 16, 3, 1), ops.conv(8, 8, 3, 2)
    cases = [
        ({"blocks": []}, "has no choice blocks"),
        ({"blocks": [[conv], []]}, "choice block 1 has no candidate op"),
        ({"blocks": [[conv, wide]]}, r"choice block 0: choice 1 \(conv_k3\) has .* \(8, 16, 1\)"),
        ({"blocks": [[conv, down]]}, r"choice block 0: choice 1 \(conv_k3\) has .* \(8, 8, 2\)"),
        ({"blocks": [[wide], [conv]]}, r"choice block 1: .* expected \(16, 8, 1\)"),
        ({"blocks": [[wide]]}, "head takes 8 channels, 16 reach it"),
        ({"blocks": [["conv"]]}, "choice block 0: choice 0 must be an Op, got 'conv'"),
        ({"blocks": [[conv] * 257]}, "choice block 0 has 257 choices, at most 256 are possible"),
        ({"stem": [Unit("dense", 1, 8, 3)]}, "stem: unit 0 takes 1 channels, 3 reach it"),
        ({"stem": [conv]}, "stem must hold units"),
        ({"head": None}, "head must be a Head, got None"),
        ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ({"image_size": 8.5}, "image_size must be a positive integer, got 8.5"),
    ]
    for changes, message in cases:
        with pytest.raises(SpaceError, match=message):
            make_space(**changes)


def test_256_choices_still_fit_a_byte():
    space = make_space(blocks=[[ops.identity(8)] * 256])
    assert space.as_archs([[255]]).tolist() == [[255]]
    assert space.format([255]) == "255"


def test_the_size_is_exact_however_large():
    space = make_space(blocks=[[ops.identity(8)] * 4] * 40)
    assert space.size == 4**40


def test_a_space_is_made_again_from_its_json(space):
    text = json.dumps(make_space(recipe={"name": "mixed", "kwargs": {}}).to_dict())
    again = SearchSpace.from_dict(json.loads(text))
    assert again.blocks == space.blocks
    assert (again.stem, again.head, again.affine) == (space.stem, space.head, space.affine)
    assert again.recipe == {"name": "mixed", "kwargs": {}}
    assert again.fingerprint() == space.fingerprint()


def test_numpy_integers_in_a_description_make_no_difference(space):
    again = make_space(in_channels=np.int64(3), image_size=np.int32(8), num_classes=np.int64(5))
    assert again.fingerprint() == space.fingerprint()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("blocks", [[{"name": "x"}]]),
        ("head", {"units": []}),
        ("stem", [{"kind": 1}]),
    ],
)
def test_a_description_that_cannot_be_read_is_refused(space, key, value):
    with pytest.raises(SpaceError, match="space"):
        SearchSpace.from_dict(space.to_dict() | {key: value})
    incomplete = {name: entry for name, entry in space.to_dict().items() if name != key}
    with pytest.raises(SpaceError, match="space"):
        SearchSpace.from_dict(incomplete)


def test_the_fingerprint_tells_spaces_apart_and_ignores_the_recipe(space):
    assert len(space.fingerprint()) == 64
    assert make_space(recipe={"name": "x", "kwargs": {}}).fingerprint() == space.fingerprint()
    others = [
        make_space((2, 3, 1, 3)),
        make_space(num_classes=6),
        make_space(image_size=9),
        make_space(affine=False),
        make_space(head=Head(8, (), 5, dropout=0.5)),
    ]
    prints = {other.fingerprint() for other in others}
    assert len(prints | {space.fingerprint()}) == len(others) + 1


def test_the_trunk_fingerprint_survives_a_change_of_classes_and_image_size(space):
    trunk = space.trunk_fingerprint()
    same = [make_space(num_classes=6), make_space(image_size=16), make_space(recipe={"name": "x"})]
    assert {other.trunk_fingerprint() for other in same} == {trunk}
    other_trunks = [make_space((2, 3, 1, 3)), make_space(affine=False)]
    assert trunk not in {other.trunk_fingerprint() for other in other_trunks}


def test_added_costs_do_not_change_the_fingerprint(space):
    timed = make_space()
    timed.add_cost("latency_ms", np.ones((4, 4)))
    assert timed.fingerprint() == space.fingerprint()


def test_describe_is_json_with_size_choices_and_cost_range(space):
    described = json.loads(json.dumps(space.describe()))
    assert described["size"] == 24
    assert described["num_choices"] == [2, 3, 1, 4]
    assert described["choices"][1] == ["identity", "conv_k1", "conv_k3"]
    assert described["costs"]["flops"] == {
        "smallest": space.smallest("flops"),
        "largest": space.largest("flops"),
    }
    assert "size=24" in repr(space)
