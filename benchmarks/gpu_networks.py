"""The evaluator and the shift step on generations of real searches, beside both baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import generations
import numpy as np
import torch
from baselines import agree
from bench_evaluator import SAMPLE
from bench_evaluator import TOLERANCE as SCORING_TOLERANCE
from bench_shift import SGD
from bench_shift import TOLERANCE as TRAINING_TOLERANCE
from gpu_baselines import Baseline, Loop, compiled_ops, fastest, score, spread, train, ways
from gpu_ceilings import plain_fp32, share
from gpu_gate import PROVIDERS, steps_by
from gpu_items import Bench, Item, Row
from gpu_timing import Call, in_turns

from fastshift import spaces
from fastshift.evaluator import PRECISIONS, Evaluator
from fastshift.supernet import Supernet
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

__all__ = ["CELLS", "LOOP", "TINY_CELLS", "Cell", "Setting", "items"]

ROUNDS = {"rounds": 7, "fewest": 3}
LOOP_CANDIDATES = 3  # of the released loop, scaled to all by their multiply-adds
LOOP = "released loop"
SETS = 4  # of batches, which calls take in turn

Batch = tuple[torch.Tensor, torch.Tensor]
OneAtATime = Callable[..., torch.Tensor]  # of candidates and the number of the call, 0 without


@dataclass(frozen=True)
class Cell:
    """A supernet and the sizes of its batches, in images."""

    space: str
    size: int
    calibration: int
    scored: tuple[int, ...]
    shift: int
    candidates: int = 50

    @property
    def name(self) -> str:
        """The space and the size of its images."""
        return f"{self.space} {self.size}"


CELLS = (
    Cell("nasbench_macro", 32, 256, (256,) * 4, 150),
    Cell("shufflenet_v2", 64, 128, (128,) * 2, 150),
    Cell("shufflenet_v2", 224, 32, (32,) * 2, 32),
)
TINY_CELLS = (Cell("nasbench_macro", 8, 4, (4,), 4, candidates=3),)


def items(*, tiny: bool) -> list[Item]:
    """Every cell, generation and precision: the last generation first, bf16 first.

    Args:
        tiny: those of a dry run.
    """
    cells = TINY_CELLS if tiny else CELLS
    kept = generations.KEPT[-1:] if tiny else generations.KEPT[::-1]
    precisions = ("fp32",) if tiny else PRECISIONS[::-1]
    found = [
        (cell, generation, precision)
        for generation in kept
        for precision in precisions
        for cell in cells
    ]
    return [
        Item(part, f"{part} | {c.name} | generation {g} | {p}", partial(measure, c, g, p))
        for part, measure in (("evaluator", _evaluator), ("shift step", _shift))
        for c, g, p in found
    ]


@dataclass(frozen=True)
class Inputs:
    """Batches of one call: to calibrate on, to score, and to train on."""

    calibration: Batch
    scored: list[Batch]
    shift: Batch

    def read_bytes(self, *, training: bool) -> int:
        """Of what a call reads."""
        batches = [self.shift] if training else [self.calibration, *self.scored]
        return sum(tensor.nbytes for batch in batches for tensor in batch)


class Setting:
    """A supernet, its batches and a generation on a device.

    Args:
        cell: which.
        generation: of `generations.KEPT`.
        device: where.

    Attributes:
        inputs: sets of batches, `SETS` of them.
    """

    def __init__(self, cell: Cell, generation: int, device: torch.device) -> None:
        torch.manual_seed(0)
        space = spaces.build(cell.space, image_size=cell.size, num_classes=10)
        self.supernet = Supernet(space)
        for module in self.supernet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # or losses could not be compared
        self.supernet.to(device)
        self.archs = generations.load(cell.space)[generation][: cell.candidates].astype(np.uint8)
        self.plan = Plan(self.archs)
        self.device, self.cell = device, cell
        self.inputs = [
            Inputs(
                self._batch(cell.calibration),
                [self._batch(images) for images in cell.scored],
                self._batch(cell.shift),
            )
            for _ in range(SETS)
        ]

    def _batch(self, images: int) -> Batch:
        """Random images `[N, 3, size, size]` and labels `[N]`."""
        x = torch.randn(images, 3, self.cell.size, self.cell.size, device=self.device)
        return x, torch.arange(images, device=self.device) % 10

    def flops(self) -> float:
        """Multiply-adds of an image through what the generation's trie computes."""
        space = self.supernet.space
        return float(space.flops(self.archs).sum()) / self.plan.sharing(space.flops_table)

    def loop(self, batches: Sequence) -> tuple[Loop, list[int], float]:
        """The released loop on a copy, candidates that stand for all, and their scale."""
        net = Supernet(self.supernet.space).to(self.device)
        net.load_state_dict(self.supernet.state_dict())
        flops = self.supernet.space.flops(self.archs)
        chosen = spread(flops, min(LOOP_CANDIDATES, len(self.archs))).tolist()
        scale = float(flops.sum() / flops[chosen].sum())
        return Loop(net, batches, batches), chosen, scale


