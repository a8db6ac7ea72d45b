"""Search spaces: architectures in and out, additive costs, constraints, descriptions."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastshift import ops
from fastshift.errors import ArchError, ConstraintError, SpaceError
from fastshift.ops import Head, Unit
from fastshift.space import Constraint, ModuleSpace, SearchSpace, parse_constraints


def make_space(choices=(2, 3, 1, 4), *, num_classes=5, recipe=None, **changes):
    """Return a space of wide and narrow blocks, in which costs differ between all choices."""
    blocks = []
    for count in choices:
        candidates = [ops.identity(8), *(ops.conv(8, 8, kernel, 1) for kernel in range(1, 40, 2))]
        blocks.append(candidates[:count])
    arguments = {
        "stem": [Unit("dense", 3, 8, 3, 2)],
        "blocks": blocks,
        "head": Head(8, (), num_classes),
        "in_channels": 3,
        "image_size": 8,
        "recipe": recipe,
    }
    return SearchSpace("mixed", **(arguments | changes))


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


# Spaces of modules


def make_module_space(**changes):
    arguments = {
        "num_choices": [2, 3],
        "flops_table": [[0, 10], [1, 2, 3]],
        "params_table": [[0, 5], [1, 2, 3]],
        "fixed_flops": 100,
        "fixed_params": 50,
        "identities": [[True, False], [False, False, False]],
    }
    return ModuleSpace("released", **(arguments | changes))


def test_a_space_of_modules_needs_only_tables():
    space = make_module_space(in_channels=3, image_size=8, num_classes=10)
    assert space.size == 6
    assert space.flops(["12", "00"]).tolist() == [113, 101]
    assert space.params("12").tolist() == [58]
    assert space.identities.tolist() == [[True, False, False], [False, False, False]]
    assert space.labels == (("0", "1"), ("0", "1", "2"))
    assert (space.blocks, space.stem, space.head, space.recipe) == ((), (), None, None)
    assert json.loads(json.dumps(space.to_dict())) == space.to_dict()
    assert space.describe()["costs"]["flops"] == {"smallest": 101, "largest": 113}
    assert parse_constraints(space, {"flops": "100%"}) == (Constraint("flops", None, 113.0),)


def test_fingerprints_of_module_spaces_follow_their_tables():
    space, other = make_module_space(), make_module_space(params_table=[[0, 5], [1, 2, 4]])
    assert space.fingerprint() == make_module_space().fingerprint() != other.fingerprint()
    assert space.trunk_fingerprint() == make_module_space(num_classes=3).trunk_fingerprint()
    assert space.trunk_fingerprint() != other.trunk_fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_choices": []}, "has no choice blocks"),
        ({"num_choices": [2, 0]}, "num_choices of block 1 must be positive, got 0"),
        ({"num_choices": [2, 4]}, "row 1 has 3 entries, expected 4 choices"),
        ({"labels": [["a"], ["b", "c", "d"]]}, r"labels must name \[2, 3\] choices"),
        ({"identities": [[True, False]]}, "identities: expected 2 rows"),
    ],
)
def test_module_tables_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(SpaceError, match=message):
        make_module_space(**changes)


def test_a_module_space_cannot_be_made_again_from_json():
    with pytest.raises(SpaceError, match="space description cannot be read"):
        SearchSpace.from_dict(make_module_space().to_dict())


# Constraints

LARGEST = make_space().largest("flops")


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("330M", None, 330e6),
        ("1.5G", None, 1.5e9),
        ("30k", None, 30e3),
        ("30000", None, 30e3),
        ("3e4", None, 30e3),
        ("3.e4", None, 30e3),
        (".04M", None, 40e3),
        ("290.3M", None, 290300000.0),
        (" 30k ", None, 30e3),
        ("20k:30k", 20e3, 30e3),
        ("20k : 30k", 20e3, 30e3),
        (":30k", None, 30e3),
        ("20k:", 20e3, None),
        ("0:30k", 0.0, 30e3),
        ("100%", None, float(LARGEST)),
        ("60%", None, LARGEST * 0.6),
        ("40%:60%", LARGEST * 0.4, LARGEST * 0.6),
        ("12.5%:", LARGEST * 0.125, None),
        ("20k:60%", 20e3, LARGEST * 0.6),
        (30000, None, 30e3),
        (3.3e8, None, 3.3e8),
        (np.int64(30000), None, 30e3),
        (np.float32(30000), None, 30e3),
        ((20e3, 30e3), 20e3, 30e3),
        ([20e3, 30e3], 20e3, 30e3),
        ((None, 30e3), None, 30e3),
        ((20e3, None), 20e3, None),
        (("40%", "60%"), LARGEST * 0.4, LARGEST * 0.6),
        (("20k", 30000), 20e3, 30e3),
        ((25e3, 25e3), 25e3, 25e3),
    ],
    ids=repr,
)
def test_constraints_are_read_as_people_write_them(space, value, low, high):
    (constraint,) = parse_constraints(space, {"flops": value})
    assert constraint.metric == "flops"
    assert constraint.low == (low if low is None else pytest.approx(low, rel=1e-12))
    assert constraint.high == (high if high is None else pytest.approx(high, rel=1e-12))


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        ":",
        " : ",
        "M",
        "%",
        ".",
        "many",
        "330 M",
        "330m",
        "330K",
        "330T",
        "330MM",
        "33%M",
        "3,3M",
        "3_0M",
        "0x10",
        "٣M",
        "1e",
        "1e9999",
        "1e400",
        "9" * 400,
        "nan",
        "inf",
        "-5k",
        "+5k",
        "5k:-1",
        "120%",
        "20k:30k:40k",
        "30k:20k",
        "60%:40%",
        "20k-30k",
        "20k..30k",
        -1,
        -0.5,
        float("nan"),
        float("inf"),
        True,
        False,
        3j,
        b"330M",
        {"high": 3},
        {3},
        object,
        (),
        (1,),
        (1, 2, 3),
        (None, None),
        (30e3, 20e3),
        (True, 30e3),
        ((1, 2), 3),
        ("20k:30k", None),
        ("", 30e3),
        (-1, 30e3),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_malformed_constraint_is_refused_with_what_was_given(space, value):
    with pytest.raises(ConstraintError, match="constraint flops=") as caught:
        parse_constraints(space, {"flops": value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("constraints", ["330M", 5, ["330M"], [("flops", 3)], object()])
def test_constraints_must_map_metrics_to_bounds(space, constraints):
    with pytest.raises(ConstraintError, match="constraints must map metrics to bounds"):
        parse_constraints(space, constraints)


def test_an_unknown_metric_is_refused_with_the_known_ones(space):
    with pytest.raises(ConstraintError, match="unknown constraint 'flop': expected one of flops"):
        parse_constraints(space, {"flop": "60%"})
    with pytest.raises(ConstraintError, match="unknown constraint 'latency_ms'"):
        parse_constraints(space, [Constraint("latency_ms", None, 3.0)])


def test_a_constraint_no_architecture_can_meet_names_the_cheapest_and_the_dearest(space):
    smallest, largest = space.smallest("flops"), space.largest("flops")
    for value in ((None, smallest - 1), (largest + 1, None)):
        with pytest.raises(ConstraintError) as caught:
            parse_constraints(space, {"flops": value})
        message = str(caught.value)
        assert f"cheapest, 0000, has {smallest}" in message
        assert f"dearest, 1203, has {largest}" in message
    for value in ((None, smallest), (largest, None), "100%"):
        assert parse_constraints(space, {"flops": value})


def test_none_means_no_constraint_and_several_keep_their_order(space):
    assert parse_constraints(space, None) == parse_constraints(space, {}) == ()
    assert parse_constraints(space, {"flops": None}) == ()
    resolved = parse_constraints(space, {"params": "100%", "flops": "20k:", "x": None})
    assert [constraint.metric for constraint in resolved] == ["params", "flops"]
    assert parse_constraints(space, resolved) == resolved


def test_costs_added_later_can_be_constrained():
    space = make_space()
    space.add_cost("latency_ms", np.full((4, 4), 0.5), fixed=1.0)
    assert parse_constraints(space, {"latency_ms": "100%"}) == (
        Constraint("latency_ms", None, 3.0),
    )


def test_both_bounds_of_a_constraint_are_inclusive():
    costs = np.array([1, 2, 3, 4, 5])
    assert Constraint("flops", 2, 4).admits(costs).tolist() == [False, True, True, True, False]
    assert Constraint("flops", None, 2).admits(costs).sum() == 2
    assert Constraint("flops", 4, None).admits(costs).sum() == 2
    assert Constraint("flops").admits(costs).all()


def test_costs_of_many_architectures_need_no_loop_over_them():
    space = make_space((4,) * 20)
    archs = np.random.default_rng(0).integers(0, 4, (100_000, 20), dtype=np.uint8)
    expected = space.flops_table[np.arange(20), archs].sum(axis=1) + space.fixed_flops
    np.testing.assert_array_equal(space.flops(archs), expected)
