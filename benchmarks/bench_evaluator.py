"""A generation of 50 calibrated and scored: each lever alone, beside a strong sequential baseline.

The baseline scores one path at a time: cached batches, no gradients, no copy of a weight, channels
first and channels last, the fastest taken. Scores are compared before anything is timed. The
levers: the trie (PyTorch's ops, shared), fused kernels (one path at a time), and both, the default.
"""

from __future__ import annotations

import copy
from time import perf_counter

import generations
import numpy as np
import pytest
import torch
from baselines import LAYOUTS, ceiling, layout
from torch import nn
from torch.nn import functional

from fastshift import spaces
from fastshift.evaluator import Evaluator
from fastshift.supernet import Supernet, recalibrate

# Space, image size, calibration and scored images.
CASES = [("nasbench_macro", 32, 32, 64), ("shufflenet_v2", 64, 32, 64)]
FOUND: dict[str, dict] = {}


def setting(name, size, calibration, scored):
    torch.manual_seed(0)
    supernet = Supernet(spaces.build(name, image_size=size, num_classes=10))
    supernet.to(memory_format=torch.channels_last).eval()
    images = torch.randn(calibration + scored, 3, size, size)
    labels = torch.arange(calibration + scored) % 10
    first = [(images[:calibration], labels[:calibration])]
    return supernet, first, [(images[calibration:], labels[calibration:])]


@torch.no_grad()
def one_at_a_time(supernet, archs, calibration, batches):
    """Mean cross-entropies by plain modules that share the supernet's weights."""
    losses = []
    for arch in archs:
        ops = [block[int(choice)] for block, choice in zip(supernet.blocks, arch, strict=True)]
        net = recalibrate(nn.Sequential(supernet.stem, *ops, supernet.head), calibration)
        losses.append(np.mean([float(functional.cross_entropy(net(x), y)) for x, y in batches]))
    return np.array(losses)


def seconds(call):
    begin = perf_counter()
    found = call()
    return perf_counter() - begin, found


@pytest.fixture(scope="module")
def peak():
    return ceiling()


@pytest.mark.parametrize("generation", generations.KEPT)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_generation(benchmark, peak, monkeypatch, case, generation):
    supernet, calibration, batches = setting(*case)
    archs = generations.load(case[0])[generation]
    shared = Evaluator(supernet, batches, calibration=calibration)
    shared.evaluate(archs[:2])
    result = benchmark.pedantic(shared.evaluate, (archs,), rounds=3, warmup_rounds=0)
    if benchmark.stats is None:
        archs = archs[:2]
        result = shared.evaluate(archs)
    times = {}
    for name, memory_format in LAYOUTS.items():
        net = layout(copy.deepcopy(supernet), name)
        move = [
            [(x.contiguous(memory_format=memory_format), y) for x, y in part]
            for part in (calibration, batches)
        ]
        one_at_a_time(net, archs[:2], *move)
        times[f"sequential {name}"], losses = seconds(
            lambda n=net, m=move: one_at_a_time(n, archs, *m)
        )
        np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    alone = [archs[i : i + 1] for i in range(len(archs))]
    times["fusion alone"], _ = seconds(lambda: [shared.evaluate(arch) for arch in alone])
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    times["trie alone"], plain = seconds(lambda: shared.evaluate(archs))
    np.testing.assert_allclose(result.losses, plain.losses, rtol=1e-4)
    if benchmark.stats is None:
        return
    best = min(times["sequential nchw"], times["sequential nhwc"])
    own = benchmark.stats.stats.min
    images = case[2] + case[3]
    gflops = 2e-9 * float(supernet.space.flops(archs).sum()) * images / own
    benchmark.extra_info.update(
        seconds={key: round(value, 3) for key, value in times.items()},
        sharing=round(result.sharing, 3),
        ratio=round(best / own, 2),
        ratio_over_sharing=round(best / own / result.sharing, 2),
        archs_per_second=round(len(archs) / own, 1),
        share_of_ceiling_times_sharing=round(gflops / peak["gflops"] / result.sharing, 3),
        threads=torch.get_num_threads(),
    )
    print(f"\n{benchmark.name}: {benchmark.extra_info}")