def _evaluator(cell: Cell, generation: int, precision: str, bench: Bench) -> Iterator[Row]:
    """Calibrate and score a generation."""
    setting = Setting(cell, generation, bench.device)
    archs = setting.archs
    evaluators = [
        Evaluator(
            setting.supernet,
            inputs.scored,
            calibration=[inputs.calibration],
            precision=precision,
        )
        for inputs in setting.inputs
    ]

    def one_at_a_time(baseline: Baseline) -> OneAtATime:
        given = [
            (baseline.batch(inputs.calibration), [baseline.batch(b) for b in inputs.scored])
            for inputs in setting.inputs
        ]
        return lambda some, number=0: score(baseline, some, *given[number % SETS])

    def ours(provider: str, number: int) -> np.ndarray:
        with steps_by(provider, bench.device) as expected, plain_fp32():
            scores = evaluators[number % SETS].evaluate(archs)
        assert scores.computed.startswith(expected), f"{provider}: ran as {scores.computed!r}"
        return scores.losses

    loop, chosen, scale = setting.loop([])

    def released(number: int) -> None:
        loop.scored = setting.inputs[number % SETS].scored
        for index in chosen:
            loop.score(archs[index])

    calls = {"ours": ours, "loop": released, "loop scale": scale}
    images = cell.calibration + sum(cell.scored)
    yield from _compare(
        bench, setting, precision, one_at_a_time, calls, SCORING_TOLERANCE, images, training=False
    )


def _shift(cell: Cell, generation: int, precision: str, bench: Bench) -> Iterator[Row]:
    """Make one accumulated update on a generation, at a rate of nought: weights stay the same."""
    setting = Setting(cell, generation, bench.device)
    archs, images = setting.archs, cell.shift
    trainers = {
        provider: PathTrainer(setting.supernet, **SGD, label_smoothing=0.0, precision=precision)
        for provider in PROVIDERS[bench.device.type]
    }

    def one_at_a_time(baseline: Baseline) -> OneAtATime:
        given = [baseline.batch(inputs.shift) for inputs in setting.inputs]
        optimizer = torch.optim.SGD(baseline.net.train().parameters(), **SGD)
        return lambda some, number=0: train(baseline, some, given[number % SETS], optimizer)

    def ours(provider: str, number: int) -> float:
        trainer, batch = trainers[provider], setting.inputs[number % SETS].shift
        with steps_by(provider, bench.device) as expected, plain_fp32():
            loss = trainer.update(setting.plan, *batch, position=0)
        assert trainer.computed.startswith(expected), f"{provider}: ran as {trainer.computed!r}"
        return loss

    loop, chosen, scale = setting.loop([])

    def released(number: int) -> None:
        loop.steps = [setting.inputs[number % SETS].shift]
        for index in chosen:
            loop.train(archs[index])

    calls = {"ours": ours, "loop": released, "loop scale": scale}
    yield from _compare(
        bench, setting, precision, one_at_a_time, calls, TRAINING_TOLERANCE, images, training=True
    )


