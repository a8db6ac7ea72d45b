"""An update over static buffers: gradients and moments added up, then one step of masked SGD.

It is what `optim.PathSGD`, the clipping of `trainer.PathTrainer` and `batch_norm.MovingAverages`
do, with every decision taken on the device: where the loss or the gradient is not finite nothing
moves, and what no candidate used keeps its bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastshift.errors import UnsupportedError
from fastshift.optim import PathSGD
from fastshift.static_levels import ALIGNMENT
from fastshift.static_state import StaticState
from fastshift.supernet import Supernet
from fastshift.trie import Plan

__all__ = ["StaticUpdate"]


class StaticUpdate:
    """Gradients, momenta and moving averages of a supernet.

    Args:
        state: of the supernet.
        supernet: whose parameters are stepped.
        optimizer: whose rates and momenta it uses; the momenta move into static buffers.
        clip_norm: largest norm of the whole gradient, or None.
        ema: the moving averages that move, by name; None for the batch norms' own.

    Attributes:
        gradients: of each parameter, added to by the backward passes.
        averages: of each level, weighted sums of moments, `[choices, K]` float64.
        average_weights: of each level, the weights summed, `[choices]` float64.
        total: the loss summed over a plan's rows, `[1]` float64, nats.
        scale: factor of every candidate's loss, `[1]` float64.

    Raises:
        UnsupportedError: a parameter belongs to no level, or has a hook.
    """

    def __init__(
        self,
        state: StaticState,
        supernet: Supernet,
        optimizer: PathSGD,
        *,
        clip_norm: float | None,
        ema: Mapping[str, Tensor] | None,
    ) -> None:
        self.state, self.optimizer, self.clip_norm = state, optimizer, clip_norm
        groups = optimizer.param_groups
        self.parameters = [p for group in groups for p in group["params"]]
        self.nesterov = any(group["nesterov"] for group in groups)
        if self.has_hooks():
            raise UnsupportedError("a parameter has a hook, which expects its gradient")
        self._pairs = self._pair_of_each(supernet)
        with torch.inference_mode(False), torch.no_grad():
            self._allocate([i for i, group in enumerate(groups) for _ in group["params"]])
            self._place_averages(ema)
        self._fresh: set[Tensor] = set()  # parameters whose momenta are as if never stepped

    def _pair_of_each(self, supernet: Supernet) -> list[tuple[int, int] | None]:
        """Block and choice of each parameter; None for stem and head."""
        found: dict[Tensor, tuple[int, int] | None] = {}
        for part in (supernet.stem, supernet.head):
            found |= dict.fromkeys(part.parameters())
        for level, block in enumerate(supernet.blocks):
            for choice, op in enumerate(block):
                found |= dict.fromkeys(op.parameters(), (level, choice))
        known = {p for level in self.state.levels for p in level.parameters}
        known |= set(self.state.classifier.parameters())
        for parameter in self.parameters:
            if parameter not in known:
                name = self.optimizer.names[parameter]
                raise UnsupportedError(f"{name}: a parameter that no unit has")
        return [found[parameter] for parameter in self.parameters]

    def _allocate(self, groups: Sequence[int]) -> None:
        from fastshift.kernels.sgd import fresh_momenta, sgd_tables

        state, wide = self.state, self.state.wide
        line = ALIGNMENT // wide.itemsize
        sizes = [-(-p.numel() // line) * line for p in self.parameters]
        self._gradients = torch.zeros(sum(sizes), dtype=wide, device=state.device)
        self.gradients = {
            p: flat[: p.numel()].view(p.shape)
            for p, flat in zip(self.parameters, self._gradients.split(sizes), strict=True)
        }
        self.momenta = fresh_momenta([p.detach() for p in self.parameters])
        ordered = [self.gradients[p] for p in self.parameters]
        places = list(range(len(self.parameters)))
        self._tables = sgd_tables(self.parameters, ordered, self.momenta, places, groups)
        zeros = {"device": state.device}
        self._moves = torch.zeros(len(self.parameters), dtype=torch.uint8, **zeros)
        self._rates = torch.zeros(len(self.optimizer.param_groups), 3, dtype=wide, **zeros)
        self._coefficient = torch.zeros(1, dtype=wide, **zeros)
        self._one = torch.ones(1, dtype=wide, **zeros)
        self._nan = torch.full((1,), math.nan, dtype=wide, **zeros)
        self.total = torch.full((1,), math.nan, dtype=torch.float64, **zeros)
        self.scale = torch.ones(1, dtype=torch.float64, **zeros)
        self._report = torch.zeros(2, dtype=torch.float64, **zeros)
        self._moved: np.ndarray | None = None
        self._lrs: list[tuple[float, ...]] | None = None

    def _place_averages(self, ema: Mapping[str, Tensor] | None) -> None:
        state, levels = self.state, self.state.levels
        shapes = [(v.num_choices, v.layer.moments_floats) for v in levels]
        floats = [rows * columns for rows, columns in shapes]
        self._averages = torch.zeros(sum(floats), dtype=torch.float64, device=state.device)
        parts = self._averages.split(floats)
        self.averages = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        counts = [rows for rows, _ in shapes]
        self._weights = torch.zeros(sum(counts), dtype=torch.float64, device=state.device)
        self.average_weights = list(self._weights.split(counts))
        self._choices = [
            torch.arange(count, dtype=torch.int32, device=state.device).view(-1, 1)
            for count in counts
        ]
        self._targets, self._tracked = self._targets_of(ema)
        places, owners, momenta, norms = [], [], [], []
        before = weights_before = 0
        for level, (count, columns) in zip(levels, shapes, strict=True):
            for norm in level.norms:
                first = before + norm.choice * columns + norm.first
                places += range(first, first + 2 * norm.channels)
                owners += [weights_before + norm.choice] * (2 * norm.channels)
                momenta += [norm.module.momentum] * (2 * norm.channels)
                norms.append(weights_before + norm.choice)
            before, weights_before = before + count * columns, weights_before + count
        norms = norms[: len(self._tracked)]
        self._places = torch.tensor(places, device=state.device)
        self._owners = torch.tensor(owners, device=state.device)
        self._norms = torch.tensor(norms, device=state.device)
        self._momentum = torch.tensor(momenta, dtype=state.wide, device=state.device)

    def _targets_of(self, ema: Mapping[str, Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Moving averages, and counts of their updates where those are kept."""
        targets, tracked = [], []
        for level in self.state.levels:
            for norm in level.norms:
                for kind in ("running_mean", "running_var"):
                    own = norm.module._buffers[kind]
                    targets.append(own if ema is None else ema[f"{norm.name}.{kind}"])
                if ema is None:
                    tracked.append(norm.module._buffers["num_batches_tracked"])
        return targets, tracked

    def has_hooks(self) -> bool:
        """Whether something hangs on a parameter that expects its gradient from autograd."""
        return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters)

    def moves(self, ema: Mapping[str, Tensor] | None) -> bool:
        """Whether these are the moving averages that a captured step moves, and how it steps."""
        targets, tracked = self._targets_of(ema)
        now, then = targets + tracked, self._targets + self._tracked
        if self.nesterov != any(group["nesterov"] for group in self.optimizer.param_groups):
            return False
        return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))

    def begin(self, plan: Plan, scale: float) -> None:
        """Take what a plan and the optimiser decide: who moves, and at what rates.

        Args:
            plan: of the update's candidates.
            scale: factor of every candidate's loss.
        """
        used = {
            (level, choice)
            for level, choices in enumerate(plan.choice)
            for choice in np.unique(choices).tolist()
        }
        drifts = self.optimizer.drift
        moves = np.array(
            [
                (drifts or pair is None or pair in used) and parameter.requires_grad
                for parameter, pair in zip(self.parameters, self._pairs, strict=True)
            ],
            np.uint8,
        )
        groups = self.optimizer.param_groups
        lrs = [(g["lr"], g["weight_decay"], g["momentum"]) for g in groups]
        if lrs != self._lrs:
            self._rates.copy_(torch.tensor(lrs, dtype=self._rates.dtype), non_blocking=True)
            self._lrs = lrs
        if self._moved is None or not np.array_equal(moves, self._moved):
            self._moves.copy_(torch.from_numpy(moves), non_blocking=True)
            self._moved = moves
        self.scale.fill_(scale)
        self._load_momenta()

    def _load_momenta(self) -> None:
        """Take the optimiser's momenta where they are not these."""
        state = self.optimizer.state
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            found = state[parameter].get("momentum_buffer") if parameter in state else None
            if found is None:
                if parameter not in self._fresh:
                    momentum.fill_(-0.0)
                    self._fresh.add(parameter)
                continue
            if found is not momentum:
                momentum.copy_(found)
                state[parameter]["momentum_buffer"] = momentum
            self._fresh.discard(parameter)

    def end(self) -> tuple[float, bool]:
        """Read what the update came to, waiting for the device.

        Returns:
            The loss summed over the plan's rows, nats, and whether the supernet moved.
        """
        total, moved = self._report.tolist()
        if moved:
            changed = [p for p, m in zip(self.parameters, self._moved, strict=True) if m]
            # A replay tells no one that these are other values now.
            torch.autograd.graph.increment_version(changed)
            momenta = dict(zip(self.parameters, self.momenta, strict=True))
            for parameter, group in self._groups(changed):
                if group["momentum"]:
                    self.optimizer.state[parameter]["momentum_buffer"] = momenta[parameter]
                    self._fresh.discard(parameter)
        return total, bool(moved)

    def _groups(self, parameters: Sequence[Tensor]):
        wanted = set(parameters)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in wanted:
                    yield parameter, group

    # What the captured steps do.

    def clear(self) -> None:
        """Begin an update: no gradients, no moments, no loss."""
        self._gradients.zero_()
        self._averages.zero_()
        self._weights.zero_()
        self.total.zero_()

    def add_moments(self, position: int, choice: Tensor, weight: Tensor, moments: Tensor) -> None:
        """Add nodes' moments up by choice, in a fixed order, each with its weight.

        Args:
            position: of the level.
            choice, weight: of each node, `[M]` int32; padding has choice -1.
            moments: `[M, K]` float64.
        """
        others = self._choices[position] != choice  # [choices, M]
        weight = weight.double()
        # Filled, and not multiplied by zero: what is not finite in one choice stays there.
        shares = (weight.view(-1, 1) * moments).unsqueeze(0).masked_fill(others.unsqueeze(-1), 0.0)
        self.averages[position].add_(shares.sum(dim=1))
        self.average_weights[position].add_(weight.unsqueeze(0).masked_fill(others, 0.0).sum(dim=1))

    def step(self) -> None:
        """Clip, step, and move the averages, where loss and gradient are finite."""
        from fastshift.kernels.sgd import sgd_step

        ordered = [self.gradients[p] for p in self.parameters]
        norms = torch.stack(torch._foreach_norm(ordered))
        # Frozen parts have no part in the norm, not even where theirs is not finite.
        norm = torch.linalg.vector_norm(norms.masked_fill(self._moves == 0, 0.0))
        finite = self.total.isfinite() & norm.isfinite()
        clip = self._one
        if self.clip_norm is not None:
            clip = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0).view(1)
        self._coefficient.copy_(torch.where(finite, clip, self._nan))
        sgd_step(
            self.parameters,
            ordered,
            self.momenta,
            self._tables,
            self._moves,
            self._rates,
            self._coefficient,
            nesterov=self.nesterov,
        )
        self._move_averages(finite)
        self._report.copy_(torch.cat((self.total, finite.double())))

    def _move_averages(self, finite: Tensor) -> None:
        weights = self._weights.index_select(0, self._owners)
        values = (self._averages.index_select(0, self._places) / weights).to(self.state.wide)
        old = torch.cat(self._targets)
        new = torch.where((weights > 0) & finite, torch.lerp(old, values, self._momentum), old)
        torch._foreach_copy_(self._targets, new.split([t.numel() for t in self._targets]))
        if self._tracked:
            moved = (self._weights.index_select(0, self._norms) > 0) & finite
            counts = torch.stack(self._tracked) + moved
            torch._foreach_copy_(self._tracked, counts.unbind())
