"""Feasible architectures per second, the compiled population beside its Python twin, on one core.

The space is `shufflenet_v2` (20 blocks of 4 choices) at no more than 330M multiply-adds. Every
benchmark first asserts that both give the same rows. `extra_info` holds architectures per second
and, in the row of the compiled one, how many times the twin's that is.
"""

from __future__ import annotations

import platform
from time import perf_counter

import numpy as np
import pytest

from fastshift import _core, spaces
from fastshift._population_ref import PopulationRef, SamplerRef, build_trie_ref
from fastshift.population import Evolution
from fastshift.sampler import FeasibleSampler

CONSTRAINTS = {"flops": "330M"}


class ReferenceSampler(FeasibleSampler):
    _sampler_type = SamplerRef


class ReferenceEvolution(Evolution):
    _population_type = PopulationRef
    _sampler = ReferenceSampler


PROVIDERS = ["python", "cpp"]
SAMPLERS = {"python": ReferenceSampler, "cpp": FeasibleSampler}
SEARCHES = {"python": ReferenceEvolution, "cpp": Evolution}
TRIES = {"python": build_trie_ref, "cpp": _core.build_trie}
ROUNDS = {"python": 3, "cpp": 30}


@pytest.fixture(scope="module")
def space():
    return spaces.build("shufflenet_v2")


@pytest.fixture(scope="module")
def twin_rates():
    """Architectures per second of the twin by benchmark, in the same session."""
    return {}


def record(benchmark, twin_rates, provider, name, num_archs):
    """Note the rate of the median round, and the compiled one's over its twin's."""
    benchmark.extra_info.update(
        provider=provider,
        num_archs=num_archs,
        cpu=platform.processor() or platform.machine(),
        python=platform.python_version(),
        numpy=np.__version__,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    rate = num_archs / benchmark.stats.stats.median
    benchmark.extra_info["archs_per_second"] = round(rate)
    if provider == "python":
        twin_rates[name] = rate
    elif name in twin_rates:
        benchmark.extra_info["times_the_twin"] = round(rate / twin_rates[name], 1)
    print(f"\n{name}: {benchmark.extra_info}")


def second_generation(provider, space, population, parents):
    """Return a search whose next generation is of mutants and children."""
    search = SEARCHES[provider](
        space,
        population,
        parents,
        keep=parents,
        constraints=CONSTRAINTS,
        seen="generation",
        seed=0,
    )
    archs = FeasibleSampler(space, CONSTRAINTS, seed=1).sample(parents)
    search.tell(archs, np.linspace(0, 1, parents))
    return search


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("population", "parents"), [(50, 10), (10_000, 500)], ids=["generation", "bulk"]
)
def test_feasible_children(benchmark, twin_rates, space, provider, population, parents):
    search = second_generation(provider, space, population, parents)
    expected = second_generation("cpp", space, population, parents).ask()
    np.testing.assert_array_equal(search.ask(), expected)
    assert search.last_ask["random"] == 0
    assert (space.flops(expected) <= 330_000_000).all()
    rounds = ROUNDS[provider] * (1 if population > 50 else 50)
    archs = benchmark.pedantic(search.ask, rounds=rounds, warmup_rounds=1)
    assert len(archs) == population
    record(benchmark, twin_rates, provider, f"feasible_children[{population}]", population)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_uniform_feasible_samples(benchmark, twin_rates, space, provider):
    num_archs = 5_000
    sampler = SAMPLERS[provider](space, CONSTRAINTS, seed=2)
    expected = FeasibleSampler(space, CONSTRAINTS, seed=2).sample(num_archs)
    np.testing.assert_array_equal(sampler.sample(num_archs), expected)
    benchmark.pedantic(sampler.sample, (num_archs,), rounds=ROUNDS[provider], warmup_rounds=1)
    assert sampler.acceptance_rate == 1.0
    record(benchmark, twin_rates, provider, "uniform_feasible_samples", num_archs)


def test_counting_of_the_feasible(benchmark, space):
    started = perf_counter()
    expected = ReferenceSampler(space, CONSTRAINTS).count
    benchmark.extra_info["python_seconds"] = round(perf_counter() - started, 3)
    sampler = benchmark.pedantic(FeasibleSampler, (space, CONSTRAINTS), rounds=10, warmup_rounds=1)
    assert sampler.count == expected


@pytest.mark.parametrize("provider", PROVIDERS)
def test_trie_plan(benchmark, twin_rates, space, provider):
    archs = second_generation("cpp", space, 1_000, 50).ask()
    archs = archs[np.lexsort(archs.T[::-1])]
    plan = TRIES[provider](archs, 32)
    for got, expected in zip(plan, _core.build_trie(archs, 32), strict=True):
        for level, expected_level in zip(got, expected, strict=True):
            np.testing.assert_array_equal(level, expected_level)
    benchmark.pedantic(TRIES[provider], (archs, 32), rounds=ROUNDS[provider], warmup_rounds=1)
    record(benchmark, twin_rates, provider, "trie_plan", len(archs))
