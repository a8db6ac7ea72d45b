"""Two pools of threads in one process: our kernels right after PyTorch's own parallel ops.

OpenMP's threads spin for a while when a parallel op ends, and would then hold the cores that the
kernels' threads need; and the other way round. The ratio is the time of a call that follows one of
its own pool over that of a call that follows one of the other's: 1 where neither is in the other's
way, less where it is. Nothing to measure with one thread.
"""

from __future__ import annotations

import pytest
import torch
from baselines import seconds
from bench_blocks import BLOCKS, Case
from recording import figures, note


@pytest.mark.parametrize("block", [BLOCKS[3], BLOCKS[7]], ids=lambda b: "-".join(map(str, b)))
@pytest.mark.parametrize("second", ["kernels", "torch"])
def test_beside_torch(benchmark, block, second):
    if benchmark.enabled and torch.get_num_threads() < 2:
        pytest.skip("one thread")
    case = Case(block, "fp32", benchmark.enabled)
    module = case.module.eval()
    moments = [(norm.running_mean, norm.running_var) for _, norm in case.norms.of(module)]
    # Some milliseconds of PyTorch's: a shorter op measures how a thread is woken.
    repeats = -(-(2**24 if benchmark.enabled else 1) // case.x.numel())
    rows = case.x.repeat(repeats, 1, 1, 1)
    calls = {
        "kernels": lambda: case.norms.impose(module, case.rows, moments),
        "torch": lambda: torch.relu(rows),
    }
    own = calls[second]
    other = calls["torch" if second == "kernels" else "kernels"]
    undisturbed = []

    def setup():
        own()
        undisturbed.append(seconds(own)[0])
        other()

    with torch.no_grad():
        rounds = 41 if benchmark.enabled else 1
        benchmark.pedantic(own, setup=setup, rounds=rounds, warmup_rounds=2)
    if benchmark.stats is None:
        return
    note(
        benchmark,
        "beside the other pool",
        what=f"{second} second",
        space=case.name,
        size=case.size,
        block=case.level,
        choice=case.choice,
        precision="fp32",
        **figures(benchmark.stats.stats.data, {"after its own": undisturbed}),
    )
