"""Training: one accumulated shift update on a generation of 50, one pre-training step; the levers.

The baseline runs one path at a time through plain modules, adds the gradients up and takes one step
of SGD. Losses are compared before anything counts; gradients, which in fp32 depend on the layout by
a few percent in networks as deep as these, are the tests' matter.
"""

from __future__ import annotations

from functools import partial

import generations
import numpy as np
import pytest
import torch
from baselines import PRECISIONS, Turns, agree, race, scope, variants
from recording import figures, kernels, note
from torch.nn import functional

from fastshift import spaces
from fastshift.batch_norm import BatchNorms, MovingAverages
from fastshift.steps import train_step
from fastshift.supernet import Supernet
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

# Space, image size, images of an update on a generation, and of a pre-training step.
CASES = [("nasbench_macro", 32, 8, 64), ("shufflenet_v2", 64, 8, 64)]
LARGE = ("shufflenet_v2", 224, 4, 32)  # of few figures: its updates take seconds
# Space, image size, images, generation. 64 images, nearer to the 150 published, take minutes.
UPDATES = [(*case[:3], generation) for case in CASES for generation in generations.KEPT]
UPDATES.append((*LARGE[:3], generations.KEPT[-1]))
MANY = [(*case[:2], 64, generations.KEPT[-1]) for case in CASES]
UPDATE_CELLS = [
    pytest.param(*cell, precision, id=f"{cell[0]}-{cell[1]}-{cell[3]}{more}-{precision}")
    for cells, precisions, more in ((UPDATES, PRECISIONS, ""), (MANY, ("fp32",), "-64_images"))
    for cell in cells
    for precision in precisions
]
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}
SAMPLE = slice(0, None, 17)
# A rate of nought keeps every variant at the same weights; the work is the same.
SGD = {"lr": 0.0, "momentum": 0.9, "weight_decay": 4e-5}
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")


def candidates(archs, enabled, precision):
    """All candidates, or a few where nothing is timed: losses of two in bf16 are luck."""
    return archs[: None if enabled else 8 if precision == "bf16" else 2]


class Setting:
    """A supernet in training mode, one batch, and the candidates of an update."""

    def __init__(self, case, images, precision, archs):
        self.space, self.size = case[:2]
        self.precision, self.archs = precision, archs
        torch.manual_seed(0)
        space = spaces.build(self.space, image_size=self.size, num_classes=10)
        self.supernet = Supernet(space).train()
        for module in self.supernet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.supernet.to(memory_format=torch.channels_last)
        self.images = torch.randn(images, 3, self.size, self.size)
        self.labels = torch.arange(images) % 10
        self.plan = Plan(np.asarray(archs, np.uint8))
        self.sharing = self.plan.sharing(space.flops_table)
        self.norms = BatchNorms(self.supernet)

    def losses(self, plan, precision=None):
        """Of a plan's rows, without a step; the gradients are added up."""
        with scope(precision or self.precision):
            found = train_step(
                self.supernet,
                self.norms,
                plan,
                self.images,
                self.labels,
                MovingAverages(self.norms),
                key=(0, 0),
            )
        return found.numpy()[plan.inverse]

    def check(self, wanted, what="the baseline", plan=None):
        """Compare the shared losses, of the candidates or of another plan, with others."""
        plan = plan or self.plan
        found = self.losses(plan)
        exact = None if self.precision == "fp32" else self.losses(plan, "fp32")
        self.supernet.zero_grad(set_to_none=True)
        agree(found, wanted, exact, TOLERANCE[self.precision], what)

    def update(self, precision=None):
        """One whole update, ready to be called."""
        trainer = PathTrainer(
            self.supernet, **SGD, label_smoothing=0.0, precision=precision or self.precision
        )
        return lambda: trainer.update(self.plan, self.images, self.labels, position=0)

    def fields(self):
        with scope(self.precision):
            ran = kernels(self.supernet.stem, self.images)
        computed = 6e-9 * float(self.supernet.space.flops(self.archs).sum()) * len(self.labels)
        return {
            "space": self.space,
            "size": self.size,
            "images": len(self.labels),
            "precision": self.precision,
            "kernels": ran,
            "gflop": round(computed / self.sharing, 3),
        }


