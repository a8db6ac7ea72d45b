"""The population layer in plain PyTorch: its definition, on any device and in any floating type.

Read it, and test against it. Rows are `[R, N, H, W, C]`; a node is its candidate op applied to its
parent's row, an identity a copy of it, padding zeros. Arguments and results are those of
`fastshift.operators`, with the nodes' buffers and the layer's text read. Rows of a narrower type
than the parameters' are computed in theirs and rounded at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastshift.population_layer import STATISTICS, LayerOp, LayerUnit, PopulationLayer

__all__ = ["backward", "infer", "saved_floats", "train", "wide_type"]

# A weight, and scale and shift of its batch norm.
Parameters = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass
class _Applied:
    """What one unit did, `[N, C, H, W]` each, and its batch norm's `[STATISTICS, C]`."""

    x: Tensor
    raw: Tensor
    y: Tensor
    statistics: Tensor


Norm = Callable[[int, LayerUnit, Tensor, Parameters], Tensor]


def infer(
    rows: Tensor,
    parent: Sequence[int],
    choice: Sequence[int],
    parameters: Sequence[Tensor],
    moments: Tensor,
    layer: PopulationLayer,
) -> Tensor:
    """Apply the layer with batch norms that normalise by given moments."""
    out = []
    for node, (source, index) in enumerate(zip(parent, choice, strict=True)):
        if index < 0:
            out.append(rows.new_zeros(rows.shape[1], *layer.output_shape(*rows.shape[2:])))
            continue
        op = layer.ops[index]
        if op is None:
            out.append(rows[source])
            continue
        given = moments[node, : 2 * op.channels].split([2 * u.out_channels for u in op.units])

        def norm(i: int, unit: LayerUnit, raw: Tensor, own: Parameters, given=given) -> Tensor:
            mean, variance = given[i].view(2, -1)
            return _statistics(mean, variance, variance, unit, own)

        own = _of(layer.first_parameter[index], op, parameters)
        y, _ = _framed(op, _enter(rows[source], own), own, norm)
        out.append(_leave(y, rows.dtype))
    return _packed(out, rows, layer)


