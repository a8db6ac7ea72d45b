"""The population layer by the compiled CPU kernels: one call of `csrc/cpu/` for each node.

Arguments and results are those of `fastshift.operators`, with the nodes' buffers and the layer's
text read. Nodes are computed one after the other, each by all threads, and what nodes share is
added up in their order, so no bit depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from fastshift import cpu
from fastshift._native import cpu as _cpu
from fastshift.population_layer import LayerOp, PopulationLayer

__all__ = ["DTYPES", "backward", "has", "infer", "saved_floats", "train"]

DTYPES = (torch.float32, torch.bfloat16)
LINE = 16  # floats: where a node's saved values begin, a multiple of it from the first
FLOAT = 4  # bytes


@cache
def has(layer: PopulationLayer) -> bool:
    """Whether the kernels have every candidate op of a layer."""
    return all(
        not unit.depthwise or (unit.kernel in (3, 5, 7) and unit.stride in (1, 2))
        for op in layer.ops
        if op
        for unit in op.units
    )


@cache
def _cores(layer: PopulationLayer) -> list[_cpu.Block | None]:
    return [op and _core(op) for op in layer.ops]


def _core(op: LayerOp) -> _cpu.Block:
    units = [
        (u.depthwise, u.in_channels, u.out_channels, u.kernel, u.stride, u.relu) for u in op.units
    ]
    return _cpu.Block(units, op.main, op.frame, op.in_channels, op.out_channels)


@cache
def _eps(layer: PopulationLayer) -> list[list[float]]:
    return [[unit.eps for unit in op.units] if op else [] for op in layer.ops]


@cache
def _saved(layer: PopulationLayer, images: tuple[int, int, int], bf16: bool) -> list[int]:
    """Of a node of each choice, up to where the next one may begin."""
    return [-(-c.saved_floats(images, bf16) // LINE) * LINE if c else 0 for c in _cores(layer)]


def saved_floats(
    layer: PopulationLayer, images: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> int:
    """What `train` keeps of a node, whatever its choice; a smaller one leaves some untouched."""
    return max(_saved(layer, images, dtype is torch.bfloat16), default=0)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape)
    if dtype is torch.bfloat16:
        return cpu._memory((size + 1) // 2).view(dtype)[:size].view(shape)
    return cpu._memory(size).view(shape)


class _Call:
    """What the calls for a level's nodes have in common."""

    def __init__(
        self,
        rows: Tensor,
        parent: Sequence[int],
        choice: Sequence[int],
        parameters: Sequence[Tensor],
        layer: PopulationLayer,
    ) -> None:
        self.layer = layer
        self.cores = _cores(layer)
        self.eps = _eps(layer)
        self.isa = cpu.instruction_set()
        self.threads = torch.get_num_threads()
        self.rows = rows.contiguous()
        _, n, height, width, channels = rows.shape
        self.images = (n, height, width)
        self.bf16 = rows.dtype is torch.bfloat16
        self.parent, self.choice = parent, choice
        shape = layer.output_shape(height, width, channels)
        self.shape = (len(self.choice), n, *shape)
        self.row = n * height * width * channels
        self.out = n * shape[0] * shape[1] * shape[2]
        self._plain: dict[int, list[Tensor | None]] = {}
        self._parameters: dict[int, list[int]] = {}
        self._packed: dict[int, _cpu.PackedWeights] = {}
        self._given = parameters

    def plain(self, choice: int) -> list[Tensor | None]:
        """Weight, scale and shift of each unit; None for what a batch norm has not."""
        found = self._plain.get(choice)
        if found is None:
            found = self._plain[choice] = []
            for index in self.places(choice):
                # A dense kernel in channels-last memory is copied into its plain order.
                found.append(None if index is None else self._given[index].contiguous())
        return found

    def parameters(self, choice: int) -> list[int]:
        """Their addresses; 0 for None."""
        found = self._parameters.get(choice)
        if found is None:
            found = self._parameters[choice] = _addresses(self.plain(choice))
        return found

    def packed(self, choice: int) -> _cpu.PackedWeights:
        """The weights of a choice as the kernels read them, for all its nodes."""
        found = self._packed.get(choice)
        if found is None:
            found = self._packed[choice] = _cpu.PackedWeights(self.cores[choice])
        return found

    def places(self, choice: int) -> list[int | None]:
        """Where in the list of all tensors weight, scale and shift of each unit are."""
        return _places(self.layer)[choice]

    def row_at(self, tensor: Tensor, index: int) -> int:
        """Address of a row of the level above."""
        return tensor.data_ptr() + index * self.row * tensor.element_size()

    def out_at(self, tensor: Tensor, index: int) -> int:
        """Address of a row of this level."""
        return tensor.data_ptr() + index * self.out * tensor.element_size()


