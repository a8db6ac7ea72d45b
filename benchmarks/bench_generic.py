"""A chain of modules that no compiled kernel knows: scored as a generation, beside eager PyTorch.

MobileNetV3's blocks (expansion, depthwise convolution, Hardswish, squeeze and excitation). The
baselines score one path at a time: cached batches, no gradients, no copy of a weight, channels
first and last, with the batch norms folded into the convolutions (`fuse_conv_bn_eval`, the folding
timed) or not; the fastest is what counts. Scores are compared before anything is timed. A
population of one has nothing to share: there the ratio is that of the modules alone.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from baselines import LAYOUTS, Turns
from recording import figures, note
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastshift.evaluator import Evaluator
from fastshift.supernet import ChainSupernet, recalibrate
from fastshift.testing import random_archs, randomise
from fastshift.tracing import conv_norm_pairs

SIZE, CALIBRATION, SCORED, POPULATION = 64, 32, 32, 50
# Input and output channels and stride of every choice block.
BLOCKS = [(16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 80, 2), (80, 80, 1)]
# Expansion, kernel, squeeze and excitation of every candidate op.
OPS = [(3, 3, False), (3, 5, True), (6, 3, True), (6, 5, True)]


class Excitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        gate = functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))
        return x * functional.hardsigmoid(self.up(gate))


class Bottleneck(nn.Module):
    """MobileNetV3's block."""

    def __init__(self, width, out, stride, expansion, kernel, excites) -> None:
        super().__init__()
        hidden = width * expansion
        middle = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.body = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            middle,
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            Excitation(hidden) if excites else nn.Identity(),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.adds = stride == 1 and width == out

    def forward(self, x):
        y = self.body(x)
        return x + y if self.adds else y


def supernet() -> ChainSupernet:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
    head = nn.Sequential(
        nn.Conv2d(80, 240, 1, bias=False),
        nn.BatchNorm2d(240),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(240, 10),
    )
    blocks = [[Bottleneck(*shape, *op) for op in OPS] for shape in BLOCKS]
    return randomise(ChainSupernet(stem, blocks, head, input_shape=(3, SIZE, SIZE))).eval()


def batches(memory_format):
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (CALIBRATION, SCORED):
        images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
        labels = torch.arange(count) % 10
        parts.append([(images.contiguous(memory_format=memory_format), labels)])
    return parts


def folded(net: nn.Sequential) -> nn.Sequential:
    """A path with its norms folded; what has no norm is not copied."""
    parts = []
    for part in net:
        replaced = {}
        for conv, norm, _ in conv_norm_pairs(part):
            replaced[id(conv)] = fuse_conv_bn_eval(conv, norm)
            replaced[id(norm)] = nn.Identity()
        weights = {id(t): t for t in (*part.parameters(), *part.buffers())}
        parts.append(copy.deepcopy(part, {**weights, **replaced}) if replaced else part)
    return nn.Sequential(*parts)


@torch.no_grad()
def one_at_a_time(net, archs, calibration, scored, *, folds=False, recalibrates=True):
    """Mean cross-entropies by plain modules that share the supernet's weights."""
    losses = []
    for arch in archs:
        ops = [block[int(choice)] for block, choice in zip(net.blocks, arch, strict=True)]
        path = nn.Sequential(net.stem, *ops, net.head)
        if recalibrates:
            recalibrate(path, calibration)
        if folds:
            path = folded(path)
        losses.append(np.mean([float(functional.cross_entropy(path(x), y)) for x, y in scored]))
    return np.array(losses)


def baselines(net, policy):
    """Every way to score one path at a time: archs in, losses out."""

    def way(memory_format, folds):
        own = copy.deepcopy(net).to(memory_format=memory_format)
        parts = batches(memory_format)
        recalibrates = policy == "recalibrate"
        return lambda archs: one_at_a_time(
            own, archs, *parts, folds=folds, recalibrates=recalibrates
        )

    return {
        f"{kind} {name}": way(memory_format, kind == "folded")
        for kind in ("eager", "folded")
        for name, memory_format in LAYOUTS.items()
    }


@pytest.mark.parametrize("policy", ["recalibrate", "running"])
@pytest.mark.parametrize("population", [POPULATION, 1])
def test_generation(benchmark, monkeypatch, population, policy):
    net = supernet()
    calibration, scored = batches(torch.contiguous_format)
    archs = random_archs(net.space, population if benchmark.enabled else 2)
    score = Evaluator(net, scored, calibration=calibration, batch_norm=policy)
    found = score.evaluate(archs)
    ways = baselines(net, policy)
    for way in ways.values():
        np.testing.assert_allclose(found.losses[:2], way(archs[:2]), rtol=1e-4)
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    np.testing.assert_allclose(found.losses, score.evaluate(archs).losses, rtol=1e-4)
    monkeypatch.delenv("FASTSHIFT_BACKEND")
    timed = benchmark.enabled
    turns = Turns({name: partial(way, archs) for name, way in ways.items() if timed})
    rounds = (2 if population > 1 else 9) if timed else 1
    benchmark.pedantic(partial(score.evaluate, archs), setup=turns, rounds=rounds)
    if benchmark.stats is None:
        return
    note(
        benchmark,
        "modules' path",
        what=f"{population} {policy}",
        space="chain of modules",
        size=SIZE,
        calibration_images=CALIBRATION,
        scored_images=SCORED,
        precision="fp32",
        archs_per_second=round(len(archs) / benchmark.stats.stats.median, 1),
        **figures(benchmark.stats.stats.data, turns.times, found.sharing),
    )
