"""What the compiled CPU core is timed beside: PyTorch's own best, layout by layout."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastshift.layers import ConvUnit

__all__ = ["LAYOUTS", "best_seconds", "ceiling", "compiled", "folded", "layout"]

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Compiling costs minutes; it is asked for.
COMPILES = os.environ.get("FASTSHIFT_BENCH_COMPILE") == "1"


def best_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """The fastest of some calls, after one that is not counted."""
    call()
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return min(times)


def ceiling() -> dict[str, float]:
    """What this machine can do now: a large matrix product in GFLOP/s, a large copy in GB/s."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    x = torch.randn(1 << 25)
    y = torch.empty_like(x)
    return {
        "gflops": 2 * 1536**3 / best_seconds(lambda: a @ b) / 1e9,
        "copy_gb": 8 * x.numel() / best_seconds(lambda: y.copy_(x)) / 1e9,
    }


def layout(module: nn.Module, name: str) -> nn.Module:
    """A copy of a module with its weights in a memory format of `LAYOUTS`."""
    return copy.deepcopy(module).to(memory_format=LAYOUTS[name])


class _Folded(nn.Module):
    def __init__(self, unit: ConvUnit) -> None:
        super().__init__()
        plain = nn.Conv2d(
            unit.in_channels,
            unit.out_channels,
            unit.kernel_size,
            unit.stride,
            unit.padding,
            groups=unit.groups,
            bias=False,
        )
        plain.weight = unit.weight
        self.conv = fuse_conv_bn_eval(plain.eval(), unit.norm.eval())
        self.relu = unit.activation == "relu"

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu_(y) if self.relu else y


def folded(module: nn.Module) -> nn.Module:
    """A copy of a module whose batch norms are folded into their convolutions."""
    module = copy.deepcopy(module).eval()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvUnit):
                setattr(parent, name, _Folded(child))
    return module


def compiled(module: nn.Module) -> nn.Module | None:
    """The module under `torch.compile`, or None where compiling was not asked for."""
    return torch.compile(module, fullgraph=True) if COMPILES else None
