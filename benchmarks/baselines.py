"""What the compiled CPU core is timed beside: PyTorch's own best, one path at a time.

The baseline is eager PyTorch on cached data, channels first and channels last, in the precision of
what it is compared with; `FASTSHIFT_BENCH_COMPILE=1` adds `torch.compile` block by block. Beyond
that definition, batch norms folded into their convolutions stand apart as `folded`. In bf16 each
runs under autocast, for inference with its convolutions cast to bfloat16 as well (`cast`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastshift.evaluator import PRECISIONS, precision_scope
from fastshift.layers import ConvUnit

__all__ = [
    "LAYOUTS",
    "PRECISIONS",
    "Variant",
    "agree",
    "ceiling",
    "folded",
    "median_seconds",
    "race",
    "scope",
    "variants",
]

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Compiling costs minutes; it is asked for.
COMPILES = os.environ.get("FASTSHIFT_BENCH_COMPILE") == "1"


def scope(precision: str, device: str = "cpu") -> AbstractContextManager:
    """Autocast on a device for `bf16`, nothing for `fp32`."""
    return precision_scope(precision, torch.device(device))


def median_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """The median of some calls, after one that is not counted."""
    call()
    return median(seconds(call)[0] for _ in range(rounds))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it gives."""
    begin = perf_counter()
    found = call()
    return perf_counter() - begin, found


class Turns:
    """Baselines that take turns with a benchmark's rounds: pass it as `pedantic`'s `setup`.

    What else the machine does then weighs on all alike, and `recording.figures` compares round by
    round.

    Args:
        calls: of each baseline, by name.
        precision: also time a large matrix product in it, `fp32` or `bf16`, each round: the ceiling
            of that moment. In bf16 the better of both counts, since processors without units for it
            are faster in fp32.

    Attributes:
        times: seconds of each baseline, one a round, warm-ups' first.
        peaks: GFLOP/s of the product, likewise; empty without a precision.
    """

    def __init__(
        self, calls: dict[str, Callable[[], object]], precision: str | None = None
    ) -> None:
        self._calls = calls
        self.times: dict[str, list[float]] = {name: [] for name in calls}
        self.peaks: list[float] = []
        names = {None: (), "fp32": ("fp32",), "bf16": ("fp32", "bf16")}[precision]
        self._products = [_product(_DTYPES[name], 1024) for name in names]

    def __call__(self) -> None:
        if self._products:
            self.peaks.append(max(map(_gflops, self._products)))
        for name, call in self._calls.items():
            self.times[name].append(seconds(call)[0])

    def medians(self, rounds: int) -> dict[str, float]:
        """Median seconds of each call over the last rounds."""
        return {name: round(median(times[-rounds:]), 4) for name, times in self.times.items()}


def agree(
    found: Sequence[float],
    wanted: Sequence[float],
    exact: Sequence[float] | None,
    rtol: float,
    what: str,
) -> None:
    """Refuse losses that are not as good as PyTorch's.

    Args:
        found: ours.
        wanted: PyTorch's in the same precision.
        exact: the same in fp32 where the precision is lower, which rounds each path in ways of its
            own: ours may be twice as far from them as PyTorch's, in the mean square. None: compare
            one by one.
        rtol: relative difference that is fine; with `exact`, from them in the mean square.
        what: named in the error.

    Raises:
        AssertionError: they differ by more.
    """
    if exact is None:
        np.testing.assert_allclose(found, wanted, rtol=rtol, err_msg=f"against {what}")
        return
    error, bound = (float(np.linalg.norm(np.subtract(x, exact))) for x in (found, wanted))
    allowed = max(2 * bound, rtol * float(np.linalg.norm(exact)))
    assert error <= allowed, f"against {what}: {error:.3g} from fp32, PyTorch's {bound:.3g}"


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _product(dtype: torch.dtype, size: int) -> Callable[[], Tensor]:
    a, b = torch.randn(2, size, size, dtype=dtype)
    return lambda: a @ b


def _gflops(product: Callable[[], Tensor], rounds: int = 2) -> float:
    """Of the fastest of some calls, after one that is not counted."""
    size = product().shape[0]
    return 2e-9 * size**3 / min(seconds(product)[0] for _ in range(rounds))


def ceiling() -> dict[str, float]:
    """What this machine can do now: large matrix products in GFLOP/s, a large copy in GB/s."""
    found = {
        f"{name}_gflops": round(_gflops(_product(dtype, 1536), 5), 1)
        for name, dtype in _DTYPES.items()
    }
    x = torch.randn(1 << 25)
    y = torch.empty_like(x)
    y.copy_(x)
    fastest = min(seconds(lambda: y.copy_(x))[0] for _ in range(5))
    found["copy_gb"] = round(8e-9 * x.numel() / fastest, 1)
    return found


