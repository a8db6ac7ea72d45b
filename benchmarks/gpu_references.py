"""A case's results beside those of PyTorch's ops in float64: what is wrong is not timed.

Results are fine within twice the error of PyTorch's ops in the case's own type, or below a floor.
Gradients are compared one by one. There a value near zero may fall on either side of a ReLU, in
PyTorch as in the kernels, and moves a gradient by more than all other rounding: the bound is wider,
and in narrow types they are compared on average as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from catalogue import DTYPES, Case
from torch import Tensor

from fastshift import _operators_ref
from fastshift.kernels import images, layer, loss, sgd
from fastshift.kernels.described import Layer
from fastshift.testing import global_error

__all__ = ["error_of"]

# Of a relative error, where twice that of PyTorch in the same type is smaller.
FLOORS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
TF32_FLOOR = 1e-3
# Of a gradient's: in float32 few values are near enough to zero, in a narrow type a share of them.
GRADIENT_FLOORS = {"fp32": 1e-2, "tf32": 1e-1, "fp16": 1e-1, "bf16": 1e-1}
GRADIENT_FACTOR = 4.0
MOST_ROWS = 2  # of the level above, where gradients are compared

Results = dict[str, Sequence[Tensor]]


def error_of(
    case: Case, described: Layer, given: tuple, launcher: Callable, *, tf32: bool = False
) -> float:
    """The relative error against float64, the largest of a case's results.

    Args:
        case: of the catalogue.
        described: the layer of the case, where it is one of a layer.
        given: its arguments; those that it steps in place are stepped.
        launcher: called with them.
        tf32: whether it multiplies in TF32.

    Raises:
        AssertionError: the error is too large.
    """
    if case.name == "layer_backward":
        return _gradients(case, described, given, launcher, tf32=tf32)
    reference = _references(case, described, given)
    # Both before the call, which may step what it is given.
    exact, plain = reference(torch.float64), reference(DTYPES[case.dtype])
    returned = launcher(*given)
    if case.name == "sgd_step":
        found: Results = {"parameters": given[0], "momenta": given[2]}
    elif case.name == "layer_train":
        found = {"rows": returned[:1], "statistics": returned[1:2]}
    else:
        found = {"values": returned[:1] if isinstance(returned, tuple) else [returned]}
    # Whatever the gradients' type, a step is made in float32.
    floor = TF32_FLOOR if tf32 else FLOORS["fp32" if case.name == "sgd_step" else case.dtype]
    errors = []
    for name, right in exact.items():
        error, bound = (global_error(values[name], right) for values in (found, plain))
        assert error <= max(2 * bound, floor), (
            f"{case.name}: error {error:.3g} of its {name}, PyTorch's {bound:.3g}"
        )
        errors.append(error)
    return float(f"{max(errors):.3g}")


def _references(case: Case, described: Layer, given: tuple) -> Callable[[torch.dtype], Results]:
    """What gives a case's results by PyTorch's ops in a type."""
    if case.name in ("layer_infer", "layer_train"):
        return lambda dtype: _layer_results(described, given, dtype)
    if case.name == "sgd_step":
        return lambda dtype: _stepped(given, dtype)
    if case.name == "candidate_loss":
        return lambda dtype: {
            "values": [loss.candidate_loss_ref(given[0].to(dtype), *given[1:])[0]]
        }
    if case.name == "candidate_loss_backward":
        return lambda dtype: {
            "values": [loss.candidate_loss_backward_ref(given[0], given[1].to(dtype), *given[2:])]
        }
    assert case.name == "augment_images", f"{case.name}: it has no reference"
    # Of images float32 is exact but for one rounding, and the result's type rounds once more.
    return lambda dtype: {
        "values": [
            images.augment_images_ref(
                *given[:-1], torch.float32 if dtype is torch.float64 else dtype
            )
        ]
    }


def _layer_results(described: Layer, given: tuple, dtype: torch.dtype) -> Results:
    """A level's rows, and in training its statistics."""
    rows, parent, choice, parameters = given[:4]
    rows, parameters = rows.to(dtype), [p.to(dtype) for p in parameters]
    nodes = parent.tolist(), choice.tolist()
    if isinstance(given[4], Tensor):
        moments = given[4].to(dtype)
        return {"values": [_operators_ref.infer(rows, *nodes, parameters, moments, described)]}
    y, statistics, _ = _operators_ref.train(rows, *nodes, parameters, described)
    return {"rows": [y], "statistics": [statistics]}


