"""One candidate op: the compiled CPU kernels beside PyTorch's best, inference and training.

PyTorch runs the same op channels first and channels last, for inference with its batch norms
folded into the convolutions as well; `FASTSHIFT_BENCH_COMPILE=1` adds `torch.compile`. The fastest
of them is the baseline. Results are compared before they are timed. `extra_info` holds GFLOP/s, the
share of this machine's matrix product, every baseline's time and the ratio to the fastest.
"""

from __future__ import annotations

import pytest
import torch
from baselines import LAYOUTS, best_seconds, ceiling, compiled, folded, layout

from fastshift import spaces
from fastshift.cpu import CpuBlock
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


@pytest.fixture(scope="module")
def peak():
    return ceiling()


def case(name, size, images, level, choice):
    space = spaces.build(name, image_size=size)
    op = space.blocks[level][choice]
    height = chain_output_size(space.stem, size)
    for before in space.blocks[:level]:
        height = before[0].output_size(height)
    torch.manual_seed(0)
    x = torch.randn(images, op.in_channels, height, height).relu()
    return OpModule(op), x, 2 * op.flops(height) * images


def record(benchmark, peak, seconds, baselines, flops):
    benchmark.extra_info["baseline_ms"] = {k: round(1e3 * v, 3) for k, v in baselines.items()}
    best = min(baselines, key=baselines.get)
    benchmark.extra_info.update(
        baseline=best,
        ratio=round(baselines[best] / seconds, 2),
        gflops=round(flops / seconds / 1e9, 1),
        share_of_ceiling=round(flops / seconds / 1e9 / peak["gflops"], 3),
        threads=torch.get_num_threads(),
    )
    print(f"\n{benchmark.name}: {benchmark.extra_info}")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: "-".join(map(str, b)))
def test_inference(benchmark, peak, block):
    module, x, flops = case(*block)
    module.eval()
    core = CpuBlock(module)
    moments = [(unit.norm.running_mean, unit.norm.running_var) for unit in core.units]
    ours = x.contiguous(memory_format=torch.channels_last)
    baselines = {}
    with torch.no_grad():
        want = module.double()(x.double())
        module.float()
        assert global_error([core.infer(ours, moments)], [want]) < 1e-5
        for name, memory_format in LAYOUTS.items():
            rows = x.contiguous(memory_format=memory_format)
            kinds = {"eager": layout(module, name), "folded": layout(folded(module), name)}
            kinds["compiled"] = compiled(kinds["folded"])
            for kind, net in kinds.items():
                if net is not None:
                    baselines[f"{kind} {name}"] = best_seconds(lambda n=net, r=rows: n(r))
        benchmark(core.infer, ours, moments)
    if benchmark.stats is not None:
        record(benchmark, peak, benchmark.stats.stats.min, baselines, flops)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: "-".join(map(str, b)))
def test_training(benchmark, peak, block):
    module, x, flops = case(*block)
    module.train()
    core = CpuBlock(module)
    rows = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        dy = torch.randn_like(core.train(rows)[0])

    def ours():
        core.train(rows)[0].backward(dy)

    baselines = {}
    for name, memory_format in LAYOUTS.items():
        net = layout(module, name)
        own = x.contiguous(memory_format=memory_format).requires_grad_()
        own_dy = dy.contiguous(memory_format=memory_format)
        for kind, call in (("eager", net), ("compiled", compiled(net))):
            if call is not None:
                baselines[f"{kind} {name}"] = best_seconds(
                    lambda c=call, r=own, d=own_dy: c(r).backward(d)
                )
        with torch.no_grad():
            assert global_error([core.train(rows)[0]], [net(own)]) < 1e-5
    benchmark(ours)
    if benchmark.stats is not None:
        record(benchmark, peak, benchmark.stats.stats.min, baselines, 3 * flops)
