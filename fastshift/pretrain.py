"""Stage one: train the supernet on sampled paths."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastshift import checkpoint
from fastshift.batch_norm import BatchNorms, MovingAverages
from fastshift.errors import ConfigError, NonFiniteLossError, SpaceError
from fastshift.evaluator import precision_scope
from fastshift.optim import PathSGD
from fastshift.progress import Progress, Scalars
from fastshift.sampler import FeasibleSampler
from fastshift.space import SearchSpace
from fastshift.steps import refuse_random_trunk, train_step
from fastshift.supernet import ChainSupernet
from fastshift.trie import Plan

__all__ = ["PathTrainer", "PretrainOptions", "PretrainResult", "pretrain", "sample_paths"]

SAMPLERS = ("uniform", "fair")
SCHEDULES = ("linear", "cosine", "constant")
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


@dataclass(frozen=True)
class PretrainOptions:
    """How to pre-train.

    Attributes:
        steps: optimiser steps.
        batch_size: images a step; None takes the data's own, `train.batch_size`.
        sampler: `uniform` draws each path's choices uniformly (SPOS, section 3.2); `fair` trains
            every choice of every block once a step, on as many paths as a block has choices
            (FairNAS, strict fairness).
        paths_per_step: paths of a `uniform` step, all on one batch; their losses are averaged.
        lr: peak learning rate; None takes SPOS's 0.5 for 1,024 images in proportion to the batch.
        momentum, weight_decay, nesterov: of SGD; the decay acts on matrices and kernels only.
        schedule: `linear` or `cosine` down to zero, or `constant`.
        warmup_steps: steps in which the rate rises linearly from zero.
        label_smoothing: of the cross-entropy.
        clip_norm: largest norm of the whole gradient; None leaves it.
        constraints: bounds by metric, as `space.parse_constraints` takes them; paths are then
            uniform among the architectures that meet them. `fair` takes none.
    """

    steps: int = 2000
    batch_size: int | None = None
    sampler: str = "uniform"
    paths_per_step: int = 1
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 4e-5
    nesterov: bool = False
    schedule: str = "linear"
    warmup_steps: int = 0
    label_smoothing: float = 0.1
    clip_norm: float | None = None
    constraints: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler: {self.sampler!r}; expected one of {', '.join(SAMPLERS)}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"schedule: {self.schedule!r}; expected one of {', '.join(SCHEDULES)}"
            )
        if self.sampler == "fair" and self.constraints:
            raise ConfigError(
                "sampler: 'fair'; expected uniform with constraints, since a strictly fair step "
                "trains every choice whatever it costs"
            )
        for name in ("steps", "batch_size", "paths_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value}; expected at least 1")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps: {self.warmup_steps}; expected at least 0")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("momentum: 0; expected a positive one with nesterov")
        check_sgd(self)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, the default resolved (for 128 images where no batch size is)."""
        return 0.5 * (self.batch_size or 128) / 1024 if self.lr is None else self.lr

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.peak_lr * (1.0 - done)
        if self.schedule == "cosine":
            return self.peak_lr * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.peak_lr


@dataclass(frozen=True)
class PretrainResult:
    """What pre-training did.

    Attributes:
        steps: optimiser steps made in all.
        loss: mean training loss of the last hundred steps, nats.
        seconds: wall time of this call.
        skipped: updates skipped because the loss was not finite.
        stopped: why it ended early, or None.
    """

    steps: int
    loss: float
    seconds: float
    skipped: int
    stopped: str | None = None


