"""A generation of 50 calibrated and scored, beside a strong sequential baseline; and each lever.

The baseline scores one path at a time: cached batches, no gradients, no copy of a weight. Every
variant of it is tried on some candidates, the fastest runs them all. Scores are compared before
anything counts.
"""

from __future__ import annotations

from functools import partial

import generations
import numpy as np
import pytest
import torch
from baselines import PRECISIONS, Turns, agree, folded, race, scope, variants
from recording import figures, kernels, note
from torch import nn
from torch.nn import functional

from fastshift import spaces
from fastshift.batch_norm import BatchNorms, evaluation_mode
from fastshift.evaluator import Evaluator
from fastshift.steps import Statistics, calibrate_step, eval_step
from fastshift.supernet import Supernet, recalibrate
from fastshift.trie import Plan

# Space, image size, calibration and scored images, generations.
CASES = [
    ("nasbench_macro", 32, 8, 16, generations.KEPT),
    ("shufflenet_v2", 64, 8, 8, generations.KEPT),
    ("shufflenet_v2", 224, 2, 4, generations.KEPT),
]
CELLS = [(*case[:4], generation) for case in CASES for generation in case[4]]
LAST = [cell for cell in CELLS if cell[4] == generations.KEPT[-1]]


def label(cell):
    return f"{cell[0]}-{cell[1]}-generation{cell[4]}"


# More images, as searches have: these take minutes.
MANY = [(*case[:2], 32, 96, generations.KEPT[-1]) for case in CASES[:2]]
GENERATION_CELLS = [
    pytest.param(cell, precision, id=f"{label(cell)}{more}-{precision}")
    for cells, precisions, more in ((CELLS, PRECISIONS, ""), (MANY, ("fp32",), "-128_images"))
    for cell in cells
    for precision in precisions
]
# Losses: bf16 rounds every tensor, and which op rounds where differs between the paths.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
SAMPLE = slice(0, None, 17)


class Setting:
    """A supernet, its batches and a generation; tiny where nothing is timed."""

    def __init__(self, cell, precision, enabled):
        self.space, self.size, calibration, scored, self.generation = cell
        if not enabled:
            scored = 4
        torch.manual_seed(0)
        self.supernet = Supernet(spaces.build(self.space, image_size=self.size, num_classes=10))
        self.supernet.to(memory_format=torch.channels_last).eval()
        images = torch.randn(calibration + scored, 3, self.size, self.size)
        labels = torch.arange(calibration + scored) % 10
        self.calibration = [(images[:calibration], labels[:calibration])]
        self.batches = [(images[calibration:], labels[calibration:])]
        self.images = calibration + scored
        archs = generations.load(self.space)[self.generation]
        self.archs = archs if enabled else archs[:2]
        self.precision = precision

    def evaluator(self, precision=None):
        return Evaluator(
            self.supernet,
            self.batches,
            calibration=self.calibration,
            precision=precision or self.precision,
        )

    def exact(self):
        """Losses in fp32 for a lower precision to be compared with; None for fp32."""
        return (
            None if self.precision == "fp32" else self.evaluator("fp32").evaluate(self.archs).losses
        )

    def fields(self, sharing):
        with scope(self.precision), torch.no_grad():
            ran = kernels(self.supernet.stem, self.batches[0][0])
        computed = 2e-9 * float(self.supernet.space.flops(self.archs).sum()) * self.images / sharing
        return {
            "space": self.space,
            "size": self.size,
            "generation": self.generation,
            "calibration_images": len(self.calibration[0][0]),
            "scored_images": len(self.batches[0][0]),
            "precision": self.precision,
            "kernels": ran,
            "gflop": round(computed, 3),
        }


@torch.no_grad()
def one_at_a_time(variant, supernet, archs, calibration, batches):
    """Mean cross-entropies by plain modules that share the supernet's weights."""
    losses = []
    with variant.scope():
        for arch in archs:
            ops = [block[int(choice)] for block, choice in zip(supernet.blocks, arch, strict=True)]
            net = recalibrate(nn.Sequential(supernet.stem, *ops, supernet.head), calibration)
            net = folded(net) if variant.kind == "folded" else net
            found = [float(functional.cross_entropy(net(x).float(), y)) for x, y in batches]
            losses.append(np.mean(found))
    return np.array(losses)


def contestants(setting):
    calls = {}
    for variant in variants(setting.precision):
        net = variant.copy_of(setting.supernet)
        parts = [
            [(variant.rows(x), y) for x, y in part]
            for part in (setting.calibration, setting.batches)
        ]
        calls[variant.name] = lambda archs, v=variant, n=net, p=parts: one_at_a_time(
            v, n, archs, *p
        )
    return calls


