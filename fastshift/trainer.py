"""Updates of a supernet on sampled paths: one plan and one mini-batch in, one step of SGD out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastshift.batch_norm import BatchNorms, MovingAverages
from fastshift.device import TURN, use_device
from fastshift.errors import ConfigError, NonFiniteLossError, SpaceError, UnsupportedError
from fastshift.evaluator import precision_scope
from fastshift.optim import PathSGD
from fastshift.static_supernet import StaticTrainer, expect_updates, static_supernet
from fastshift.steps import refuse_random_trunk, train_step
from fastshift.supernet import ChainSupernet
from fastshift.trie import Plan

__all__ = ["PathTrainer", "check_sgd"]

MAX_SKIPPED = 3


def check_sgd(options: Any, prefix: str = "") -> None:
    """Refuse options of SGD and its loss that are out of range, None aside.

    Args:
        options: with `lr`, `momentum`, `weight_decay`, `label_smoothing`, `clip_norm` after a
            prefix.
        prefix: of their names.

    Raises:
        ConfigError: naming the option.
    """
    for name in ("lr", "momentum", "weight_decay", "label_smoothing", "clip_norm"):
        value = getattr(options, prefix + name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{prefix}{name}: {value}; expected a finite number, at least 0")
        if name in ("momentum", "label_smoothing") and value > 1:
            raise ConfigError(f"{prefix}{name}: {value}; expected at most 1")


class PathTrainer:
    """Make updates of a supernet, count them, and skip those whose loss is not finite.

    Args:
        supernet: to train.
        lr: learning rate; `update` can give another.
        momentum, weight_decay, nesterov, head_lr_multiplier, drift: of `PathSGD`.
        label_smoothing: of the cross-entropy.
        clip_norm: largest norm of the whole gradient, or None.
        reduction: `sum` or `mean` over the plan's rows.
        ema: move the shift steps' moving averages instead of the modules' own.
        seed: of the masks of dropout.
        precision: `fp32` or `bf16`.
        batch_size: images of its batches, where that is known before the first.

    Attributes:
        updates: optimiser steps made.
        skipped: updates skipped; `skipped_in_row` of them just now.
        path_images: (path, image) pairs trained on.
        images: images trained on, each counted once a step.
        computed: how the last update was: `captured` as CUDA graphs, `static`, or
            `modules: ` and why not by those.
    """

    def __init__(
        self,
        supernet: ChainSupernet,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 4e-5,
        nesterov: bool = False,
        head_lr_multiplier: float = 1.0,
        drift: bool = False,
        label_smoothing: float = 0.1,
        clip_norm: float | None = None,
        reduction: str = "sum",
        ema: bool = False,
        seed: int = 0,
        precision: str = "fp32",
        batch_size: int | None = None,
    ) -> None:
        self.supernet = supernet
        self.norms = BatchNorms(supernet)
        self.optimizer = PathSGD(
            supernet,
            lr,
            momentum,
            weight_decay,
            nesterov=nesterov,
            head_lr_multiplier=head_lr_multiplier,
            drift=drift,
        )
        self.label_smoothing = label_smoothing
        self.clip_norm = clip_norm
        self.reduction = reduction
        self.ema = ema
        self.seed = seed
        self.precision = precision
        self.updates = self.skipped = self.skipped_in_row = self.path_images = self.images = 0
        self.computed = "modules: nothing trained yet"
        self._static: StaticTrainer | None = None
        self._random_trunk_checked = False
        self._trunk = supernet.trunk_parameters()
        if batch_size is not None:
            expect_updates(supernet, self, batch_size)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def update(
        self, plan: Plan, images: Tensor, labels: Tensor, *, position: int, lr: float | None = None
    ) -> float:
        """Make one update, or skip it where a loss or the gradient is not finite.

        A caller's `no_grad`, inference mode and autocast, and gradients there before, stay outside.
        Threads take turns, evaluations included.

        Args:
            plan: of the paths.
            images: `[N, C, H, W]`.
            labels: `[N]` int64.
            position: of the step in the run; seeds the masks.
            lr: learning rate from here on.

        Returns:
            Mean loss over the plan's rows, nats.

        Raises:
            NonFiniteLossError: this is the third update in a row that had to be skipped.
        """
        supernet = self.supernet
        if lr is not None:
            self.optimizer.set_lr(lr)
        scale = 1.0 if self.reduction == "sum" else 1.0 / plan.num_rows
        moving = any(p.requires_grad for p in self._trunk)
        key = (self.seed, position)
        with TURN, use_device(next(supernet.parameters()).device):
            if not supernet.training:
                supernet.train()
            trainer = self._static_trainer(plan, images)
            step = self._step_by_modules if trainer is None else trainer.update
            total, moved = step(plan, images, labels, key=key, scale=scale, moving=moving)
            supernet.version += moved
        loss = total / plan.num_rows
        if moved:
            self.updates += 1
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        self.path_images += plan.num_rows * len(labels)
        self.images += len(labels)
        if self.skipped_in_row >= MAX_SKIPPED:
            raise NonFiniteLossError(
                f"loss or gradient: not finite in {self.skipped_in_row} updates in a row "
                f"(step {position}); lower the learning rate or clip the gradient"
            )
        return loss

    def _static_trainer(self, plan: Plan, images: Tensor) -> StaticTrainer | None:
        """The static steps, where they are to run."""
        static, self.computed = static_supernet(self.supernet, plan, lambda: images, self.precision)
        if static is None:
            self._static = None
            return None
        fixed = (self.clip_norm, self.label_smoothing, self.supernet.ema if self.ema else None)
        if self._static is None or not self._static.serves(static, *fixed):
            self._static = None  # before its successor takes as much memory
            try:
                self._static = StaticTrainer(static, self.supernet, self.optimizer, *fixed)
            except UnsupportedError as error:
                self.computed = f"modules: {error}"
        return self._static

    def release(self) -> None:
        """Let buffers and graphs of the updates go; another update makes them anew."""
        self._static = None
        expect_updates(self.supernet, self, 0)

    def _step_by_modules(
        self,
        plan: Plan,
        images: Tensor,
        labels: Tensor,
        *,
        key: tuple[int, int],
        scale: float,
        moving: bool,
    ) -> tuple[float, bool]:
        """One update by `steps.train_step`: the losses' sum, and whether anything moved."""
        supernet = self.supernet
        if plan.num_leaves > 1 and not self._random_trunk_checked:
            refuse_random_trunk(supernet)
            self._random_trunk_checked = True
        reference = next(supernet.parameters())
        images = images.to(reference.device, reference.dtype)
        labels = labels.to(reference.device)
        # Autograd keeps no tensor of an inference mode.
        images, labels = (x.clone() if x.is_inference() else x for x in (images, labels))
        self.optimizer.zero_grad(set_to_none=True)
        averages = MovingAverages(self.norms)
        shares = plan.num_leaves > 1
        before = _random_state(reference.device) if shares else None
        with precision_scope(self.precision, reference.device):
            losses = train_step(
                supernet,
                self.norms,
                plan,
                images,
                labels,
                averages,
                key=key,
                label_smoothing=self.label_smoothing,
                scale=scale,
                moving=moving,
            )
        if shares and not torch.equal(before, _random_state(reference.device)):
            raise SpaceError(
                "the stem or a candidate op draws random numbers, which several candidates would "
                "share; move what draws them into the head, or train one path at a time"
            )
        counts = torch.as_tensor(plan.counts, dtype=torch.float64, device=losses.device)
        total = float((losses * counts).sum())
        moved = math.isfinite(total) and self._clip()
        if moved:
            self.optimizer.step()
            averages.apply(supernet.ema if self.ema else None)
        self.optimizer.zero_grad(set_to_none=True)
        return total, moved

    def _clip(self) -> bool:
        """Clip the gradient where asked to, and say whether it is finite."""
        moved = [p for p in self.supernet.parameters() if p.grad is not None]
        gradients = [p.grad for p in moved]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(moved, self.clip_norm, norm)
        return bool(norm.isfinite()) if gradients else True

    def counters(self) -> dict[str, int]:
        """Counts, for a checkpoint."""
        names = ("updates", "skipped", "skipped_in_row", "path_images", "images")
        return {name: getattr(self, name) for name in names}

    def load_counters(self, counters: dict[str, int]) -> None:
        """Take back what `counters` gave."""
        for name, value in counters.items():
            setattr(self, name, value)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
