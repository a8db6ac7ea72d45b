"""The population layer by the Triton kernels: a launch for each convolution, whatever the nodes.

Arguments and results are those of `fastshift.operators`, but the nodes' buffers stay on the device
and are not read here. Nothing of Triton is loaded before the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from fastshift.device import fp32_precision
from fastshift.kernels.addresses import plain
from fastshift.kernels.plan import plan_layer
from fastshift.population_layer import PopulationLayer

__all__ = ["DTYPES", "backward", "has", "hidden_bytes", "infer", "saved_floats", "train"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_KERNEL = 7  # of a depthwise convolution, whose weight's gradient a program holds


@cache
def has(layer: PopulationLayer) -> bool:
    """Whether the kernels have every candidate op of a layer."""
    return all(
        not unit.depthwise or unit.kernel <= LARGEST_KERNEL
        for op in layer.ops
        if op
        for unit in op.units
    )


def saved_floats(
    layer: PopulationLayer, images: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> int:
    """What `train` keeps of a node, whatever its choice; a smaller one leaves some untouched."""
    channels = next((op.in_channels for op in layer.ops if op), 1)
    return plan_layer(layer, *images, channels).kept_elements * dtype.itemsize // 4


def hidden_bytes(
    nodes: int,
    layer: PopulationLayer,
    images: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """What `infer` takes for hidden rows of so many nodes, of `[N, H, W, C]` above, in bytes."""
    from fastshift.kernels import infer as kernels

    return kernels.hidden_bytes(nodes, layer, *images, device, dtype, fp32_precision())


def infer(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    moments: Tensor,
    layer: PopulationLayer,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Apply the layer with batch norms that normalise by given moments, into `out` if given."""
    from fastshift.kernels import infer as kernels

    shape = layer.output_shape(*map(int, rows.shape[2:]))
    given = [p.contiguous() for p in parameters]
    with _current(rows.device):
        return kernels.infer(
            rows, parent, choice, given, moments, layer, shape, precision=fp32_precision(), out=out
        )


def _current(device: torch.device) -> AbstractContextManager:
    """Make a CUDA device the current one, on which Triton launches; others it leaves alone."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def train(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    layer: PopulationLayer,
    keep: bool,
    *,
    into: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the layer with each batch norm normalising by its node's own moments.

    Rows, statistics and what is kept go into `into` if given.
    """
    from fastshift.kernels import layer as kernels

    plan = plan_layer(layer, *map(int, rows.shape[1:]))
    with _current(rows.device):
        given = plain(parameters)
        return kernels.train(
            rows.contiguous(), parent, choice, given, plan, keep, fp32_precision(), into=into
        )


def backward(
    d_out: Tensor,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    statistics: Tensor,
    saved: Tensor,
    layer: PopulationLayer,
    needs: Sequence[bool],
    *,
    d_rows: Tensor | None = None,
    sums: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `train`'s rows; that of the rows above goes into `d_rows` if given.

    Those of all parameters are added to `sums` if given, contiguous and float32.
    """
    from fastshift.kernels import layer as kernels

    plan = plan_layer(layer, *map(int, rows.shape[1:]))
    with _current(rows.device):
        d_rows, gradients = kernels.backward(
            d_out.contiguous(),
            rows.contiguous(),
            parent,
            choice,
            plain(parameters),
            statistics.contiguous(),
            saved,
            plan,
            needs[0],
            fp32_precision(),
            d_rows=d_rows,
            sums=sums,
        )
    return d_rows, [g for g, needed in zip(gradients, needs[1:], strict=True) if needed]
