"""The population layer as PyTorch operators: a level of the trie in one call, forward and backward.

`fastshift::layer_infer`, `fastshift::layer_train` and `fastshift::layer_backward` take the rows of
the level above, one for each distinct parent, channels innermost (`[R, N, H, W, C]`), and for each
of `M` nodes its `parent` and its `choice`, and give the nodes' rows. Choices are read from their
buffers: a compiled function serves every population of its size.

Each has the plain reference (`_operators_ref`), which any device and floating type may use, the
compiled kernels for CPUs (`_operators_cpu`) and the Triton kernels for CUDA devices
(`_operators_triton`); `implementation` chooses. A choice below 0 is padding, the unused capacity of
a buffer: such a node has no parent, gets no row (zeros on a CPU, on a CUDA device whatever its
memory holds) and zeros for statistics, and contributes no gradient.

They are registered by `torch.library.Library` and not by its decorator `custom_op`, whose wrappers
load torch._dynamo at the first call (2.4 s) and take a list of 36 tensors apart again and again
(0.3 ms a training pass); `torch.compile` and `opcheck` see no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastshift import _operators_cpu, _operators_ref, _operators_triton
from fastshift.backends import backend, cuda_backend, is_interpreted
from fastshift.errors import ConfigError
from fastshift.population_layer import PopulationLayer, parse_layer

_KERNELS = {"reference": _operators_ref, "cpu": _operators_cpu, "triton": _operators_triton}

__all__ = [
    "implementation",
    "layer_backward",
    "layer_infer",
    "layer_train",
    "saved_floats",
    "used_parameters",
]


def implementation(layer: PopulationLayer, rows: Tensor, parameters: Sequence[Tensor]) -> str:
    """What computes a layer of such rows: `cpu`, `triton` or `reference`.

    On a CPU these are the compiled kernels, for rows of float32 or bfloat16; on a CUDA device the
    Triton kernels, for those and float16, where Triton is installed. Parameters are float32. The
    reference has all else, and all where `FASTSHIFT_BACKEND=reference` says so (under it a
    supernet, which calls its own modules, does not come here). `FASTSHIFT_BACKEND=triton` has the
    Triton kernels take rows on a CPU, which `TRITON_INTERPRET=1` allows; `cpu` keeps them from
    those on a CUDA device.

    Raises:
        ConfigError: the one asked for is unknown or cannot run here.
    """
    wanted = _wanted(rows)
    kernels = _KERNELS[wanted]
    if wanted != "reference" and (
        rows.dtype not in kernels.DTYPES
        or any(parameter.dtype is not torch.float32 for parameter in parameters)
        or not kernels.has(layer)
    ):
        return "reference"
    return wanted


def _wanted(rows: Tensor) -> str:
    """What would compute such rows if it had their type and their layer."""
    if rows.device.type == "cpu":
        name = backend()
        if name == "triton" and not is_interpreted():
            raise ConfigError(
                "FASTSHIFT_BACKEND: 'triton' cannot run: rows are on a CPU, and "
                "TRITON_INTERPRET=1, for tests without a GPU, is not set"
            )
        return name
    return cuda_backend(rows.device) if rows.device.type == "cuda" else "reference"


def layer_infer(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    moments: Tensor,
    layer: str,
) -> Tensor:
    """Compute a level's nodes with batch norms that normalise by given moments.

    No gradient comes back through it.

    Args:
        rows: of the level above, `[R, N, H, W, C]`, in the parameters' type or a narrower one.
        parent: index into `rows` of each node, `[M]` int32.
        choice: candidate op of each node, `[M]` int32; below 0 for padding. Values out of range
            are refused on a CPU; on a CUDA device, where reading them would be waiting for it,
            they are not noticed.
        parameters: of all choices, in order: weight, and scale and shift where there are any, of
            each unit, the main chain's and then the shortcut's.
        moments: of each node, `[M, K]`, in the parameters' type: mean and variance, `[C]` each, of
            every unit in turn; `K` is the largest over the choices, and what a node does not need
            is not read.
        layer: the text of the choices, `population_layer.describe_layer`.

    Returns:
        The nodes' rows, `[M, N, H', W', C']`, of the type of `rows`; an identity's is a copy of its
        parent's.

    Raises:
        ValueError: `layer` is no such text, or rows, nodes, parameters or moments do not fit it.
    """
    return torch.ops.fastshift.layer_infer.default(rows, parent, choice, parameters, moments, layer)


def layer_train(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    layer: str,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a level's nodes with each batch norm normalising by its node's own moments.

    In eager mode the parameters of a choice that no node has get no gradient at all; in a compiled
    function, which does not know the choices, they get zeros.

    Args:
        rows, parent, choice, parameters, layer: as for `layer_infer`.
        keep: whether a backward pass may follow; without it what that needs is not kept.

    Returns:
        The nodes' rows, `[M, N, H', W', C']`; their statistics, `[M, K]`, in the parameters'
        type, which carry no gradient:
        mean, unbiased variance, scale, shift and one over the standard deviation, `[5, C]`, of
        every unit in turn, zeros behind; and what the backward pass needs, flat.

    Raises:
        ValueError: `layer` is no such text, or rows, nodes or parameters do not fit it.
    """
    return torch.ops.fastshift.layer_train.default(rows, parent, choice, parameters, layer, keep)


def layer_backward(
    d_out: Tensor,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    statistics: Tensor,
    saved: Tensor,
    layer: str,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Compute the gradients of `layer_train`'s rows.

    Gradients of nodes that share a parent, or a choice, are added up in the nodes' order.

    Args:
        d_out: gradient of the nodes' rows, `[M, N, H', W', C']`.
        rows, parent, choice, parameters, layer: as given to `layer_train`.
        statistics, saved: as it returned them.
        needs: whether the rows' gradient is wanted, and that of each parameter.

    Returns:
        The gradient of `rows`, empty where not wanted, and those of the parameters that want one,
        zeros where no node uses it.

    Raises:
        ValueError: as for `layer_train`, or `saved` was not kept.
    """
    return torch.ops.fastshift.layer_backward.default(
        d_out, rows, parent, choice, parameters, statistics, saved, layer, needs
    )


def _checked(
    rows: Tensor, parent: Tensor, choice: Tensor, parameters: Sequence[Tensor], layer: str
) -> PopulationLayer:
    """The layer, where shapes fit it."""
    described = parse_layer(layer)
    if rows.dim() != 5:
        raise ValueError(f"rows: shape {tuple(rows.shape)}; expected [R, N, H, W, C]")
    if parent.dim() != 1 or parent.shape != choice.shape:
        raise ValueError(
            f"parent, choice: shapes {tuple(parent.shape)}, {tuple(choice.shape)}; expected [M]"
        )
    if len(parameters) != described.num_parameters:
        raise ValueError(f"parameters: {len(parameters)}; expected {described.num_parameters}")
    for parameter, shape in zip(parameters, described.shapes, strict=True):
        if parameter.shape != shape or parameter.device != rows.device:
            raise ValueError(
                f"parameters: {tuple(parameter.shape)} on {parameter.device}; "
                f"expected {shape} on {rows.device}"
            )
    return described


def _nodes(
    described: PopulationLayer, rows: Tensor, parent: Tensor, choice: Tensor
) -> tuple[list[int], list[int]]:
    """The nodes' parents and choices, where none is outside of what is there."""
    for name, values in (("parent", parent), ("choice", choice)):
        if values.is_floating_point() or values.dtype is torch.bool:
            raise ValueError(f"{name}: {values.dtype}; expected integers")
    sources, choices = parent.tolist(), choice.tolist()
    limit = len(described.ops)
    if choices and max(choices) >= limit:
        raise ValueError(f"choice: {choices}; expected values below {limit}")
    limit = rows.shape[0]
    if any(not 0 <= s < limit for s, c in zip(sources, choices, strict=True) if c >= 0):
        raise ValueError(f"parent: {sources}; expected values from 0, below {limit}")
    return sources, choices


def _buffers(rows: Tensor, parent: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes' buffers for the kernels that read them: their values are not looked at here."""
    for name, values in (("parent", parent), ("choice", choice)):
        if values.dtype is not torch.int32 or values.device != rows.device:
            raise ValueError(
                f"{name}: {values.dtype} on {values.device}; expected int32 on {rows.device}"
            )
    return parent.contiguous(), choice.contiguous()


def _kernels(
    described: PopulationLayer,
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[ModuleType, tuple]:
    """The implementation, and the nodes as it takes them."""
    name = implementation(described, rows, parameters)
    if name == "triton":
        return _operators_triton, _buffers(rows, parent, choice)
    return _KERNELS[name], _nodes(described, rows, parent, choice)


def _checked_moments(
    rows: Tensor,
    parent: Tensor,
    choice: Tensor,
    parameters: Sequence[Tensor],
    moments: Tensor,
    layer: str,
) -> PopulationLayer:
    """The layer, where shapes and moments fit it."""
    described = _checked(rows, parent, choice, parameters, layer)
    expected = (choice.shape[0], described.moments_floats)
    if moments.shape != expected or moments.device != rows.device:
        place = f"{tuple(moments.shape)} on {moments.device}"
        raise ValueError(f"moments: {place}; expected {expected} on {rows.device}")
    return described


def _infer(rows, parent, choice, parameters, moments, layer):
    described = _checked_moments(rows, parent, choice, parameters, moments, layer)
    run, nodes = _kernels(described, rows, parent, choice, parameters)
    return run.infer(rows, *nodes, parameters, moments, described)


def _infer_fake(rows, parent, choice, parameters, moments, layer):
    described = _checked_moments(rows, parent, choice, parameters, moments, layer)
    return _fake_rows(described, rows, choice)


def _train(rows, parent, choice, parameters, layer, keep=True):
    described = _checked(rows, parent, choice, parameters, layer)
    run, nodes = _kernels(described, rows, parent, choice, parameters)
    _, images, height, width, channels = rows.shape
    if images * math.prod(described.output_shape(height, width, channels)[:2]) < 2:
        raise ValueError(f"rows: {tuple(rows.shape)}; expected two values a channel at least")
    return run.train(rows, *nodes, parameters, described, keep)


def _train_fake(rows, parent, choice, parameters, layer, keep=True):
    described = _checked(rows, parent, choice, parameters, layer)
    out = _fake_rows(described, rows, choice)
    wide = _operators_ref.wide_type(rows, parameters)
    statistics = rows.new_empty(choice.shape[0], described.statistics_floats, dtype=wide)
    kept = saved_floats(described, rows, choice, parameters) if keep else 0
    return out, statistics, rows.new_empty(kept, dtype=wide)


def _fake_rows(described: PopulationLayer, rows: Tensor, choice: Tensor) -> Tensor:
    shape = described.output_shape(*rows.shape[2:])
    return rows.new_empty(choice.shape[0], rows.shape[1], *shape)


def saved_floats(
    described: PopulationLayer, rows: Tensor, choice: Tensor, parameters: Sequence[Tensor]
) -> int:
    """How many floats `layer_train` keeps for a backward pass of such rows and nodes."""
    images = tuple(int(size) for size in rows.shape[1:4])
    run = _KERNELS[implementation(described, rows, parameters)]
    return choice.shape[0] * run.saved_floats(described, images, rows.dtype)


def _backward(d_out, rows, parent, choice, parameters, statistics, saved, layer, needs):
    described = _checked(rows, parent, choice, parameters, layer)
    run, nodes = _kernels(described, rows, parent, choice, parameters)
    expected = (saved_floats(described, rows, choice, parameters),)
    wide = _operators_ref.wide_type(rows, parameters)
    if saved.shape != expected or saved.dtype is not wide or not saved.is_contiguous():
        raise ValueError(
            f"saved: {tuple(saved.shape)} of {saved.dtype}; expected {expected} of {wide}, "
            "contiguous, as layer_train keeps"
        )
    expected = (choice.shape[0], *rows.shape[1:2], *described.output_shape(*rows.shape[2:]))
    if d_out.shape != expected or d_out.dtype is not rows.dtype:
        raise ValueError(
            f"d_out: {tuple(d_out.shape)} of {d_out.dtype}; expected {expected} of {rows.dtype}"
        )
    expected = (choice.shape[0], described.statistics_floats)
    if statistics.shape != expected:
        raise ValueError(f"statistics: shape {tuple(statistics.shape)}; expected {expected}")
    return run.backward(d_out, rows, *nodes, parameters, statistics, saved, described, needs)


def _backward_fake(d_out, rows, parent, choice, parameters, statistics, saved, layer, needs):
    d_rows = rows.new_empty(rows.shape if needs[0] else 0)
    wanted = zip(parameters, needs[1:], strict=True)
    return d_rows, [torch.empty_like(p) for p, needed in wanted if needed]


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, rows, parent, choice, *parameters):
        with torch._C._AutoDispatchBelowAutograd():
            found = layer_train(rows, parent, choice, parameters, layer)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[1:])
        ctx.save_for_backward(rows, parent, choice, *found[1:], *parameters)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, *_):
        rows, parent, choice, statistics, saved, *parameters = ctx.saved_tensors
        needs_rows, _, _, *needs = ctx.needs_input_grad[1:]
        if d_out is None:
            return (None,) * (4 + len(parameters))
        # A tensor that is being traced has no values to read, and one elsewhere is not waited for.
        if type(choice) is Tensor and choice.device.type == "cpu":
            needs = used_parameters(parse_layer(ctx.layer), choice, needs)
        with torch._C._AutoDispatchBelowAutograd():
            d_rows, found = layer_backward(
                d_out,
                rows,
                parent,
                choice,
                parameters,
                statistics,
                saved,
                ctx.layer,
                [needs_rows, *needs],
            )
        gradients = iter(found)
        return (
            None,
            d_rows if needs_rows else None,
            None,
            None,
            *(next(gradients) if needed else None for needed in needs),
        )