@pytest.mark.parametrize(("cell", "precision"), GENERATION_CELLS)
def test_generation(benchmark, cell, precision):
    if not benchmark.enabled and (cell not in LAST or cell[1] > 64):
        pytest.skip("one generation of small images is enough where nothing is timed")
    setting = Setting(cell, precision, benchmark.enabled)
    archs = setting.archs
    shared = setting.evaluator()
    shared.evaluate(archs[:2])
    calls = contestants(setting)
    tried, times, losses, compiling = race(calls, archs[SAMPLE], archs, benchmark.enabled)
    # The one without folded norms takes turns; a generation of the other is timed once.
    plain = min((name for name in times if not name.startswith("folded")), key=times.get)
    timed = benchmark.enabled
    turns = Turns(
        {plain: partial(calls[plain], archs)} if timed else {}, precision if timed else None
    )
    rounds = 2 if timed else 1
    result = benchmark.pedantic(partial(shared.evaluate, archs), setup=turns, rounds=rounds)
    agree(result.losses, losses, setting.exact(), TOLERANCE[precision], "the baseline")
    if benchmark.stats is None:
        return
    own = benchmark.stats.stats.data
    once = {name: [t] for name, t in times.items()}
    note(
        benchmark,
        "evaluator",
        **({"what": "128 images"} if cell in MANY else {}),
        **setting.fields(result.sharing),
        **figures(own, once | turns.times, result.sharing, turns.peaks),
        sampled_seconds={name: round(t, 3) for name, t in tried.items()},
        compile_seconds=compiling,
        archs_per_second=round(len(archs) / benchmark.stats.stats.median, 1),
    )


def nodes_of(plan, leaf):
    """The node of each level that a leaf passes through."""
    return [int(np.searchsorted(offsets, leaf, "right")) - 1 for offsets in plan.offsets]


@torch.no_grad()
def score_one_at_a_time(setting):
    """Statistics made once for what candidates share, the scores of each on their own."""
    supernet, norms = setting.supernet, BatchNorms(setting.supernet)
    plan = Plan(setting.archs)
    statistics = Statistics.empty(plan)
    losses = np.zeros(len(plan.archs))
    with evaluation_mode(supernet), scope(setting.precision):
        for x, _ in setting.calibration:
            calibrate_step(supernet, norms, plan, x, statistics)
        for leaf, arch in enumerate(plan.archs):
            alone = Plan(arch[None])
            own = Statistics.empty(alone)
            own.stem, own.leaves[0] = statistics.stem, statistics.leaves[leaf]
            for level, node in enumerate(nodes_of(plan, leaf)):
                own.nodes[level][0] = statistics.nodes[level][node]
            for x, y in setting.batches:
                found = eval_step(supernet, norms, alone, x, y, "recalibrate", own)
                losses[leaf] += float(found[1])
    return losses[plan.inverse] / sum(len(y) for _, y in setting.batches)


@torch.no_grad()
def calibrate_one_at_a_time(setting):
    """Scores shared, the statistics of each candidate made on their own."""
    supernet, norms = setting.supernet, BatchNorms(setting.supernet)
    plan = Plan(setting.archs)
    statistics = Statistics.empty(plan)
    losses = 0
    with evaluation_mode(supernet), scope(setting.precision):
        for leaf, arch in enumerate(plan.archs):
            alone = Plan(arch[None])
            own = Statistics.empty(alone)
            for x, _ in setting.calibration:
                calibrate_step(supernet, norms, alone, x, own)
            statistics.stem, statistics.leaves[leaf] = own.stem, own.leaves[0]
            for level, node in enumerate(nodes_of(plan, leaf)):
                statistics.nodes[level][node] = own.nodes[level][0]
        for x, y in setting.batches:
            losses += eval_step(supernet, norms, plan, x, y, "recalibrate", statistics)[1].numpy()
    return losses[plan.inverse] / sum(len(y) for _, y in setting.batches)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", LAST, ids=label)
def test_levers(benchmark, monkeypatch, cell, precision):
    setting = Setting(cell, precision, benchmark.enabled)
    archs = setting.archs
    shared = setting.evaluator()
    shared.evaluate(archs[:2])

    def fusion_off():
        with monkeypatch.context() as patch:
            patch.setenv("FASTSHIFT_BACKEND", "reference")
            return shared.evaluate(archs).losses

    off = {
        "trie": lambda: score_one_at_a_time(setting),
        "calibration sharing": lambda: calibrate_one_at_a_time(setting),
        "fusion": fusion_off,
    }
    losses = {lever: call() for lever, call in off.items()}
    if precision == "bf16":
        full = setting.evaluator("fp32")
        off["precision"] = lambda: full.evaluate(archs)
        off["precision"]()
    turns = Turns(off if benchmark.enabled else {})
    rounds = 2 if benchmark.enabled else 1
    result = benchmark.pedantic(partial(shared.evaluate, archs), setup=turns, rounds=rounds)
    for lever, found in losses.items():
        agree(result.losses, found, setting.exact(), TOLERANCE[precision], f"no {lever}")
    note(
        benchmark,
        "evaluator levers",
        **setting.fields(result.sharing),
        sharing=round(result.sharing, 3),
        without=turns.medians(rounds),
    )
