"""One batch through a whole plan over static buffers: a chain of captured steps, level by level.

There is one step for each kind of work, level and bucket of nodes; a plan decides which are
replayed, and in which order, and nothing else. Between steps only buffers are copied. What
`steps.calibrate_step` and `steps.eval_step` compute, this computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.nn import functional

from fastshift.errors import DataError
from fastshift.graphs import CapturedStep
from fastshift.node_tables import Nodes, NodeTables
from fastshift.row_buffers import InferRows
from fastshift.static_levels import buckets
from fastshift.static_operators import infer_bytes, layer_infer_into, layer_train_into
from fastshift.static_state import StaticState
from fastshift.trie import Segment

__all__ = ["PopulationPass", "StepCache", "Wanted"]

Key = tuple


@dataclass(frozen=True)
class Wanted:
    """A step to be made.

    Attributes:
        key: what it does.
        num_bytes: that it takes beside the buffers; or, where these are not known, that it reads
            and writes, some: of that size is then what it takes.
        function: does it.
    """

    key: Key
    num_bytes: int
    function: Callable[[], None]


class StepCache:
    """Captured steps by what they do; each is made once.

    Args:
        state: whose device and memory they use.
    """

    def __init__(self, state: StaticState) -> None:
        self.state = state
        self.steps: dict[Key, CapturedStep] = {}

    def prepare(self, wanted: Iterable[Wanted]) -> None:
        """Make steps, with no node in the buffers, the largest first.

        The allocator never joins the small stretches of memory of a pool into a larger one: what a
        small step left could not serve a large one, but the other way round.
        """
        missing = [step for step in wanted if step.key not in self.steps]
        if not missing:
            return
        self._release()
        for step in sorted(missing, key=lambda step: -step.num_bytes):
            made = CapturedStep(step.function, self.state.device, self.state.pool)
            self.steps[step.key] = made.capture()
        self._release()

    def _release(self) -> None:
        """Give unused memory back: what runs aside have left serves no other stream."""
        if self.state.device.type == "cuda":
            torch.cuda.empty_cache()

    def replay(self, *key) -> None:
        """Run a step that was made."""
        self.steps[key].replay()


class PopulationPass:
    """Calibration and scoring of batches of one size.

    Args:
        state: of the supernet.
        images: of a batch.

    Raises:
        DataError: a batch norm would meet one value a channel, where moments are taken.
    """

    def __init__(self, state: StaticState, images: int) -> None:
        self.state, self.num_images = state, images
        shape = (1, images, *state.image_size)
        with torch.inference_mode(False):
            self.images = torch.zeros(shape, dtype=state.dtype, device=state.device)
            self.labels = torch.zeros(images, dtype=torch.int64, device=state.device)
        self.rows = InferRows(state.levels, images, state.dtype)
        self.steps = StepCache(state)
        self._prepared: set[str] = set()

    @torch.no_grad()
    def prepare(self, kind: str) -> None:
        """Make every step of a kind of pass, for all levels and buckets.

        Args:
            kind: `calibrate` (rows normalised by their own moments, which are summed) or `infer`
                (by given moments); both with scoring.

        Raises:
            CaptureError: a step cannot be captured.
        """
        if kind in self._prepared:
            return
        if kind == "calibrate":
            self.check_moments()
        self.state.clear_nodes()
        self.steps.prepare(self._wanted(kind))
        self._prepared.add(kind)

    def _wanted(self, kind: str) -> Iterator[Wanted]:
        """The steps of a kind of pass."""
        state = self.state
        function = {"calibrate": self._calibrate, "infer": self._infer}[kind]
        for position, level in enumerate(state.levels):
            # The last block and the head are never a trunk's, the stem always is.
            sizes = [(1, True)] if position < state.num_blocks else []
            if position:
                sizes += [(nodes, False) for nodes in buckets(level.capacity)]
            for nodes, trunk in sizes:
                key = (kind, position, nodes, trunk)
                wanted = self._of_level(key, function, position, nodes, trunk)
                taken = self._infer_bytes(position, nodes) if kind == "infer" else None
                yield wanted if taken is None else replace(wanted, num_bytes=taken)
        yield from self._of_leaves("score", self._score)

    def _of_level(
        self, key: Key, function: Callable, position: int, nodes: int, *given: bool
    ) -> Wanted:
        level = self.state.level(position)
        elements = math.prod(level.in_size) + math.prod(level.out_size)
        num_bytes = nodes * self.num_images * elements * self.state.dtype.itemsize
        return Wanted(key, num_bytes, _weakly(function, position, nodes, *given))

    def _infer_bytes(self, position: int, nodes: int) -> int | None:
        level, state = self.state.level(position), self.state
        images = (self.num_images, *level.in_size)
        return infer_bytes(nodes, images, state.device, state.dtype, level.parameters, level.text)

    def _of_leaves(self, name: str, function: Callable) -> Iterator[Wanted]:
        last = self.state.levels[-1]
        row = self.num_images * math.prod(last.out_size) * self.state.dtype.itemsize
        for nodes in buckets(last.capacity):
            yield Wanted((name, nodes), nodes * row, _weakly(function, nodes))

    def check_moments(self) -> None:
        """Refuse batches that leave a batch norm one value a channel."""
        pixels = min(math.prod(level.out_size[:2]) for level in self.state.levels)
        if self.num_images * pixels < 2:
            raise DataError(
                "batch of 1 image: it reaches a batch norm as a map of one pixel, which has no "
                "moments; expected batches of at least 2 images"
            )

    def load(self, images: Tensor, labels: Tensor) -> None:
        """Take a batch, `[N, C, H, W]` and `[N]`, from any device."""
        device = self.state.device
        images = _pinned(images, device).to(device, non_blocking=True).permute(0, 2, 3, 1)
        self.images.copy_(images.unsqueeze(0))
        self.labels.copy_(_pinned(labels, device), non_blocking=True)

    @torch.no_grad()
    def run(self, kind: str, tables: NodeTables, *, score: bool) -> None:
        """Take the loaded batch through a plan.

        Args:
            kind: as for `prepare`, which must have been called.
            tables: of the plan.
            score: add losses and wrong answers up in the state.
        """
        state = self.state
        tables.select(state.current, None)
        self.steps.replay(kind, 0, 1, True)
        for root in tables.plan.roots:
            self._descend(kind, tables, root, score)

    def _descend(self, kind: str, tables: NodeTables, segment: Segment, score: bool) -> None:
        state, trunk = self.state, bool(segment.children)
        tables.select(state.current, segment)
        first = 1 + segment.start
        if not trunk:
            self.rows.enter(first)
        sizes = tables.sizes(segment)
        for position, nodes in enumerate(sizes, first):
            if position < len(state.levels):
                self.steps.replay(kind, position, nodes, trunk)
        if not trunk and score:
            self.steps.replay("score", sizes[-1])
        for child in segment.children:
            self._descend(kind, tables, child, score)

    # What the steps do. Each reads what varies from buffers.

    def _source(self, position: int, nodes: int, trunk: bool) -> Tensor:
        return self.rows.source(position, nodes, trunk) if position else self.images

    def _infer(self, position: int, nodes: int, trunk: bool) -> None:
        level, own = self.state.level(position), self.state.nodes(position, nodes)
        layer_infer_into(
            self.rows.out(position, nodes, trunk),
            self._source(position, nodes, trunk),
            own.parent,
            own.choice,
            level.parameters,
            self.state.means[position].index_select(0, own.slot),
            level.text,
        )

    def _calibrate(self, position: int, nodes: int, trunk: bool) -> None:
        nothing = self.state.statistics[position].new_empty(0)
        own, moments = self._train_level(position, nodes, trunk, nothing)
        self.state.sums[position].index_add_(0, own.slot, moments)

    def _train_level(
        self, position: int, nodes: int, trunk: bool, saved: Tensor
    ) -> tuple[Nodes, Tensor]:
        """Rows of a level by its own moments: its nodes, and these, `[M, K]` float64."""
        level, own = self.state.level(position), self.state.nodes(position, nodes)
        layer_train_into(
            self.rows.out(position, nodes, trunk),
            self.state.statistics[position][:nodes],
            saved,
            self._source(position, nodes, trunk),
            own.parent,
            own.choice,
            level.parameters,
            level.text,
        )
        return own, moments_of(self.state, position, nodes)

    def _score(self, nodes: int) -> None:
        from fastshift.kernels.loss import candidate_loss

        state = self.state
        pooled = pooled_rows(state, self.rows.out(state.last, nodes, False), nodes)
        count, candidate = state.packing.leaves_of(state.current, nodes)
        losses, wrong = candidate_loss(classify(state, pooled), self.labels, count)
        state.losses.index_add_(0, candidate, losses.double())
        state.wrong.index_add_(0, candidate, wrong)


def _weakly(method: Callable, *given: object) -> Callable[[], None]:
    """Call a method of a pass whose steps hold the call: so that they do not keep it alive."""
    weak = WeakMethod(method)

    def call() -> None:
        weak()(*given)

    call.__qualname__ = method.__qualname__
    return call


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    """Values in memory that a GPU reads by itself, where they are to go to one."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory()
    return values


def moments_of(state: StaticState, position: int, nodes: int) -> Tensor:
    """Means and variances of a level's nodes, `[M, K]` float64, from its statistics."""
    choice = state.nodes(position, nodes).choice
    index = state.index[position].index_select(0, choice.clamp(min=0))
    return state.statistics[position][:nodes].gather(1, index).double()


def pooled_rows(state: StaticState, rows: Tensor, nodes: int) -> Tensor:
    """Means over the positions of the leaves' rows, `[M, N, F]`; zeros for padding."""
    padding = state.nodes(1 + state.num_blocks, nodes).choice < 0
    return rows.mean((2, 3)).masked_fill(padding.view(nodes, 1, 1), 0.0)


def classify(state: StaticState, pooled: Tensor) -> Tensor:
    """The classifier's logits, `[M, N, K]`, in the rows' type."""
    bias = state.classifier.bias
    weight = state.classifier.weight.to(pooled.dtype)
    return functional.linear(pooled, weight, None if bias is None else bias.to(pooled.dtype))
