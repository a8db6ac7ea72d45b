"""One batch through a whole plan of candidates: score it, calibrate on it, or train on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from fastshift.batch_norm import BatchNorms, Moments, MomentSums, MovingAverages
from fastshift.errors import SpaceError
from fastshift.layers import apply_module
from fastshift.level_moments import LevelMoments, LevelSums
from fastshift.levels import Level, Rows, Visit, last_rows, walk
from fastshift.supernet import ChainSupernet
from fastshift.trie import Plan, Segment

__all__ = [
    "Statistics",
    "calibrate_step",
    "candidate_random",
    "eval_step",
    "refuse_random_trunk",
    "train_step",
]


@dataclass
class Statistics:
    """The moments of every node of a plan, summed over calibration batches.

    Attributes:
        stem: of the root.
        nodes: of each level, of each node.
        leaves: of the head, for each leaf.
    """

    stem: MomentSums
    nodes: list[list[MomentSums]]
    leaves: list[MomentSums]
    _means: dict[int, list[Moments]] = field(default_factory=dict)
    _levels: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, plan: Plan) -> Statistics:
        """Sums of nothing yet, for each node of a plan."""
        return cls(
            MomentSums(),
            [[MomentSums() for _ in choice] for choice in plan.choice],
            [MomentSums() for _ in range(plan.num_leaves)],
        )

    def mean(self, sums: MomentSums, norms: BatchNorms, owner: nn.Module) -> list[Moments]:
        """The averages of one node, computed once."""
        found = self._means.get(id(sums))
        if found is None:
            found = self._means[id(sums)] = sums.mean(norms.of(owner))
        return found

    def add_level(self, level: int, first: int, moments: LevelMoments) -> None:
        """Add the moments of a segment's nodes of a level, from its first on, of one batch."""
        own = self.nodes[level][first : first + len(moments.choice)]
        if all(sums.count == 0 for sums in own):
            shared = LevelSums(moments)
            for index, sums in enumerate(own):
                sums.shared = (shared, index) if moments.has(index) else None
            return
        shared = _shared(own)
        if shared is None or not shared.add(moments):
            for sums, found in zip(own, moments.each(), strict=True):
                if found:
                    sums.add(found)

    def level_mean(self, level: int, first: int, nodes: Level) -> Tensor | None:
        """`Level.infer`'s moments of a segment's nodes, where one tensor holds their sums."""
        shared = _shared(self.nodes[level][first : first + len(nodes.ops)])
        return shared.mean() if shared is not None and nodes.is_like(shared.first) else None

    def of_level(self, level: int, first: int, make: Callable[[], Tensor]) -> Tensor:
        """The averages of a segment's nodes of a level, from its first on, put together once."""
        found = self._levels.get((level, first))
        if found is None:
            found = self._levels[level, first] = make()
        return found


def _shared(own: Sequence[MomentSums]) -> LevelSums | None:
    """What holds the sums of just these nodes, in this order."""
    found = next((sums.shared[0] for sums in own if sums.shared is not None), None)
    if found is None or len(found.first.choice) != len(own):
        return None
    expected = [(found, i) if found.first.has(i) else None for i in range(len(own))]
    return found if [sums.shared for sums in own] == expected else None


def _collect(norms: BatchNorms, owner: nn.Module, x: Tensor) -> tuple[Tensor, list[Moments]]:
    """`norms.collect` for the stem or the head, whose input others may read too."""
    found: list[list[Moments]] = []

    def call(row: Tensor) -> Tensor:
        y, moments = norms.collect(owner, row)
        found.append(moments)
        return y

    return apply_module(owner, x, call), found[0]


@torch.no_grad()
def calibrate_step(
    supernet: ChainSupernet, norms: BatchNorms, plan: Plan, images: Tensor, statistics: Statistics
) -> None:
    """Add one calibration batch to the statistics of every node.

    Args:
        supernet: in evaluation mode.
        norms: of the supernet.
        plan: of the candidates.
        images: `[N, C, H, W]`.
        statistics: changed in place.
    """

    def node(level: int, index: int, op: nn.Module, x: Tensor) -> Tensor:
        y, moments = norms.collect(op, x)
        statistics.nodes[level][index].add(moments)
        return y

    def whole(level: int, first: int, nodes: Level, rows: Rows, parent: Sequence[int]) -> Rows:
        out, moments = nodes.train(rows, parent)
        statistics.add_level(level, first, moments)
        return out

    def leaf(index: int, x: Tensor) -> None:
        if norms.of(supernet.head):
            statistics.leaves[index].add(_collect(norms, supernet.head, x)[1])

    x, moments = _collect(norms, supernet.stem, images)
    statistics.stem.add(moments)
    for root in plan.roots:
        walk(supernet, root, x, Visit(node, whole, leaf, known=norms.known_ops))