def train(
    rows: Tensor,
    parent: Sequence[int],
    choice: Sequence[int],
    parameters: Sequence[Tensor],
    layer: PopulationLayer,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the layer with each batch norm normalising by its node's own moments.

    Nothing is kept for `backward`, which computes all of it again.
    """
    out = []
    wide = wide_type(rows, parameters)
    statistics = rows.new_zeros(len(choice), layer.statistics_floats, dtype=wide)
    for node, (source, index) in enumerate(zip(parent, choice, strict=True)):
        if index < 0:
            out.append(rows.new_zeros(rows.shape[1], *layer.output_shape(*rows.shape[2:])))
            continue
        op = layer.ops[index]
        if op is None:
            out.append(rows[source])
            continue
        own = _of(layer.first_parameter[index], op, parameters)
        y, applied = _framed(op, _enter(rows[source], own), own, _own_moments)
        out.append(_leave(y, rows.dtype))
        found = torch.cat([unit.statistics.flatten() for unit in applied])
        statistics[node, : len(found)] = found
    return _packed(out, rows, layer), statistics, rows.new_empty(0, dtype=wide)


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
    """Gradients of `train`'s rows, the forward pass computed again."""
    wide = wide_type(rows, parameters)
    d_rows = torch.zeros_like(rows, dtype=wide)
    gradients = [torch.zeros_like(p) for p in parameters]
    for node, (source, index) in enumerate(zip(parent, choice, strict=True)):
        if index < 0:
            continue
        op = layer.ops[index]
        if op is None:
            d_rows[source] += d_out[node]
            continue
        first = layer.first_parameter[index]
        own, into = _of(first, op, parameters), _of(first, op, gradients)
        x = _enter(rows[source], own)
        _, applied = _framed(op, x, own, _own_moments)
        dx = _framed_backward(op, x, _enter(d_out[node], own), applied, own, into)
        d_rows[source] += dx.permute(0, 2, 3, 1)
    wanted = [g for g, needed in zip(gradients, needs[1:], strict=True) if needed]
    return d_rows.to(rows.dtype) if needs[0] else rows.new_empty(0), wanted


def saved_floats(
    layer: PopulationLayer, images: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> int:
    """What `train` keeps of a node."""
    return 0


def wide_type(rows: Tensor, parameters: Sequence[Tensor]) -> torch.dtype:
    """The type that is computed in, and that statistics have."""
    return parameters[0].dtype if parameters else torch.promote_types(rows.dtype, torch.float32)


def _enter(row: Tensor, own: Sequence[Parameters]) -> Tensor:
    return row.to(own[0][0].dtype).permute(0, 3, 1, 2)


def _leave(row: Tensor, dtype: torch.dtype) -> Tensor:
    return row.permute(0, 2, 3, 1).to(dtype)


def _packed(out: Sequence[Tensor], rows: Tensor, layer: PopulationLayer) -> Tensor:
    if out:
        return torch.stack(out).contiguous()
    shape = layer.output_shape(*rows.shape[2:])
    return rows.new_empty(0, rows.shape[1], *shape)


def _of(first: int, op: LayerOp, tensors: Sequence[Tensor]) -> list[Parameters]:
    """A choice's tensors by unit."""
    found = []
    for unit in op.units:
        given = iter(tensors[first : first + unit.num_parameters])
        weight = next(given)
        found.append(
            (weight, next(given) if unit.scale else None, next(given) if unit.shift else None)
        )
        first += unit.num_parameters
    return found


def _statistics(
    mean: Tensor, biased: Tensor, unbiased: Tensor, unit: LayerUnit, own: Parameters
) -> Tensor:
    """`[STATISTICS, C]`, normalising by the biased variance."""
    inverse = (biased + unit.eps).rsqrt()
    scale = inverse if own[1] is None else inverse * own[1]
    shift = -mean * scale if own[2] is None else own[2] - mean * scale
    found = (mean, unbiased, scale, shift, inverse)
    assert len(found) == STATISTICS
    return torch.stack(found)


def _own_moments(_: int, unit: LayerUnit, raw: Tensor, own: Parameters) -> Tensor:
    mean = raw.mean((0, 2, 3))
    biased = (raw - _channels(mean)).square().mean((0, 2, 3))
    count = raw.numel() // raw.shape[1]
    return _statistics(mean, biased, biased * count / (count - 1), unit, own)


def _channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _conv_options(unit: LayerUnit) -> dict[str, int]:
    groups = unit.in_channels if unit.depthwise else 1
    return {"stride": unit.stride, "padding": unit.kernel // 2, "groups": groups}


def _chain(
    units: Sequence[LayerUnit], x: Tensor, own: Sequence[Parameters], norm: Norm, first: int
) -> list[_Applied]:
    found = []
    for index, (unit, parameters) in enumerate(zip(units, own, strict=True)):
        raw = functional.conv2d(x, parameters[0], **_conv_options(unit))
        statistics = norm(first + index, unit, raw, parameters)
        # The mean goes first: scale * raw + shift would cancel far from zero.
        mean, _, scale, _, _ = statistics
        y = (raw - _channels(mean)) * _channels(scale)
        if parameters[2] is not None:
            y = y + _channels(parameters[2])
        y = y.relu() if unit.relu else y
        found.append(_Applied(x, raw, y, statistics))
        x = y
    return found


def _framed(
    op: LayerOp, x: Tensor, own: Sequence[Parameters], norm: Norm
) -> tuple[Tensor, list[_Applied]]:
    """A candidate op's output, and what each of its units did."""
    main, rest = op.units[: op.main], op.units[op.main :]
    applied = _chain(main, x[:, 1::2] if op.splits else x, own[: op.main], norm, 0)
    y = applied[-1].y
    aside = x[:, ::2] if op.splits else x
    if rest:
        applied += _chain(rest, x, own[op.main :], norm, op.main)
        aside = applied[-1].y
    if op.frame == "residual":
        y = y + aside
    elif op.frame == "shuffle":
        y = torch.cat((aside, y), dim=1)
    return y, applied


def _chain_backward(
    units: Sequence[LayerUnit],
    dy: Tensor,
    applied: Sequence[_Applied],
    own: Sequence[Parameters],
    into: Sequence[Parameters],
) -> Tensor:
    """The gradient of a chain's input; those of its parameters are added to `into`."""
    for unit, did, parameters, gradients in reversed(
        list(zip(units, applied, own, into, strict=True))
    ):
        if unit.relu:
            dy = dy.masked_fill(did.y <= 0, 0)
        mean, _, scale, _, inverse = map(_channels, did.statistics)
        normal = (did.raw - mean) * inverse
        if gradients[1] is not None:
            gradients[1].add_((dy * normal).sum((0, 2, 3)))
        if gradients[2] is not None:
            gradients[2].add_(dy.sum((0, 2, 3)))
        along = (dy * normal).mean((0, 2, 3), keepdim=True)
        d_raw = scale * (dy - dy.mean((0, 2, 3), keepdim=True) - normal * along)
        options = _conv_options(unit)
        weight = parameters[0]
        gradients[0].add_(torch.nn.grad.conv2d_weight(did.x, weight.shape, d_raw, **options))
        dy = torch.nn.grad.conv2d_input(did.x.shape, weight, d_raw, **options)
    return dy


def _framed_backward(
    op: LayerOp,
    x: Tensor,
    dy: Tensor,
    applied: Sequence[_Applied],
    own: Sequence[Parameters],
    into: Sequence[Parameters],
) -> Tensor:
    main = slice(op.main)
    rest = slice(op.main, None)
    aside = dy if op.frame == "residual" else None
    if op.frame == "shuffle":
        passed = op.out_channels - op.units[op.main - 1].out_channels
        aside, dy = dy[:, :passed], dy[:, passed:]
    through = _chain_backward(op.units[main], dy, applied[main], own[main], into[main])
    if op.units[rest]:
        aside = _chain_backward(op.units[rest], aside, applied[rest], own[rest], into[rest])
    if op.splits:
        return torch.stack((aside, through), dim=2).flatten(1, 2)
    return through if aside is None else through + aside
