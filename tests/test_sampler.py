"""Uniform samples under constraints: exact where costs are whole numbers, rejected elsewhere."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import chisquare

from fastshift import _core, spaces
from fastshift._population_ref import RngRef, SamplerRef
from fastshift.errors import CheckpointError, ConstraintError
from fastshift.sampler import FeasibleSampler, _bins
from fastshift.space import Constraint, ModuleSpace


class ReferenceSampler(FeasibleSampler):
    _sampler_type = SamplerRef


def table_space(flops, params=None, *, fixed=0):
    """Return a space of which only the costs matter."""
    return ModuleSpace(
        "table",
        num_choices=[len(row) for row in flops],
        flops_table=flops,
        params_table=flops if params is None else params,
        fixed_flops=fixed,
        fixed_params=0,
        identities=[[False] * len(row) for row in flops],
    )


def random_space(seed, num_choices=(3, 4, 1, 2, 3, 4), step=7):
    generator = np.random.default_rng(seed)
    flops, params = (
        [(step * generator.integers(0, 40, count)).tolist() for count in num_choices]
        for _ in range(2)
    )
    return table_space(flops, params, fixed=13)


def every_arch(space):
    return np.array(list(itertools.product(*map(range, space.num_choices))), np.uint8)


def feasible_archs(space, constraints):
    archs = every_arch(space)
    bounds = FeasibleSampler(space, constraints).constraints
    admitted = [bound.admits(space.cost(bound.metric, archs)) for bound in bounds]
    return archs[np.all(admitted, axis=0)] if admitted else archs


def p_value_of_uniform(samples, archs):
    """Return the chi-square p-value of `samples` being uniform over `archs`; none may be other."""
    index = {tuple(arch): i for i, arch in enumerate(archs.tolist())}
    counts = np.bincount([index[tuple(row)] for row in samples.tolist()], minlength=len(archs))
    return chisquare(counts).pvalue


def test_generator_gives_the_published_sequence():
    # xoshiro256** from the state 1, 2, 3, 4, by the authors' C code
    rng = RngRef.from_state([1, 2, 3, 4])
    assert [rng.next() for _ in range(4)] == [11520, 0, 1509978240, 1215971899390074240]


def test_generator_is_seeded_by_the_published_splitmix():
    # splitmix64 from 0, by the authors' C code
    assert RngRef(0).state == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
    ]
    for seed in (0, 1, 2**64 - 1):
        assert list(_core.seeded(seed)) == RngRef(seed).state


@pytest.mark.parametrize("n", [1, 2, 3, 5, 255, 2**31 + 1])
def test_bounded_draws_stay_in_range_and_reach_both_ends(n):
    rng = RngRef(3)
    draws = [rng.below(n) for _ in range(2000)]
    assert min(draws) >= 0
    assert max(draws) < n
    if n < 256:
        assert set(draws) == set(range(n))


@pytest.mark.parametrize(
    "constraints",
    [None, {"flops": "60%"}, {"flops": "55%:80%"}, {"flops": "70%:"}, {"params": "50%:60%"}],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_ranks_list_every_feasible_architecture_once_and_in_order(seed, constraints):
    space = random_space(seed)
    sampler = FeasibleSampler(space, constraints)
    expected = feasible_archs(space, constraints)
    assert sampler.count == len(expected)
    listed = sampler.core.unrank(np.arange(sampler.count, dtype=np.uint64))
    np.testing.assert_array_equal(listed, expected)
    with pytest.raises(IndexError, match="below the count"):
        sampler.core.unrank(np.array([sampler.count], np.uint64))


@pytest.mark.parametrize("constraints", [None, {"flops": "60%"}, {"flops": "57%:70%"}], ids=str)
def test_exact_samples_are_uniform_by_chi_square(constraints):
    space = random_space(1, num_choices=(3, 4, 1, 2, 3))
    sampler = FeasibleSampler(space, constraints, seed=5)
    archs = feasible_archs(space, constraints)
    assert 5 < len(archs) <= 72
    assert p_value_of_uniform(sampler.sample(200 * len(archs)), archs) > 1e-3
    assert sampler.acceptance_rate == 1.0


def real_space(seed):
    space = random_space(seed, num_choices=(3, 4, 1, 2, 3))
    generator = np.random.default_rng(seed)
    space.add_cost("latency", generator.uniform(0.5, 2.0, (5, 4)), fixed=0.25)
    return space


@pytest.mark.parametrize(
    "constraints",
    [
        {"latency": "80%"},
        {"latency": (5.0, 6.5)},
        {"flops": "75%", "params": "80%"},
        {"flops": "30%:75%", "latency": "40%:85%", "params": "90%"},
    ],
    ids=str,
)
def test_rejected_samples_are_uniform_by_chi_square(constraints):
    space = real_space(2)
    sampler = FeasibleSampler(space, constraints, seed=6)
    archs = feasible_archs(space, constraints)
    assert 3 < len(archs) < 72
    samples = sampler.sample(200 * len(archs))
    assert p_value_of_uniform(samples, archs) > 1e-3
    assert sampler.count is None
    np.testing.assert_allclose(
        sampler.acceptance_rate, len(archs) / sampler.core.count, rtol=0, atol=0.05
    )


def test_bins_of_a_real_cost_lose_nothing_and_reject_little():
    generator = np.random.default_rng(0)
    space = random_space(0, num_choices=(4,) * 7)
    space.add_cost("latency", generator.uniform(0.5, 2.0, (7, 4)))
    for wanted in ("70%", "55%:60%"):
        sampler = FeasibleSampler(space, {"latency": wanted}, seed=1)
        sampler.sample(2000)
        feasible = sampler.constraints[0].admits(space.cost("latency", every_arch(space))).sum()
        assert feasible <= sampler.core.count
        assert sampler.acceptance_rate > 0.97


def test_the_most_selective_constraint_is_the_one_sampled():
    space = random_space(3)
    alone = [FeasibleSampler(space, {m: "70%"}).count for m in ("flops", "params")]
    both = FeasibleSampler(space, {"flops": "70%", "params": "70%"})
    assert both.core.count == min(alone)
    assert both.count is None


def test_a_constraint_that_all_meet_leaves_the_other_exact():
    space = random_space(3)
    sampler = FeasibleSampler(space, {"flops": "100%", "params": "70%"})
    assert sampler.count == FeasibleSampler(space, {"params": "70%"}).count


@pytest.mark.parametrize("num_blocks", [31, 32, 33, 64, 200])
def test_counts_beyond_one_word_are_exact(num_blocks):
    space = table_space([[0, 1, 2, 3]] * num_blocks)
    assert FeasibleSampler(space).count == 4**num_blocks
    half = FeasibleSampler(space, {"flops": (None, 3 * num_blocks // 2)}, seed=1)
    ways = [1]
    for _ in range(num_blocks):
        ways = [sum(ways[max(0, i - 3) : i + 1]) for i in range(len(ways) + 3)]
    assert half.count == sum(ways[: 3 * num_blocks // 2 + 1])
    archs = half.sample(300)
    assert space.flops(archs).max() <= 3 * num_blocks // 2
    reference = ReferenceSampler(space, half.constraints, seed=1)
    np.testing.assert_array_equal(reference.sample(300), archs)


def ways_to_cost(rows):
    """Count the architectures of each total cost, in Python's integers."""
    ways = {0: 1}
    for row in rows:
        longer = {}
        for total, count in ways.items():
            for cost in row:
                longer[total + cost] = longer.get(total + cost, 0) + count
        ways = longer
    return ways


