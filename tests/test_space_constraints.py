"""Constraints on the costs of a search space, and spaces of modules, which have only tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
from space_cases import make_space

from fastshift.errors import ConstraintError, SpaceError
from fastshift.space import Constraint, ModuleSpace, SearchSpace, parse_constraints


@pytest.fixture(scope="module")
def space():
    return make_space()


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
