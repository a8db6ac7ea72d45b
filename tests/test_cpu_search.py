"""A search with the compiled CPU kernels finds what one with PyTorch's ops finds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fastshift import cpu, spaces
from fastshift.batch_norm import BatchNorms, MovingAverages
from fastshift.evaluator import Evaluator
from fastshift.search import search
from fastshift.steps import train_step
from fastshift.supernet import Supernet
from fastshift.testing import (
    FLOORS,
    assert_as_accurate,
    global_error,
    random_archs,
    randomise,
    synthetic_data,
)
from fastshift.trie import Plan

SPACES = {
    "digits": spaces.digits(num_classes=4),
    "nasbench_macro": spaces.nasbench_macro(image_size=16, num_classes=4, width=0.25),
    "shufflenet_v2": spaces.shufflenet_v2(image_size=16, num_classes=4, width=0.25),
}
BACKENDS = ("reference", "cpu")
FLOOR = FLOORS[torch.float32]


@pytest.fixture(params=SPACES)
def space(request):
    return SPACES[request.param]


def _supernet(space):
    net = randomise(Supernet(space))
    net.head.dropout.p = 0.0
    return net


def _data(space):
    return synthetic_data(
        in_channels=space.in_channels,
        image_size=space.image_size,
        validation=(24,),
        calibration=(10, 7),
    )


@pytest.fixture
def calls(monkeypatch):
    """Which blocks the compiled kernels were asked for and took."""
    taken = []

    def count(name):
        plain = getattr(cpu.CpuBlock, name)

        def counted(*arguments, **options):
            taken.append(name)
            return plain(*arguments, **options)

        monkeypatch.setattr(cpu.CpuBlock, name, counted)

    count("train")
    count("infer")
    return taken


def test_every_instruction_set_ranks_alike(monkeypatch):
    space = SPACES["digits"]
    net, data = _supernet(space), _data(space)
    archs = np.unique(random_archs(space, 24, seed=4), axis=0)
    evaluator = Evaluator(net, data.validation, calibration=data.calibration)
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    plain = evaluator.evaluate(archs)
    monkeypatch.setenv("FASTSHIFT_BACKEND", "cpu")
    for name, reason in cpu.instruction_sets().items():
        if reason is None:
            monkeypatch.setenv("FASTSHIFT_CPU_ISA", name)
            found = evaluator.evaluate(archs)
            assert found.losses.argsort().tolist() == plain.losses.argsort().tolist(), name
            assert np.array_equal(found.errors, plain.errors), name


@pytest.mark.parametrize(
    ("space", "policy"),
    [
        *((name, "batch") for name in SPACES),
        ("digits", "recalibrate"),
        ("nasbench_macro", "recalibrate"),
        pytest.param("shufflenet_v2", "recalibrate", marks=pytest.mark.slow),
    ],
    indirect=["space"],
)
def test_scores_are_as_accurate_and_ranked_alike(space, policy, monkeypatch, calls):
    net, data = _supernet(space), _data(space)
    archs = np.unique(random_archs(space, 6, seed=3), axis=0)
    found = {}
    for backend in (*BACKENDS, "exact"):
        monkeypatch.setenv("FASTSHIFT_BACKEND", "cpu" if backend == "cpu" else "reference")
        calls.clear()
        scored = copy.deepcopy(net).double() if backend == "exact" else net
        evaluator = Evaluator(
            scored, data.validation, calibration=data.calibration, batch_norm=policy
        )
        found[backend] = evaluator.evaluate(archs)
        assert bool(calls) == (backend == "cpu")
    reference, ours, exact = (found[name].losses for name in (*BACKENDS, "exact"))
    assert_as_accurate([ours], [reference], [exact], floor=FLOOR)
    assert ours.argsort().tolist() == reference.argsort().tolist()
    assert np.array_equal(found["cpu"].errors, found["reference"].errors)


# The widest space takes seconds a draw; its ops are compared one by one in the quick tests.
@pytest.mark.parametrize(
    ("space", "draws"),
    [
        ("digits", 5),
        ("nasbench_macro", 5),
        pytest.param("shufflenet_v2", 5, marks=pytest.mark.slow),
        *(pytest.param(name, 25, marks=pytest.mark.slow) for name in SPACES),
    ],
    indirect=["space"],
)
def test_an_accumulated_gradient_is_as_accurate(space, draws, monkeypatch):
    """Of a whole population, in the middle of draws.

    In a deep random network one value that rounding takes across a ReLU moves a draw's gradient by
    more than all other rounding, PyTorch's too.
    """
    net = _supernet(space).train()
    archs = np.unique(random_archs(space, 4, seed=3), axis=0)
    errors = {name: [] for name in BACKENDS}
    for draw in range(draws):
        torch.manual_seed(draw)
        x = torch.randn(8, space.in_channels, space.image_size, space.image_size)
        found = {}
        for backend in (*BACKENDS, "exact"):
            monkeypatch.setenv("FASTSHIFT_BACKEND", "cpu" if backend == "cpu" else "reference")
            own = copy.deepcopy(net).double() if backend == "exact" else copy.deepcopy(net)
            norms = BatchNorms(own)
            images = x.double() if backend == "exact" else x
            averages = MovingAverages(norms)
            train_step(own, norms, Plan(archs), images, torch.arange(8) % 4, averages, key=(0, 0))
            found[backend] = [parameter.grad for parameter in own.parameters()]
        for name in BACKENDS:
            errors[name].append(global_error(found[name], found["exact"]))
    reference, ours = (np.median(errors[name]) for name in BACKENDS)
    assert ours <= max(2 * reference, FLOOR)


# Four updates of shufflenet_v2 move its losses by 1e-3 where its first weights are off by one
# rounding, with PyTorch's ops alone; its gradient is compared above.
@pytest.mark.parametrize(
    ("space", "shift"),
    [
        ("digits", "accumulate"),
        ("nasbench_macro", "accumulate"),
        *((name, "none") for name in SPACES),
    ],
    indirect=["space"],
)
def test_a_search_finds_the_same_architectures_with_the_same_scores(
    space, shift, monkeypatch, calls
):
    results, nets = [], []
    for backend in BACKENDS:
        monkeypatch.setenv("FASTSHIFT_BACKEND", backend)
        calls.clear()
        net = _supernet(space)
        results.append(
            search(
                net,
                _data(space),
                seed=1,
                shift=shift,
                score_by="loss",
                generations=1,
                population=4,
                parents=2,
                shift_steps=2,
                shift_batch_size=8,
                shift_lr=0.001,
                top_k=3,
            )
        )
        nets.append(net.state_dict())
        assert ("train" in calls) == ("infer" in calls) == (backend == "cpu")
    plain, ours = results
    assert [row.arch for row in ours.top] == [row.arch for row in plain.top]
    assert [row.error for row in ours.top] == [row.error for row in plain.top]
    losses = [[row.loss for row in result.top] for result in results]
    assert global_error([losses[1]], [losses[0]]) < 10 * FLOOR
    shifted = [value.double() for value in nets[0].values()]
    assert global_error(nets[1].values(), shifted) < 10 * FLOOR
