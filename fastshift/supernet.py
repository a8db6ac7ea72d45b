"""Supernets: a stem, choice blocks of candidate ops with weights of their own, and a head."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastshift.device import in_turn
from fastshift.errors import ArchError, CheckpointError, DataError, SpaceError
from fastshift.layers import HeadModule, OpModule, UnitChain
from fastshift.space import ModuleSpace, SearchSpace

__all__ = ["ChainSupernet", "Supernet", "needing_moments", "recalibrate"]


@contextmanager
def needing_moments(images: Tensor) -> Iterator[None]:
    """Name the batch where a batch norm that takes moments meets one value a channel.

    Args:
        images: the batch that is computed within, `[N, C, H, W]`.

    Raises:
        DataError: it is one image, and it reaches a batch norm as a map of one pixel.
    """
    try:
        yield
    except ValueError as error:  # torch's own text names neither the batch nor what would do
        if len(images) != 1 or "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            "batch of 1 image: it reaches a batch norm as a map of one pixel, which has no "
            "moments; expected batches of at least 2 images"
        ) from error


def recalibrate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """Give a network's batch norms the statistics of fixed batches.

    Each batch is normalised by its own moments; the means and the unbiased variances are averaged
    over the batches, as `nn.BatchNorm2d(momentum=None)` does. Everything else stays in evaluation
    mode. This is the definition of the `recalibrate` policy.

    Args:
        net: the network; its batch norms are changed in place.
        batches: `(images, labels)` pairs, images `[N, C, H, W]`.

    Returns:
        `net`, in evaluation mode.

    Raises:
        ValueError: there is no batch.
        DataError: a batch is one image, and leaves a batch norm one value a channel.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    count = 0
    with torch.no_grad():
        for images, _ in batches:
            with needing_moments(images):
                net(_like(images, net))
            count += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    if count == 0:
        raise ValueError("calibration: no batches; recalibrate needs at least one")
    return net


def _like(images: Tensor, net: nn.Module) -> Tensor:
    """Bring images to the device and floating type of a network."""
    reference = next(net.parameters(), None)
    return images if reference is None else images.to(reference.device, reference.dtype)


