"""Training: one accumulated shift update on a generation of 50, and one pre-training step.

The baseline runs one path at a time through plain modules and adds the gradients up, channels first
and channels last, the fastest taken. Losses are compared before anything is timed; gradients, which
in fp32 depend on the layout by a few percent in networks as deep as these, are the tests' matter.
"""

from __future__ import annotations

from time import perf_counter

import generations
import numpy as np
import pytest
import torch
from baselines import LAYOUTS, layout
from torch.nn import functional

from fastshift import spaces
from fastshift.batch_norm import BatchNorms, MovingAverages
from fastshift.steps import train_step
from fastshift.supernet import Supernet
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

# Space, image size, images of an update on a generation, and of a pre-training step.
CASES = [("nasbench_macro", 32, 16, 64), ("shufflenet_v2", 64, 16, 64)]


def setting(name, size, images):
    torch.manual_seed(0)
    supernet = Supernet(spaces.build(name, image_size=size, num_classes=10)).train()
    for module in supernet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    supernet.to(memory_format=torch.channels_last)
    return supernet, torch.randn(images, 3, size, size), torch.arange(images) % 10


def one_at_a_time(net, archs, images, labels):
    """Add up the gradients of every path's loss; the losses."""
    net.zero_grad(set_to_none=True)
    losses = []
    for arch in archs:
        loss = functional.cross_entropy(net(images, arch), labels)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


def baselines(supernet, archs, images, labels, rounds):
    """Seconds by layout, and the losses."""
    times, losses = {}, None
    for name, memory_format in LAYOUTS.items():
        net = layout(supernet, name)
        rows = images.contiguous(memory_format=memory_format)
        one_at_a_time(net, archs[:1], rows, labels)
        for _ in range(rounds):
            begin = perf_counter()
            losses = one_at_a_time(net, archs, rows, labels)
            taken = perf_counter() - begin
            times[name] = min(times.get(name, taken), taken)
    return times, losses


def run(benchmark, supernet, archs, images, labels, rounds):
    """Compare the losses, then time whole updates."""
    plan = Plan(np.asarray(archs, np.uint8))
    norms = BatchNorms(supernet)
    times, wanted = baselines(supernet, archs, images, labels, rounds)
    averages = MovingAverages(norms)
    found = train_step(supernet, norms, plan, images, labels, averages, key=(0, 0))
    np.testing.assert_allclose(found.numpy()[plan.inverse], wanted, rtol=1e-3)
    supernet.zero_grad(set_to_none=True)
    trainer = PathTrainer(supernet, lr=1e-6)
    benchmark.pedantic(
        trainer.update,
        (plan, images, labels),
        {"position": 0},
        rounds=max(3, rounds),
        warmup_rounds=1,
    )
    return times, plan


@pytest.mark.parametrize("generation", generations.KEPT)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_accumulate(benchmark, case, generation):
    supernet, images, labels = setting(case[0], case[1], case[2])
    archs = generations.load(case[0])[generation][: None if benchmark.enabled else 2]
    times, plan = run(benchmark, supernet, archs, images, labels, 1)
    record(benchmark, times, plan.sharing(supernet.space.flops_table))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_pretraining_step(benchmark, case):
    supernet, images, labels = setting(case[0], case[1], case[3])
    archs = generations.load(case[0])[0][:1]
    times, _ = run(benchmark, supernet, archs, images, labels, 5)
    record(benchmark, times, 1.0)


def record(benchmark, times, sharing):
    if benchmark.stats is None:
        return
    own = benchmark.stats.stats.min
    best = min(times.values())
    benchmark.extra_info.update(
        baseline_seconds={key: round(value, 4) for key, value in times.items()},
        sharing=round(sharing, 3),
        ratio=round(best / own, 2),
        ratio_over_sharing=round(best / own / sharing, 2),
        threads=torch.get_num_threads(),
    )
    print(f"\n{benchmark.name}: {benchmark.extra_info}")
