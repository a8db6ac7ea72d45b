"""Two baselines on a device: a strong one, one path at a time, and the released code's loop.

The strong one has its data on the device, no gradients in scoring, no wait for the device between
candidates, and is every combination of channels first and last, eager and compiled block by block
(the compilation timed apart), and for fp32 PyTorch's TF32 as well: the fastest on some candidates
runs them all. The loop is that of the method's released code: fp32, channels first, autograd on
while it scores, a read of every loss; a few candidates stand for all by their multiply-adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from baselines import LAYOUTS, Variant
from bench_generation import Loop, spread
from gpu_ceilings import plain_fp32
from gpu_items import Bench
from gpu_timing import Stopwatch
from torch import Tensor, nn
from torch.nn import functional

from fastshift.supernet import Supernet

__all__ = ["Baseline", "Loop", "compiled_ops", "fastest", "score", "spread", "train", "ways"]

COMPILE_SECONDS = 40.0  # of a variant, beyond which it is left out

Batch = tuple[Tensor, Tensor]


@dataclass
class Baseline:
    """One way to run a supernet's paths one at a time.

    Attributes:
        variant: layout, eager or compiled, autocast or cast.
        net: a copy of the supernet for it.
        tf32: whether fp32 products and convolutions may be TF32's.
    """

    variant: Variant
    net: Supernet
    tf32: bool = False

    @property
    def name(self) -> str:
        """As records show it."""
        return self.variant.name + (" tf32" if self.tf32 else "")

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What its calls run under."""
        with self.variant.scope(), plain_fp32(self.tf32):
            yield

    def batch(self, batch: Batch) -> Batch:
        """A batch as it takes it."""
        return self.variant.rows(batch[0]), batch[1]


def ways(
    bench: Bench, supernet: Supernet, precision: str, *, training: bool, compiles: bool
) -> list[Baseline]:
    """Every combination, eager ones first.

    Args:
        bench: of the device.
        supernet: whose copies they run.
        precision: `fp32` or `bf16`.
        training: whether for updates: autocast alone, since weights stay float32.
        compiles: whether with those that are compiled.
    """
    casts = (False, True) if precision == "bf16" and not training else (False,)
    kinds = ("eager", "compiled") if compiles else ("eager",)
    found = []
    for kind in kinds:
        for layout in LAYOUTS:
            for cast in casts:
                variant = Variant(precision, kind, layout, cast, bench.device.type)
                for tf32 in (False, True) if precision == "fp32" else (False,):
                    if tf32 and bench.device.type != "cuda":
                        continue
                    net = variant.copy_of(supernet)
                    for parameter in net.parameters():
                        parameter.grad = None
                    found.append(Baseline(variant, net, tf32))
    return found


def compiled_ops(
    bench: Bench, baseline: Baseline, images: Tensor, *, training: bool
) -> float | None:
    """Compile a baseline's candidate ops, each by a first call; None where that took too long.

    Args:
        bench: of the device; what is left out is noted there.
        baseline: whose `variant.kind` is `compiled`.
        images: a batch as it takes it, `[N, C, H, W]`.
        training: whether with gradients and their pass back.

    Returns:
        Seconds.
    """
    begin, net = time.perf_counter(), baseline.net
    limit = min(COMPILE_SECONDS, bench.clock.left / 2)
    with baseline.scope(), torch.set_grad_enabled(training):
        x = net.stem(images).detach()
        for block in net.blocks:
            rows = []
            for op in block:
                for mode in (True,) if training else (True, False):
                    _set_norms(op.train(mode))
                    y = op(x.clone().requires_grad_(training))
                    if training and y.requires_grad:
                        y.sum().backward()
                rows.append(y.detach())
                if time.perf_counter() - begin > limit:
                    torch.cuda.synchronize() if bench.device.type == "cuda" else None
                    return None
            x = rows[0]
    net.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def _set_norms(module: nn.Module) -> None:
    """Let batch norms take over a batch's moments whole, with nothing to count or to wait for."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum, norm.num_batches_tracked = 1.0, None


@torch.no_grad()
def score(
    baseline: Baseline, archs: Sequence, calibration: Batch, batches: Sequence[Batch]
) -> Tensor:
    """Calibrate and score candidates one at a time; waits for nothing.

    Args:
        baseline: the way.
        archs: choices, `[P, L]`.
        calibration: the one batch whose moments each path's batch norms take.
        batches: scored.

    Returns:
        Mean cross-entropies, nats, `[P]`.
    """
    net, losses = baseline.net, []
    with baseline.scope():
        for arch in archs:
            ops = [block[int(choice)] for block, choice in zip(net.blocks, arch, strict=True)]
            path = nn.Sequential(net.stem, *ops, net.head)
            _set_norms(path.eval())
            norms = [m for m in path.modules() if isinstance(m, nn.BatchNorm2d)]
            for norm in norms:
                norm.train()
            path(calibration[0])
            path.eval()
            found = [functional.cross_entropy(path(x).float(), y) for x, y in batches]
            losses.append(torch.stack(found).mean())
    return torch.stack(losses)


def train(
    baseline: Baseline, archs: Sequence, batch: Batch, optimizer: torch.optim.Optimizer
) -> Tensor:
    """Add up the gradients of candidates one at a time and take one step; waits for nothing.

    Returns:
        Cross-entropies, nats, `[P]`.
    """
    net, losses = baseline.net, []
    optimizer.zero_grad(set_to_none=True)
    with baseline.scope():
        for arch in archs:
            x = net.stem(batch[0])
            for block, choice in zip(net.blocks, arch, strict=True):
                x = block[int(choice)](x)
            loss = functional.cross_entropy(net.head(x).float(), batch[1])
            loss.backward()
            losses.append(loss.detach())
    optimizer.step()
    return torch.stack(losses)


def fastest(
    calls: dict[str, Callable[[Sequence], object]], sample: np.ndarray, stopwatch: Stopwatch
) -> tuple[str, dict[str, float]]:
    """Try every call twice on some candidates: the fastest second time, and all of them, ms."""
    tried = {}
    for name, call in calls.items():
        call(sample)
        tried[name] = stopwatch(lambda c=call: c(sample))
    shown = {name: float(f"{1e3 * seconds:.4g}") for name, seconds in tried.items()}
    return min(tried, key=tried.get), shown
