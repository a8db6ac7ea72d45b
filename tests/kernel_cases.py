"""Population layers for the Triton kernels' tests, and their launches under the interpreter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from block_cases import every_frame, op_of, seeded

from fastshift.kernels import _launch
from fastshift.operators import layer_train
from fastshift.ops import (
    identity,
    inverted_residual,
    projection,
    shuffle_unit,
    shuffle_xception,
)
from fastshift.population_layer import LayerOp, LayerUnit, describe_layer, describe_op, parse_layer
from fastshift.testing import FLOORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu" is Triton's interpreter
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _rare(c):
    """Chains of other orders, dense ones with a stride, and shortcuts of each kind."""
    wide = ("pointwise", c, 2 * c, 1, 1, None)
    return [
        op_of([("depthwise", c, c, 3, 2), wide, ("depthwise", 2 * c, 2 * c, 3)], "plain", 2),
        op_of(
            [("depthwise", c, c, 3, 2), wide],
            "residual",
            2,
            [("dense", c, 2 * c, 3, 2)],
        ),
        op_of([("dense", c, 2 * c, 3, 2)], "residual", 2, [("pointwise", c, 2 * c, 1, 2, None)]),
        inverted_residual(c, 2 * c, 2, 1, 3),
    ]


OPS = {
    "s1": lambda c: every_frame(c, 2, (3, 3)),
    "s2": lambda c: [
        projection(c, 2 * c, 2),
        inverted_residual(c, 2 * c, 2, 2, 3),
        shuffle_unit(c, 2 * c, 2, 3),
        shuffle_xception(c, 2 * c, 2),
    ],
    "rare": _rare,
    "kernels": lambda c: [
        op_of([("depthwise", c, c, k, s)], "plain", s) for k, s in ((3, 2), (5, 2), (7, 2))
    ],
    "kernels_s1": lambda c: [op_of([("depthwise", c, c, k)], "plain") for k in (3, 5, 7)],
    "pair": lambda c: [inverted_residual(c, c, 1, 2, 3), shuffle_unit(c, c, 1, 3)],
    # A depthwise launch is the first that adds to rows' gradients; a later one adds as well.
    "passing": lambda c: [
        identity(c),
        op_of([("depthwise", c, c, 3), ("pointwise", c, c), ("depthwise", c, c, 3)], "residual"),
        op_of([("pointwise", c, c), ("depthwise", c, c, 3)], "residual"),
        shuffle_unit(c, c, 1, 3),
    ],
    "nothing": lambda c: [identity(c), identity(c)],
    "one": lambda c: [identity(c), op_of([("pointwise", c, c)], "residual")],
}
# N, C, H, W; more channels than a tile of a frame has.
SHAPES = {"easy": (4, 8, 6, 6), "odd": (3, 6, 5, 3), "tiny": (5, 4, 1, 1), "wide": (2, 130, 3, 3)}
# Rows above; parent of each node, and its choice modulo those that there are. The padded one has
# padding and a row that no one reads.
POPULATIONS = {
    "every_choice": (2, [1, 1, 0, 0, 1], [4, 3, 2, 1, 0]),
    "one_choice": (2, [0, 1, 1], [2, 2, 2]),
    "padded": (3, [2, 0, 9, 2, -1], [1, 0, -1, 2, -1]),
    "first_three": (1, [0, 0, 0], [0, 1, 2]),
    "first_four": (1, [0, 0, 0, 0], [0, 1, 2, 3]),
    "last_two": (1, [0, 0], [2, 3]),
}


def layer_text(ops, affine=True):
    """A described layer, no two units of which have one epsilon."""
    eps = iter(range(1, 100))

    def unit_of(unit):
        sizes = (unit.in_channels, unit.out_channels, unit.kernel, unit.stride)
        relu = unit.activation == "relu"
        return LayerUnit(unit.kind == "depthwise", *sizes, relu, next(eps) * 1e-3, affine, affine)

    def op_of(op):
        if op.is_identity:
            return None
        units = tuple(unit_of(unit) for unit in (*op.units, *op.frame.shortcut))
        return LayerOp(units, len(op.units), op.frame.kind)

    return describe_layer(describe_op(op_of(op)) for op in ops)


def buffer(values):
    """Node indices as a device holds them."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class TrainingCase:
    """A layer, rows, nodes and parameters."""

    def __init__(
        self, name, shape, population="every_choice", dtype=torch.float32, affine=True, at=0.0
    ):
        n, c, h, w = shape
        self.text = layer_text(OPS[name](c), affine)
        self.layer = parse_layer(self.text)
        named = isinstance(population, str)
        num_rows, parent, choice = POPULATIONS[population] if named else population
        num_choices = len(self.layer.ops)
        self.parent = buffer(parent)
        self.choice = buffer([i % num_choices if i >= 0 else i for i in choice])
        rows = torch.randn(num_rows, n, h, w, c, generator=seeded(1)) + at
        self.rows = rows.to(DEVICE, dtype)
        self.parameters, generator = [], seeded()
        for size in self.layer.shapes:
            scale = math.sqrt(2 / math.prod(size[1:])) if len(size) > 1 else 1.0
            self.parameters.append((torch.randn(size, generator=generator) * scale).to(DEVICE))

    @property
    def unused(self):
        """Names of the gradients of choices that no node has."""
        used, starts = set(self.choice.tolist()), pairwise(self.layer.first_parameter)
        return {
            f"d parameter {index}"
            for choice, span in enumerate(starts)
            if choice not in used
            for index in range(*span)
        }

    def trained(self, dtype=None, nodes=slice(None)):
        """Rows of nodes that are there, statistics and gradients by name.

        Args:
            dtype: of rows and parameters; the case's rows and float32 parameters without.
            nodes: which.
        """
        rows = (self.rows if dtype is None else self.rows.to(dtype)).clone().requires_grad_()
        given = [p.to(dtype or p.dtype).clone().requires_grad_() for p in self.parameters]
        parent, choice = self.parent[nodes], self.choice[nodes]
        y, statistics, _ = layer_train(rows, parent, choice, given, self.text)
        dy = torch.randn(len(self.choice), *y.shape[1:], generator=seeded(2))
        dy = dy.to(self.rows.dtype)[nodes].to(y.device, y.dtype)
        dy[choice < 0] = math.nan  # of padding nothing is read
        gradients = torch.autograd.grad(y, [rows, *given], dy, allow_unused=True)
        found = {"y": y.detach()[choice >= 0], "statistics": statistics, "d rows": gradients[0]}
        for index, (p, g) in enumerate(zip(given, gradients[1:], strict=True)):
            found[f"d parameter {index}"] = torch.zeros_like(p) if g is None else g
        return found


def noting(launches):
    """Make a launch that notes itself in a list and runs."""
    launch = _launch.Launch.__call__

    def note(self):
        launches.append(self)
        launch(self)

    return note


def assert_near(found, own, exact):
    """Twice the error of the reference in the kernel's type, or the type's floor."""
    assert found.dtype is own.dtype
    size = float(exact.norm())
    errors = [float((x.cpu().double() - exact).norm()) for x in (found, own)]
    bound = max(2 * errors[1], FLOORS[found.dtype] * size)
    assert errors[0] <= bound, f"error {errors[0]:.3g} of {size:.3g}; expected {bound:.3g}"


def same_bits(before, after):
    """Whether two lists of tensors are equal, one by one."""
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