class ChainSupernet(nn.Module):
    """A chain supernet made of any modules: `blocks[l][o]` is candidate op `o` of choice block `l`.

    `nn.Identity` is the identity choice. Candidate ops must not change their input in place.

    Args:
        stem: maps images `[N, C, H, W]` to the first block's input.
        blocks: `[L][O]` modules; blocks may differ in their number of candidates.
        head: maps the last block's output to logits `[N, num_classes]`.
        input_shape: `(C, H, W)` of an image; with it, FLOPs are counted by running one image.
        name: of the search space this makes.

    Attributes:
        memory_format: of the rows that are scored without a compiled kernel: `torch.channels_last`,
            `torch.contiguous_format` (as the modules leave them), or None, the default: channels
            last on a CPU, as the modules leave them elsewhere. The weights' own is untouched.

    Raises:
        SpaceError: a block is empty, a candidate cannot follow every candidate before it, or a
            module with weights or statistics stands in two places.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Sequence[nn.Module]],
        head: nn.Module,
        *,
        input_shape: tuple[int, int, int] | None = None,
        name: str = "chain",
        space: SearchSpace | None = None,
    ) -> None:
        super().__init__()
        if not blocks or any(len(block) == 0 for block in blocks):
            raise SpaceError("blocks: every choice block needs at least one candidate op")
        self.stem = stem
        self.blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.head = head
        _refuse_shared_weights(self)
        self.space = space or _measured_space(self, name, input_shape)
        self.identities = self.space.identities
        self.version = 0
        self.ema: dict[str, Tensor] = {}
        self.memory_format: torch.memory_format | None = None

    def forward(self, images: Tensor, arch: Sequence[int] | str | np.ndarray) -> Tensor:
        """Logits of one path.

        Args:
            images: `[N, C, H, W]`.
            arch: choices, `[L]`, or their string.

        Returns:
            `[N, num_classes]`.

        Raises:
            ArchError: `arch` is not in the space.
        """
        x = self.stem(images)
        for block, choice in zip(self.blocks, self._row(arch), strict=True):
            x = block[int(choice)](x)
        return self.head(x)

    def _apply(self, fn, recurse=True):
        """Let the moving averages follow the weights to another device or type."""
        super()._apply(fn, recurse)
        self.ema = {key: fn(value) for key, value in self.ema.items()}
        return self

    def _row(self, arch: Sequence[int] | str | np.ndarray) -> np.ndarray:
        rows = self.space.as_archs([arch] if isinstance(arch, str) else np.asarray(arch))
        if len(rows) != 1:
            raise ArchError(f"arch: {len(rows)} rows; expected one architecture")
        return rows[0]

    @in_turn
    def subnet(
        self,
        arch: Sequence[int] | str | np.ndarray,
        calibration: Iterable[tuple[Tensor, Tensor]] | None = None,
        *,
        statistics: str = "running",
    ) -> nn.Sequential:
        """Copy one path into a network of its own.

        Args:
            arch: choices, `[L]`, or their string.
            calibration: batches whose statistics its batch norms get; without them `statistics`
                decides.
            statistics: `running`, as pre-training left them, or `ema`, as the shift steps did.

        Returns:
            A plain module in evaluation mode, with children `stem`, `blocks`, `head`; it shares
            nothing with the supernet.

        Raises:
            ArchError: `arch` is not in the space.
            ValueError: unknown statistics, or `ema` before any shift step.
        """
        if statistics not in ("running", "ema"):
            raise ValueError(f"statistics: {statistics!r}; expected running or ema")
        if statistics == "ema" and not self.ema:
            raise ValueError("statistics: 'ema' has no values before the first shift step")
        row = self._row(arch)
        net = nn.Sequential(
            OrderedDict(
                stem=copy.deepcopy(self.stem),
                blocks=nn.Sequential(
                    *(
                        copy.deepcopy(block[int(choice)])
                        for block, choice in zip(self.blocks, row, strict=True)
                    )
                ),
                head=copy.deepcopy(self.head),
            )
        ).eval()
        if calibration is not None:
            return recalibrate(net, calibration)
        if statistics == "ema":
            for key, value in net.state_dict().items():
                value.copy_(self.ema.get(self._source_key(key, row), value))
        return net

    @staticmethod
    def _source_key(key: str, row: np.ndarray) -> str:
        """The supernet's name for an entry of a subnet's state dict."""
        parts = key.split(".")
        if parts[0] == "blocks":
            parts.insert(2, str(int(row[int(parts[1])])))
        return ".".join(parts)

    @in_turn
    def reset_head(self, num_classes: int, *, seed: int | None = None) -> None:
        """Replace the classifier, the last linear layer of the head, by a fresh one.

        Weights are drawn from N(0, 0.01), as in the released code's transfer; a bias starts at
        zero.

        Args:
            num_classes: outputs of the new classifier.
            seed: of the draw; the global generator is used without one.

        Raises:
            SpaceError: the head has no linear layer, or `num_classes` is below 1.
        """
        if num_classes < 1:
            raise SpaceError(f"num_classes: {num_classes}; expected at least 1")
        found = [(n, m) for n, m in self.head.named_modules() if isinstance(m, nn.Linear)]
        if not found:
            raise SpaceError(f"head {type(self.head).__name__}: no nn.Linear to replace")
        name, old = found[-1]
        fresh = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            fresh.weight.normal_(0.0, 0.01, generator=generator)
            if fresh.bias is not None:
                fresh.bias.zero_()
        fresh = fresh.to(old.weight.device, old.weight.dtype)
        if name:
            parent, _, leaf = name.rpartition(".")
            setattr(self.head.get_submodule(parent), leaf, fresh)
        else:
            self.head = fresh
        self.space = _with_classifier(self.space, old, fresh)

    @in_turn
    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name; the shift steps' moving averages behind `ema.`.

        Waits for an evaluation in another thread, whose statistics stand in for the norms' own.
        """
        return {**self.state_dict(), **{f"ema.{key}": value for key, value in self.ema.items()}}

    @in_turn
    @torch.inference_mode(False)
    def load_tensors(self, tensors: dict[str, Tensor], version: int) -> None:
        """Take back what `tensors` gave.

        Args:
            tensors: by name; every weight and buffer must be there with its shape.
            version: optimiser steps the weights had seen.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape.
        """
        own = {k: v for k, v in tensors.items() if not k.startswith("ema.")}
        state = self.state_dict()
        for key in sorted(state.keys() | own.keys()):
            if key not in own or key not in state:
                what = "is missing" if key not in own else "is unknown to the space"
                raise CheckpointError(f"supernet weights: {key} {what}")
            if own[key].shape != state[key].shape:
                raise CheckpointError(
                    f"supernet weights: {key} has shape {tuple(own[key].shape)}, "
                    f"expected {tuple(state[key].shape)}"
                )
        self.load_state_dict(own)
        device = next(self.parameters()).device
        self.ema = {
            k.removeprefix("ema."): v.clone().to(device)
            for k, v in tensors.items()
            if k.startswith("ema.")
        }
        self.version = version

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Parameters of the stem and of every candidate op."""
        return [*self.stem.parameters(), *self.blocks.parameters()]


class Supernet(ChainSupernet):
    """The supernet of a described search space.

    The state dict's keys read `blocks.<block>.<choice>.<unit>.weight`.

    Args:
        space: with its stem, blocks and head described by units.

    Raises:
        SpaceError: the space has no description (build a `ChainSupernet` instead).
    """

    def __init__(self, space: SearchSpace) -> None:
        if not space.blocks:
            raise SpaceError(f"space {space.name!r} has no description to build a supernet from")
        super().__init__(
            UnitChain(space.stem, space.affine),
            [[OpModule(op, space.affine) for op in block] for block in space.blocks],
            HeadModule(space.head, space.affine),
            space=space,
        )


def _refuse_shared_weights(net: ChainSupernet) -> None:
    """Refuse a module with tensors in two parts: its statistics would be those of neither."""
    parts = [("stem", net.stem), ("head", net.head)]
    for level, block in enumerate(net.blocks):
        parts += [(f"blocks.{level}.{choice}", op) for choice, op in enumerate(block)]
    places: dict[nn.Module, str] = {}
    for part, owner in parts:
        for name, module in owner.named_modules():
            if not module._parameters and not module._buffers:
                continue
            place = f"{part}.{name}".rstrip(".")
            if module in places:
                raise SpaceError(
                    f"{place}: the {type(module).__name__} that stands at {places[module]}; "
                    "candidate ops share nothing, so each place needs a module of its own"
                )
            places[module] = place


def _with_classifier(space: SearchSpace, old: nn.Linear, fresh: nn.Linear) -> SearchSpace:
    """The same space with another last linear layer."""
    classes = fresh.out_features
    if isinstance(space, ModuleSpace):
        params = [sum(p.numel() for p in layer.parameters()) for layer in (old, fresh)]
        measured = space.image_size is not None  # multiply-adds were counted, the old layer's too
        changed = ModuleSpace(
            space.name,
            num_choices=space.num_choices.tolist(),
            flops_table=space.flops_table,
            params_table=space.params_table,
            fixed_flops=space.fixed_flops
            + measured * old.in_features * (classes - old.out_features),
            fixed_params=space.fixed_params + params[1] - params[0],
            identities=space.identities,
            in_channels=space.in_channels,
            image_size=space.image_size,
            num_classes=classes,
            labels=space.labels,
        )
    else:
        recipe = space.recipe
        if recipe is not None:
            kwargs = {**recipe.get("kwargs", {}), "num_classes": classes}
            recipe = {**recipe, "kwargs": kwargs}
        changed = SearchSpace(
            space.name,
            stem=space.stem,
            blocks=space.blocks,
            head=replace(space.head, num_classes=classes),
            in_channels=space.in_channels,
            image_size=space.image_size,
            affine=space.affine,
            recipe=recipe,
        )
    for name, (table, fixed) in space.costs.items():
        if name not in changed.costs:
            changed.add_cost(name, table, fixed)
    return changed


def _measured_space(
    net: ChainSupernet, name: str, input_shape: tuple[int, int, int] | None
) -> ModuleSpace:
    """Cost tables of arbitrary modules: parameters counted, multiply-adds measured on one image."""
    num_choices = np.array([len(block) for block in net.blocks], np.int32)
    shape = (len(num_choices), int(num_choices.max()))
    flops, params = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    identities = np.zeros(shape, bool)
    for level, block in enumerate(net.blocks):
        for choice, module in enumerate(block):
            params[level, choice] = sum(p.numel() for p in module.parameters())
            identities[level, choice] = isinstance(module, nn.Identity)
    fixed_flops = 0
    classes = None
    if input_shape is not None:
        modes = [(module, module.training) for module in net.modules()]
        net.eval()
        try:
            with torch.no_grad():
                image = _like(torch.zeros(1, *input_shape), net)
                x, fixed_flops = _count(net.stem, image, "stem")
                for level, block in enumerate(net.blocks):
                    outputs = []
                    for choice, module in enumerate(block):
                        y, flops[level, choice] = _count(module, x, f"blocks.{level}.{choice}")
                        outputs.append(y)
                    shapes = {tuple(y.shape) for y in outputs}
                    if len(shapes) > 1:
                        raise SpaceError(
                            f"blocks.{level}: candidate ops give different shapes {sorted(shapes)}"
                        )
                    x = outputs[0]
                logits, head_flops = _count(net.head, x, "head")
                fixed_flops += head_flops
                classes = logits.shape[-1]
        finally:
            for module, mode in modes:
                module.training = mode
    if classes is None:
        linears = [m for m in net.head.modules() if isinstance(m, nn.Linear)]
        classes = linears[-1].out_features if linears else 0
    fixed_params = sum(p.numel() for part in (net.stem, net.head) for p in part.parameters())
    return ModuleSpace(
        name,
        num_choices=num_choices,
        flops_table=flops,
        params_table=params,
        fixed_flops=fixed_flops,
        fixed_params=fixed_params,
        identities=identities,
        in_channels=input_shape[0] if input_shape else None,
        image_size=input_shape[-1] if input_shape else None,
        num_classes=classes,
        labels=[[type(module).__name__ for module in block] for block in net.blocks],
    )


def _count(module: nn.Module, x: Tensor, where: str) -> tuple[Tensor, int]:
    """Run one image through a module and count multiply-adds."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter:
            y = module(x.clone())
    except RuntimeError as error:
        raise SpaceError(
            f"{where}: cannot take an input of shape {tuple(x.shape)}: {error}"
        ) from error
    return y, counter.get_total_flops() // 2
