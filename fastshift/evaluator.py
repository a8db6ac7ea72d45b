"""Score many architectures under a supernet's present weights: the piece others embed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastshift.batch_norm import POLICIES, BatchNorms, evaluation_mode
from fastshift.device import TURN, use_device
from fastshift.prefetch import PrefetchedBatches
from fastshift.static_supernet import static_supernet
from fastshift.steps import Statistics, calibrate_step, eval_step
from fastshift.supernet import ChainSupernet, needing_moments
from fastshift.trie import Plan

__all__ = ["PRECISIONS", "STRATEGIES", "Evaluator", "Scores", "precision_scope", "uploaded"]

STRATEGIES = ("shared", "sequential")
PRECISIONS = ("fp32", "bf16")
KEPT_BYTES = 1 << 30  # on a GPU, of scored batches, and as many of calibration batches

Batches = Iterable[tuple[Tensor, Tensor]]


def precision_scope(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast scope of a precision, whatever the caller's: off for `fp32`, else bfloat16."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r}; expected one of {', '.join(PRECISIONS)}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def uploaded(batches: Batches, device: torch.device, limit: int = KEPT_BYTES) -> Batches:
    """Batches on a device: kept there where all of them take no more than a limit.

    Others are copied at each iteration, to a GPU one batch ahead.

    Args:
        batches: that can be iterated again.
        device: to keep them.
        limit: bytes.
    """
    kept, left = [], limit
    for batch in batches:
        left -= sum(part.nbytes for part in batch)
        if left < 0:
            return PrefetchedBatches(batches, device)
        kept.append(tuple(part.to(device) for part in batch))
    return kept


@dataclass(frozen=True)
class Scores:
    """What an evaluation gives, row by row as asked.

    Attributes:
        errors: top-1 error in [0, 1], float32 `[P]`; NaN where the loss was not finite.
        losses: mean cross-entropy in nats, float64 `[P]`; NaN likewise.
        weights_version: optimiser steps the supernet had seen.
        images: scored images per architecture.
        calibration_images: calibration images per architecture.
        sharing: cost of all paths over the cost computed; 1 for `sequential`.
        seconds: wall time, without waiting for a turn.
        computed: how the batches were: `captured` as CUDA graphs, `static`, `modules: ` and
            why not by those, or `sequential`.
    """

    errors: np.ndarray
    losses: np.ndarray
    weights_version: int
    images: int
    calibration_images: int
    sharing: float
    seconds: float
    computed: str = "modules: nothing to score"


class Evaluator:
    """Score architectures on fixed held-out batches.

    Neither weights nor buffers of the supernet change, bit for bit, and scores do not depend on the
    order or the company in which architectures are asked for.

    Threads may share a supernet, and an evaluator: evaluations and updates in one process take
    turns. To score in parallel, give each process a supernet of its own. On a GPU an evaluation
    runs on the stream that is current where it is called, and waits for its result.

    Args:
        supernet: with the weights to score under; they may move between calls.
        batches: `(images, labels)` pairs that can be iterated again and again, the same every time,
            by code that does not score or train itself;
            images `[N, C, H, W]`. For a GPU they are uploaded once and kept there where all fit in
            1 GiB, and else at each evaluation, the next batch while one is scored.
        calibration: batches for `recalibrate`, as `batches` and disjoint from them.
        batch_norm: `recalibrate` (statistics of the calibration batches per candidate), `batch` (of
            the scored batch), `running` (what pre-training left), `ema` (the same after the shift
            steps).
        strategy: `shared` computes each node of the population's trie once; `sequential` is the
            plain definition, one stand-alone copy of a path at a time.
        subtrie_size: candidates that `shared` computes side by side; bounds memory, changes nothing
            else.
        precision: `fp32` (the weights' own type) or `bf16` (autocast).

    Raises:
        ValueError: an unknown policy, strategy or precision, or `recalibrate` without calibration
            batches.
    """

    def __init__(
        self,
        supernet: ChainSupernet,
        batches: Batches,
        *,
        calibration: Batches | None = None,
        batch_norm: str = "recalibrate",
        strategy: str = "shared",
        subtrie_size: int = 8,
        precision: str = "fp32",
    ) -> None:
        for name, value, known in (
            ("batch_norm", batch_norm, POLICIES),
            ("strategy", strategy, STRATEGIES),
            ("precision", precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r}; expected one of {', '.join(known)}")
        if batch_norm == "recalibrate" and calibration is None:
            raise ValueError("calibration: none given; batch_norm='recalibrate' needs batches")
        self.supernet = supernet
        self.batches = batches
        self.calibration = calibration
        self.batch_norm = batch_norm
        self.strategy = strategy
        self.subtrie_size = subtrie_size
        self.precision = precision
        self._uploaded: dict[str, tuple[Batches, torch.device, Batches]] = {}
        self._sampled: tuple[Batches, Tensor] | None = None

    def __call__(self, archs: np.ndarray | Sequence) -> np.ndarray:
        """Score architectures.

        Args:
            archs: choices `[P, L]`, a list of tuples, or of strings.

        Returns:
            Top-1 error in [0, 1], `[P]` float32, in the order given; NaN where the loss was not
            finite.

        Raises:
            ArchError: a row is not in the space.
            DataError: a batch whose moments are needed leaves a batch norm one value a channel.
            ValueError: `ema` before any shift step, or no batches.
        """
        return self.evaluate(archs).errors

    def evaluate(self, archs: np.ndarray | Sequence) -> Scores:
        """Score architectures as a call does, and say under which weights and at what cost."""
        rows = self.supernet.space.as_archs(archs)
        if len(rows) == 0:
            nothing = np.zeros(0)
            return Scores(
                nothing.astype(np.float32), nothing, self.supernet.version, 0, 0, 1.0, 0.0
            )
        if self.batch_norm == "ema" and not self.supernet.ema:
            raise ValueError("batch_norm: 'ema' has no statistics before the first shift step")
        with TURN, use_device(next(self.supernet.parameters()).device):
            return self._scores(rows)

    def _scores(self, rows: np.ndarray) -> Scores:
        begin = time.perf_counter()
        plan = Plan(rows, self.subtrie_size)
        score = self._shared if self.strategy == "shared" else self._sequential
        wrong, losses, images, calibrated, computed = score(plan)
        if images == 0:
            raise ValueError("batches: none to score on")
        errors, losses = wrong / images, losses / images
        failed = ~np.isfinite(losses)
        errors[failed] = losses[failed] = np.nan
        sharing = plan.sharing(self.supernet.space.flops_table)
        return Scores(
            errors.astype(np.float32)[plan.inverse],
            losses[plan.inverse],
            self.supernet.version,
            images,
            calibrated,
            sharing if self.strategy == "shared" else 1.0,
            time.perf_counter() - begin,
            computed,
        )

    def _place(self, images: Tensor, labels: Tensor | None = None):
        reference = next(self.supernet.parameters())
        images = images.to(reference.device, reference.dtype)
        return images, None if labels is None else labels.to(reference.device)

    def _shared(self, plan: Plan) -> tuple[np.ndarray, np.ndarray, int, int, str]:
        static, computed = static_supernet(self.supernet, plan, self._sample, self.precision)
        if static is None:
            return *self._by_modules(plan), computed
        moments = None
        if self.batch_norm == "ema":
            moments = self.supernet.ema
        elif self.batch_norm == "running":
            moments = dict(self.supernet.named_buffers())
        given = self._there("batches"), self._there("calibration")
        return *static.evaluate(plan, *given, self.batch_norm, moments), computed

    def _sample(self) -> Tensor:
        """No images, of the size of those that are scored; a batch is read for it once."""
        if self._sampled is None or self._sampled[0] is not self.batches:
            first = next(iter(self.batches), None)
            if first is None:
                raise ValueError("batches: none to score on")
            self._sampled = self.batches, first[0][:0].clone()
        return self._sampled[1]

    def _there(self, name: str) -> Batches:
        """Batches as the supernet's device reads them: kept there where they fit."""
        batches = getattr(self, name)
        device = next(self.supernet.parameters()).device
        if device.type == "cpu" or batches is None:
            return batches
        found = self._uploaded.get(name)
        if found is None or found[0] is not batches or found[1] != device:
            found = self._uploaded[name] = batches, device, uploaded(batches, device)
        return found[2]

    def _by_modules(self, plan: Plan) -> tuple[np.ndarray, np.ndarray, int, int]:
        supernet, norms = self.supernet, BatchNorms(self.supernet, is_settled=True)
        statistics = None
        images = calibrated = 0
        wrong, losses = None, None
        device = next(supernet.parameters()).device
        # A caller's inference mode would hide an op that writes into a row it shares.
        with (
            torch.inference_mode(False),
            evaluation_mode(supernet),
            precision_scope(self.precision, device),
        ):
            if self.batch_norm == "recalibrate":
                statistics = Statistics.empty(plan)
                for x, _ in self._there("calibration"):
                    calibrate_step(supernet, norms, plan, self._place(x)[0], statistics)
                    calibrated += len(x)
                if calibrated == 0:
                    raise ValueError("calibration: no batches; recalibrate needs at least one")
            for x, y in self._there("batches"):
                x, y = self._place(x, y)
                w, s = eval_step(supernet, norms, plan, x, y, self.batch_norm, statistics)
                wrong, losses = (w, s) if wrong is None else (wrong + w, losses + s)
                images += len(y)
        if images == 0:
            return np.zeros(0), np.zeros(0), 0, calibrated
        return wrong.cpu().numpy().astype(float), losses.cpu().numpy(), images, calibrated

    @torch.no_grad()
    def _sequential(self, plan: Plan) -> tuple[np.ndarray, np.ndarray, int, int, str]:
        wrong, losses = np.zeros(plan.num_leaves), np.zeros(plan.num_leaves)
        images = calibrated = 0
        device = next(self.supernet.parameters()).device
        recalibrates = self.batch_norm == "recalibrate"
        with precision_scope(self.precision, device):
            for index, arch in enumerate(plan.archs):
                net = self.supernet.subnet(
                    arch,
                    calibration=self.calibration if recalibrates else None,
                    statistics="ema" if self.batch_norm == "ema" else "running",
                )
                if self.batch_norm == "batch":
                    for module in net.modules():
                        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                            module.train()
                images = 0
                for x, y in self.batches:
                    x, y = self._place(x, y)
                    with needing_moments(x):
                        logits = net(x)
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    wrong[index] += int((logits.argmax(dim=1) != y).sum())
                    losses[index] += float(functional.cross_entropy(logits, y, reduction="sum"))
                    images += len(y)
        if recalibrates:
            calibrated = sum(len(x) for x, _ in self.calibration)
        return wrong, losses, images, calibrated, "sequential"