class _Folded(nn.Module):
    def __init__(self, unit: ConvUnit) -> None:
        super().__init__()
        norm = unit.norm
        self.weight, self.bias = fuse_conv_bn_weights(
            unit.weight,
            None,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        self.bias.data = self.bias.to(self.weight.dtype)
        self.options = unit.stride, unit.padding, unit.dilation, unit.groups
        self.relu = unit.activation == "relu"

    def forward(self, x: Tensor) -> Tensor:
        y = functional.conv2d(x, self.weight, self.bias, *self.options)
        return torch.relu_(y) if self.relu else y


def folded(module: nn.Module) -> nn.Module:
    """A module whose batch norms are folded into its convolutions; the rest is shared."""
    kept = [*module.parameters(), *module.buffers()]
    module = copy.deepcopy(module, {id(tensor): tensor for tensor in kept})
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvUnit):
                setattr(parent, name, _Folded(child))
    return module


@dataclass(frozen=True)
class Variant:
    """One way to run the baseline.

    Attributes:
        precision: `fp32` or `bf16`.
        kind: `eager`, `compiled` (block by block) or `folded`.
        layout: of `LAYOUTS`.
        cast: weights and rows are bfloat16, in place of autocast; the norms keep their statistics
            in float32.
        device: where it runs.
    """

    precision: str
    kind: str
    layout: str
    cast: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As records show it."""
        return f"{self.kind} {self.layout}" + (" cast" if self.cast else "")

    def scope(self) -> AbstractContextManager:
        """What its calls run under."""
        return nullcontext() if self.cast else scope(self.precision, self.device)

    def rows(self, x: Tensor) -> Tensor:
        """Images or rows as it takes them."""
        x = x.contiguous(memory_format=LAYOUTS[self.layout])
        return x.bfloat16() if self.cast else x

    def copy_of(self, net: nn.Module) -> nn.Module:
        """A copy of a module with weights as it takes them."""
        net = copy.deepcopy(net).to(memory_format=LAYOUTS[self.layout])
        if self.cast:
            net.bfloat16()
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.float()
        if self.kind == "compiled":
            # One code object serves every candidate op.
            torch._dynamo.config.recompile_limit = 10_000
            blocks = [op for block in getattr(net, "blocks", []) for op in block]
            for module in blocks or [net]:
                module.compile(fullgraph=True)
        return net


def variants(precision: str, *, training: bool = False) -> list[Variant]:
    """Every way to run the baseline in a precision."""
    kinds = ["eager"] + ["compiled"] * COMPILES + ["folded"] * (not training)
    casts = (False, True) if precision == "bf16" and not training else (False,)
    # Autocast would cast folded weights at every call; cast once, they are the stronger.
    return [
        Variant(precision, kind, name, cast)
        for kind in kinds
        for name in LAYOUTS
        for cast in (casts[-1:] if kind == "folded" else casts)
    ]


def race(
    calls: dict[str, Callable[[Sequence], Any]],
    sample: Sequence,
    everything: Sequence,
    timed: bool = True,
) -> tuple[dict[str, float], dict[str, float], Any, dict[str, float]]:
    """Try every variant on a sample, then time the fastest on everything.

    Args:
        calls: of each variant, by name; each takes candidates.
        sample: of the candidates; each variant runs it twice, the second time counts.
        everything: all candidates; run once by the fastest variant, and once by the fastest that is
            not `folded` where that is another one.
        timed: else each variant runs the sample once.

    Returns:
        Seconds of each variant on the sample, of the fastest on everything, what the fastest that
        is not folded gave, and the seconds of the compiled ones' first calls.
    """
    tried, compiling = {}, {}
    for name, call in calls.items():
        if timed:
            first = seconds(lambda c=call: c(sample))[0]
            compiling |= {name: round(first, 1)} if name.startswith("compiled") else {}
        tried[name] = seconds(lambda c=call: c(sample))[0]
    plain = min((name for name in tried if not name.startswith("folded")), key=tried.get)
    times, found = {}, None
    for name in dict.fromkeys((plain, min(tried, key=tried.get))):
        if name.startswith("compiled"):
            first = seconds(lambda n=name: calls[n](everything))[0]
            compiling[name] = round(compiling.get(name, 0.0) + first, 1)
        times[name], given = seconds(lambda n=name: calls[n](everything))
        found = given if name == plain else found
    return tried, times, found, compiling