def sample_paths(
    space: SearchSpace,
    options: PretrainOptions,
    seed: int,
    step: int,
    feasible: FeasibleSampler | None = None,
) -> np.ndarray:
    """The paths of one step, a function of seed and step alone.

    Args:
        space: to draw from.
        options: the sampler.
        seed: of the run.
        step: counted from 0.
        feasible: of the options' constraints; made here where it is not given.

    Returns:
        `[paths_per_step, L]` uint8 for `uniform`, `[max choices, L]` for `fair`.

    Raises:
        ConstraintError: no architecture meets the constraints.
    """
    rng = np.random.default_rng([seed, 0x9A7, step])
    if options.constraints:
        feasible = feasible or FeasibleSampler(space, options.constraints)
        words = rng.integers(1, 1 << 64, 4, dtype=np.uint64).tolist()
        feasible.load_state_dict(feasible.state_dict() | {"rng": words})
        return feasible.sample(options.paths_per_step)
    if options.sampler == "uniform":
        shape = (options.paths_per_step, space.num_blocks)
        return rng.integers(0, space.num_choices, shape).astype(np.uint8)
    most = int(space.num_choices.max())
    columns = []
    for choices in space.num_choices.tolist():
        # A block with fewer choices repeats them in whole rounds, cut at the last.
        rounds = [rng.permutation(choices) for _ in range(-(-most // choices))]
        columns.append(np.concatenate(rounds)[:most])
    return np.stack(columns, axis=1).astype(np.uint8)


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

    Attributes:
        updates: optimiser steps made.
        skipped: updates skipped; `skipped_in_row` of them just now.
        path_images: (path, image) pairs trained on.
        images: images trained on, each counted once a step.
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
        self._random_trunk_checked = False
        self._trunk = supernet.trunk_parameters()

    def update(
        self, plan: Plan, images: Tensor, labels: Tensor, *, position: int, lr: float | None = None
    ) -> float:
        """Make one update, or skip it where a loss or the gradient is not finite.

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
        if plan.num_leaves > 1 and not self._random_trunk_checked:
            refuse_random_trunk(supernet)
            self._random_trunk_checked = True
        if lr is not None:
            self.optimizer.set_lr(lr)
        reference = next(supernet.parameters())
        images = images.to(reference.device, reference.dtype)
        labels = labels.to(reference.device)
        if not supernet.training:
            supernet.train()
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
                key=(self.seed, position),
                label_smoothing=self.label_smoothing,
                scale=1.0 if self.reduction == "sum" else 1.0 / plan.num_rows,
                moving=any(p.requires_grad for p in self._trunk),
            )
        if shares and not torch.equal(before, _random_state(reference.device)):
            raise SpaceError(
                "the stem or a candidate op draws random numbers, which several candidates would "
                "share; move what draws them into the head, or train one path at a time"
            )
        counts = torch.as_tensor(plan.counts, dtype=torch.float64, device=losses.device)
        loss = float((losses * counts).sum()) / plan.num_rows
        if math.isfinite(loss) and self._clip():
            self.optimizer.step()
            averages.apply(supernet.ema if self.ema else None)
            supernet.version += 1
            self.updates += 1
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.path_images += plan.num_rows * len(labels)
        self.images += len(labels)
        if self.skipped_in_row >= MAX_SKIPPED:
            raise NonFiniteLossError(
                f"loss or gradient: not finite in {self.skipped_in_row} updates in a row "
                f"(step {position}); lower the learning rate or clip the gradient"
            )
        return loss

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


def pretrain(
    supernet: ChainSupernet,
    data: Any,
    steps: int | None = None,
    *,
    options: PretrainOptions | None = None,
    seed: int = 0,
    precision: str = "fp32",
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 120.0,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
    what: str = "pretrain",
    **overrides: Any,
) -> PretrainResult:
    """Train a supernet on sampled paths (SPOS, section 3.2), in place.

    Args:
        supernet: to train.
        data: its `train.batch(index, size, stream)` is a pure function of its arguments.
        steps: optimiser steps; overrides the options'.
        options: everything else; single fields can be given as keywords.
        seed: of paths, batches and masks.
        precision: `fp32` or `bf16`.
        out: run directory; checkpoints go there.
        resume: go on from the directory's last checkpoint, where there is one.
        checkpoint_seconds: wall time between checkpoints.
        stop: asked between steps; true ends the call with a checkpoint.
        quiet: show no progress.
        what: names the stage in its progress and its checkpoints.

    Returns:
        Steps, last loss, time.

    Raises:
        ConfigError: an option is unknown or unusable.
        CheckpointError: the directory holds a run and `resume` is false, or its checkpoint is
            damaged or belongs to another run.
        ConstraintError: a constraint is malformed, or no architecture satisfies it.
        NonFiniteLossError: three losses in a row were not finite; the state was saved.
    """
    if steps is not None:
        overrides["steps"] = steps
    options = _with_overrides(options or PretrainOptions(), overrides)
    if options.batch_size is None:
        options = replace(options, batch_size=getattr(data.train, "batch_size", 128))
    trainer = PathTrainer(
        supernet,
        lr=options.peak_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        label_smoothing=options.label_smoothing,
        clip_norm=options.clip_norm,
        reduction="mean" if options.sampler == "uniform" else "sum",
        seed=seed,
        precision=precision,
    )
    feasible = None
    if options.constraints:
        feasible = FeasibleSampler(supernet.space, options.constraints)
    # An earlier shift's averages are of weights that are about to go.
    supernet.ema.clear()
    step, recent = 0, []
    identity = {"stage": what, "seed": seed, "space": supernet.space.fingerprint()}
    identity |= {"data": getattr(data, "describe", dict)()}
    identity |= {"precision": precision, "options": asdict(options)}
    if not options.constraints:  # runs from before there were any go on too
        del identity["options"]["constraints"]
    identity = json.loads(json.dumps(identity))

    def save() -> None:
        if out is not None:
            state = {"step": step, "recent": recent, "version": supernet.version}
            state |= {"identity": identity, "counters": trainer.counters()}
            tensors = {"supernet": supernet.tensors(), "momenta": trainer.optimizer.momenta()}
            checkpoint.save(out, step, tensors=tensors, state=state)

    found = None if out is None else checkpoint.load(out)
    if found is not None:
        state = found.state
        if not resume:
            raise checkpoint.CheckpointError(
                f"{out}: holds a run already; go on with resume, or give another directory"
            )
        if state["identity"] != identity:
            raise checkpoint.CheckpointError(
                f"{out}: its checkpoint belongs to another run "
                f"({_difference(state['identity'], identity)}); give another directory"
            )
        supernet.load_tensors(found.tensors["supernet"], state["version"])
        trainer.optimizer.load_momenta(found.tensors["momenta"])
        trainer.load_counters(state["counters"])
        step, recent = state["step"], list(state["recent"])
    stopped, saved, begin = None, time.perf_counter(), time.perf_counter()
    with (
        Progress(options.steps - step, what=what, quiet=quiet) as progress,
        Scalars(out) as scalars,
    ):
        while step < options.steps:
            if stop():
                stopped = "interrupted"
                break
            paths = sample_paths(supernet.space, options, seed, step, feasible)
            images, labels = data.train.batch(step, options.batch_size, "pretrain")
            lr = options.lr_at(step)
            try:
                loss = trainer.update(Plan(paths), images, labels, position=step, lr=lr)
            except NonFiniteLossError:
                step += 1
                save()
                raise
            step += 1
            if math.isfinite(loss):
                recent = [*recent, loss][-100:]
            shown = sum(recent) / len(recent) if recent else None
            progress.advance(1, loss=shown, images=len(labels))
            if step % 20 == 0:
                scalars.write(step, {f"{what}/loss": loss, f"{what}/lr": lr})
            if time.perf_counter() - saved > checkpoint_seconds:
                save()
                saved = time.perf_counter()
    save()
    loss = sum(recent) / len(recent) if recent else math.nan
    return PretrainResult(step, loss, time.perf_counter() - begin, trainer.skipped, stopped)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _with_overrides(options: Any, overrides: dict[str, Any]) -> Any:
    """A copy of an options record with some fields changed; an unknown one is an error."""
    known = set(options.__dataclass_fields__)
    for name in overrides:
        if name not in known:
            raise ConfigError(f"{name}: unknown option; expected one of {', '.join(sorted(known))}")
    return replace(options, **overrides)


def _difference(old: dict, new: dict) -> str:
    """Name the first entry in which two identities differ."""
    for key in new:
        if old.get(key) == new[key]:
            continue
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            return f"{key}: {_difference(old[key], new[key])}"
        return f"{key} is {old.get(key)!r} there, {new[key]!r} here"
    return "it has entries this run has not"
