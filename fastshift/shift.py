"""Supernet Shifting (arXiv 2403.11380): train on the architectures that are to be scored."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastshift.batch_norm import start_ema
from fastshift.errors import ConfigError
from fastshift.pretrain import PathTrainer, check_sgd
from fastshift.sampler import FeasibleSampler
from fastshift.supernet import ChainSupernet
from fastshift.trie import Plan

__all__ = ["HeadWarmup", "ShiftOptions", "Shifter"]

MODES = ("accumulate", "immediate", "every:G", "uniform", "none")


@dataclass(frozen=True)
class ShiftOptions:
    """How the supernet shifts during a search.

    Attributes:
        shift: `accumulate` (the paper) scores a generation under one set of weights, then shifts on
            all of it; `immediate` (the released code) shifts on one candidate and scores it, one
            after the other; `every:G` does so with G candidates at a time; `uniform` is the
            control: the same updates on as many uniform feasible paths; `none`: SPOS.
        shift_steps: updates of each shift, each on a fresh mini-batch.
        shift_batch_size: images of such a mini-batch.
        shift_lr: learning rate; by default 1e-4 with `--reduction sum`, and that times the
            candidates of an update with `mean`.
        shift_momentum: momentum of SGD.
        shift_weight_decay: weight decay of SGD; acts on matrices and kernels only.
        shift_label_smoothing: of the cross-entropy.
        shift_clip_norm: largest norm of the whole gradient; by default it is not clipped.
        reduction: `sum` (the paper) or `mean` of the candidates' losses.
        score: `before` or `after` the shift; by default `before` for `accumulate` and `uniform`,
            and `after`, the only possibility, for `immediate` and `every:G`.
        drift: let unsampled parameters drift by momentum and decay as torch 1 did; for comparison
            only.
        head_lr_multiplier: learning rate of the head over that of the trunk.
        head_warmup_steps: steps that train the head alone before the first generation; by default
            200 in a transfer by `accumulate`, `every:G` or `uniform`, and 0 otherwise.
        head_warmup_lr: learning rate of those steps.
        frozen_trunk_generations: generations, from the first, that shift only the head.
    """

    shift: str = "accumulate"
    shift_steps: int = 20
    shift_batch_size: int = 150
    shift_lr: float | None = None
    shift_momentum: float = 0.9
    shift_weight_decay: float = 4e-5
    shift_label_smoothing: float = 0.1
    shift_clip_norm: float | None = None
    reduction: str = "sum"
    score: str | None = None
    drift: bool = False
    head_lr_multiplier: float = 1.0
    head_warmup_steps: int | None = None
    head_warmup_lr: float = 0.05
    frozen_trunk_generations: int = 0

    def __post_init__(self) -> None:
        every = re.fullmatch(r"every:([1-9][0-9]*)", self.shift)
        if not every and self.shift not in MODES[:2] + MODES[3:]:
            raise ConfigError(f"shift: {self.shift!r}; expected one of {', '.join(MODES)}")
        if self.shift == "every:1":
            object.__setattr__(self, "shift", "immediate")
        if self.reduction not in ("sum", "mean"):
            raise ConfigError(f"reduction: {self.reduction!r}; expected sum or mean")
        if self.score not in (None, "before", "after"):
            raise ConfigError(f"score: {self.score!r}; expected before or after")
        if self.score == "before" and (every or self.shift == "immediate"):
            raise ConfigError(f"score: 'before' is not possible with shift {self.shift!r}")
        for name in ("shift_steps", "shift_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; expected at least 1")
        for name in (
            "head_lr_multiplier",
            "head_warmup_steps",
            "head_warmup_lr",
            "frozen_trunk_generations",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}: {value}; expected a finite number, at least 0")
        check_sgd(self, "shift_")

    @property
    def moves(self) -> bool:
        """Whether weights move during the search."""
        return self.shift != "none"

    @property
    def scores_after(self) -> bool:
        """Whether candidates are scored after the shift on them."""
        if self.shift in ("accumulate", "uniform"):
            return self.score == "after"
        return self.moves

    def group_size(self, candidates: int) -> int:
        """How many candidates are shifted on at a time, out of a generation of so many."""
        if self.shift == "immediate":
            return 1
        if self.shift.startswith("every:"):
            return min(int(self.shift.split(":")[1]), candidates)
        return candidates

    def lr_for(self, population: int) -> float:
        """The learning rate, the default resolved for a population's group."""
        if self.shift_lr is not None:
            return self.shift_lr
        return 1e-4 * (self.group_size(population) if self.reduction == "mean" else 1)

    @property
    def default_batch_norm(self) -> str:
        """The default policy of scores: `ema`, as released, for `immediate`, else `recalibrate`."""
        return "ema" if self.shift == "immediate" else "recalibrate"

    @property
    def rescores_parents(self) -> bool:
        """Whether parents are scored again each generation; `immediate` keeps them, as released."""
        return self.moves and self.shift != "immediate"


