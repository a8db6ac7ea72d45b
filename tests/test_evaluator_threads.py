"""Evaluators in several threads of one process: right scores, and a supernet that is left alone."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
import torch

from fastshift import Evaluator
from fastshift.batch_norm import start_ema
from fastshift.device import TURN
from fastshift.testing import (
    chain_supernet,
    changed_tensors,
    random_archs,
    synthetic_data,
    tiny_supernet,
)
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

DATA = synthetic_data()


@pytest.fixture(autouse=True)
def _threads_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _at_once(*functions):
    """What functions give that start together, each in a thread of its own."""
    start, found, failed = threading.Barrier(len(functions)), {}, []

    def call(index, function):
        start.wait()
        try:
            found[index] = function()
        except Exception as error:
            failed.append(error)

    threads = [
        threading.Thread(target=call, args=each, daemon=True) for each in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]
    return [found[index] for index in range(len(functions))]


def _evaluator(net, policy="recalibrate", **options):
    data = {"calibration": DATA.calibration, "batch_norm": policy}
    return Evaluator(net, DATA.validation, **data, **options)


@pytest.mark.parametrize("policy", ["recalibrate", "batch", "running"])
@pytest.mark.parametrize("kind", ["modules", "compiled", "static"])
def test_two_evaluators_of_one_supernet_give_the_scores_of_each_alone(kind, policy, monkeypatch):
    if kind == "static":
        pytest.importorskip("triton", minversion="3.6")
        monkeypatch.setenv("FASTSHIFT_STEPS", "static")
    net = (chain_supernet if kind == "modules" else tiny_supernet)().train()
    archs = [random_archs(net.space, 6, seed) for seed in range(2)]
    wanted = [_evaluator(net, policy).evaluate(own).losses for own in archs]
    before = {name: value.clone() for name, value in net.tensors().items()}

    def scored(own):
        evaluator = _evaluator(net, policy)
        return lambda: [evaluator.evaluate(own).losses for _ in range(6)]

    for losses, alone in zip(_at_once(*map(scored, archs)), wanted, strict=True):
        assert all(np.array_equal(one, alone) for one in losses)
    assert changed_tensors(before, net.tensors()) == set()
    assert all(module.training for module in net.modules())


def test_threads_may_share_an_evaluator_and_two_supernets_do_not_meet():
    nets = chain_supernet(), tiny_supernet()
    archs = [random_archs(net.space, 6) for net in nets]
    wanted = [_evaluator(net).evaluate(own).losses for net, own in zip(nets, archs, strict=True)]
    shared = [_evaluator(net) for net in (chain_supernet(), tiny_supernet())]
    jobs = [lambda i=i: [shared[i].evaluate(archs[i]).losses for _ in range(4)] for i in (0, 1)]
    for index, losses in enumerate(_at_once(*jobs, *jobs)):
        assert all(np.array_equal(one, wanted[index % 2]) for one in losses)


@pytest.mark.parametrize("make", [chain_supernet, tiny_supernet])
def test_a_score_beside_training_is_that_of_the_weights_it_names(make):
    archs = random_archs(make().space, 5)

    def trained(net, after=lambda: None):
        trainer = PathTrainer(net, lr=0.05)
        for position in range(12):
            batch = DATA.train.batch(position, 8)
            trainer.update(Plan(archs), *batch, position=position)
            after()
        return net.tensors()

    plain, wanted = make().train(), {}
    scores = [_evaluator(plain).evaluate(archs)]
    weights = trained(plain, lambda: scores.append(_evaluator(plain).evaluate(archs)))
    for found in scores:
        wanted[found.weights_version] = found.losses
    net = make().train()
    evaluator = _evaluator(net)
    moved, found = _at_once(
        lambda: trained(net), lambda: [evaluator.evaluate(archs) for _ in range(12)]
    )
    assert changed_tensors(weights, moved) == set()
    for score in found:
        assert np.array_equal(score.losses, wanted[score.weights_version])
    assert sorted(wanted) == [*range(13)]


@pytest.mark.parametrize("make", [chain_supernet, tiny_supernet])
def test_what_is_copied_beside_an_evaluation_is_the_supernets_own(make):
    net = make().eval()
    archs, evaluator = random_archs(net.space, 6), _evaluator(net)
    wanted = net.subnet(archs[0]).state_dict()
    images = DATA.validation[0][0]
    with torch.no_grad():
        logits = net.subnet(archs[0])(images)

    def copies():
        found = []
        for _ in range(30):
            net.ema = {}
            start_ema(net)
            found.append((net.subnet(archs[0]), dict(net.ema)))
        return found

    _, found = _at_once(lambda: [evaluator.evaluate(archs) for _ in range(8)], copies)
    for subnet, ema in found:
        assert changed_tensors(wanted, subnet.state_dict()) == set()
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in ema.items())
        with torch.no_grad():
            assert torch.equal(subnet(images), logits)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_in_another_threads_turn_has_its_own():
    taken, forked = threading.Event(), threading.Event()

    def hold():
        with TURN:
            taken.set()
            forked.wait(60)

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    assert taken.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if TURN.acquire(timeout=20) else 1)
    forked.set()
    holder.join(60)
    assert os.waitpid(child, 0)[1] == 0
