"""One launch of masked SGD over all parameters: only those of sampled (block, choice) pairs move.

Fused: clipping, weight decay, momentum (Nesterov's too) and the update of every parameter tensor,

    g = coefficient grad + decay p;  m = momentum m + g;  p = p - lr (g + momentum m | m)

as `torch.optim.SGD` has it. Each of p, grad and m of a sampled parameter is read once, p and m are
written once; nothing of the others is touched, so they stay bit-identical. Every program finds its
piece of a tensor in a table of addresses, and learning rates, the mask and the clipping coefficient
are read from device buffers: a captured graph follows a schedule and serves every population.

A momentum starts as -0.0, the one value for which `momentum m + g` is g bit for bit, as
`torch.optim.SGD` has it in a parameter's first step: no flag says which step is the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastshift.kernels.sgd_layout import (
    ALWAYS,
    BLOCK,
    TRITON_TYPES,
    SgdTables,
    fresh_momenta,
    sgd_tables,
)

__all__ = ["SgdTables", "fresh_momenta", "sgd_step", "sgd_step_ref", "sgd_tables"]


def sgd_step_ref(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    addresses: Tensor,
    layout: Tensor,
    pieces: Tensor,
    used: Tensor,
    rates: Tensor,
    coefficient: Tensor,
    nesterov: bool,
    aligned: bool,
) -> None:
    """Define `sgd_step` in plain PyTorch; of the tables it reads pairs and groups alone."""
    scale = coefficient.item()
    if not math.isfinite(scale):
        return
    triples = zip(parameters, gradients, momenta, layout.tolist(), strict=True)
    for parameter, gradient, momentum, (_, pair, group) in triples:
        if pair != ALWAYS and not used[pair]:
            continue
        lr, decay, rate = rates[group].tolist()
        g = gradient.to(parameter.dtype) * scale
        if decay:
            g = g.add(parameter, alpha=decay)
        if rate:
            momentum.mul_(rate).add_(g)
            g = g.add(momentum, alpha=rate) if nesterov else momentum
        parameter.add_(g, alpha=-lr)


@triton.jit
def _sgd_piece(
    p_ptr, g_ptr, m_ptr, offs, count, rate_ptr, scale, NESTEROV: tl.constexpr, FULL: tl.constexpr
):
    """Step the values at `offs` of one parameter; a `FULL` piece needs no mask, which is wider."""
    lr = tl.load(rate_ptr)
    decay = tl.load(rate_ptr + 1)
    rate = tl.load(rate_ptr + 2)
    mask = None if FULL else offs < count
    p = tl.load(p_ptr + offs, mask=mask)
    g = scale * tl.load(g_ptr + offs, mask=mask).to(tl.float32)
    m = tl.load(m_ptr + offs, mask=mask)
    # Without decay, not even an infinite parameter reaches its gradient.
    g = tl.where(decay != 0, g + decay * p, g)
    if rate != 0:
        m = rate * m + g
        tl.store(m_ptr + offs, m, mask=mask)
        g = g + rate * m if NESTEROV else m
    tl.store(p_ptr + offs, p - lr * g, mask=mask)


@triton.jit
def _sgd_kernel(
    address_ptr,
    layout_ptr,
    piece_ptr,
    used_ptr,
    rate_ptr,
    coefficient_ptr,
    GRADIENT: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step one piece of one parameter, where its pair is used and the gradient is finite."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(piece_ptr + 2 * program).to(tl.int64)
    pair = tl.load(layout_ptr + 3 * tensor + 1)
    scale = tl.load(coefficient_ptr)
    moves = tl.load(used_ptr + tl.maximum(pair, 0)) != 0
    # Neither NaN nor infinite.
    if ((pair < 0) | moves) & (tl.abs(scale) < float("inf")):
        first = tl.load(piece_ptr + 2 * program + 1)
        count = tl.load(layout_ptr + 3 * tensor)
        group = tl.load(layout_ptr + 3 * tensor + 2)
        p_address = tl.load(address_ptr + 3 * tensor)
        g_address = tl.load(address_ptr + 3 * tensor + 1)
        m_address = tl.load(address_ptr + 3 * tensor + 2)
        p_ptr = p_address.to(tl.pointer_type(tl.float32))
        g_ptr = g_address.to(tl.pointer_type(GRADIENT))
        m_ptr = m_address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p_ptr = tl.multiple_of(p_ptr, 16)
            g_ptr = tl.multiple_of(g_ptr, 16)
            m_ptr = tl.multiple_of(m_ptr, 16)
        first = tl.multiple_of(first, BLOCK)
        rate_ptr += 3 * group
        offs = first + tl.arange(0, BLOCK)
        if first + BLOCK <= count:
            _sgd_piece(p_ptr, g_ptr, m_ptr, offs, count, rate_ptr, scale, NESTEROV, True)
        else:
            _sgd_piece(p_ptr, g_ptr, m_ptr, offs, count, rate_ptr, scale, NESTEROV, False)


def _sgd_triton(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    addresses: Tensor,
    layout: Tensor,
    pieces: Tensor,
    used: Tensor,
    rates: Tensor,
    coefficient: Tensor,
    nesterov: bool,
    aligned: bool,
) -> None:
    _sgd_kernel[(pieces.shape[0],)](
        addresses,
        layout,
        pieces,
        used,
        rates,
        coefficient,
        GRADIENT=TRITON_TYPES[gradients[0].dtype],
        NESTEROV=nesterov,
        ALIGNED=aligned,
        BLOCK=BLOCK,
        num_warps=4,
    )
    # Nothing else tells autograd that what it may have saved has changed.
    torch.autograd.graph.increment_version([*parameters, *momenta])


def _sgd_fake(*args) -> None:
    return None


_LIBRARY = torch.library.Library("fastshift", "FRAGMENT")
_LIBRARY.define(
    "sgd_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momenta, Tensor addresses, "
    "Tensor layout, Tensor pieces, Tensor used, Tensor rates, Tensor coefficient, bool nesterov, "
    "bool aligned) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("sgd_step", sgd_step_ref, "CPU")
_LIBRARY.impl("sgd_step", _sgd_triton, "CUDA")
torch.library.register_fake("fastshift::sgd_step", _sgd_fake, lib=_LIBRARY)


@torch.no_grad()
def sgd_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    tables: SgdTables,
    used: Tensor,
    rates: Tensor,
    coefficient: Tensor,
    *,
    nesterov: bool = False,
) -> None:
    """Make one update of the sampled parameters, in place.

    Args:
        parameters, gradients, momenta: those that `sgd_tables` was given, which stand where they
            stood; on CUDA their places come from the tables alone.
        tables: of these tensors.
        used: of each pair of (block, choice), whether a candidate of the step uses it: `[U]` uint8.
        rates: of each group, learning rate, weight decay and momentum: `[G, 3]` float32 (float64
            of parameters of float64). Where its momentum is 0 a group's momenta stay untouched.
        coefficient: `[1]`, of the type of `rates`, that every gradient is multiplied by; where it
            is not finite nothing moves.
        nesterov: use Nesterov's form.

    Raises:
        ValueError: a buffer is not as described.
    """
    wide = parameters[0].dtype
    for name, buffer, dim, dtype in (
        ("used", used, 1, torch.uint8),
        ("rates", rates, 2, wide),
        ("coefficient", coefficient, 1, wide),
    ):
        if buffer.dim() != dim or buffer.dtype is not dtype or not buffer.is_contiguous():
            raise ValueError(
                f"{name}: {tuple(buffer.shape)} of {buffer.dtype}; expected {dim} dimensions of "
                f"{dtype}, contiguous"
            )
    if rates.shape[1] != 3 or coefficient.shape != (1,) or not used.numel():
        raise ValueError(
            f"used, rates, coefficient: {tuple(used.shape)}, {tuple(rates.shape)}, "
            f"{tuple(coefficient.shape)}; expected [U], not empty, [G, 3] and [1]"
        )
    if wide is torch.float64 and parameters[0].device.type != "cpu":
        raise ValueError(f"parameters: float64 on {parameters[0].device}; expected float32")
    if len(parameters) != len(tables.addresses):
        raise ValueError(
            f"parameters: {len(parameters)}; expected {len(tables.addresses)}, as in the tables"
        )
    torch.ops.fastshift.sgd_step(
        parameters,
        gradients,
        momenta,
        tables.addresses,
        tables.layout,
        tables.pieces,
        used,
        rates,
        coefficient,
        nesterov,
        tables.aligned,
    )