class Shifter:
    """Shift a supernet on groups of candidates.

    Optimiser and momenta last for the whole search.

    Args:
        supernet: to shift.
        data: its `train.batch(index, size, stream)` gives mini-batches.
        options: how.
        population: candidates of a generation; decides the default rate of `mean`.
        constraints: what the paths of `uniform` must satisfy.
        seed: of masks and of the control's paths.
        precision: `fp32` or `bf16`.
        subtrie_size: candidates trained side by side; bounds memory.

    Attributes:
        position: updates asked for, skipped ones included; the position in the data.
    """

    def __init__(
        self,
        supernet: ChainSupernet,
        data: Any,
        options: ShiftOptions,
        *,
        population: int,
        constraints: Any = None,
        seed: int = 0,
        precision: str = "fp32",
        subtrie_size: int = 8,
    ) -> None:
        start_ema(supernet)
        self.options = options
        self.data = data
        self.subtrie_size = subtrie_size
        self.position = 0
        self._movable = [p for p in supernet.trunk_parameters() if p.requires_grad]
        self.trainer = PathTrainer(
            supernet,
            lr=options.lr_for(population),
            momentum=options.shift_momentum,
            weight_decay=options.shift_weight_decay,
            head_lr_multiplier=options.head_lr_multiplier,
            drift=options.drift,
            label_smoothing=options.shift_label_smoothing,
            clip_norm=options.shift_clip_norm,
            reduction=options.reduction,
            ema=True,
            seed=seed,
            precision=precision,
            batch_size=options.shift_batch_size,
        )
        self.control = None
        if options.shift == "uniform":
            self.control = FeasibleSampler(supernet.space, constraints, seed)
        self._plan: tuple[bytes, Plan] | None = None

    def update(self, archs: np.ndarray) -> float:
        """Make one update on a group: one fresh mini-batch through all of it, then one step.

        Args:
            archs: the group's choices, `[G, L]`; for the control only their number counts.

        Returns:
            Mean loss over the paths, nats.

        Raises:
            NonFiniteLossError: three losses in a row were not finite.
        """
        if self.control is not None:
            plan = Plan(self.control.sample(len(archs)), self.subtrie_size)
        else:
            key = archs.tobytes()
            if self._plan is None or self._plan[0] != key:
                self._plan = key, Plan(archs, self.subtrie_size)
            plan = self._plan[1]
        images, labels = self.data.train.batch(
            self.position, self.options.shift_batch_size, "shift"
        )
        self.position += 1
        return self.trainer.update(plan, images, labels, position=self.position - 1)

    def freeze_trunk(self, frozen: bool) -> None:
        """Let the trunk's parameters move or not; its moving averages always do.

        What the caller had frozen before stays so.
        """
        for p in self._movable:
            p.requires_grad_(not frozen)

    def state(self) -> dict[str, Any]:
        """Position, counts and the control's generator, for a checkpoint."""
        control = None if self.control is None else self.control.state_dict()
        return {
            "position": self.position,
            "counters": self.trainer.counters(),
            "control": control,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.position = state["position"]
        self.trainer.load_counters(state["counters"])
        if self.control is not None:
            self.control.load_state_dict(state["control"])


class HeadWarmup:
    """Train a fresh head alone, on one uniform feasible path a step, before a transfer's search.

    Args:
        supernet, data, options, constraints, seed, precision: as for `Shifter`.
    """

    def __init__(
        self,
        supernet: ChainSupernet,
        data: Any,
        options: ShiftOptions,
        *,
        constraints: Any = None,
        seed: int = 0,
        precision: str = "fp32",
    ) -> None:
        start_ema(supernet)
        self.options = options
        self.data = data
        # A seed of its own: the control's draws must not repeat the warm-up's.
        self.sampler = FeasibleSampler(supernet.space, constraints, seed ^ (1 << 40))
        self.position = 0
        self.trainer = PathTrainer(
            supernet,
            lr=options.head_warmup_lr,
            momentum=options.shift_momentum,
            weight_decay=options.shift_weight_decay,
            label_smoothing=options.shift_label_smoothing,
            clip_norm=options.shift_clip_norm,
            ema=True,
            seed=seed,
            precision=precision,
            batch_size=options.shift_batch_size,
        )

    def update(self) -> float:
        """Make one update of the head; the trunk's parameters stay as they are."""
        trunk = self.trainer.supernet.trunk_parameters()
        images, labels = self.data.train.batch(self.position, self.options.shift_batch_size, "head")
        plan = Plan(self.sampler.sample(1))
        self.position += 1
        frozen = [p.requires_grad for p in trunk]
        for p in trunk:
            p.requires_grad_(False)
        try:
            return self.trainer.update(plan, images, labels, position=self.position - 1)
        finally:
            for p, moves in zip(trunk, frozen, strict=True):
                p.requires_grad_(moves)

    def state(self) -> dict[str, Any]:
        """Position, counts and generator, for a checkpoint."""
        return {
            "position": self.position,
            "counters": self.trainer.counters(),
            "sampler": self.sampler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.position = state["position"]
        self.trainer.load_counters(state["counters"])
        self.sampler.load_state_dict(state["sampler"])
