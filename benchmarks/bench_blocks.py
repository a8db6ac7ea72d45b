"""One candidate op: the compiled CPU kernels beside PyTorch's best, inference and training.

Every baseline's median is recorded. Rows are compared before they are timed: inference with
float64, training with PyTorch's in the same precision; bf16 loosely, since autocast rounds every
tensor.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from baselines import PRECISIONS, Turns, folded, scope, seconds, variants
from recording import figures, kernels, note
from torch import nn

from fastshift import spaces
from fastshift.batch_norm import BatchNorms
from fastshift.layers import OpModule
from fastshift.ops import chain_output_size
from fastshift.testing import global_error

# Space, image size, images, block and choice: early and late, each kind of op.
BLOCKS = [
    ("shufflenet_v2", 224, 32, 1, 0),
    ("shufflenet_v2", 224, 32, 9, 1),
    ("shufflenet_v2", 224, 32, 9, 3),
    ("shufflenet_v2", 224, 32, 12, 2),
    ("shufflenet_v2", 64, 32, 1, 0),
    ("shufflenet_v2", 64, 32, 9, 3),
    ("nasbench_macro", 32, 64, 1, 1),
    ("nasbench_macro", 32, 64, 3, 2),
    ("nasbench_macro", 32, 64, 6, 2),
]
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}
each_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda b: "-".join(map(str, b)))
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


class Case:
    """One op, its input, and the call that picks what runs it."""

    def __init__(self, block, precision, enabled):
        self.name, self.size, images, self.level, self.choice = block
        self.images = images if enabled else 2
        self.rounds = 7 if enabled else 1
        space = spaces.build(self.name, image_size=self.size)
        op = space.blocks[self.level][self.choice]
        height = chain_output_size(space.stem, self.size)
        for before in space.blocks[: self.level]:
            height = before[0].output_size(height)
        torch.manual_seed(0)
        self.module = OpModule(op)
        self.x = torch.randn(self.images, op.in_channels, height, height).relu()
        if precision == "bf16":
            self.x = self.x.bfloat16()
        self.rows = self.x.contiguous(memory_format=torch.channels_last)
        self.gflop = 2e-9 * op.flops(height) * self.images
        self.precision = precision
        parts = {"stem": self.module, "head": nn.Identity(), "blocks": []}
        self.norms = BatchNorms(SimpleNamespace(**parts, memory_format=None))

    def measure(self, benchmark, call, calls):
        """Time a call in turns with the baselines."""
        turns = Turns(calls, self.precision if benchmark.enabled else None)
        benchmark.pedantic(call, setup=turns, rounds=self.rounds, warmup_rounds=2)
        return turns

    def note(self, benchmark, item, turns, gflop, compile_seconds):
        if benchmark.stats is None:
            return
        with scope(self.precision):
            ran = kernels(self.module, self.rows)
        note(
            benchmark,
            item,
            space=self.name,
            size=self.size,
            block=self.level,
            choice=self.choice,
            images=self.images,
            precision=self.precision,
            kernels=ran,
            gflop=round(gflop, 4),
            compile_seconds=compile_seconds,
            **figures(benchmark.stats.stats.data, turns.times, peaks=turns.peaks),
        )


def first_call(variant, call):
    """Seconds of a compiled variant's first call; nothing of another's."""
    return {variant.name: round(seconds(call)[0], 1)} if variant.kind == "compiled" else {}


@each_precision
@each_block
def test_inference(benchmark, block, precision):
    case = Case(block, precision, benchmark.enabled)
    module = case.module.eval()
    moments = [(norm.running_mean, norm.running_var) for _, norm in case.norms.of(module)]
    calls, compiling = {}, {}
    with torch.no_grad():
        want = module.double()(case.x.double())
        module.float()

        def ours():
            with scope(precision):
                return case.norms.impose(module, case.rows, moments)

        assert global_error([ours()], [want]) < TOLERANCE[precision]
        for variant in variants(precision):
            net, rows = variant.copy_of(module), variant.rows(case.x)
            net = folded(net) if variant.kind == "folded" else net

            def call(net=net, rows=rows, variant=variant):
                with variant.scope():
                    return net(rows)

            compiling |= first_call(variant, call)
            calls[variant.name] = call
        turns = case.measure(benchmark, ours, calls)
    case.note(benchmark, "block inference", turns, case.gflop, compiling)


@each_precision
@each_block
def test_training(benchmark, block, precision):
    case = Case(block, precision, benchmark.enabled)
    module = case.module.train()
    rows = case.rows.requires_grad_()

    def ours(dy=None):
        with scope(precision):
            y = case.norms.collect(module, rows)[0]
        return y if dy is None else y.backward(dy)

    with torch.no_grad():
        given = ours()
        own_dy = torch.randn_like(given)
    calls, compiling = {}, {}
    for variant in variants(precision, training=True):
        net, own = variant.copy_of(module), variant.rows(case.x.detach()).requires_grad_()
        dy = variant.rows(own_dy)

        def call(net=net, own=own, dy=dy, variant=variant):
            with variant.scope():
                y = net(own)
            y.backward(dy.to(y.dtype))

        compiling |= first_call(variant, call)
        calls[variant.name] = call
        with torch.no_grad(), variant.scope():
            assert global_error([given], [net(own)]) < TOLERANCE[precision]
    turns = case.measure(benchmark, lambda: ours(own_dy), calls)
    case.note(benchmark, "block training", turns, 3 * case.gflop, compiling)
