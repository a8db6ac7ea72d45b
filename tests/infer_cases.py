"""Population layers with given moments for the tests of inference by Triton, and its forms."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from block_cases import every_frame, op_of, strided_shortcut
from kernel_cases import DEVICE, layer_text

from fastshift import _operators_ref
from fastshift.kernels import infer as kernels
from fastshift.kernels import infer_bands
from fastshift.kernels.infer_bands import plan_bands
from fastshift.ops import (
    Frame,
    Op,
    Unit,
    inverted_residual,
    projection,
    shuffle_unit,
    shuffle_xception,
)
from fastshift.population_layer import parse_layer
from fastshift.testing import FLOORS


def _rare(c, kernel=3):
    """What the ready-made spaces have not: other ends of chains, dense ones, other shortcuts."""
    wide = ("pointwise", c, 2 * c, 1, 1, None)
    return [
        op_of([wide, ("depthwise", 2 * c, 2 * c, 3, 2)], "plain", 2),
        op_of([("depthwise", c, c, kernel, 2), ("depthwise", c, c, 3, 1, None), wide], "plain", 2),
        op_of(
            [("depthwise", c, c, 3, 2), wide],
            "residual",
            2,
            [("dense", c, c, 3, 2), ("depthwise", c, c, 3), wide],
        ),
        op_of([("dense", c, 2 * c, 3, 2)], "residual", 2, [("pointwise", c, 2 * c, 1, 2, None)]),
    ]


OPS = {
    "s1": lambda c, kernel=3: every_frame(c, 3, (kernel, 3)),
    "s2": lambda c, kernel=3: [
        projection(c, 2 * c, 2),
        inverted_residual(c, 2 * c, 2, 3, 3),
        shuffle_unit(c, 2 * c, 2, kernel),
        shuffle_xception(c, 2 * c, 2),
        strided_shortcut(c),
    ],
    "rare": _rare,
    "end_in_depthwise": lambda c, kernel=3: [
        op_of([("pointwise", c, c), ("depthwise", c, c, kernel, 1, None)], "residual"),
        Op(
            "shuffle",
            c,
            c,
            1,
            (Unit("depthwise", c // 2, c // 2, 3), Unit("depthwise", c // 2, c // 2, 3)),
            Frame("shuffle"),
        ),
        Op("dense", c, c, 1, (Unit("dense", c // 2, c // 2, 3),), Frame("shuffle")),
    ],
}
SHAPES = {"easy": (2, 8, 4, 4), "odd": (3, 6, 5, 3), "tiny": (2, 4, 1, 1)}  # N, C, H, W
KERNELS = {"easy": 5, "odd": 7, "tiny": 3}  # the largest depthwise one
EVERY_CHOICE = (2, (1, 0, 0, 1, 1), (4, 3, 2, 1, 0))  # rows above; parent, choice of each node


class InferCase:
    """A layer, rows, nodes, parameters and moments."""

    def __init__(self, ops, shape, population=EVERY_CHOICE, dtype=torch.float32, affine=True):
        n, c, h, w = shape
        generator = torch.Generator().manual_seed(0)
        self.text = layer_text(ops, affine)
        self.layer = parse_layer(self.text)
        num_rows, parent, choice = population
        self.rows = torch.randn(num_rows, n, h, w, c, generator=generator).to(DEVICE, dtype)
        self.parent = torch.tensor(parent, dtype=torch.int32, device=DEVICE)
        choice = [index % len(ops) if index >= 0 else index for index in choice]
        self.choice = torch.tensor(choice, dtype=torch.int32, device=DEVICE)
        self.parameters = []
        for size in self.layer.shapes:
            scale = math.sqrt(2 / math.prod(size[1:])) if len(size) > 1 else 1.0
            self.parameters.append((torch.randn(size, generator=generator) * scale).to(DEVICE))
        size = (len(choice), self.layer.moments_floats)
        variance = torch.rand(size, generator=generator) + 0.5
        # Means and variances take turns; a mean may be negative, a variance not.
        self.moments = (variance * torch.rand(size, generator=generator)).to(DEVICE) + 0.1
        self.shape = self.layer.output_shape(h, w, c)

    def run(self, **given):
        own = {n: given.get(n, getattr(self, n)) for n in ("rows", "parent", "choice")}
        parameters = given.get("parameters", self.parameters)
        moments = given.get("moments", self.moments)
        return kernels.infer(*own.values(), parameters, moments, self.layer, self.shape)

    def reference(self, dtype=None):
        """Rows of the nodes that are there, in a type, or the rows' with wider parameters."""
        there = self.choice >= 0
        rows, wide = (self.rows.to(dtype), dtype) if dtype else (self.rows, torch.float32)
        return _operators_ref.infer(
            rows,
            self.parent[there].tolist(),
            self.choice[there].tolist(),
            [p.to(wide) for p in self.parameters],
            self.moments[there].to(wide),
            self.layer,
        )

    def assert_accurate(self, found):
        """Node by node."""
        assert found.dtype is self.rows.dtype
        assert found.shape == (len(self.choice), self.rows.shape[1], *self.shape)
        floor = FLOORS[self.rows.dtype]
        there = (self.choice >= 0).nonzero()[:, 0].tolist()
        exact, plain = self.reference(torch.float64), self.reference()
        for node, right, own in zip(there, exact, plain, strict=True):
            error, bound = (float((y.double() - right).norm()) for y in (found[node], own))
            limit = max(2 * bound, floor * float(right.norm()))
            choice = int(self.choice[node])
            assert error <= limit, f"node {node}, choice {choice}: {error:.3g} > {limit:.3g}"


# Images and rows of a band at a time, and whether a depthwise convolution and its product are two
# jobs; None is a launch for each stage.
FORMS = {"stages": None, "rows": (1, 3, False), "parts": (1, 4, True), "images": (2, 99, False)}


def take(form, monkeypatch, programs=3):
    """Have layers computed in bands of a size, with few programs, or stage by stage."""

    def choose(plan, machine):
        found = plan_bands(plan, machine, form[2:]) if form else None
        return found and replace(found, programs=programs)

    def bands(images, chain, *, of=infer_bands._bands):
        height = next(job["out_height"] for job in chain if not job["to_hidden"])
        wanted = form[0], min(form[1], height)
        found = [band for band in of(images, chain) if (band.images, band.rows) == wanted]
        return found or list(of(images, chain))[-1:]

    monkeypatch.setattr(kernels, "choose_bands", choose)
    if form:
        monkeypatch.setattr(infer_bands, "_bands", bands)
    for name in ("_bands", "_launches"):  # which keep what they once chose
        monkeypatch.setattr(kernels, name, cache(getattr(kernels, name).__wrapped__))
