"""A small search from end to end, beside what the baselines would take for the same work.

The search is timed whole, by the wall's clock, once for each provider after a shorter one that
compiles the kernels and captures the graphs for scoring. Those of updates belong to a search's own
trainer, and are captured anew in each: that is part of the time, and told apart. The baselines'
figures are composed: their time for a candidate's score and its share of the updates, of a few
candidates, times what the search asked for. They are eager: none is compiled here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from bench_shift import SGD
from gpu_baselines import Baseline, fastest, score, train, ways
from gpu_ceilings import plain_fp32
from gpu_gate import PROVIDERS, steps_by
from gpu_items import Bench, Item, Row
from gpu_networks import CELLS, LOOP, TINY_CELLS, Cell, Setting
from torch import Tensor

import fastshift as fs
from fastshift.graphs import CAPTURES
from fastshift.supernet import Supernet
from fastshift.testing import synthetic_data

__all__ = ["items"]

GENERATIONS, SHIFT_STEPS, PARENTS = 2, 10, 10
LAST = 10  # the generation whose candidates stand for all in the baselines


def items(*, tiny: bool) -> list[Item]:
    """One search of each small space."""
    cells = TINY_CELLS if tiny else CELLS[:2]
    precision = "fp32" if tiny else "bf16"
    return [
        Item("search", f"search | {c.name} | {precision}", partial(_search, c, precision))
        for c in cells
    ]


class _Stream:
    """Training batches that lie on the device, taken in turn."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    def batch(self, index: int, size: int, stream: str = "train") -> tuple[Tensor, Tensor]:
        """Return images `[N, C, H, W]` and labels `[N]`, of the size that was prepared."""
        images, labels = self._batches[index % len(self._batches)]
        assert len(images) == size, f"{stream}: {size} images; {len(images)} were prepared"
        return images, labels


def _data(cell: Cell, device: torch.device) -> SimpleNamespace:
    """A task whose batches all lie on a device."""
    data = synthetic_data(
        num_classes=10,
        image_size=cell.size,
        validation=cell.scored,
        calibration=(cell.calibration,),
    )

    def there(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0].to(device), batch[1].to(device)

    return SimpleNamespace(
        train=_Stream([there(data.train.batch(i, cell.shift)) for i in range(8)]),
        validation=[there(batch) for batch in data.validation],
        calibration=[there(batch) for batch in data.calibration],
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
        test=None,
    )


def _search(cell: Cell, precision: str, bench: Bench) -> Iterator[Row]:
    """Search by each provider, and compose the baselines' time."""
    steps = 1 if bench.tiny else SHIFT_STEPS
    few = min(PARENTS, cell.candidates)
    options = {
        "shift": "accumulate",
        "population": cell.candidates,
        "parents": few,
        "top_k": few,
        "shift_batch_size": cell.shift,
        "precision": precision,
    }
    for provider in PROVIDERS[bench.device.type]:
        supernet, data = Setting(cell, LAST, bench.device).supernet, _data(cell, bench.device)
        with steps_by(provider, bench.device), plain_fp32():
            first, *_ = _timed(bench, supernet, data, generations=0, shift_steps=1, **options)
            bench.clock.need((GENERATIONS + 1) * first, f"the search by {provider}")
            seconds, result, captured = _timed(
                bench, supernet, data, generations=GENERATIONS, shift_steps=steps, **options
            )
        yield {
            "provider": provider,
            "is_baseline": False,
            "median_ms": float(f"{1e3 * seconds:.4g}"),
            "rounds": 1,
            "calls_a_round": 1,
            "first_call_s": float(f"{first:.3g}"),
            **captured,
            "budget": result.budget,
        }
    yield from _composed(cell, precision, bench, result.budget["scored"], result.budget["updates"])


def _timed(bench: Bench, supernet: Supernet, data: SimpleNamespace, **options: Any) -> tuple:
    """Seconds, the result, and what capturing took of them."""
    before, begin = replace(CAPTURES), time.perf_counter()
    result = fs.search(supernet, data, seed=0, **options)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    captured = {
        "captures": CAPTURES.count - before.count,
        "capture_s": float(f"{CAPTURES.seconds - before.seconds:.3g}"),
    }
    return seconds, result, captured


def _composed(cell: Cell, precision: str, bench: Bench, scored: int, updates: int) -> Iterator[Row]:
    """What scoring so many candidates and so many updates would take, by the time of a few."""
    setting = Setting(cell, LAST, bench.device)
    archs, chosen, inputs = setting.archs, setting.loop([])[1:], setting.inputs[0]
    some, scale = archs[chosen[0]], chosen[1] / len(archs)

    def strong(training: bool) -> tuple[str, float]:
        calls = {}
        for way in ways(bench, setting.supernet, precision, training=training, compiles=False):
            if training:
                optimizer = torch.optim.SGD(way.net.train().parameters(), **SGD)
                batch = way.batch(inputs.shift)
                calls[way.name] = partial(_train, way, batch, optimizer)
            else:
                batches = [way.batch(b) for b in inputs.scored]
                calls[way.name] = partial(_score, way, way.batch(inputs.calibration), batches)
        name, tried = fastest(calls, some, bench.stopwatch)
        return name, 1e-3 * tried[name]

    names, times = zip(strong(False), strong(True), strict=True)
    seconds = scale * (scored * times[0] + updates * len(archs) * times[1])
    loops = [setting.loop(batches)[0] for batches in (inputs.scored, [inputs.shift])]
    loop = [
        bench.stopwatch(lambda: [loops[0].score(arch) for arch in some]),
        bench.stopwatch(lambda: [loops[1].train(arch) for arch in some]),
    ]
    released = scale * (scored * loop[0] + updates * len(archs) * loop[1])
    for name, total in ((" and ".join(dict.fromkeys(names)), seconds), (LOOP, released)):
        yield {
            "provider": f"{name}, composed",
            "is_baseline": True,
            "median_ms": float(f"{1e3 * total:.4g}"),
            "rounds": 1,
            "calls_a_round": 1,
            "candidates_timed": len(some),
        }


def _score(way: Baseline, calibration: Any, batches: Any, some: Any) -> Tensor:
    return score(way, some, calibration, batches)


def _train(way: Baseline, batch: Any, optimizer: torch.optim.Optimizer, some: Any) -> Tensor:
    return train(way, some, batch, optimizer)
