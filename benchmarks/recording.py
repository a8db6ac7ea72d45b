"""What a record says of the machine, the versions, the code and each figure."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastshift.cpu import block_of, instruction_set
from fastshift.versions import versions

__all__ = ["at_peak", "figures", "is_dirty", "kernels", "machine", "note"]

HERE = Path(__file__).parent


def _git(*command: str) -> str:
    found = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip()


def machine() -> dict[str, str | int | None]:
    """Versions, processor, cores and commit; the commit ends in `-dirty` where the tree differs."""
    return {
        **versions(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "commit": _git("describe", "--always", "--dirty") or None,
    }


def is_dirty() -> bool:
    """Whether the tree differs from its commit, what a recording itself writes aside."""
    written = (":!/benchmarks/records", ":!/README.md", ":!/benchmarks/README.md")
    return bool(_git("status", "--porcelain", "--", ":/", *written))


def kernels(module: torch.nn.Module, x: torch.Tensor) -> str:
    """What runs a candidate op on rows such as `x`: an instruction set, or PyTorch's ops."""
    return "PyTorch" if block_of(module, x) is None else instruction_set()


def figures(
    own: Sequence[float],
    baselines: dict[str, Sequence[float]],
    sharing: float = 1.0,
    peaks: Sequence[float] = (),
) -> dict[str, Any]:
    """The ratios of a figure to its baselines.

    Args:
        own: seconds of each round.
        baselines: seconds of each round by variant, as many as `own` or, before them, warm-ups'
            too; or those of a variant that was not timed in turns, fewer. A `folded` one goes
            beyond the baseline's definition.
        sharing: of the plan.
        peaks: GFLOP/s of the matrix product in each round, of `Turns`.

    Returns:
        `ratio` over the fastest baseline, `ratio_folded` over the fastest with the folded ones,
        `ratio_over_sharing`. A ratio is the median over the rounds where there are turns, and
        `ratio_extremes` are the least and the greatest of `ratio`'s then. With peaks,
        `at_peak`'s too.
    """

    baselines = {name: times[-len(own) :] for name, times in baselines.items()}

    def ratios(names: Iterable[str]) -> list[float]:
        times = baselines[min(names, key=lambda name: median(baselines[name]))]
        if len(times) < len(own):
            return [median(times) / median(own)]
        return [t / o for t, o in zip(times, own, strict=True)]

    plain = [name for name in baselines if not name.startswith("folded")]
    each = ratios(plain)
    found = median(each)
    return {
        "baseline": min(plain, key=lambda name: median(baselines[name])),
        "baseline_seconds": {name: _short(median(times)) for name, times in baselines.items()},
        "turns": any(len(times) == len(own) > 1 for times in baselines.values()),
        "ratio": _short(found),
        **({"ratio_extremes": [_short(min(each)), _short(max(each))]} if len(each) > 1 else {}),
        "ratio_folded": _short(median(ratios(baselines))),
        "sharing": _short(sharing),
        "ratio_over_sharing": _short(found / sharing),
        **at_peak(own, peaks),
    }


def at_peak(own: Sequence[float], peaks: Sequence[float]) -> dict[str, float]:
    """`peak_gflop`, what the ceiling of its rounds would do in a figure's time; median of rounds.

    Args:
        own: seconds of each round.
        peaks: GFLOP/s of the matrix product in as many rounds or, before them, warm-ups' too.
    """
    if not peaks:
        return {}
    rounds = zip(own, peaks[-len(own) :], strict=True)
    return {"peak_gflop": _short(median(t * peak for t, peak in rounds))}


def note(benchmark: Any, item: str, **fields: Any) -> None:
    """Keep a figure's fields beside its times; nothing where nothing was timed.

    Args:
        benchmark: pytest-benchmark's fixture, after it has timed.
        item: what was measured; the floors go by it.
        fields: of the row; `figures` among them, where there are baselines.
    """
    if benchmark.stats is None:
        return
    benchmark.extra_info.update(item=item, threads=torch.get_num_threads(), **fields)
    print(f"\n{benchmark.name}: {benchmark.extra_info}")


def _short(x: float) -> float:
    """Four significant digits."""
    return float(f"{x:.4g}")
