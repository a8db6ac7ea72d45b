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

from fastshift import checkpoint
from fastshift.errors import ConfigError, NonFiniteLossError
from fastshift.identity import check_identity, with_overrides
from fastshift.prefetch import PrefetchedTrain
from fastshift.progress import Progress, Scalars
from fastshift.sampler import FeasibleSampler
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet
from fastshift.trainer import PathTrainer, check_sgd
from fastshift.trie import Plan

__all__ = ["PathTrainer", "PretrainOptions", "PretrainResult", "pretrain", "sample_paths"]

SAMPLERS = ("uniform", "fair")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class PretrainOptions:
    """How to pre-train.

    Attributes:
        steps: optimiser steps.
        batch_size: images a step, by default that of the data, 128 on the command line; more than
            the training part has come from several passes over it.
        sampler: `uniform` draws each path's choices uniformly (SPOS, section 3.2); `fair` trains
            every choice of every block once a step, on as many paths as a block has choices
            (FairNAS, strict fairness).
        paths_per_step: paths of a `uniform` step, all on one batch; their losses are averaged.
        lr: peak learning rate; by default that of SPOS, 0.5 for a batch of 1,024 images, in
            proportion to the batch size.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD; acts on matrices and kernels only.
        nesterov: use Nesterov's form of momentum.
        schedule: `linear` or `cosine` down to zero, or `constant`.
        warmup_steps: steps in which the rate rises linearly from zero.
        label_smoothing: of the cross-entropy.
        clip_norm: largest norm of the whole gradient; by default it is not clipped.
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
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps: {self.warmup_steps}; expected at most steps, {self.steps}"
            )
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
        computed: how the last update was: `captured` as CUDA graphs, `static`, or `modules: ` and
            why not as graphs.
        augmented: where the batches were augmented, as the data says it; None where it does not.
    """

    steps: int
    loss: float
    seconds: float
    skipped: int
    stopped: str | None = None
    computed: str = "modules: nothing trained"
    augmented: str | None = None


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


@torch.inference_mode(False)
@torch.enable_grad()
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

    On a GPU each call captures the CUDA graphs of its updates anew.

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
    options = with_overrides(options or PretrainOptions(), overrides)
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
        batch_size=options.batch_size,
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
        check_identity(out, state["identity"], identity, resume=resume)
        supernet.load_tensors(found.tensors["supernet"], state["version"])
        trainer.optimizer.load_momenta(found.tensors["momenta"])
        trainer.load_counters(state["counters"])
        step, recent = state["step"], list(state["recent"])
    stopped, saved, begin = None, time.perf_counter(), time.perf_counter()
    device = next(supernet.parameters()).device
    with (
        Progress(options.steps, what=what, quiet=quiet, done=step) as progress,
        Scalars(out) as scalars,
        PrefetchedTrain(data.train, device, options.steps) as train,
    ):
        while step < options.steps:
            if stop():
                stopped = "interrupted"
                break
            paths = sample_paths(supernet.space, options, seed, step, feasible)
            images, labels = train.batch(step, options.batch_size, "pretrain")
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
    seconds = time.perf_counter() - begin
    augmented = getattr(data.train, "augmented", None)
    return PretrainResult(
        step, loss, seconds, trainer.skipped, stopped, trainer.computed, augmented
    )
