"""On a CUDA device: captured steps against eager ones, and both against a CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fastshift as fs
from fastshift.batch_norm import start_ema
from fastshift.graphs import CapturedStep
from fastshift.static_supernet import static_supernet
from fastshift.testing import (
    assert_as_accurate,
    changed_tensors,
    global_error,
    random_archs,
    synthetic_data,
    tiny_supernet,
)
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DATA = synthetic_data()


def _evaluator(net, **options):
    options = {"calibration": DATA.calibration, "subtrie_size": 4} | options
    return fs.Evaluator(net, DATA.validation, **options)


def _eager(monkeypatch):
    """Run the same functions over the same buffers, without graphs."""
    monkeypatch.setattr(CapturedStep, "capture", lambda step: step)
    monkeypatch.setattr(CapturedStep, "replay", lambda step: step.function())


def _train(net, updates=3, **options):
    start_ema(net)
    trainer = PathTrainer(net, **{"lr": 0.05, "ema": True} | options)
    losses = []
    for position in range(updates):
        plan = Plan(random_archs(net.space, 7, seed=position), 4)
        batch = DATA.train.batch(position, 10)
        losses.append(trainer.update(plan, *batch, position=position))
    return net.tensors() | trainer.optimizer.momenta(), losses, trainer


def _moved(state, start):
    """How far the weights went, on a CPU."""
    names = [name for name, value in start.items() if value.is_floating_point()]
    return [state[name].double().cpu() - start[name].double() for name in names]


@pytest.mark.parametrize("policy", ["recalibrate", "batch", "running"])
def test_captured_scores_are_as_accurate_as_one_path_at_a_time_on_a_cpu(policy):
    net = tiny_supernet()
    archs = random_archs(net.space, 9)
    found = _evaluator(copy.deepcopy(net).cuda(), batch_norm=policy).evaluate(archs)
    plain = _evaluator(net, batch_norm=policy, strategy="sequential").evaluate(archs)
    exact = _evaluator(copy.deepcopy(net).double(), batch_norm=policy).evaluate(archs)
    assert found.computed == "captured"
    assert_as_accurate([found.losses], [plain.losses], [exact.losses])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_scores_are_those_of_the_eager_functions_bit_for_bit(precision, monkeypatch):
    archs = random_archs(tiny_supernet().space, 9)
    found = _evaluator(tiny_supernet().cuda(), precision=precision).evaluate(archs)
    _eager(monkeypatch)
    plain = _evaluator(tiny_supernet().cuda(), precision=precision).evaluate(archs)
    assert np.array_equal(found.losses, plain.losses)
    assert np.array_equal(found.errors, plain.errors)


def test_replayed_updates_are_those_of_the_eager_functions_bit_for_bit(monkeypatch):
    found, losses, trainer = _train(tiny_supernet(dropout=0.2).cuda(), clip_norm=1.0)
    assert trainer.computed == "captured"
    _eager(monkeypatch)
    plain, plain_losses, _ = _train(tiny_supernet(dropout=0.2).cuda(), clip_norm=1.0)
    assert changed_tensors(plain, found) == set()
    assert losses == plain_losses


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5, "nesterov": True, "reduction": "mean"}])
def test_captured_updates_are_as_accurate_as_those_of_a_cpu(options):
    net = tiny_supernet()
    start = {name: value.clone() for name, value in net.tensors().items()}
    found = _train(copy.deepcopy(net).cuda(), **options)[0]
    plain = _train(copy.deepcopy(net), **options)[0]
    exact = _train(copy.deepcopy(net).double(), **options)[0]
    assert_as_accurate(*(_moved(state, start) for state in (found, plain, exact)))


def test_changing_populations_replay_what_is_there_and_never_wait():
    net = tiny_supernet().cuda()
    sample = DATA.validation[0]
    plan = Plan(random_archs(net.space, 12), 4)
    _evaluator(net).evaluate(plan.archs)
    static, _ = static_supernet(net, plan, lambda: sample[0])
    scoring = static._scoring_pass(len(sample[0]))
    steps, memory = dict(scoring.steps.steps), torch.cuda.memory_allocated()
    for seed in range(20):
        tables = static.state.tables(Plan(random_archs(net.space, 12, seed), 4))
        scoring.load(*sample)
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            scoring.run("calibrate", tables, score=False)
            scoring.run("infer", tables, score=True)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        del tables
    assert scoring.steps.steps == steps
    assert torch.cuda.memory_allocated() <= memory
    assert all(step.is_captured for step in steps.values())


def test_a_population_scores_the_same_whatever_was_replayed_before():
    net = tiny_supernet().cuda()
    archs = random_archs(net.space, 9)
    first = _evaluator(net).evaluate(archs).losses
    for seed in range(5):
        _evaluator(net).evaluate(random_archs(net.space, 3 + 4 * seed, seed))
    assert np.array_equal(_evaluator(net).evaluate(archs).losses, first)


def test_what_no_path_used_keeps_its_bits_and_a_spoiled_update_moves_nothing():
    net = tiny_supernet().cuda()
    trainer = PathTrainer(net, lr=0.1, weight_decay=0.1)
    plan = Plan(np.array([[1, 0, 1, 0], [2, 0, 0, 0]], np.uint8))
    images, labels = DATA.train.batch(0, 8)
    before = {name: value.clone() for name, value in net.tensors().items()}
    trainer.update(plan, images, labels, position=0)
    moved = {".".join(name.split(".")[:3]) for name in changed_tensors(before, net.tensors())}
    assert {name for name in moved if name.startswith("blocks")} == {
        *("blocks.0.1", "blocks.0.2", "blocks.1.0", "blocks.2.1", "blocks.3.0")
    }
    before = {name: value.clone() for name, value in net.tensors().items()}
    trainer.update(plan, torch.full_like(images, torch.nan), labels, position=1)
    assert trainer.skipped == 1
    assert changed_tensors(before, net.tensors()) == set()


@pytest.mark.parametrize("shift", ["accumulate", "immediate", "every:3"])
def test_a_whole_search_on_a_gpu_agrees_with_one_on_a_cpu(shift):
    options = {"generations": 1, "population": 6, "parents": 3, "top_k": 3, "shift_steps": 2}
    options |= {"shift_batch_size": 8, "head_warmup_steps": 2, "subtrie_size": 4, "shift": shift}
    results, nets = [], []
    for device in ("cpu", "cuda"):
        net = tiny_supernet(dropout=0.0).to(device)
        start = {name: value.clone().cpu() for name, value in net.tensors().items()}
        results.append(fs.search(net, DATA, **options, seed=3))
        nets.append(net)
    assert results[1].computed == {"score": ["captured"], "train": ["captured"]}
    assert [row.arch for row in results[0].top] == [row.arch for row in results[1].top]
    one, two = (_moved(net.tensors(), start) for net in nets)
    assert global_error(two, one) < 1e-3


def test_pre_training_on_a_gpu_learns():
    net = tiny_supernet().cuda()
    result = fs.pretrain(net, DATA, steps=20, lr=0.05, batch_size=16)
    assert np.isfinite(result.loss)
    assert net.version == 20


def test_one_compiled_function_serves_a_gpu():
    net = tiny_supernet().cuda().train()
    images = DATA.train.batch(0, 6)[0]
    archs = random_archs(net.space, 6)
    compiled = fs.CompiledSupernet(net, backend="aot_eager")
    with torch.no_grad():
        found = compiled(images, archs).cpu()
        plain = torch.stack([tiny_supernet().train()(images, arch) for arch in archs])
        exact = tiny_supernet().double().train()
        exact = torch.stack([exact(images.double(), arch) for arch in archs])
    assert_as_accurate([found], [plain], [exact])


def test_memory_is_bounded_by_the_sub_tries():
    peaks = {}
    for candidates in (4, 24):
        net = tiny_supernet().cuda()
        archs = random_archs(net.space, candidates)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _evaluator(net).evaluate(archs)
        peaks[candidates] = torch.cuda.max_memory_allocated() - before
        del net
    assert peaks[24] <= 1.1 * peaks[4]