@cache
def _places(layer: PopulationLayer) -> list[list[int | None]]:
    found = []
    for op, first in zip(layer.ops, layer.first_parameter, strict=False):
        own: list[int | None] = []
        for unit in op.units if op else ():
            for there in (True, unit.scale, unit.shift):
                own.append(first if there else None)
                first += there
        found.append(own)
    return found


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def infer(
    rows: Tensor,
    parent: Sequence[int],
    choice: Sequence[int],
    parameters: Sequence[Tensor],
    moments: Tensor,
    layer: PopulationLayer,
) -> Tensor:
    """Apply the layer with batch norms that normalise by given moments."""
    call = _Call(rows, parent, choice, parameters, layer)
    moments = moments.float().contiguous()
    out = _empty(call.shape, rows.dtype)
    for node, (source, index) in enumerate(zip(call.parent, call.choice, strict=True)):
        if index < 0:
            out[node].zero_()
            continue
        core = call.cores[index]
        if core is None:
            out[node].copy_(call.rows[source])
            continue
        place = moments.data_ptr() + node * moments.shape[1] * FLOAT
        addresses = []
        for unit in layer.ops[index].units:
            addresses += (place, place + unit.out_channels * FLOAT)
            place += 2 * unit.out_channels * FLOAT
        core.infer(
            call.isa,
            call.images,
            call.row_at(call.rows, source),
            call.parameters(index),
            call.eps[index],
            addresses,
            call.out_at(out, node),
            False,
            call.threads,
            call.bf16,
            call.packed(index),
        )
    return out