@torch.no_grad()
def eval_step(
    supernet: ChainSupernet,
    norms: BatchNorms,
    plan: Plan,
    images: Tensor,
    labels: Tensor,
    policy: str,
    statistics: Statistics | None = None,
    on_logits: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every candidate of a plan on one batch.

    Args:
        supernet: in evaluation mode; nothing of it changes.
        norms: of the supernet.
        plan: of the candidates.
        images: `[N, C, H, W]`.
        labels: `[N]` int64.
        policy: one of `batch_norm.POLICIES`.
        statistics: of the plan's nodes, for `recalibrate`.
        on_logits: called with each leaf and its logits `[N, num_classes]`.

    Returns:
        Wrong answers, `[D]` int64, and summed cross-entropies in nats, `[D]` float64, of the plan's
        leaves.
    """
    wrong = torch.zeros(plan.num_leaves, dtype=torch.int64, device=images.device)
    losses = torch.zeros(plan.num_leaves, dtype=torch.float64, device=images.device)

    def moments_of(owner: nn.Module, sums: MomentSums | None) -> list[Moments]:
        if policy == "running":
            return [(norm.running_mean, norm.running_var) for _, norm in norms.of(owner)]
        if policy == "ema":
            kept = supernet.ema
            return [
                (kept[f"{name}.running_mean"], kept[f"{name}.running_var"])
                for name, _ in norms.of(owner)
            ]
        return statistics.mean(sums, norms, owner)

    def apply(owner: nn.Module, x: Tensor, sums: MomentSums | None) -> Tensor:
        if not norms.of(owner):
            return norms.impose(owner, x, [])
        if policy == "batch":
            return norms.collect(owner, x)[0]
        return norms.impose(owner, x, moments_of(owner, sums))

    def node(level: int, index: int, op: nn.Module, x: Tensor) -> Tensor:
        return apply(op, x, statistics.nodes[level][index] if statistics else None)

    def whole(level: int, first: int, nodes: Level, rows: Rows, parent: Sequence[int]) -> Rows:
        if policy == "batch":
            return nodes.train(rows, parent)[0]

        def moments() -> Tensor:
            if policy == "recalibrate":
                found = statistics.level_mean(level, first, nodes)
                if found is not None:
                    return found
            sums = statistics.nodes[level][first:] if statistics else [None] * len(parent)
            return nodes.moments(
                moments_of(op, own) if op is not None else []
                for op, own in zip(nodes.ops, sums, strict=False)
            )

        if policy != "recalibrate":
            return nodes.infer(rows, parent, moments())
        return nodes.infer(rows, parent, statistics.of_level(level, first, moments))

    def leaf(index: int, x: Tensor) -> None:
        sums = statistics.leaves[index] if statistics else None
        logits = apply_module(supernet.head, x, lambda row: apply(supernet.head, row, sums))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if on_logits is not None:
            on_logits(index, logits)
        wrong[index] = (logits.argmax(dim=1) != labels).sum()
        losses[index] = functional.cross_entropy(logits, labels, reduction="sum").double()

    sums = statistics.stem if statistics else None
    x = apply_module(supernet.stem, images, lambda batch: apply(supernet.stem, batch, sums))
    visit = Visit(node, whole, leaf, trains=policy == "batch", known=norms.known_ops)
    for root in plan.roots:
        walk(supernet, root, x, visit)
    return wrong, losses


def train_step(
    supernet: ChainSupernet,
    norms: BatchNorms,
    plan: Plan,
    images: Tensor,
    labels: Tensor,
    averages: MovingAverages,
    *,
    key: tuple[int, int],
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    moving: bool = True,
) -> Tensor:
    """Add up the gradients of all candidates' losses on one batch, each node computed once.

    The gradient is that of `scale` times the sum over the plan's rows of the mean cross-entropy.
    Backward goes depth-first: a row's gradient is complete when its children are done, and only
    then goes on to its parent, so a trunk's graph is walked once. No parameter moves here.

    Args:
        supernet: in training mode; gradients are accumulated in its parameters.
        norms: of the supernet.
        plan: of the candidates.
        images: `[N, C, H, W]`.
        labels: `[N]` int64.
        averages: gets the moments of every node.
        key: (seed, step) of the head's random masks; the candidate is the third part.
        label_smoothing: of the cross-entropy.
        scale: factor of the loss.
        moving: whether any parameter of the trunk needs a gradient.

    Returns:
        Mean cross-entropy of each leaf, `[D]` float64, detached.
    """
    losses = torch.zeros(plan.num_leaves, dtype=torch.float64, device=images.device)

    def node(level: int, index: int, op: nn.Module, x: Tensor) -> Tensor:
        y, moments = norms.collect(op, x)
        averages.add(op, moments, int(plan.weights[level][index]))
        return y

    def whole(level: int, first: int, nodes: Level, rows: Rows, parent: Sequence[int]) -> Rows:
        out, moments = nodes.train(rows, parent)
        for index, (op, found) in enumerate(zip(nodes.ops, moments.packed(), strict=True), first):
            if op is not None:
                averages.add_packed(op, *found, int(plan.weights[level][index]))
        return out

    visit = Visit(node, whole)

    def backward(segment: Segment, row: Tensor) -> None:
        rows = last_rows(supernet, segment, row, visit).each
        if segment.children:
            out = rows[0]
            split = out if out is row else out.detach().requires_grad_(moving)
            for child in segment.children:
                backward(child, split)
            if split is not out and out.requires_grad and split.grad is not None:
                torch.autograd.backward(out, split.grad)
            return
        total = None
        for offset, x in enumerate(rows):
            index = segment.first_leaf + offset
            with candidate_random(key, plan.archs[index], images.device):
                logits, moments = _collect(norms, supernet.head, x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            averages.add(supernet.head, moments, int(plan.counts[index]))
            loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            losses[index] = loss.detach().double()
            loss = loss * (scale * int(plan.counts[index]))
            total = loss if total is None else total + loss
        if total.requires_grad:
            total.backward()

    # A lone candidate may draw random numbers anywhere; several may not before they split.
    lone = plan.num_leaves == 1
    before_head = (*key, "trunk")
    with candidate_random(before_head, plan.archs[0], images.device) if lone else nullcontext():
        x, moments = _collect(norms, supernet.stem, images)
        averages.add(supernet.stem, moments, plan.num_rows)
        split = x.detach().requires_grad_(moving)
        for root in plan.roots:
            backward(root, split)
        if x.requires_grad and split.grad is not None:
            torch.autograd.backward(x, split.grad)
    return losses


@contextmanager
def candidate_random(key: tuple, arch: np.ndarray, device: torch.device) -> Iterator[None]:
    """Give what follows random numbers that depend on (seed, step, candidate) alone.

    Args:
        key: (seed, step).
        arch: the candidate's choices, `[L]`.
        device: whose generator is set, and afterwards set back.
    """
    digest = hashlib.blake2b(repr(key).encode() + arch.tobytes(), digest_size=7).digest()
    # torch.manual_seed formats a stack trace for every kind of device not started yet: 2 ms.
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(int.from_bytes(digest, "little"))
    try:
        yield
    finally:
        generator.set_state(state)


def refuse_random_trunk(supernet: ChainSupernet) -> None:
    """Refuse a supernet that draws random numbers before candidates split.

    A row that candidates share would share the draw.

    Raises:
        SpaceError: naming the module.
    """
    for part in ("stem", "blocks"):
        for name, module in supernet.get_submodule(part).named_modules():
            if isinstance(module, _DropoutNd) and module.p > 0:
                raise SpaceError(
                    f"{part}.{name}: {type(module).__name__}(p={module.p}) before the head "
                    "cannot be shared between candidates in training; move it into the head, or "
                    "train one path at a time"
                )