def used_parameters(
    described: PopulationLayer, choice: Tensor, needs: Sequence[bool]
) -> list[bool]:
    """`needs` without the parameters of choices that no node has."""
    found = [False] * len(needs)
    for index in {index for index in choice.tolist() if index >= 0}:
        own = slice(described.first_parameter[index], described.first_parameter[index + 1])
        found[own] = needs[own]
    return found


def _infer_autograd(rows, parent, choice, parameters, moments, layer):
    """None comes back, whichever implementation runs: not a part of one either."""
    with torch._C._AutoDispatchBelowAutograd():
        return layer_infer(rows, parent, choice, parameters, moments, layer)


def _train_autograd(rows, parent, choice, parameters, layer, keep=True):
    if torch.is_grad_enabled() and (
        rows.requires_grad or any(parameter.requires_grad for parameter in parameters)
    ):
        if not keep:
            raise ValueError("keep: False; expected True where a gradient may be asked for")
        return _Train.apply(layer, rows, parent, choice, *parameters)
    with torch._C._AutoDispatchBelowAutograd():
        return layer_train(rows, parent, choice, parameters, layer, keep)


_NODES = "Tensor rows, Tensor parent, Tensor choice, Tensor[] parameters"
_LIBRARY = torch.library.Library("fastshift", "FRAGMENT")
for _schema, _kernel, _fake in (
    (f"layer_infer({_NODES}, Tensor moments, str layer) -> Tensor", _infer, _infer_fake),
    (
        f"layer_train({_NODES}, str layer, bool keep=True) -> (Tensor, Tensor, Tensor)",
        _train,
        _train_fake,
    ),
    (
        f"layer_backward(Tensor d_out, {_NODES}, Tensor statistics, Tensor saved, str layer, "
        "bool[] needs) -> (Tensor, Tensor[])",
        _backward,
        _backward_fake,
    ),
):
    _name = _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastshift::{_name}", _fake, lib=_LIBRARY)
_LIBRARY.impl("layer_infer", _infer_autograd, "Autograd")
_LIBRARY.impl("layer_train", _train_autograd, "Autograd")
