"""Batch-norm statistics per trie node: collected or imposed, the modules' own left alone.

The four policies of a score (`POLICIES`): `recalibrate` gives each node the statistics of fixed
calibration batches, each batch normalised by its own moments and the statistics averaged over
batches as `nn.BatchNorm2d(momentum=None)` does; `batch` normalises by the scored batch's own
moments; `running` and `ema` are kept per (block, choice): what pre-training left, and the same
after the shift steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastshift.backends import backend
from fastshift.channel_moments import summed_in_chunks
from fastshift.cpu import block_of
from fastshift.device import in_turn
from fastshift.folding import FoldCache, NotAsTracedError, apply_folded
from fastshift.level_moments import LevelSums
from fastshift.levels import KnownOps
from fastshift.row_layout import RowLayout
from fastshift.supernet import ChainSupernet, needing_moments
from fastshift.tracing import Pair, conv_norm_pairs, unfold

__all__ = ["POLICIES", "BatchNorms", "MomentSums", "MovingAverages", "evaluation_mode", "start_ema"]

POLICIES = ("recalibrate", "batch", "running", "ema")

Moments = tuple[Tensor, Tensor]


class BatchNorms:
    """The batch norms of a supernet that keep statistics, by the module that owns them.

    Without gradients, what no compiled kernel runs takes rows channels last and runs with its norms
    folded into its convolutions, where it can (`row_layout`, `folding`); `FASTSHIFT_BACKEND` set to
    `reference` runs every module as it is. One instance serves one evaluation.

    Args:
        supernet: its stem, candidate ops and head are the owners.
        is_settled: nothing of it changes while this is in use, so that each op is looked at once.

    Attributes:
        known_ops: found so far, of a settled supernet.
    """

    def __init__(self, supernet: ChainSupernet, *, is_settled: bool = False) -> None:
        self.known_ops: KnownOps | None = {} if is_settled else None
        self._prefixes = {supernet.stem: "stem", supernet.head: "head"}
        for level, block in enumerate(supernet.blocks):
            self._prefixes.update((op, f"blocks.{level}.{i}") for i, op in enumerate(block))
        self._of: dict[nn.Module, list[tuple[str, _BatchNorm]]] = {}
        self._layout = RowLayout(supernet.memory_format)
        self._folds = FoldCache()
        self._pairs: dict[nn.Module, list[tuple[Pair, int]]] = {}

    def of(self, owner: nn.Module) -> list[tuple[str, _BatchNorm]]:
        """Names and batch norms of one owner, in the order of its modules."""
        found = self._of.get(owner)
        if found is None:
            prefix = self._prefixes[owner]
            found = self._of[owner] = [
                (f"{prefix}.{name}" if name else prefix, module)
                for name, module in owner.named_modules()
                if isinstance(module, _BatchNorm) and module.track_running_stats
            ]
        return found

    def items(self) -> Iterator[tuple[str, _BatchNorm]]:
        """Names and batch norms of the whole supernet."""
        for owner in self._prefixes:
            yield from self.of(owner)

    def collect(self, owner: nn.Module, x: Tensor) -> tuple[Tensor, list[Moments]]:
        """Apply an owner with each batch norm normalising by this batch's own moments.

        Args:
            owner: the stem, a candidate op or the head.
            x: its input, `[N, C, H, W]`.

        Returns:
            Its output, and the mean and the unbiased variance, `[C]` each, that every batch norm
            met.

        Raises:
            DataError: `x` is one image, and leaves a batch norm one value a channel.
        """
        # One image may reach a norm as one pixel, which has no variance: PyTorch's norm says so.
        block = block_of(owner, x) if len(x) > 1 else None
        if block is not None:
            return block.train(x)
        found = self.of(owner)
        moments = [
            (torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var))
            for _, norm in found
        ]

        def call(row: Tensor) -> Tensor:
            with summed_in_chunks(owner):
                return self._with(owner, row, found, moments, True)

        with needing_moments(x):
            if torch.is_grad_enabled() or _is_reference():
                return self._with(owner, x, found, moments, True), moments
            return self._layout.apply(owner, x, call), moments

    def impose(self, owner: nn.Module, x: Tensor, moments: Sequence[Moments]) -> Tensor:
        """Apply an owner with the given statistics in place of its own."""
        if torch.is_grad_enabled() or _is_reference():
            return self._with(owner, x, self.of(owner), moments, False)
        block = block_of(owner, x)
        if block is not None:
            return block.infer(x, moments)
        return self._layout.apply(owner, x, lambda row: self._folded(owner, row, moments))

    def _folded(self, owner: nn.Module, x: Tensor, moments: Sequence[Moments]) -> Tensor:
        """`_with` with the norms of pairs folded into their convolutions."""
        found = self.of(owner)
        pairs = self._pairs_of(owner)
        if pairs:
            folds = [self._folds.of(pair, *moments[i]) for pair, i in pairs]
            folded = {i for _, i in pairs}
            rest = [i for i in range(len(found)) if i not in folded]
            norms, kept = [found[i] for i in rest], [moments[i] for i in rest]
            try:
                return apply_folded(folds, lambda: self._with(owner, x, norms, kept, False))
            except NotAsTracedError:
                unfold(owner)
                self._pairs[owner] = []
        return self._with(owner, x, found, moments, False)

    def _pairs_of(self, owner: nn.Module) -> list[tuple[Pair, int]]:
        """Convolutions that take over a norm, and the norm's place among the owner's."""
        if owner not in self._pairs:
            place = {norm: i for i, (_, norm) in enumerate(self.of(owner))}
            pairs = conv_norm_pairs(owner) if place else ()
            self._pairs[owner] = [(p, place[p.norm]) for p in pairs if p.norm in place]
        return self._pairs[owner]

    def _with(
        self,
        owner: nn.Module,
        x: Tensor,
        found: Sequence[tuple[str, _BatchNorm]],
        moments: Sequence[Moments],
        training: bool,
    ) -> Tensor:
        saved = [(norm._buffers.copy(), norm.momentum, norm.training) for _, norm in found]
        try:
            for (_, norm), (mean, var) in zip(found, moments, strict=True):
                # With momentum 1 the update replaces the zeros by the batch's moments, exactly.
                norm._buffers.update(running_mean=mean, running_var=var, num_batches_tracked=None)
                # Past nn.Module.__setattr__, which costs more than the rest of this loop.
                norm.__dict__.update(momentum=1.0, training=training)
            return owner(x)
        finally:
            for (_, norm), (buffers, momentum, mode) in zip(found, saved, strict=True):
                norm._buffers.update(buffers)
                norm.__dict__.update(momentum=momentum, training=mode)


def _is_reference() -> bool:
    """Whether every module runs as it is."""
    return backend() == "reference"


class MomentSums:
    """Running sums of one node's moments over the calibration batches, in float64.

    Attributes:
        count: batches so far.
        shared: sums of the node's level and its index in them, as long as these hold its own.
    """

    def __init__(self) -> None:
        self.shared: tuple[LevelSums, int] | None = None
        self._count = 0
        self._sums: list[Sequence[Tensor]] = []

    @property
    def count(self) -> int:
        return self._count if self.shared is None else self.shared[0].count

    @property
    def sums(self) -> list[Sequence[Tensor]]:
        """Of mean and variance of each batch norm; of one batch its own, as they were given."""
        return self._sums if self.shared is None else self.shared[0].node(self.shared[1])

    def add(self, moments: Sequence[Moments]) -> None:
        """Add the moments of one batch, which nothing may write to afterwards."""
        if self.shared is not None:
            self._sums, self._count, self.shared = self.sums, self.count, None
        if self._count == 0:
            self._sums = list(moments)
        else:
            self._sums = [
                (total_mean.double() + mean, total_var.double() + var)
                for (total_mean, total_var), (mean, var) in zip(self._sums, moments, strict=True)
            ]
        self._count += 1

    def mean(self, like: Iterable[tuple[str, _BatchNorm]]) -> list[Moments]:
        """Averages over the batches, in the dtype of the batch norms they are for."""
        count = self.count
        return [
            (
                (mean if count == 1 else mean / count).to(norm.running_mean.dtype),
                (var if count == 1 else var / count).to(norm.running_var.dtype),
            )
            for (mean, var), (_, norm) in zip(self.sums, like, strict=True)
        ]


@dataclass
class _Packed:
    total: Tensor  # of the moments times their weights, in float64
    parts: Sequence[int]
    weight: int


class MovingAverages:
    """One moving-average update per (block, choice) and training step, whatever the cut.

    The moments of the nodes of one (block, choice) are averaged with the number of candidates below
    each node as weight.
    """

    def __init__(self, norms: BatchNorms) -> None:
        self._norms = norms
        self._sums: dict[str, list[Tensor]] = {}
        self._weights: dict[str, int] = {}
        self._packed: dict[nn.Module, _Packed] = {}

    def add(self, owner: nn.Module, moments: Sequence[Moments], weight: int) -> None:
        """Add the moments of one node that `weight` candidates pass through."""
        for (name, _), (mean, var) in zip(self._norms.of(owner), moments, strict=True):
            if name in self._sums:
                total = self._sums[name]
                total[0].add_(mean.double(), alpha=weight)
                total[1].add_(var.double(), alpha=weight)
                self._weights[name] += weight
            else:
                self._sums[name] = [mean.double() * weight, var.double() * weight]
                self._weights[name] = weight

    def add_packed(
        self, owner: nn.Module, moments: Tensor, parts: Sequence[int], weight: int
    ) -> None:
        """Add the moments of one node that are in one tensor, by one addition.

        Args:
            owner: a candidate op.
            moments: `[K]`, mean, variance and something else of every batch norm.
            parts: the sizes of these, the same at each call for an owner.
            weight: candidates that pass through the node.
        """
        found = self._packed.get(owner)
        if found is None:
            self._packed[owner] = _Packed(moments.double() * weight, parts, weight)
        else:
            found.total.add_(moments, alpha=weight)
            found.weight += weight

    def _unpack(self) -> None:
        """Put what `add_packed` added up with the sums of the batch norms."""
        for owner, own in self._packed.items():
            parts = own.total.split(own.parts)
            pairs = zip(parts[::3], parts[1::3], strict=True)
            for (name, _), pair in zip(self._norms.of(owner), pairs, strict=True):
                if name in self._sums:
                    for total, part in zip(self._sums[name], pair, strict=True):
                        total.add_(part)
                    self._weights[name] += own.weight
                else:
                    self._sums[name] = list(pair)
                    self._weights[name] = own.weight
        self._packed.clear()

    @torch.no_grad()
    def apply(self, ema: dict[str, Tensor] | None = None) -> None:
        """Make the update.

        Args:
            ema: where given, the averages kept there (`NAME.running_mean`, `NAME.running_var`) move
                and the modules' own stay; else the modules' own move.
        """
        self._unpack()
        modules = dict(self._norms.items())
        for name, (mean, var) in self._sums.items():
            norm, weight = modules[name], self._weights[name]
            if ema is None:
                targets = (norm.running_mean, norm.running_var)
                norm.num_batches_tracked += 1
            else:
                targets = (ema[f"{name}.running_mean"], ema[f"{name}.running_var"])
            momentum = norm.momentum
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked) if ema is None else 0.1
            for target, total in zip(targets, (mean, var), strict=True):
                target.lerp_((total / weight).to(target.dtype), momentum)


@in_turn
@torch.inference_mode(False)
def start_ema(supernet: ChainSupernet) -> None:
    """Begin the shift steps' moving averages where pre-training left its own, once."""
    for name, norm in BatchNorms(supernet).items():
        for kind in ("running_mean", "running_var"):
            key = f"{name}.{kind}"
            if key not in supernet.ema:
                supernet.ema[key] = getattr(norm, kind).detach().clone()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and afterwards each part back into the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    # Setting an attribute of a module is slow: 4 ms for 600 modules, a tenth of a path's score.
    if any(mode for _, mode in modes):
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            if part.training is not mode:
                part.training = mode
