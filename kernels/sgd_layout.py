"""Where the tensors of an SGD step lie, noted once: `sgd` reads these tables at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["ALWAYS", "BLOCK", "TRITON_TYPES", "SgdTables", "fresh_momenta", "sgd_tables"]

BLOCK = 1024  # values a program: 8 a thread with 4 warps
ALWAYS = -1  # the pair of parameters that every step moves: stem and head
_ALIGNED = 16
TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class SgdTables:
    """Where the tensors of a model lie, on its device.

    Attributes:
        addresses: of each parameter, its gradient and its momentum, `[T, 3]` int64.
        layout: of each parameter, its number of values, its pair and its group, `[T, 3]` int32.
        pieces: of each program, its tensor and the first value of its piece, `[B, 2]` int32.
        aligned: whether every address is a multiple of 16 bytes.
    """

    addresses: Tensor
    layout: Tensor
    pieces: Tensor
    aligned: bool


def fresh_momenta(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return momenta as no step has touched them: -0.0 everywhere, contiguous."""
    return [torch.full(p.shape, -0.0, dtype=p.dtype, device=p.device) for p in parameters]


def sgd_tables(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    pairs: Sequence[int],
    groups: Sequence[int],
) -> SgdTables:
    """Note once where the tensors lie; they must stay there, as in a captured graph.

    Args:
        parameters: float32, each dense: its values fill its memory, in any order of dimensions.
        gradients: of the parameters, in the same order of dimensions, all of one type: float32,
            float16 or bfloat16.
        momenta: float32 in the same order of dimensions, `fresh_momenta` before the first step.
        pairs: of each parameter, its place in `used`, or -1 where every step moves it.
        groups: of each parameter, its row of `rates`.

    Raises:
        ValueError: the lists differ in length, or a tensor is not as described.
    """
    lists = (parameters, gradients, momenta, pairs, groups)
    if len({len(values) for values in lists}) > 1 or not parameters:
        raise ValueError(
            f"parameters, gradients, momenta, pairs, groups: {[len(v) for v in lists]} entries; "
            "expected as many of each, not none"
        )
    for index, tensors in enumerate(zip(parameters, gradients, momenta, strict=True)):
        _check(index, tensors, gradients[0].dtype)
    if min(pairs) < ALWAYS or min(groups) < 0:
        raise ValueError(f"pairs, groups: {min(pairs)}, {min(groups)}; expected at least -1 and 0")
    device = parameters[0].device
    triples = list(zip(parameters, gradients, momenta, strict=True))
    addresses = [[t.data_ptr() for t in triple] for triple in triples]
    counts = [p.numel() for p in parameters]
    pieces = [(t, first) for t, count in enumerate(counts) for first in range(0, count, BLOCK)]
    return SgdTables(
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.tensor(list(zip(counts, pairs, groups, strict=True)), dtype=torch.int32).to(device),
        torch.tensor(pieces, dtype=torch.int32).view(-1, 2).to(device),
        all(address % _ALIGNED == 0 for triple in addresses for address in triple),
    )


def _check(index: int, tensors: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    parameter = tensors[0]
    types = tuple(t.dtype for t in tensors)
    fits = types in ((torch.float32, dtype, torch.float32), (torch.float64,) * 3)
    if not fits or dtype not in (*TRITON_TYPES, torch.float64):
        raise ValueError(
            f"parameter {index}: types {types}; expected float32, gradients of one floating type "
            "and momenta of float32"
        )
    same = all(
        t.shape == parameter.shape
        and t.stride() == parameter.stride()
        and t.device == parameter.device
        for t in tensors
    )
    if not same or not _is_dense(parameter):
        raise ValueError(
            f"parameter {index}: shapes {[tuple(t.shape) for t in tensors]}, strides "
            f"{[t.stride() for t in tensors]} on {[str(t.device) for t in tensors]}; expected "
            "the same three times, dense"
        )
    if parameter.numel() >= 2**31 - BLOCK:
        raise ValueError(f"parameter {index}: {parameter.numel()} values; expected below 2^31")


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's values fill its memory without gaps or overlaps."""
    extents = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    reached = 1
    for stride, size in extents:
        if size > 1 and stride != reached:
            return False
        reached *= size
    return True