def train(
    rows: Tensor,
    parent: Sequence[int],
    choice: Sequence[int],
    parameters: Sequence[Tensor],
    layer: PopulationLayer,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the layer with each batch norm normalising by its node's own moments."""
    call = _Call(rows, parent, choice, parameters, layer)
    out = _empty(call.shape, rows.dtype)
    width = layer.statistics_floats
    statistics = torch.zeros(call.shape[0], width, dtype=torch.float32, device="cpu")
    sizes = _saved(layer, call.images, call.bf16)
    floats = saved_floats(layer, call.images, rows.dtype)
    saved = cpu._memory(call.shape[0] * floats if keep else 0)
    kept = 0
    for node, (source, index) in enumerate(zip(call.parent, call.choice, strict=True)):
        if index < 0:
            out[node].zero_()
            continue
        core = call.cores[index]
        if core is None:
            out[node].copy_(call.rows[source])
            continue
        core.forward(
            call.isa,
            call.images,
            call.row_at(call.rows, source),
            call.parameters(index),
            call.eps[index],
            saved.data_ptr() + kept * FLOAT if keep else 0,
            statistics.data_ptr() + node * width * FLOAT,
            call.out_at(out, node),
            call.threads,
            call.bf16,
            call.packed(index),
        )
        kept += sizes[index] if keep else 0
    return out, statistics, saved


def backward(
    d_out: Tensor,
    rows: Tensor,
    parent: Sequence[int],
    choice: Sequence[int],
    parameters: Sequence[Tensor],
    statistics: Tensor,
    saved: Tensor,
    layer: PopulationLayer,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `train`'s rows."""
    call = _Call(rows, parent, choice, parameters, layer)
    d_out, statistics = d_out.contiguous(), statistics.float().contiguous()
    d_rows = _empty(rows.shape if needs[0] else (0,), rows.dtype)
    rows_to, sums = _Rows(d_rows, call.row_at), _Sums(call, needs[1:])
    sizes = _saved(layer, call.images, call.bf16)
    kept = 0
    for node, (source, index) in enumerate(zip(call.parent, call.choice, strict=True)):
        if index < 0:
            continue
        core = call.cores[index]
        if core is None:
            if needs[0]:
                rows_to.add(source, d_out[node])
            continue
        gradients, add = sums.target(index)
        core.backward(
            call.isa,
            call.images,
            call.row_at(call.rows, source),
            call.parameters(index),
            call.eps[index],
            saved.data_ptr() + kept * FLOAT,
            statistics.data_ptr() + node * statistics.shape[1] * FLOAT,
            call.out_at(d_out, node),
            rows_to.address(source) if needs[0] else 0,
            gradients,
            call.threads,
            call.bf16,
            call.packed(index),
            add,
        )
        if needs[0]:
            rows_to.written(source)
        kept += sizes[index]
    if needs[0]:
        rows_to.finish()
    return d_rows, sums.finish(parameters)


class _Rows:
    """Rows that are sums: the first term is written in place, later ones are added."""

    def __init__(self, rows: Tensor, at: Callable[[Tensor, int], int]) -> None:
        self._rows, self._at = rows, at
        self._begun: set[int] = set()
        self._term: Tensor | None = None

    def add(self, index: int, term: Tensor) -> None:
        """Add a term that is there."""
        if index in self._begun:
            self._rows[index].add_(term)
        else:
            self._rows[index].copy_(term)
            self._begun.add(index)

    def address(self, index: int) -> int:
        """Where a term of a row is to be written; `written` must follow."""
        if index not in self._begun:
            return self._at(self._rows, index)
        if self._term is None:
            self._term = _empty(self._rows.shape[1:], self._rows.dtype)
        return self._term.data_ptr()

    def written(self, index: int) -> None:
        """Count the term that was written."""
        if index in self._begun:
            self._rows[index].add_(self._term)
        self._begun.add(index)

    def finish(self) -> None:
        """Make the rows without a term zero."""
        for index in range(len(self._rows)):
            if index not in self._begun:
                self._rows[index].zero_()


class _Sums:
    """Parameters' gradients that are sums over the nodes of a choice."""

    def __init__(self, call: _Call, needs: Sequence[bool]) -> None:
        self._call, self._needs = call, needs
        self._totals: dict[int, list[Tensor | None]] = {}
        self._addresses: dict[int, list[int]] = {}

    def target(self, choice: int) -> tuple[list[int], bool]:
        """Where a node's gradients go, and whether another's are there, which they add to."""
        again = choice in self._totals
        if not again:
            made = self._totals[choice] = []
            for place, plain in zip(
                self._call.places(choice), self._call.plain(choice), strict=True
            ):
                # The kernels write every weight's gradient, and a batch norm's where it is asked.
                skipped = plain is None or (plain.dim() == 1 and not self._needs[place])
                made.append(None if skipped else torch.empty_like(plain))
            self._addresses[choice] = _addresses(made)
        return self._addresses[choice], again

    def finish(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the parameters that need one; zeros where no node uses it."""
        found: dict[int | None, Tensor] = {}
        for choice, totals in self._totals.items():
            found.update(zip(self._call.places(choice), totals, strict=True))
        return [
            found[index] if index in found else torch.zeros_like(parameter)
            for index, (parameter, needed) in enumerate(zip(parameters, self._needs, strict=True))
            if needed
        ]