def _stepped(given: tuple, dtype: torch.dtype) -> Results:
    """Parameters and momenta after a step, from copies: in float64, or as they are."""
    dtype = torch.promote_types(dtype, torch.float32)
    parameters, momenta = ([value.to(dtype, copy=True) for value in given[i]] for i in (0, 2))
    sgd.sgd_step_ref(parameters, given[1], momenta, *given[3:])
    return {"parameters": parameters, "momenta": momenta}


def _gradients(
    case: Case, described: Layer, given: tuple, launcher: Callable, *, tf32: bool
) -> float:
    """Compare each gradient of a few nodes; the relative error of all together."""
    given = _of_few_nodes(given)
    chosen = set(given[3].tolist())
    d_rows, sums = launcher(*given)
    found = {"rows": d_rows} | {f"parameter {index}": value for index, value in enumerate(sums)}
    precision = "tf32" if tf32 else case.dtype
    narrow = torch.float16 if tf32 else DTYPES[case.dtype]  # TF32 has as many bits as float16
    exact, plain = (_layer_gradients(described, given, t) for t in (torch.float64, narrow))
    least = 0.1 * (TF32_FLOOR if tf32 else FLOORS[case.dtype])
    least *= max(_norm(value) for value in exact.values())
    ratios = []
    for name in _used(described, chosen, found):
        right = exact[name].double()
        own, theirs = (_norm(values[name].double() - right) for values in (found, plain))
        theirs = theirs if math.isfinite(theirs) else 0.0
        bound = max(GRADIENT_FACTOR * theirs, GRADIENT_FLOORS[precision] * _norm(right), least)
        assert own <= bound, (
            f"{case.name}: error {own:.3g} of the gradient of {name}, PyTorch's {theirs:.3g}"
        )
        ratios.append(max(own, least) / max(theirs, least))
    if precision != "fp32":
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        assert mean <= 1.25, f"{case.name}: gradients' errors are {mean:.3g} times PyTorch's"
    return float(f"{global_error(found.values(), exact.values()):.3g}")


def _used(described: Layer, chosen: set[int], found: dict[str, Tensor]) -> list[str]:
    """Names of the gradients of choices that some node has; those of others must be zeros."""
    names = ["rows"]
    for choice, span in enumerate(pairwise(described.first_parameter)):
        own = [f"parameter {index}" for index in range(*span)]
        if choice in chosen:
            names += own
        for name in own:
            assert choice in chosen or not found[name].any(), f"the gradient of {name}: no zeros"
    return names


def _of_few_nodes(given: tuple) -> tuple:
    """A backward pass's arguments with one node of each choice: float64 of all would not fit.

    Images stay as many, and so the kernels the same; rows above are shared by every other node.
    """
    d_y, rows, _, choice, parameters, _, _, plan, *_ = given
    last = {own: node for node, own in enumerate(choice.tolist()) if own >= 0}
    nodes = sorted(last.values())
    rows = rows[:MOST_ROWS]
    parent = torch.arange(len(nodes), dtype=torch.int32, device=rows.device) % len(rows)
    few = rows, parent, choice[nodes], parameters
    _, *kept = layer.train(*few, plan, True)
    sums = [torch.zeros_like(p) for p in parameters]
    return d_y[nodes], *few, *kept, plan, True, torch.empty_like(rows), sums


def _layer_gradients(described: Layer, given: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of rows and parameters by PyTorch's ops in a type."""
    d_y, rows, parent, choice, parameters = given[:5]
    nodes = parent.tolist(), choice.tolist()
    wide = [p.to(dtype) for p in parameters]
    nothing = rows.new_empty(0)  # the reference computes the forward pass again
    d_rows, gradients = _operators_ref.backward(
        *(d_y.to(dtype), rows.to(dtype), *nodes, wide, nothing, nothing, described),
        [True] * (1 + len(wide)),
    )
    return {"rows": d_rows} | {f"parameter {i}": value for i, value in enumerate(gradients)}


def _norm(value: Tensor) -> float:
    return float(value.double().norm())
