"""What a device can do at most, as measured: large matrix products of each type, a large copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from gpu_timing import Clock, Stopwatch, in_turns

__all__ = ["CEILINGS", "measure", "plain_fp32", "share"]

# How each type's products are computed; fp32 without tensor cores.
PRODUCTS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}
CEILINGS = (*(f"{name} product" for name in PRODUCTS), "copy")


@contextmanager
def plain_fp32(tf32: bool = False) -> Iterator[None]:
    """Keep PyTorch's fp32 products and convolutions at full precision, or at TF32's."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = tf32
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def measure(device: torch.device, clock: Clock, *, tiny: bool) -> dict[str, float]:
    """Measure the ceilings.

    Args:
        device: whose.
        clock: of the budget.
        tiny: sizes of a dry run, which say nothing.

    Returns:
        Multiply-adds times two a second of each product, and bytes read and written a second of
        the copy, by the names in `CEILINGS`.

    Raises:
        OutOfTimeError: they do not fit into the budget.
    """
    stopwatch, side = Stopwatch(device), 64 if tiny else 8192
    rounds = {"rounds": 2, "fewest": 1} if tiny else {}
    found = {}
    for name, (dtype, tf32) in PRODUCTS.items():
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        out = torch.empty_like(a)
        with plain_fp32(tf32):
            times = in_turns(
                {name: lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out)},
                stopwatch,
                clock,
                **rounds,
            )
        found[f"{name} product"] = 2 * side**3 / median(times[name].samples)
    source = torch.randn(1 << (16 if tiny else 28), device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda _: target.copy_(source)}, stopwatch, clock, **rounds)
    found["copy"] = 8 * source.numel() / median(times["copy"].samples)
    return found


def share(
    ceilings: dict[str, float], precision: str, flops: float, moved: float, seconds: float
) -> dict[str, float]:
    """What a time is of the ceilings.

    Args:
        ceilings: as measured.
        precision: of the products.
        flops: multiply-adds.
        moved: bytes that must be read or written; 0 where they are not counted.
        seconds: the time.

    Returns:
        Shares of the product's rate and of the copy's, and the larger one.
    """
    rates = {"of_product": 2 * flops / ceilings[f"{precision} product"] / seconds}
    if moved:
        rates["of_copy"] = moved / ceilings["copy"] / seconds
    rates["of_ceiling"] = max(rates.values())
    return {key: float(f"{value:.3g}") for key, value in rates.items()}