def contestants(setting):
    calls = {}
    for variant in variants(setting.precision, training=True):
        net, images = variant.copy_of(setting.supernet), variant.rows(setting.images)
        optimizer = torch.optim.SGD(net.parameters(), **SGD)

        def call(archs, net=net, images=images, optimizer=optimizer, variant=variant):
            optimizer.zero_grad(set_to_none=True)
            losses = []
            with variant.scope():
                for arch in archs:
                    loss = functional.cross_entropy(net(images, arch).float(), setting.labels)
                    loss.backward()
                    losses.append(float(loss.detach()))
            optimizer.step()
            return losses

        calls[variant.name] = call
    return calls


@pytest.mark.parametrize(("space", "size", "images", "generation", "precision"), UPDATE_CELLS)
def test_accumulate(benchmark, space, size, images, generation, precision):
    if not benchmark.enabled and (generation != generations.KEPT[-1] or images == 64):
        pytest.skip("one generation, of few images, is enough where nothing is timed")
    archs = generations.load(space)[generation]
    archs = candidates(archs, benchmark.enabled, precision)
    setting = Setting((space, size), images, precision, archs)
    calls = contestants(setting)
    tried, times, losses, compiling = race(calls, archs[SAMPLE], archs, benchmark.enabled)
    setting.check(losses)
    update = setting.update()
    update()
    timed = benchmark.enabled
    turns = Turns(
        {name: partial(calls[name], archs) for name in times if timed}, precision if timed else None
    )
    benchmark.pedantic(update, setup=turns, rounds=3 if timed else 1)
    if benchmark.stats is None:
        return
    note(
        benchmark,
        "accumulate",
        **({"what": "64 images"} if images == 64 else {}),
        **setting.fields(),
        generation=generation,
        **figures(benchmark.stats.stats.data, turns.times, setting.sharing, turns.peaks),
        sampled_seconds={name: round(t, 3) for name, t in tried.items()},
        compile_seconds=compiling,
    )


@each_precision
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=lambda c: f"{c[0]}-{c[1]}")
def test_pretraining_step(benchmark, case, precision):
    archs = generations.load(case[0])[0][:1]
    setting = Setting(case, case[3] if benchmark.enabled else 8, precision, archs)
    calls = contestants(setting)
    rounds = 5 if benchmark.enabled else 1
    # One path's loss in bf16 is luck; some paths' are compared.
    some = generations.load(case[0])[0][:8]
    setting.check(next(iter(calls.values()))(some), plan=Plan(some))
    turns = Turns(
        {name: partial(call, archs) for name, call in calls.items()},
        precision if benchmark.enabled else None,
    )
    benchmark.pedantic(setting.update(), setup=turns, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return
    figure = figures(benchmark.stats.stats.data, turns.times, peaks=turns.peaks)
    note(benchmark, "pre-training step", **setting.fields(), **figure)


@each_precision
@each_case
def test_levers(benchmark, monkeypatch, case, precision):
    archs = generations.load(case[0])[generations.KEPT[-1]]
    archs = candidates(archs, benchmark.enabled, precision)
    setting = Setting(case, case[2], precision, archs)
    alone = [Plan(arch[None].astype(np.uint8)) for arch in archs]
    optimizer = torch.optim.SGD(setting.supernet.parameters(), **SGD)

    def trie_off():
        optimizer.zero_grad(set_to_none=True)
        losses = np.concatenate([setting.losses(plan) for plan in alone])
        optimizer.step()
        return losses

    def fusion_off():
        with monkeypatch.context() as patch:
            patch.setenv("FASTSHIFT_BACKEND", "reference")
            return update()

    setting.check(trie_off(), "one path at a time")
    with monkeypatch.context() as patch:
        patch.setenv("FASTSHIFT_BACKEND", "reference")
        losses = setting.losses(setting.plan)
    setting.supernet.zero_grad(set_to_none=True)
    setting.check(losses, "PyTorch's ops")
    update = setting.update()
    off = {"trie": trie_off, "fusion": fusion_off}
    if precision == "bf16":
        off["precision"] = setting.update("fp32")
    turns = Turns(off if benchmark.enabled else {})
    # The warm-up is each lever's too.
    rounds = 3 if benchmark.enabled else 1
    benchmark.pedantic(update, setup=turns, rounds=rounds, warmup_rounds=1)
    note(
        benchmark,
        "accumulate levers",
        **setting.fields(),
        generation=generations.KEPT[-1],
        sharing=round(setting.sharing, 3),
        without=turns.medians(rounds),
    )
