"""A population layer in training: its buffers, and its launches one after the other.

Forward: one launch for each step of the plan, one for the frames. Backward: one for the frames,
then one for each step in reverse, which has both its convolution's gradients. Beside them one
memset each, of the counters. Nothing here depends on a device value, and there is no transfer but
the first time that a layer, a size or a parameter's place is seen, so all of it can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastshift.kernels.addresses import address_table
from fastshift.kernels.layer_launches import backward_launches, backward_shares, train_launches
from fastshift.kernels.layer_shares import ForwardShares, Shares
from fastshift.kernels.plan import LayerPlan
from fastshift.kernels.record import Backward, Forward

__all__ = ["backward", "train"]


def _raw_rows(plan: LayerPlan, nodes: int, elements: int, rows: Tensor) -> Tensor:
    """Uninitialised hidden rows of all nodes, as floats."""
    floats = nodes * elements * rows.element_size() // 4
    return torch.empty(floats, dtype=torch.float32, device=rows.device)


def train(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    plan: LayerPlan,
    keep: bool,
    precision: str = "ieee",
    into: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a layer with each batch norm normalising by its node's own moments.

    Args:
        rows: of the level above, `[R, N, H, W, C]`, contiguous.
        parent, choice: of each node, `[M]` int32, on the same device; a choice below 0 is padding.
        parameters: contiguous, float32.
        plan: of the layer, for rows of this size.
        keep: whether a backward pass may follow.
        precision: of a product of float32: `ieee`, or `tf32`.
        into: memory for what is returned, contiguous; of the last only where `keep`.

    Returns:
        The nodes' rows, `[M, N, H', W', C']`, those of padding left as they were; statistics,
        `[M, K]` float32, zeros for padding; and the raw rows, flat float32, empty unless kept.
    """
    nodes, device = choice.shape[0], rows.device
    out, statistics, raw = into or (None, None, None)
    if into is None:
        shape = (nodes, plan.images, *plan.out_size, plan.channels[1])
        out = torch.empty(shape, dtype=rows.dtype, device=device)
        statistics = torch.empty(nodes, plan.statistics_floats, dtype=torch.float32, device=device)
    if raw is None:
        elements = plan.kept_elements if keep else plan.passing_elements
        raw = _raw_rows(plan, nodes, elements, rows)
    if out.numel():
        table, frames = plan.tables(device, kept=keep)
        addresses, _ = address_table(parameters, device)
        steps = [ForwardShares(plan, step, nodes, rows.dtype) for step in plan.steps]
        partial = max((step.partial_floats for step in steps), default=0)
        buffers = Forward(
            rows=rows,
            parent=parent,
            choice=choice,
            table=table,
            frames=frames,
            addresses=addresses,
            raw=raw.view(rows.dtype),
            statistics=statistics,
            partial=torch.empty(partial, dtype=torch.float32, device=device),
            counters=_counters(steps, device),
            out=out,
        )
        for launch in train_launches(buffers, plan, precision):
            launch()
    return out, statistics, raw if keep else raw.new_empty(0)


def _counters(shares: Sequence[Shares], device: torch.device) -> Tensor:
    """Of all launches, one after the other."""
    return torch.zeros(sum(s.counters for s in shares), dtype=torch.int32, device=device)


def backward(
    d_out: Tensor,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    statistics: Tensor,
    saved: Tensor,
    plan: LayerPlan,
    needs_rows: bool,
    precision: str = "ieee",
    d_rows: Tensor | None = None,
    sums: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Compute the gradients of `train`'s rows.

    Args:
        d_out: of the nodes' rows, contiguous; those of padding are not read.
        rows, parent, choice, parameters, plan, precision: as for `train`.
        statistics, saved: as it returned them.
        needs_rows: whether the rows' gradient is wanted.
        d_rows: memory for it, contiguous.
        sums: what the parameters' gradients are added to, float32 and contiguous.

    Returns:
        The gradient of `rows`, empty where not wanted, and those of all parameters, each a tensor
        of its own, or the sums.
    """
    device, nodes = rows.device, choice.shape[0]
    if not d_out.numel():
        d_rows = torch.zeros_like(rows) if needs_rows else rows.new_empty(0)
        return d_rows, [torch.zeros_like(p) for p in parameters] if sums is None else sums
    if d_rows is None:
        d_rows = torch.empty(rows.shape if needs_rows else 0, dtype=rows.dtype, device=device)
    gradients = sums
    if sums is None:
        gradients = [torch.empty(p.shape, dtype=torch.float32, device=device) for p in parameters]
    row_sums = d_rows
    # Where more than one launch adds to them, sums stay in float32 until the last, which rounds.
    if rows.dtype is not torch.float32 and sum(step.enters for step in plan.steps) > 1:
        row_sums = torch.empty(d_rows.shape, dtype=torch.float32, device=device)
    table, frames = plan.tables(device, kept=True)
    addresses, _ = address_table(parameters, device)
    shares = backward_shares(plan, nodes, rows.shape[0] if needs_rows else 0, rows.dtype)
    weight_floats = max((own.weight_floats for own in shares[1:]), default=0)
    floats = max(own.partial_floats for own in shares)
    totals = plan.totals_floats * nodes
    buffers = Backward(
        rows=rows,
        parent=parent,
        choice=choice,
        table=table,
        frames=frames,
        addresses=addresses,
        raw=saved.view(rows.dtype),
        statistics=statistics,
        partial=torch.empty(floats, dtype=torch.float32, device=device),
        counters=_counters(shares, device),
        destinations=torch.empty(max(len(gradients), 1), dtype=torch.int64, device=device),
        totals=torch.empty(totals, dtype=torch.float32, device=device),
        d_out=d_out,
        gradient=_raw_rows(plan, nodes, plan.gradient_elements, rows).view(rows.dtype),
        sums=row_sums,
        d_rows=d_rows,
        partial_weights=torch.empty(weight_floats, dtype=torch.float32, device=device),
    )
    adds = sums is not None
    for launch in backward_launches(buffers, gradients, plan, needs_rows, precision, adds):
        launch()
    return d_rows, gradients
