"""The walk through a trie, level by level: one operator call each, or node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastshift.cpu import CpuBlock, block_of, row_dtype
from fastshift.layers import ConvUnit, apply_level
from fastshift.level_moments import LevelMoments
from fastshift.operators import layer_infer, layer_train
from fastshift.population_layer import (
    LayerOp,
    LayerUnit,
    describe_layer,
    describe_op,
    parse_layer,
)
from fastshift.supernet import ChainSupernet
from fastshift.trie import Segment

__all__ = [
    "KnownOps",
    "Level",
    "Rows",
    "Visit",
    "last_rows",
    "level_of",
    "walk",
]

Moments = tuple[Tensor, Tensor]


class Rows:
    """The rows of a level, packed in one tensor or each for itself; the other form on demand.

    Args:
        each: `[N, C, H, W]`, in any memory; or
        packed: `[R, N, H, W, C]`, contiguous.
    """

    def __init__(
        self, each: Sequence[Tensor] | None = None, *, packed: Tensor | None = None
    ) -> None:
        if each is not None:
            self.each = list(each)
        if packed is not None:
            self.packed = packed
        self._num = len(each if packed is None else packed)

    def __len__(self) -> int:
        return self._num

    @cached_property
    def each(self) -> list[Tensor]:
        """Views `[N, C, H, W]` of the rows, channels last in memory."""
        # Of one row, whose gradient is then a view too; unbind's is a copy.
        parts = [self.packed.squeeze(0)] if len(self) == 1 else self.packed.unbind()
        return [part.permute(0, 3, 1, 2) for part in parts]

    @cached_property
    def packed(self) -> Tensor:
        """`[R, N, H, W, C]`; a view of a lone row that has its channels last in memory."""
        rows = [row.permute(0, 2, 3, 1) for row in self.each]
        return rows[0].contiguous().unsqueeze(0) if len(rows) == 1 else torch.stack(rows)

    @property
    def sample(self) -> Tensor:
        """A row, of whichever form is there: its dtype and device are those of all."""
        return self.packed if "packed" in self.__dict__ else self.each[0]


def _entering(rows: Rows) -> Tensor:
    """Packed, in the kernels' type: bfloat16 under autocast."""
    return rows.packed.to(row_dtype(rows.packed))


class Level:
    """A level's nodes as arguments of the operators: the choices that nodes have, numbered anew.

    Choices without a node take no part: their parameters are not so much as looked at.

    Attributes:
        ops: the module of each node; None for an identity.
    """

    def __init__(
        self,
        ops: Sequence[nn.Module | None],
        choice: Sequence[int],
        parameters: Sequence[Tensor | None],
        text: str,
    ) -> None:
        self.ops = ops
        self._text = text
        self._layer = parse_layer(text)
        self._choice = choice
        self._parameters = [p for p in parameters if p is not None]

    def _nodes(self, parent: Sequence[int]) -> tuple[Tensor, Tensor]:
        return _indices(tuple(parent)), _indices(tuple(self._choice))

    def train(self, rows: Rows, parent: Sequence[int]) -> tuple[Rows, LevelMoments]:
        """Apply the nodes' ops with each batch norm normalising by this batch's own moments.

        Args:
            rows: of the level above.
            parent: index into `rows` of each node.

        Returns:
            The nodes' rows, and the moments that their batch norms met.
        """
        x = _entering(rows)
        keep = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self._parameters)
        )
        out, statistics, _ = layer_train(
            x, *self._nodes(parent), self._parameters, self._text, keep
        )
        return Rows(packed=out), LevelMoments(self._layer, self._choice, statistics)

    def moments(self, of: Iterable[Sequence[Moments]]) -> Tensor:
        """`infer`'s moments from those of each node, none for an identity."""
        width = self._layer.moments_floats
        parts = []
        for choice, node in zip(self._choice, of, strict=True):
            for pair in node:
                parts += pair
            op = self._layer.ops[choice]
            missing = width - (2 * op.channels if op else 0)
            if missing:
                parts.append(torch.zeros(missing, dtype=torch.float32, device="cpu"))
        return torch.cat(parts).float().view(-1, width)

    def is_like(self, moments: LevelMoments) -> bool:
        """Whether moments are of nodes such as these."""
        return moments.is_of(self._layer, self._choice)

    def infer(self, rows: Rows, parent: Sequence[int], moments: Tensor) -> Rows:
        """Apply the nodes' ops with batch norms that normalise by given statistics.

        Args:
            rows: of the level above.
            parent: index into `rows` of each node.
            moments: as `moments` gives them.
        """
        nodes = self._nodes(parent)
        return Rows(
            packed=layer_infer(_entering(rows), *nodes, self._parameters, moments, self._text)
        )


