"""A training batch through a whole plan over static buffers, forward and backward.

What `steps.train_step` computes, this computes: a chain of captured steps, depth-first between
sub-tries, whose gradients and moments add up until `StaticUpdate` steps on them once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fastshift.node_tables import NodeTables
from fastshift.population_pass import PopulationPass, Wanted, classify, pooled_rows
from fastshift.row_buffers import TrainRows
from fastshift.static_levels import buckets
from fastshift.static_operators import layer_backward_into
from fastshift.static_state import StaticState
from fastshift.static_update import StaticUpdate
from fastshift.steps import candidate_random
from fastshift.trie import Segment

__all__ = ["TrainingPass"]


class TrainingPass(PopulationPass):
    """Updates on batches of one size.

    Args:
        state: of the supernet.
        update: what its gradients go to.
        images: of a batch.
        saved: floats that a node of each level keeps for its backward pass.
        label_smoothing: of the cross-entropy.
        dropout: of the pooled features.
    """

    def __init__(
        self,
        state: StaticState,
        update: StaticUpdate,
        images: int,
        *,
        saved: list[int],
        label_smoothing: float,
        dropout: float,
    ) -> None:
        super().__init__(state, images)
        self.check_moments()
        self.rows = TrainRows(state.levels, images, state.dtype, saved, state.wide)
        self.update, self.label_smoothing, self.dropout = update, label_smoothing, dropout
        self.masks: Tensor | None = None
        if dropout:
            features = (images, state.levels[-1].out_size[2])
            leaves = state.levels[-1].capacity
            with torch.inference_mode(False):
                self.masks = torch.ones(leaves, *features, dtype=state.dtype, device=state.device)
                self._ones = torch.ones(features, dtype=state.dtype, device=state.device)

    @torch.no_grad()
    def prepare(self, kind: str = "train") -> None:
        """Make every step, for all levels and buckets.

        Raises:
            CaptureError: a step cannot be captured.
        """
        if kind in self._prepared:
            return
        self.state.clear_nodes()
        # A loss that is no number, to which losses are only added: the step moves nothing.
        self.update.total.copy_(torch.full_like(self.update.total, torch.nan))
        self.steps.prepare(self._wanted(kind))
        self._prepared.add(kind)

    def _wanted(self, kind: str) -> Iterator[Wanted]:
        for position, level in enumerate(self.state.levels):
            for nodes in buckets(level.capacity):
                for name, function in (("forward", self._forward), ("backward", self._backward)):
                    yield self._of_level((name, position, nodes), function, position, nodes)
        yield from self._of_leaves("loss", self._loss)
        yield Wanted(("step",), 0, self.update.step)
        yield Wanted(("clear",), 0, self.update.clear)

    @torch.no_grad()
    def train(self, tables: NodeTables, *, key: tuple[int, int], moving: bool = True) -> None:
        """Add up the gradients of all candidates' losses on the loaded batch, and step on them.

        Args:
            tables: of the plan.
            key: (seed, step) of the head's random masks; the candidate is the third part.
            moving: whether any parameter of the trunk needs a gradient.
        """
        self.steps.replay("clear")
        tables.select(self.state.current, None)
        self.steps.replay("forward", 0, 1)
        self.rows.sum(0).zero_()
        for root in tables.plan.roots:
            self._segment(tables, root, key, moving)
        if moving:
            self.rows.gradient(0, 1).copy_(self.rows.sum(0))
            self.steps.replay("backward", 0, 1)
        self.steps.replay("step")

    def _segment(
        self, tables: NodeTables, segment: Segment, key: tuple[int, int], moving: bool
    ) -> None:
        state, rows = self.state, self.rows
        tables.select(state.current, segment)
        first, stop = 1 + segment.start, 1 + segment.stop
        sizes = tables.sizes(segment)
        blocks = list(zip(range(first, stop), sizes, strict=False))
        for position, nodes in blocks:
            self.steps.replay("forward", position, nodes)
        if segment.children:
            rows.sum(stop - 1).zero_()
            for child in segment.children:
                self._segment(tables, child, key, moving)
            if moving:
                rows.gradient(stop - 1, 1).copy_(rows.sum(stop - 1))
        else:
            self._draw_masks(tables, segment, key)
            if state.has_features:
                self.steps.replay("forward", stop, sizes[-1])
            self.steps.replay("loss", sizes[-1])
            if state.has_features:
                self.steps.replay("backward", stop, sizes[-1])
        if moving:
            for position, nodes in reversed(blocks):
                self.steps.replay("backward", position, nodes)
            rows.sum(first - 1).add_(rows.gradient(first - 1, 1))

    def _draw_masks(self, tables: NodeTables, segment: Segment, key: tuple[int, int]) -> None:
        """Fill the buffer of dropout masks, each a function of (seed, step, candidate)."""
        if self.masks is None:
            return
        leaves = range(segment.first_leaf, segment.stop_leaf)
        for mask, leaf in zip(self.masks, leaves, strict=False):
            with candidate_random(key, tables.plan.archs[leaf], self.state.device):
                mask.copy_(functional.dropout(self._ones, self.dropout, True))

    # What the steps do. Each reads what varies from buffers.

    def _forward(self, position: int, nodes: int) -> None:
        own, moments = self._train_level(position, nodes, True, self.rows.saved(position, nodes))
        self.update.add_moments(position, own.choice, own.weight, moments)

    def _backward(self, position: int, nodes: int) -> None:
        level, own = self.state.level(position), self.state.nodes(position, nodes)
        source = self._source(position, nodes, True)
        layer_backward_into(
            self.rows.gradient(position - 1, len(source)) if position else source.new_empty(0),
            [self.update.gradients[p] for p in level.parameters],
            self.rows.gradient(position, nodes),
            source,
            own.parent,
            own.choice,
            level.parameters,
            self.state.statistics[position][:nodes],
            self.rows.saved(position, nodes),
            level.text,
        )

    def _loss(self, nodes: int) -> None:
        from fastshift.kernels.loss import candidate_loss

        state, update = self.state, self.update
        rows = self.rows.out(state.last, nodes)
        pooled = pooled_rows(state, rows, nodes)
        if self.masks is not None:
            pooled = pooled * self.masks[:nodes]
        logits = classify(state, pooled)
        count, _ = state.packing.leaves_of(state.current, nodes)
        losses, _ = candidate_loss(logits, self.labels, count, label_smoothing=self.label_smoothing)
        weight = state.nodes(1 + state.num_blocks, nodes).weight.double()
        update.total.add_((losses.double() * weight).sum() / self.num_images)
        d_losses = (weight * update.scale / self.num_images).to(losses.dtype)
        d_logits = torch.ops.fastshift.candidate_loss_backward(
            d_losses, logits, self.labels, count, self.label_smoothing
        )
        classifier = state.classifier
        flat = d_logits.flatten(0, 1)
        update.gradients[classifier.weight].add_(flat.t() @ pooled.flatten(0, 1))
        if classifier.bias is not None:
            update.gradients[classifier.bias].add_(flat.sum(dim=0))
        d_pooled = d_logits @ classifier.weight.to(d_logits.dtype)
        if self.masks is not None:
            d_pooled = d_pooled * self.masks[:nodes]
        pixels = rows.shape[2] * rows.shape[3]
        d_rows = (d_pooled / pixels)[:, :, None, None]
        self.rows.gradient(state.last, nodes).copy_(d_rows.expand_as(rows))