def _compare(
    bench: Bench,
    setting: Setting,
    precision: str,
    one_at_a_time: Callable[[Baseline], OneAtATime],
    calls: dict,
    tolerance: dict[str, float],
    images: int,
    *,
    training: bool,
) -> Iterator[Row]:
    """Check our losses against the baseline's, then time providers and baselines in turns."""
    archs, ours = setting.archs, calls["ours"]
    ways_of, compiling = _ways(bench, setting, precision, training=training)
    contestants = {way.name: one_at_a_time(way) for way in ways_of}
    # The TF32 of an fp32 baseline is another precision: it is timed, and not compared with.
    best, tried = fastest(contestants, archs[SAMPLE], bench.stopwatch)
    plain = min((name for name in tried if "tf32" not in name), key=tried.get)
    wanted = contestants[plain](archs).cpu().numpy()
    exact = None
    if precision != "fp32":
        full = ways(bench, setting.supernet, "fp32", training=training, compiles=False)[0]
        exact = one_at_a_time(full)(archs).cpu().numpy()
    timed: dict[str, Call] = {}
    for provider in PROVIDERS[bench.device.type]:
        found = ours(provider, 0)
        if training:
            agree([found], [wanted.mean()], _mean(exact), tolerance[precision], plain)
        else:
            agree(found, wanted, exact, tolerance[precision], plain)
        timed[provider] = partial(ours, provider)
    for name in dict.fromkeys((best, plain)):
        timed[name] = partial(contestants[name], archs)
    timed[LOOP] = calls["loop"]
    rotated = sum(inputs.read_bytes(training=training) for inputs in setting.inputs)
    times = in_turns(timed, bench.stopwatch, bench.clock, **(bench.rounds or ROUNDS))
    for name, found in times.items():
        row = {"provider": name, "is_baseline": name not in PROVIDERS[bench.device.type]}
        row |= found.row(calls["loop scale"] if name == LOOP else 1.0)
        seconds = 1e-3 * row["median_ms"]
        row |= {
            "archs_per_second": float(f"{len(archs) / seconds:.4g}"),
            "images_per_second": float(f"{len(archs) * images / seconds:.4g}"),
            "rotated_bytes": rotated,
            "in_cache": rotated < 2 * bench.cache_bytes,
        }
        if not row["is_baseline"]:
            passes = 3 if training else 1
            row |= share(bench.ceilings, precision, passes * setting.flops() * images, 0, seconds)
            row["sharing"] = round(setting.plan.sharing(setting.supernet.space.flops_table), 3)
        if name == LOOP:
            row["candidates_timed"] = min(LOOP_CANDIDATES, len(archs))
            row["precision"] = "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
            row["calibrates"] = False
        if name == best:
            row["tried_ms"], row["compile_s"] = tried, compiling
        yield row


def _ways(
    bench: Bench, setting: Setting, precision: str, *, training: bool
) -> tuple[list[Baseline], dict[str, float]]:
    """The baselines that can be timed, and what compiling took."""
    inputs = setting.inputs[0]
    batch = inputs.shift if training else inputs.calibration
    kept, compiling = [], {}
    for way in ways(bench, setting.supernet, precision, training=training, compiles=not bench.tiny):
        if way.variant.kind == "compiled":
            seconds = compiled_ops(bench, way, way.batch(batch)[0], training=training)
            if seconds is None:
                what = f"{way.name} of {setting.cell.name}, {precision}"
                what += ", training" if training else ", scoring"
                bench.leave(what, "compiling it took too long")
                continue
            compiling[way.name] = float(f"{seconds:.3g}")
        kept.append(way)
    if bench.tiny:
        bench.leave("compiled baselines", "not part of a dry run")
    return kept, compiling


def _mean(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else [float(values.mean())]
