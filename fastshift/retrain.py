"""Train one architecture from scratch: what a search's winner is worth by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastshift.device import parse_device, use_device
from fastshift.errors import ConfigError, DataError
from fastshift.identity import with_overrides
from fastshift.pretrain import PretrainOptions, pretrain
from fastshift.single_path import fresh_path, single_path
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet

__all__ = ["RetrainOptions", "Retrained", "retrain", "single_path", "top1_error"]


@dataclass(frozen=True)
class RetrainOptions:
    """How to train one architecture from scratch.

    Attributes:
        epochs: passes over the training part.
        batch_size: images a step.
        lr: peak learning rate; by default that of SPOS, 0.5 for a batch of 1,024 images, in
            proportion to the batch size.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD; acts on matrices and kernels only.
        nesterov: use Nesterov's form of momentum.
        schedule: `cosine` or `linear` down to zero, or `constant`.
        warmup_epochs: epochs in which the rate rises linearly from zero.
        label_smoothing: of the cross-entropy.
        clip_norm: largest norm of the whole gradient; by default it is not clipped.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 4e-5
    nesterov: bool = False
    schedule: str = "cosine"
    warmup_epochs: int = 0
    label_smoothing: float = 0.1
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs: {self.epochs}; expected at least 1")
        if self.warmup_epochs < 0:
            raise ConfigError(f"warmup_epochs: {self.warmup_epochs}; expected at least 0")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"warmup_epochs: {self.warmup_epochs}; expected at most epochs, {self.epochs}"
            )
        self.for_images(1)

    def for_images(self, num_images: int) -> PretrainOptions:
        """The same as optimiser steps, for a training part of so many images."""
        per_epoch = num_images / self.batch_size if self.batch_size > 0 else 1.0
        return PretrainOptions(
            steps=max(1, round(self.epochs * per_epoch)),
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            schedule=self.schedule,
            warmup_steps=round(self.warmup_epochs * per_epoch),
            label_smoothing=self.label_smoothing,
            clip_norm=self.clip_norm,
        )


@dataclass(frozen=True)
class Retrained:
    """A network trained by itself.

    Attributes:
        net: a plain module in evaluation mode, of the structure that `Supernet.subnet` gives.
        path: the same weights as a supernet of this one architecture, which can be saved.
        test_error: top-1 error on the test set, in [0, 1]; None where training was stopped.
        loss: mean training loss of the last hundred steps, nats.
        steps: optimiser steps.
        seconds: wall time of this call.
        stopped: why it ended early, or None.
    """

    net: nn.Module
    path: ChainSupernet
    test_error: float | None
    loss: float
    steps: int
    seconds: float
    stopped: str | None = None


@torch.inference_mode(False)
@torch.enable_grad()
def retrain(
    space: SearchSpace | ChainSupernet,
    arch: Sequence[int] | str | np.ndarray,
    data: Any,
    epochs: int | None = None,
    *,
    options: RetrainOptions | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    memory_format: torch.memory_format = torch.contiguous_format,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 120.0,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
    **overrides: Any,
) -> Retrained:
    """Train one architecture from scratch on the training part, and test it.

    Its weights are drawn anew and nothing is inherited; batch norms of a described space are affine
    whatever those of the supernet are. The result is a function of the arguments alone. The test
    set is used once, after the last step.

    Args:
        space: the architecture's, or its supernet; of modules the supernet is needed, whose own
            `reset_parameters` draw the weights.
        arch: choices, `[L]`, or their string.
        data: with `train.batch`, `train.num_images` and `test` batches.
        epochs: passes over the training part; overrides the options'.
        options: everything else; single fields can be given as keywords.
        seed: of initial weights, batches and masks.
        device: where to train, `auto` a GPU where there is one; None takes the supernet's, or a
            CPU for a space.
        precision: `fp32` or `bf16`.
        memory_format: of the weights; decides speed, and rounding.
        out: run directory for checkpoints, or None.
        resume: go on from the directory's last checkpoint, where there is one.
        checkpoint_seconds: wall time between checkpoints.
        stop: asked between steps; true ends the call with a checkpoint.
        quiet: show no progress.

    Returns:
        The network with its test error.

    Raises:
        ArchError: `arch` is not in the space.
        CheckpointError: the directory's checkpoint is damaged or belongs to another run.
        ConfigError: an option is unknown or unusable.
        DataError: there is no test set.
        NonFiniteLossError: three losses in a row were not finite; the state was saved.
        SpaceError: a space without a description, or a module that cannot draw its weights anew.
    """
    if epochs is not None:
        overrides["epochs"] = epochs
    options = with_overrides(options or RetrainOptions(), overrides)
    if data.test is None:
        raise DataError(f"data {data.spec!r}: no test set, expected one to test the network on")
    if device is None:
        device = next(space.parameters()).device if isinstance(space, nn.Module) else "cpu"
    try:
        device = parse_device(device)
    except ValueError as error:
        raise ConfigError(f"device: {str(device)!r}; {error}") from error
    path = fresh_path(space, arch, seed)
    path.to(device=device, memory_format=memory_format)
    trained = pretrain(
        path,
        data,
        options=options.for_images(data.train.num_images),
        seed=seed,
        precision=precision,
        out=out,
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        stop=stop,
        quiet=quiet,
        what="retrain",
    )
    net = path.subnet(np.zeros(path.space.num_blocks, np.uint8))
    with use_device(device):
        error = None if trained.stopped else top1_error(net, data.test)
    return Retrained(
        net=net,
        path=path,
        test_error=error,
        loss=trained.loss,
        steps=trained.steps,
        seconds=trained.seconds,
        stopped=trained.stopped,
    )


@torch.no_grad()
def top1_error(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 error of a network on labelled batches, in [0, 1]; its mode stays as it is.

    Args:
        net: maps images `[N, C, H, W]` to logits.
        batches: `(images, labels)` pairs.

    Raises:
        ValueError: there is no batch.
    """
    reference = next(net.parameters())
    wrong = images_seen = 0
    for images, labels in batches:
        with torch.autocast(reference.device.type, enabled=False):
            logits = net(images.to(reference.device, reference.dtype))
        wrong += int((logits.argmax(dim=1) != labels.to(logits.device)).sum())
        images_seen += len(labels)
    if images_seen == 0:
        raise ValueError("batches: none to test on")
    return wrong / images_seen
