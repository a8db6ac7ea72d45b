"""Evolutionary search by ask and tell: proposals, order, bounds, state, and the exact twin."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import runpy
import sys

import numpy as np
import pytest
from scipy.stats import chisquare

import fastshift.population
from fastshift._population_ref import PopulationRef, SamplerRef
from fastshift.errors import ArchError, CheckpointError, ConstraintError
from fastshift.population import Evolution, Scored
from fastshift.sampler import FeasibleSampler
from fastshift.space import ModuleSpace


class ReferenceSampler(FeasibleSampler):
    _sampler_type = SamplerRef


class ReferenceEvolution(Evolution):
    _population_type = PopulationRef
    _sampler = ReferenceSampler


def toy_space(num_blocks=6, num_choices=3, seed=0):
    generator = np.random.default_rng(seed)
    shape = (num_blocks, num_choices)
    flops, params = (10 * generator.integers(1, 30, shape) for _ in range(2))
    return ModuleSpace(
        "toy",
        num_choices=[num_choices] * num_blocks,
        flops_table=flops,
        params_table=params,
        fixed_flops=50,
        fixed_params=7,
        identities=np.zeros(shape, bool),
    )


def plain_space(num_blocks, num_choices=2):
    """Return a space in which every architecture costs its number of blocks."""
    ones = np.ones((num_blocks, num_choices), int)
    return ModuleSpace(
        "plain",
        num_choices=[num_choices] * num_blocks,
        flops_table=ones,
        params_table=ones,
        fixed_flops=0,
        fixed_params=0,
        identities=ones == 0,
    )


def distance(archs, target):
    """Return the share of genes that differ from a target."""
    return (np.asarray(archs) != target).mean(axis=1)


# Proposals


@pytest.mark.parametrize("seen", ["run", "generation"])
@pytest.mark.parametrize(
    "constraints", [None, {"flops": "60%"}, {"flops": "65%", "params": "45%:70%"}], ids=str
)
def test_every_generation_is_full_feasible_and_without_repeats(constraints, seen):
    space = toy_space(8)
    search = Evolution(space, 30, 5, constraints=constraints, seed=1, seen=seen)
    asked = set()
    for generation in range(6):
        archs = search.ask()
        assert (archs.shape, archs.dtype, search.generation) == ((30, 8), np.uint8, generation)
        assert search.sampler.is_feasible(archs).all()
        rows = set(map(tuple, archs.tolist()))
        assert len(rows) == 30
        if seen == "run":
            assert not rows & asked
        asked |= rows
        counts = [search.last_ask[name] for name in ("mutants", "children", "random")]
        assert sum(counts) == 30
        if generation == 0:
            assert counts == [0, 0, 30]
        search.tell(archs, distance(archs, 1))


def test_generation_0_is_uniform_over_feasible_architectures():
    space = toy_space(3)
    feasible = FeasibleSampler(space, {"flops": "70%"}).count
    firsts = []
    for seed in range(1500):
        firsts += Evolution(space, 2, 1, constraints={"flops": "70%"}, seed=seed).ask().tolist()
    _, counts = np.unique(np.array(firsts), axis=0, return_counts=True)
    assert len(counts) == feasible
    assert chisquare(counts).pvalue > 1e-3


def test_mutants_come_first_then_children_then_random_ones():
    space = plain_space(40, 2)
    search = Evolution(space, 20, 1, mutation=8, crossover=0, mutation_prob=0.1, seed=0)
    search.tell(np.zeros((1, 40), np.uint8), [0.5])
    archs = search.ask()
    assert search.last_ask["mutants"] == 8
    assert (distance(archs[:8], 0) < 0.3).all()
    assert (distance(archs[8:], 0) > 0.2).all()


def test_a_mutation_redraws_each_gene_from_all_its_choices():
    space = plain_space(50, 4)
    search = Evolution(
        space, 2000, 1, mutation=2000, crossover=0, mutation_prob=0.2, seen="generation", seed=3
    )
    search.tell(np.full((1, 50), 2, np.uint8), [0.5])
    genes = search.ask().ravel()
    assert search.last_ask["mutants"] == 2000
    counts = np.bincount(genes, minlength=4)
    expected = genes.size * np.array([0.05, 0.05, 0.85, 0.05])
    assert chisquare(counts, expected).pvalue > 1e-3


def test_a_child_takes_each_gene_from_either_parent_with_one_half():
    space = plain_space(70, 4)
    search = Evolution(space, 1000, 2, mutation=0, crossover=1000, seen="generation", seed=4)
    search.tell(np.repeat([[1], [3]], 70, axis=1), [0.1, 0.2])
    archs = search.ask()
    children = archs[: search.last_ask["children"]]
    assert set(np.unique(children)) == {1, 3}
    crossed = children[np.ptp(children, axis=1) > 0]
    assert len(crossed) >= len(children) - 2  # equal parents give the parent itself, once each
    share = (crossed == 1).mean(axis=0)
    assert np.abs(share - 0.5).max() < 4.5 * 0.5 / math.sqrt(len(crossed))


def test_without_mutation_a_mutant_is_its_parent():
    space = plain_space(6)
    settings = {"mutation": 4, "crossover": 0, "mutation_prob": 0.0, "seed": 1}
    parents = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]], np.uint8)
    again = Evolution(space, 4, 2, seen="generation", **settings)
    again.tell(parents, [0.1, 0.2])
    assert {tuple(row) for row in again.ask()[:2].tolist()} == set(map(tuple, parents.tolist()))
    assert again.last_ask["mutants"] == 2
    assert "2 of 4 mutants in 40 tries" in again.last_ask["reason"]
    once = Evolution(space, 4, 2, seen="run", **settings)
    once.tell(parents, [0.1, 0.2])
    assert len(once.ask()) == 4
    assert (once.last_ask["mutants"], once.last_ask["random"]) == (0, 4)
    assert once.last_ask["tries"] >= 44


def test_the_fill_lists_what_is_left_until_nothing_is():
    space = plain_space(2, 2)
    search = Evolution(space, 3, 1, mutation=0, crossover=0, seed=0)
    first, second = search.ask(), search.ask()
    assert (len(first), len(second)) == (3, 1)
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 4
    assert search.last_ask["reason"] == "1 of 3 architectures: no feasible one is unseen"
    assert search.ask().shape == (0, 2)
    assert search.last_ask["random"] == 0


def test_what_rejection_rarely_finds_is_listed():
    choices = np.array([[0, 1, 2, 3]] * 6)
    space = ModuleSpace(
        "rare",
        num_choices=[4] * 6,
        flops_table=choices,
        params_table=choices * 4 ** np.arange(6)[:, None],  # one sum for each architecture
        fixed_flops=0,
        fixed_params=0,
        identities=choices < 0,
    )
    constraints = {"flops": (9, 9), "params": (1000, 3000)}
    search = Evolution(space, 200, 2, constraints=constraints, seed=0)
    every = np.array(list(itertools.product(range(4), repeat=6)), np.uint8)
    expected = search.sampler.is_feasible(every).sum()
    assert search.feasible_count is None
    assert 200 < expected < 400
    assert [len(search.ask()) for _ in range(3)] == [200, expected - 200, 0]
    assert "no feasible one is unseen" in search.last_ask["reason"]


def test_a_generation_as_large_as_the_space_comes_back_whole_each_time():
    space = plain_space(3, 2)
    search = Evolution(space, 8, 2, seen="generation", seed=0)
    for _ in range(3):
        archs = search.ask()
        assert len(np.unique(archs, axis=0)) == 8
        search.tell(archs, distance(archs, 1))


def test_search_ends_at_the_best_architecture_of_a_toy_space():
    space = toy_space(8, 4)
    costs = np.random.default_rng(5).random((8, 4))
    search = Evolution(space, 40, 8, constraints={"flops": "70%"}, seed=0)
    for _ in range(12):
        archs = search.ask()
        search.tell(archs, costs[np.arange(8), archs].sum(axis=1))
    every = np.array(list(itertools.product(range(4), repeat=8)), np.uint8)
    every = every[search.sampler.is_feasible(every)]
    best = every[costs[np.arange(8), every].sum(axis=1).argmin()]
    assert search.best.arch == tuple(best.tolist())


# Scores


def test_a_score_says_what_when_and_under_which_weights():
    space = toy_space(3)
    search = Evolution(space, 4, 2, seed=0)
    assert search.best is None
    search.tell(search.ask(), [0.9] * 4, weights_version=3)
    search.tell(["012", "111"], np.float32([0.25, 0.5]), [1.5, 2.0], weights_version=7)
    arch = [[0, 1, 2]]
    assert search.best == Scored(
        (0, 1, 2), 0.25, int(space.flops(arch)[0]), int(space.params(arch)[0]), 7, 1, loss=1.5
    )
    fields = ["arch", "error", "flops", "params", "weights_version", "generation", "loss"]
    assert [field.name for field in dataclasses.fields(Scored)] == fields
    assert [scored.error for scored in search.top_k(3)] == [0.25, 0.5, 0.9]
    assert search.parents.tolist() == [[0, 1, 2], [1, 1, 1]]
    assert search.generation == 2


def test_ties_go_to_lower_loss_then_lower_flops_then_lower_choices():
    space = ModuleSpace(
        "ties",
        num_choices=[3, 3],
        flops_table=[[5, 5, 1], [5, 5, 1]],
        params_table=[[1, 1, 1], [1, 1, 1]],
        fixed_flops=0,
        fixed_params=0,
        identities=np.zeros((2, 3), bool),
    )
    archs = ["10", "01", "22", "00", "20"]
    search = Evolution(space, 5, 5)
    search.tell(archs, [0.5] * 5, [2.0, 2.0, 2.0, 1.0, math.nan])
    ordered = [space.format(scored.arch) for scored in search.top_k(5)]
    assert ordered == ["00", "22", "01", "10", "20"]
    search.tell(archs, [0.5] * 5)  # without losses
    assert [space.format(scored.arch) for scored in search.top_k(5)] == [
        "22",
        "20",
        "00",
        "01",
        "10",
    ]


def test_scoring_by_loss_orders_by_loss_then_error():
    search = Evolution(plain_space(2, 3), 5, 2, score_by="loss")
    search.tell(
        ["00", "01", "02", "10", "11"],
        [0.1, 0.3, 0.2, 0.0, math.nan],
        [3.0, 1.0, 1.0, math.nan, 0.5],
    )
    assert [scored.arch for scored in search.top_k(5)] == [(0, 2), (0, 1), (0, 0)]
    with pytest.raises(ValueError, match="losses are expected with score_by='loss'"):
        search.tell(["00"], [0.1])


@pytest.mark.parametrize("seen", ["run", "generation"])
def test_nan_error_never_enters_top_k(seen):
    search = Evolution(plain_space(2, 3), 3, 2, seen=seen)
    search.tell(["00", "01", "02"], [math.nan, 0.5, math.inf])
    assert [scored.arch for scored in search.top_k(3)] == [(0, 1), (0, 2)]
    search.tell(["01"], [math.nan])  # a later NaN takes the architecture out
    assert [scored.arch for scored in search.top_k(3)] == [(0, 2)]


def test_a_generation_of_nan_leaves_random_search_and_says_so():
    search = Evolution(plain_space(8, 3), 6, 2, seed=0)
    search.tell(search.ask(), [math.nan] * 6)
    assert len(search.ask()) == 6
    assert search.last_ask["random"] == 6
    assert "no parents" in search.last_ask["reason"]
    assert search.best is None
    assert search.parents.shape == (0, 8)


def test_a_second_score_replaces_the_first():
    search = Evolution(plain_space(2, 3), 3, 2)
    search.tell(["00", "01"], [0.1, 0.2])
    search.tell(["00", "00"], [0.7, 0.3], weights_version=5)
    assert [(s.arch, s.error) for s in search.top_k(3)] == [((0, 1), 0.2), ((0, 0), 0.3)]


@pytest.mark.parametrize("evolution", [Evolution, ReferenceEvolution])
def test_each_row_can_have_the_version_of_its_own_weights(evolution):
    search = evolution(plain_space(2, 4), 4, 2, seed=5)
    search.tell(["00", "01"], [0.1, 0.2], weights_version=1)
    fresh = evolution(plain_space(2, 4), 4, 2, seed=5)
    fresh.tell(["00", "01"], [0.1, 0.2], weights_version=1)
    rows, errors = ["11", "00", "12", "12", "13"], [0.3, 0.05, 0.7, 0.4, math.nan]
    search.tell(rows, errors, weights_version=np.arange(20, 25))
    fresh.tell(rows, errors, weights_version=7)
    versions = {search.space.format(s.arch): s.weights_version for s in search.top_k(9)}
    assert versions == {"00": 21, "01": 1, "11": 20, "12": 23}  # of equal rows the last counts
    assert [s.generation for s in search.top_k(9)] == [1, 0, 1, 1]
    search.replace_scores(["01", "12"], [0.5, 0.6], weights_version=[30, 31])
    assert [s.weights_version for s in search.top_k(9)] == [21, 20, 30, 31]
    fresh.replace_scores(["01", "12"], [0.5, 0.6])
    np.testing.assert_array_equal(search.ask(), fresh.ask())  # nothing else depends on it
    search.tell([], [], weights_version=3)


def test_no_more_than_keep_are_kept():
    search = Evolution(plain_space(3, 4), 20, 4, keep=6, seed=0)
    archs = search.ask()
    search.tell(archs, np.linspace(1, 0, 20))
    assert [scored.arch for scored in search.top_k(6)] == list(map(tuple, archs[:-7:-1].tolist()))
    with pytest.raises(ValueError, match=r"k must be 0 to keep \(6\), got 7"):
        search.top_k(7)


def test_where_weights_move_a_generation_meets_only_the_present_parents():
    search = Evolution(plain_space(2, 4), 4, 2, seen="generation")
    search.tell(["00", "01", "02", "03"], [0.1, 0.2, 0.3, 0.4])
    search.tell(["10", "11"], [0.5, 0.6])
    assert [scored.arch for scored in search.top_k(9)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    lasting = Evolution(plain_space(2, 4), 4, 2, seen="run")
    lasting.tell(["00", "01", "02", "03"], [0.1, 0.2, 0.3, 0.4])
    lasting.tell(["10", "11"], [0.5, 0.6])
    assert len(lasting.top_k(9)) == 6


@pytest.mark.parametrize(("seen", "expected"), [("run", ["02", "01", "00"]), ("generation", None)])
def test_parents_can_be_scored_again_without_ending_a_generation(seen, expected):
    search = Evolution(plain_space(2, 4), 4, 2, seen=seen)
    search.tell(["00", "01", "02"], [0.1, 0.2, 0.3], weights_version=1)
    search.replace_scores(search.parents, [0.9, 0.8], weights_version=2)
    assert search.generation == 1
    names = [search.space.format(scored.arch) for scored in search.top_k(4)]
    assert names == (expected or ["01", "00"])  # where weights move the stale score is dropped
    rescored = search.top_k(4)[-1]
    assert (rescored.error, rescored.weights_version, rescored.generation) == (0.9, 2, 0)
    with pytest.raises(ValueError, match="row 1 is not one"):
        search.replace_scores([names[0], "33"], [0.1, 0.1])
    search.replace_scores(names, [math.nan] + [0.5] * (len(names) - 1))
    assert [search.space.format(scored.arch) for scored in search.top_k(4)] == names[:0:-1]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"population": 0}, "population must be at least 1, got 0"),
        ({"parents": 0}, "parents must be at least 1, got 0"),
        ({"parents": 60}, r"keep must be at least parents \(60\), got 50"),
        ({"mutation": -1}, "mutation must be at least 0, got -1"),
        ({"mutation": 30, "crossover": 21}, r"at most population \(50\), got 30 \+ 21"),
        ({"mutation_prob": 1.5}, r"mutation_prob must be in \[0, 1\], got 1.5"),
        ({"mutation_prob": math.nan}, "mutation_prob must be"),
        ({"seen": "ever"}, "seen must be 'run' or 'generation', got 'ever'"),
        ({"score_by": "flops"}, "score_by must be 'error' or 'loss', got 'flops'"),
        ({"seed": -3}, "seed must be"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(arguments, match):
    with pytest.raises(ValueError, match=match):
        Evolution(plain_space(4, 4), **arguments)


def test_a_constraint_that_cannot_be_met_is_refused_at_once():
    with pytest.raises(ConstraintError, match=r"the cheapest, .* the dearest, "):
        Evolution(toy_space(), constraints={"flops": "10"})


def test_unusable_scores_are_refused():
    search = Evolution(toy_space(5), 4, 2, constraints={"flops": "75%"}, seed=0)
    archs = search.ask()
    with pytest.raises(ValueError, match=r"errors must have shape \(4,\), got \(3,\)"):
        search.tell(archs, [0.1] * 3)
    with pytest.raises(ValueError, match=r"losses must have shape \(4,\), got \(4, 1\)"):
        search.tell(archs, [0.1] * 4, np.zeros((4, 1)))
    for version in ([1, 2, 3], 1.5, None, True):
        with pytest.raises(ValueError, match=r"weights_version must be a whole number or have sha"):
            search.tell(archs, [0.1] * 4, weights_version=version)
    with pytest.raises(ArchError, match="out of range"):
        search.tell(archs + 3, [0.1] * 4)
    dearest = search.space.dearest("flops")
    with pytest.raises(ConstraintError, match=r"archs row 1: \d+ is not in flops in :"):
        search.tell([archs[0], dearest], [0.1, 0.2])
    assert search.generation == 0
    assert search.best is None


# State and twin

GRID = [
    {},
    {"constraints": {"flops": "60%"}},
    {"constraints": {"flops": "55%:75%"}, "seen": "generation"},
    {"constraints": {"flops": "70%", "params": "75%"}, "score_by": "loss"},
    {"mutation_prob": 0.5, "mutation": 3, "crossover": 12, "seen": "generation", "keep": 5},
    {"mutation_prob": 1.0, "mutation": 0, "crossover": 0},
    {"population": 90, "mutation_prob": 0.0, "constraints": {"params": "50%"}},  # is exhausted
]


def scripted_scores(archs, generation):
    """Return errors and losses with ties and NaN."""
    generator = np.random.default_rng(generation)
    errors = generator.integers(0, 6, len(archs)) / 8
    losses = generator.integers(0, 4, len(archs)) / 4
    errors[generator.random(len(archs)) < 0.1] = np.nan
    losses[generator.random(len(archs)) < 0.1] = np.nan
    return errors, losses


def advance(search, generation):
    """Go through one generation and return what was asked."""
    archs = search.ask()
    versions = 10 * generation + np.arange(len(archs)) // 4
    search.tell(archs, *scripted_scores(archs, generation), weights_version=versions)
    if generation % 2 == 1:
        parents = search.parents[::-1]
        search.replace_scores(parents, *scripted_scores(parents, -generation % 97))
    return archs


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize("settings", GRID, ids=str)
def test_compiled_population_equals_its_twin_draw_by_draw(settings, seed):
    arguments = {"population": 16, "parents": 4, "seed": seed, **settings}
    compiled = Evolution(toy_space(), **arguments)
    reference = ReferenceEvolution(toy_space(), **arguments)
    for generation in range(7):
        np.testing.assert_array_equal(advance(compiled, generation), advance(reference, generation))
        assert compiled.last_ask == reference.last_ask
        assert repr(compiled.state_dict()) == repr(reference.state_dict())
        assert repr(compiled.top_k(5)) == repr(reference.top_k(5))
        assert compiled.acceptance_rate == reference.acceptance_rate


@pytest.mark.parametrize("settings", GRID, ids=str)
def test_a_saved_and_resumed_search_equals_the_unbroken_one(settings):
    arguments = {"population": 16, "parents": 4, "seed": 3, **settings}
    unbroken = Evolution(toy_space(), **arguments)
    for generation in range(3):
        advance(unbroken, generation)
    unbroken.ask()  # a stop between ask and tell
    resumed = Evolution(toy_space(), **arguments)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    assert repr(resumed.state_dict()) == repr(unbroken.state_dict())
    pickled = pickle.loads(pickle.dumps(unbroken))
    for generation in range(3, 6):
        expected = advance(unbroken, generation)
        np.testing.assert_array_equal(advance(resumed, generation), expected)
        np.testing.assert_array_equal(advance(pickled, generation), expected)


def test_a_state_of_other_settings_is_refused_by_name():
    state = Evolution(toy_space(), 16, 4, seed=1).state_dict()
    with pytest.raises(CheckpointError, match="saved with population=16, this search has 20"):
        Evolution(toy_space(), 20, 4, seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"constraints=\[\], this search has \[\['flops'"):
        Evolution(
            toy_space(), 16, 4, mutation=8, crossover=8, seed=1, constraints={"flops": "70%"}
        ).load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("kept"),
        lambda state: state.update(rng=[0, 0, 0, 0]),
        lambda state: state.update(rng=[1, 2, 3]),
        lambda state: state.update(format=2),
        lambda state: state.update(seen=["999999"]),
        lambda state: state.update(generation="two"),
        lambda state: state["kept"].update(errors=[0.5]),
        lambda state: state.update(settings=None),
        lambda state: state["settings"].update(unknown=1),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    search = Evolution(toy_space(), 16, 4, seed=1)
    for generation in range(2):
        advance(search, generation)
    before = search.state_dict()
    damaged = json.loads(json.dumps(before))
    damage(damaged)
    with pytest.raises(CheckpointError, match="population state cannot be read"):
        search.load_state_dict(damaged)
    assert repr(search.state_dict()) == repr(before)


def test_a_missing_extension_is_an_error_that_names_the_command(monkeypatch):
    monkeypatch.delattr(fastshift, "_core")
    monkeypatch.setitem(sys.modules, "fastshift._core", None)
    with pytest.raises(ImportError, match=r"build it with `pip install -e \.`"):
        runpy.run_path(fastshift._native.__file__)


def test_a_sampler_of_the_same_seed_draws_other_architectures_than_the_search():
    space = toy_space(10)
    assert (
        Evolution(space, 20, 4, seed=1).ask() != FeasibleSampler(space, seed=1).sample(20)
    ).any()


def test_searches_of_one_seed_agree_and_of_two_seeds_differ():
    first, again, other = (Evolution(toy_space(), 16, 4, seed=seed).ask() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
