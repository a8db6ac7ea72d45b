"""A layer's parameters as one device table of addresses, and what the kernels may assume of them.

A choice picks its tensors inside the kernels, so they need the addresses of all. As arguments these
would have a kernel compiled for each number of them (as gradients are passed, whose places are new
at each call); as a flat copy they would cost a launch a call, and twice the weights' traffic. A
table is copied to the device when parameters first appear, and found again by their addresses, so
it can't say anything else: what is there is the caller's to keep.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastshift.kernels.plan import refuse_capture

__all__ = ["ALIGNMENT", "address_table", "plain"]

CAPACITY = 4096  # tables, of eight bytes a parameter
ALIGNMENT = 16  # bytes, of the widest access

_TABLES: OrderedDict[tuple, Tensor] = OrderedDict()
_CAPTURED: dict[tuple, Tensor] = {}  # those that a CUDA graph reads, which must not go


def plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor itself where its memory is plain and begins where a wide access may, or a copy.

    Copies are new at each call: a layer with such parameters can't be captured.
    """
    return [
        tensor
        if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
        else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    ]


def address_table(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
    """The addresses of contiguous tensors, and whether all begin where a wide access may.

    Args:
        tensors: on `device`.
        device: where the table is to be.

    Returns:
        `[n]` int64 (`[1]` where there are none); and whether all are multiples of 16 bytes.

    Raises:
        RuntimeError: the table is not there yet and a CUDA graph is being captured.
    """
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    key = (device, addresses)
    table = _TABLES.get(key)
    if table is None:
        refuse_capture(device, "a table of parameters' addresses")
        with torch.inference_mode(False):
            table = torch.tensor(addresses or (0,), dtype=torch.int64, device=device)
        _TABLES[key] = table
        if len(_TABLES) > CAPACITY:
            _TABLES.popitem(last=False)
    else:
        _TABLES.move_to_end(key)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _CAPTURED[key] = table
    return table, all(address % ALIGNMENT == 0 for address in addresses)
