"""The population layer over static buffers: `operators`' three, with results in given memory.

`fastshift::layer_infer_into`, `fastshift::layer_train_into` and `fastshift::layer_backward_into`
compute what `fastshift.operators` says, padding included, and write it where the caller wants it,
so that captured graphs of one level, each for another number of nodes, share one memory. On a CUDA
device the Triton kernels write there themselves; elsewhere what the operators give is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from fastshift import _operators_triton
from fastshift.operators import (
    implementation,
    layer_backward,
    layer_infer,
    layer_train,
    used_parameters,
)
from fastshift.population_layer import parse_layer

__all__ = ["infer_bytes", "layer_backward_into", "layer_infer_into", "layer_train_into"]


def layer_infer_into(
    out: Tensor,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    moments: Tensor,
    layer: str,
) -> None:
    """Compute a level's nodes with batch norms that normalise by given moments.

    Args:
        out: gets the nodes' rows, `[M, N, H', W', C']`, contiguous; those of padding are undefined.
        rows, parent, choice, parameters, moments, layer: as for `operators.layer_infer`.

    Raises:
        ValueError: as for `operators.layer_infer`.
    """
    torch.ops.fastshift.layer_infer_into.default(
        out, rows, parent, choice, parameters, moments, layer
    )


def layer_train_into(
    out: Tensor,
    statistics: Tensor,
    saved: Tensor,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    layer: str,
) -> None:
    """Compute a level's nodes with each batch norm normalising by its node's own moments.

    Args:
        out: gets the nodes' rows, as for `layer_infer_into`.
        statistics: gets theirs, `[M, K]`; zeros for padding.
        saved: gets what the backward pass needs, flat; empty where there will be none.
        rows, parent, choice, parameters, layer: as for `operators.layer_train`.

    Raises:
        ValueError: as for `operators.layer_train`.
    """
    torch.ops.fastshift.layer_train_into.default(
        out, statistics, saved, rows, parent, choice, parameters, layer
    )


def layer_backward_into(
    d_rows: Tensor,
    gradients: Sequence[Tensor],
    d_out: Tensor,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    statistics: Tensor,
    saved: Tensor,
    layer: str,
) -> None:
    """Compute the gradients of `layer_train_into`'s rows.

    Args:
        d_rows: gets the gradient of `rows`; empty where that is not wanted.
        gradients: of all parameters; theirs are added to these.
        d_out: of the nodes' rows; those of padding are not read.
        rows, parent, choice, parameters, layer: as given to `layer_train_into`.
        statistics, saved: as it left them.

    Raises:
        ValueError: as for `operators.layer_backward`.
    """
    torch.ops.fastshift.layer_backward_into.default(
        d_rows, gradients, d_out, rows, parent, choice, parameters, statistics, saved, layer
    )


def infer_bytes(
    nodes: int,
    images: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    parameters: Sequence[Tensor],
    layer: str,
) -> int | None:
    """Memory that `layer_infer_into` takes beside what it is given, in bytes; None if not known.

    Args:
        nodes: whose rows it gives.
        images: their number, height, width and channels, as the rows above have them.
        device, dtype: of the rows.
        parameters, layer: as for `layer_infer_into`.
    """
    if not _is_triton(torch.empty(0, dtype=dtype, device=device), parameters, layer):
        return None
    return _operators_triton.hidden_bytes(nodes, parse_layer(layer), images, device, dtype)


def _is_triton(rows: Tensor, parameters: Sequence[Tensor], layer: str) -> bool:
    return implementation(parse_layer(layer), rows, parameters) == "triton"


def _infer_into(out, rows, parent, choice, parameters, moments, layer):
    if _is_triton(rows, parameters, layer):
        described = parse_layer(layer)
        _operators_triton.infer(rows, parent, choice, parameters, moments, described, out=out)
    else:
        out.copy_(layer_infer(rows, parent, choice, parameters, moments, layer))


def _train_into(out, statistics, saved, rows, parent, choice, parameters, layer):
    keep = saved.numel() > 0
    if _is_triton(rows, parameters, layer):
        into = (out, statistics, saved) if keep else (out, statistics, None)
        described = parse_layer(layer)
        _operators_triton.train(rows, parent, choice, parameters, described, keep, into=into)
        return
    found = layer_train(rows, parent, choice, parameters, layer, keep)
    for target, value in zip((out, statistics, saved), found, strict=True):
        target.copy_(value)


def _backward_into(
    d_rows, gradients, d_out, rows, parent, choice, parameters, statistics, saved, layer
):
    wanted = d_rows.numel() > 0
    described = parse_layer(layer)
    if _is_triton(rows, parameters, layer):
        needs = [wanted] + [True] * len(parameters)
        for gradient in gradients:
            fits = gradient.dtype is torch.float32 and gradient.is_contiguous()
            if not fits or gradient.storage_offset() % 4:
                shown = f"{tuple(gradient.shape)} of {gradient.dtype}"
                raise ValueError(
                    f"gradients: {shown}, {gradient.storage_offset()} values into its memory; "
                    "expected contiguous float32 that begins at a multiple of 16 bytes"
                )
        _operators_triton.backward(
            d_out,
            rows,
            parent,
            choice,
            parameters,
            statistics,
            saved,
            described,
            needs,
            d_rows=d_rows if wanted else None,
            sums=gradients,
        )
        return
    # Adding a zero changes no value, and is not worth the time for what no node uses.
    used = used_parameters(described, choice, [True] * len(parameters))
    found_rows, found = layer_backward(
        d_out, rows, parent, choice, parameters, statistics, saved, layer, [wanted, *used]
    )
    if wanted:
        d_rows.copy_(found_rows)
    for gradient, value in zip(compress(gradients, used), found, strict=True):
        gradient.add_(value)


# Over fake tensors, where no kernel says what it misses, sizes are compared.


def _must_be(name: str, given: Tensor, expected: Tensor) -> None:
    same = ("shape", "dtype", "device")
    if any(getattr(given, what) != getattr(expected, what) for what in same):
        raise ValueError(
            f"{name}: {tuple(given.shape)} of {given.dtype} on {given.device}; "
            f"expected {tuple(expected.shape)} of {expected.dtype} on {expected.device}"
        )


def _infer_fake(out, rows, parent, choice, parameters, moments, layer) -> None:
    _must_be("out", out, layer_infer(rows, parent, choice, parameters, moments, layer))


def _train_fake(out, statistics, saved, rows, parent, choice, parameters, layer) -> None:
    keep = saved.numel() > 0
    found = layer_train(rows, parent, choice, parameters, layer, keep)
    for name, given, expected in zip(
        ("out", "statistics", "saved"), (out, statistics, saved), found, strict=True
    ):
        _must_be(name, given, expected)


def _backward_fake(
    d_rows, gradients, d_out, rows, parent, choice, parameters, statistics, saved, layer
) -> None:
    out = layer_train(rows, parent, choice, parameters, layer, True)
    for name, given, expected in zip(
        ("d_out", "statistics", "saved"), (d_out, statistics, saved), out, strict=True
    ):
        _must_be(name, given, expected)
    if d_rows.shape != (0,):
        _must_be("d_rows", d_rows, rows)
    if len(gradients) != len(parameters):
        raise ValueError(f"gradients: {len(gradients)}; expected {len(parameters)}")
    for gradient, parameter in zip(gradients, parameters, strict=True):
        _must_be("gradients", gradient, parameter)


_NODES = "Tensor rows, Tensor parent, Tensor choice, Tensor[] parameters"
_LIBRARY = torch.library.Library("fastshift", "FRAGMENT")
for _schema, _kernel, _fake in (
    (
        f"layer_infer_into(Tensor(a!) out, {_NODES}, Tensor moments, str layer) -> ()",
        _infer_into,
        _infer_fake,
    ),
    (
        f"layer_train_into(Tensor(a!) out, Tensor(b!) statistics, Tensor(c!) saved, {_NODES}, "
        "str layer) -> ()",
        _train_into,
        _train_fake,
    ),
    (
        "layer_backward_into(Tensor(a!) d_rows, Tensor(b!)[] gradients, Tensor d_out, "
        f"{_NODES}, Tensor statistics, Tensor saved, str layer) -> ()",
        _backward_into,
        _backward_fake,
    ),
):
    _name = _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastshift::{_name}", _fake, lib=_LIBRARY)