@lru_cache(maxsize=4096)
def _indices(values: tuple[int, ...]) -> Tensor:
    """A buffer that no one writes."""
    # An inference tensor that was kept could not be saved for a backward pass later on.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int32, device="cpu")


_TEXTS: WeakKeyDictionary[CpuBlock, tuple[tuple, str]] = WeakKeyDictionary()


# Of ops that were looked at, and a row's type: what the kernels compute, and their parameters.
KnownOps = dict[tuple[nn.Module, torch.dtype], tuple[str, list[Tensor | None]]]


def level_of(
    ops: nn.ModuleList,
    identities: Sequence[bool],
    choice: Sequence[int],
    sample: Tensor,
    known: KnownOps | None = None,
) -> Level | None:
    """The nodes of a level for the operators, or None where an op of theirs has no kernel.

    Args:
        ops: the block's candidate ops.
        identities: which choices are identities.
        choice: candidate op of each node.
        sample: a row of the level above.
        known: ops that have kernels for rows such as `sample` and have not changed since; added to.
    """
    known = {} if known is None else known
    used = sorted(set(choice))
    modules = {index: None if identities[index] else ops[index] for index in used}
    parameters: list[Tensor | None] = []
    texts = []
    for module in modules.values():
        if module is None:
            texts.append(describe_op(None))
            continue
        found = known.get((module, sample.dtype))
        if found is None:
            block = block_of(module, sample)
            if not isinstance(block, CpuBlock):
                return None
            own = block.parameters()
            found = known[module, sample.dtype] = _text_of(block, own), own
        texts.append(found[0])
        parameters += found[1]
    number = {index: position for position, index in enumerate(used)}
    chosen = [number[index] for index in choice]
    nodes = [modules[index] for index in choice]
    return Level(nodes, chosen, parameters, describe_layer(texts))


def _text_of(block: CpuBlock, parameters: Sequence[Tensor | None]) -> str:
    """What the kernels compute for a block, written once for each state of its batch norms."""
    state = (block.eps, [parameter is None for parameter in parameters])
    found = _TEXTS.get(block)
    if found is None or found[0] != state:
        op = LayerOp(tuple(map(_unit_of, block.units)), block.main, block.frame)
        found = _TEXTS[block] = (state, describe_op(op))
    return found[1]


def _unit_of(unit: ConvUnit) -> LayerUnit:
    norm = unit.norm
    return LayerUnit(
        unit.groups > 1,
        unit.in_channels,
        unit.out_channels,
        unit.kernel_size[0],
        unit.stride[0],
        unit.activation == "relu",
        norm.eps,
        norm.weight is not None,
        norm.bias is not None,
    )


@dataclass
class Visit:
    """What a step does at the nodes.

    Attributes:
        node: `(level, node, module, row) -> row`, of one node.
        level: `(level, first node, nodes, rows, parent) -> rows`, of a level whose nodes' ops all
            have a compiled kernel.
        leaf: `(leaf, row)`, of a candidate's last row.
        trains: whether the moments of the batch are taken.
        known: `level_of`'s, where the supernet does not change between steps.
    """

    node: Callable[[int, int, nn.Module, Tensor], Tensor]
    level: Callable[[int, int, Level, Rows, Sequence[int]], Rows]
    leaf: Callable[[int, Tensor], None] | None = None
    trains: bool = True
    known: KnownOps | None = None


def walk(supernet: ChainSupernet, segment: Segment, row: Tensor, visit: Visit) -> None:
    """Compute a segment and what hangs below it, depth-first between segments."""
    rows = last_rows(supernet, segment, row, visit).each
    if segment.children:
        for child in segment.children:
            walk(supernet, child, rows[0], visit)
    else:
        for offset, out in enumerate(rows):
            visit.leaf(segment.first_leaf + offset, out)


def last_rows(supernet: ChainSupernet, segment: Segment, row: Tensor, visit: Visit) -> Rows:
    """The rows at a segment's last level."""
    rows = Rows([row])
    # One image may reach a batch norm as one pixel, which PyTorch's own refuses.
    whole = len(row) > 1 or not visit.trains
    for index, level in enumerate(range(segment.start, segment.stop)):
        first, parent, choice = (
            part[index] for part in (segment.first_node, segment.parent, segment.choice)
        )
        ops, identities = supernet.blocks[level], supernet.identities[level]
        if all(identities[op] for op in choice):
            if list(parent) != list(range(len(rows))):
                rows = Rows([rows.each[source] for source in parent])
            continue
        nodes = level_of(ops, identities, choice, rows.sample, visit.known) if whole else None
        if nodes is not None:
            rows = visit.level(level, first, nodes, rows, parent)
            continue

        def call(position: int, op: nn.Module, x: Tensor, level=level, first=first) -> Tensor:
            return visit.node(level, first + position, op, x)

        rows = Rows(apply_level(ops, identities, rows.each, parent, choice, call))
    return rows