@pytest.mark.parametrize("num_blocks", [32, 40, 70, 150])
def test_choices_of_many_blocks_have_their_exact_shares(num_blocks):
    generator = np.random.default_rng(num_blocks)
    rows = generator.integers(0, 9, (num_blocks, 4)).tolist()
    limit = sum(map(sum, rows)) // 5  # below the mean, so that the cheap choices are favoured
    space = table_space(rows)
    sampler = FeasibleSampler(space, {"flops": limit}, seed=3)
    total = sum(count for cost, count in ways_to_cost(rows).items() if cost <= limit)
    assert sampler.count == total
    archs = sampler.sample(8000)
    p_values = []
    for block in (0, 1, num_blocks // 2, num_blocks - 1):
        others = ways_to_cost(rows[:block] + rows[block + 1 :])
        exact = [
            sum(count for cost, count in others.items() if cost + own <= limit) / total
            for own in rows[block]
        ]
        found = np.bincount(archs[:, block], minlength=4)
        p_values.append(chisquare(found, 8000 * np.array(exact)).pvalue)
    assert min(p_values) > 1e-3


@pytest.mark.parametrize(("num_blocks", "bins"), [(32, 508_400), (64, 172_074)])
def test_counts_of_two_words_and_more_leave_room_for_fewer_bins(num_blocks, bins):
    step = bins // num_blocks
    rows = [[0, 1, step - 1, step]] * (num_blocks - 1) + [[0, 0, 0, 10 * bins]]
    for limit, is_exact in ((bins - 1, True), (bins, False)):
        low, high, found = _bins(table_space(rows), Constraint("flops", None, limit))[1:]
        assert found == is_exact
        assert (low, high == limit) == (0, is_exact)


def test_costs_of_too_many_bins_are_sampled_by_rejection():
    # coprime costs: no common divisor leaves fewer bins
    space = table_space([[1, 400_000 + i, 900_001 + 3 * i] for i in range(6)])
    constraints = {"flops": (1_000_000, 3_000_000)}
    sampler = FeasibleSampler(space, constraints, seed=2)
    assert sampler.count is None
    archs = feasible_archs(space, constraints)
    assert p_value_of_uniform(sampler.sample(100 * len(archs)), archs) > 1e-3


def test_a_choice_dearer_than_the_bound_costs_no_bins():
    space = table_space([[1, 2, 10**9], [1, 4, 10**9 + 1]])
    assert FeasibleSampler(space, {"flops": (0, 5)}).count == 3


def test_the_shufflenet_table_is_counted_without_rejection():
    space = spaces.build("shufflenet_v2")
    sampler = FeasibleSampler(space, {"flops": "330M"}, seed=0)
    unbounded = Constraint("flops", None, space.largest("flops"))
    assert _bins(space, unbounded)[1:] == (0, 20_448, True)
    archs = sampler.sample(20_000)
    assert space.flops(archs).max() <= 330_000_000
    uniform = FeasibleSampler(space, seed=1).sample(20_000)
    share = (space.flops(uniform) <= 330_000_000).mean()
    assert abs(sampler.count / space.size - share) < 0.02


@pytest.mark.parametrize(
    ("constraints", "is_exact"),
    [
        (None, True),
        ({"flops": "75%"}, True),
        ({"flops": "55%:80%"}, True),
        ({"latency": "60%:75%"}, False),
        ({"flops": "70%", "params": "75%"}, False),
    ],
    ids=str,
)
def test_compiled_sampler_equals_its_twin_draw_by_draw(constraints, is_exact):
    space = real_space(4)
    for seed in (0, 1, 2**64 - 1):
        compiled = FeasibleSampler(space, constraints, seed)
        reference = ReferenceSampler(space, constraints, seed)
        assert compiled.count == reference.count
        assert compiled.core.count == reference.core.count
        assert (compiled.count is not None) == is_exact
        for num in (1, 0, 50):
            np.testing.assert_array_equal(compiled.sample(num), reference.sample(num))
        assert compiled.state_dict() == reference.state_dict()
        archs = every_arch(space)
        np.testing.assert_array_equal(compiled.is_feasible(archs), reference.is_feasible(archs))


def test_a_resumed_sampler_goes_on_as_the_unbroken_one():
    space = real_space(5)
    sampler = FeasibleSampler(space, {"latency": "70%"}, seed=9)
    sampler.sample(30)
    resumed = FeasibleSampler(space, {"latency": "70%"}, seed=0)
    resumed.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(resumed.sample(40), sampler.sample(40))
    assert resumed.state_dict() == sampler.state_dict()
    with pytest.raises(CheckpointError, match="sampler state cannot be read"):
        resumed.load_state_dict({"format": 1, "rng": [0, 0, 0, 0], "proposals": 0, "accepted": 0})


def test_a_bound_no_architecture_meets_names_the_cheapest_and_the_dearest():
    space = table_space([[10, 20], [10, 40]], fixed=5)
    for wanted in ("24", "66:", (26, 34)):  # below, above, and in a gap between
        with pytest.raises(ConstraintError, match=r"cheapest, 00, has 25.*dearest, 11, has 65"):
            FeasibleSampler(space, {"flops": wanted})


def test_bounds_that_exclude_each_other_are_refused_where_every_architecture_was_seen():
    space = table_space([[1, 2, 3]] * 4, [[3, 2, 1]] * 4)
    match = r"no architecture of table has .*flops the cheapest, 0000, .*params the cheapest"
    with pytest.raises(ConstraintError, match=match):
        FeasibleSampler(space, {"flops": "5", "params": "5"})


@pytest.mark.parametrize("sampler", [FeasibleSampler, ReferenceSampler])
def test_a_search_in_vain_says_that_none_was_found_not_that_there_is_none(sampler, monkeypatch):
    # there is none, but to prove it 531,441 architectures would have to be looked at
    space = table_space([[0, 1, 1, 1]] * 12, [[1, 0, 0, 0]] * 12)
    bounds = {"flops": (12, 12), "params": (1, 1)}
    monkeypatch.setattr("fastshift._population_ref.MAX_PROPOSALS", 1000)
    with pytest.raises(ConstraintError) as raised:
        sampler(space, bounds)
    text = str(raised.value)
    draws = {FeasibleSampler: "100,000", ReferenceSampler: "1,000"}[sampler]
    assert f"was found: none in {draws} draws, an acceptance below 1e-0" in text
    assert "flops in 12:12, params in 1:1" in text
    assert "one may exist" in text
    assert "cheapest" not in text


def test_samples_that_run_out_of_draws_say_how_many_there_were():
    # one in 65,536 of the architectures that meet either bound meets both
    one, other = [[0] + [1] * 255] * 2, [[0] * 256] * 2
    space = table_space(one + other, other + one)
    sampler = FeasibleSampler(space, {"flops": 0, "params": 0}, seed=0)
    with pytest.raises(ConstraintError, match=r"only . of 50 architectures .* in [0-9,]+ draws"):
        sampler.sample(50)


def test_a_given_constraint_object_is_used_as_it_is():
    space = random_space(0)
    bound = Constraint("flops", None, float(space.smallest("flops")))
    np.testing.assert_array_equal(
        FeasibleSampler(space, [bound]).sample(1)[0], space.cheapest("flops")
    )


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_no_64_bit_word_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be"):
        FeasibleSampler(random_space(0), seed=seed)


def test_the_core_refuses_arrays_it_would_have_to_convert():
    sampler = FeasibleSampler(random_space(0)).core
    rows = np.zeros((2, 6), np.uint8)
    for archs in (rows.astype(np.int64), rows[:, ::-1], rows.tolist()):
        with pytest.raises(TypeError):
            sampler.is_feasible(archs)
    with pytest.raises(ValueError, match="6 columns expected, got 5"):
        sampler.is_feasible(np.zeros((2, 5), np.uint8))
    with pytest.raises(ValueError, match="row 1 is not in the space"):
        sampler.is_feasible(np.array([[0] * 6, [9] * 6], np.uint8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_choices": np.array([3, 0], np.int32)}, "1 to 256 choices"),
        ({"num_choices": np.array([3, 3, 3], np.int32)}, "bins"),
        ({"bins": np.full((2, 3), -1, np.int32)}, "no negative entry"),
        ({"bounds": [(np.zeros((2, 2)), 0.0, 0.0, 1.0)]}, r"costs \[L, O\]"),
    ],
)
def test_the_core_refuses_tables_that_do_not_fit(change, match):
    arguments = {
        "num_choices": np.array([3, 2], np.int32),
        "bins": np.zeros((2, 3), np.int32),
        "low_bin": 0,
        "high_bin": 0,
        "bounds": [],
    }
    assert _core.Sampler(**arguments).count == 6
    with pytest.raises(ValueError, match=match):
        _core.Sampler(**{**arguments, **change})


def test_bits_of_a_rank_are_uniform_in_every_word():
    space = table_space([[0, 0]] * 130)
    archs = FeasibleSampler(space, seed=8).sample(4000)
    z = (archs.mean(axis=0) - 0.5) * 2 * math.sqrt(4000)
    assert np.abs(z).max() < 4.5
