"""Population layers of every frame, shape and population, for the tests of their operators."""

from __future__ import annotations

import pytest
import torch
from block_cases import every_frame, seeded, strided_shortcut
from torch import nn

from fastshift import cpu, levels
from fastshift.layers import OpModule
from fastshift.operators import layer_train
from fastshift.ops import (
    inverted_residual,
    projection,
    shuffle_unit,
)
from fastshift.population_layer import describe_layer, describe_op, parse_layer

# Every frame, with and without a shortcut; choice 0 of the first is the identity.
OPS = {
    "s1": lambda c: every_frame(c, 3, (3, 5)),
    "s2": lambda c: [
        projection(c, 2 * c, 2),
        inverted_residual(c, 2 * c, 2, 3, 5),
        shuffle_unit(c, 2 * c, 2, 7),
        strided_shortcut(c),
    ],
}
# Rows above, parent and choice of each node.
POPULATIONS = {
    "lone": (1, [0], [1]),
    "siblings": (1, [0, 0, 0, 0], [0, 1, 2, 3]),
    "cousins": (3, [0, 0, 1, 2, 2], [3, 0, 2, 2, 1]),
    "one_choice": (2, [0, 1, 1], [2, 2, 2]),
    "first_choices": (2, [0, 1], [0, 0]),
    "an_unread_row": (3, [2, 0, 2], [1, 0, 0]),
    "every_choice": (2, [1, 1, 0, 0, 1], [4, 3, 2, 1, 0]),
}
SHAPES = {"easy": (4, 8, 6, 6), "odd": (3, 6, 5, 3), "tiny": (5, 4, 1, 1)}


class Layer:
    """Modules of some ops, and what the operators take in their place."""

    def __init__(self, ops, affine=True, dtype=torch.float32):
        self.modules = nn.ModuleList(OpModule(op, affine) for op in ops)
        generator = seeded()
        names = {}
        with torch.no_grad():
            for name, p in self.modules.named_parameters():
                fan = p[0].numel() if p.dim() > 1 else 4
                p.normal_(0.0, (2.0 / fan) ** 0.5, generator=generator)
                names[p] = name
        texts, self.parameters = [], []
        for op, module in zip(ops, self.modules, strict=True):
            if op.is_identity:
                texts.append(describe_op(None))
                continue
            block = cpu.CpuBlock(module)
            own = block.parameters()
            texts.append(levels._text_of(block, own))
            self.parameters += [p for p in own if p is not None]
        self.names = [names[p] for p in self.parameters]
        self.text = describe_layer(texts)
        self.parsed = parse_layer(self.text)
        self.modules.to(dtype)

    def given(self, dtype=torch.float32, needs=True):
        """Copies of the parameters in a type."""
        return [p.detach().to(dtype).clone().requires_grad_(needs) for p in self.parameters]


def buffers(parent, choice):
    """The nodes, as a device holds them."""
    return torch.tensor(parent, dtype=torch.int32), torch.tensor(choice, dtype=torch.int32)


def make_case(name, shape, population, **options):
    """A layer, random rows and the nodes' buffers."""
    n, c, h, w = shape
    layer = Layer(OPS[name](c), **options)
    num, parent, choice = population
    rows = torch.randn(num, n, h, w, c, generator=seeded(1))
    return layer, rows, *buffers(parent, [i % len(layer.modules) for i in choice])


def trained(layer, rows, parent, choice, dtype=torch.float32, rows_type=None):
    """Rows, statistics and gradients by name."""
    rows = rows.detach().to(rows_type or dtype).requires_grad_()
    parameters = layer.given(dtype)
    y, statistics, _ = layer_train(rows, parent, choice, parameters, layer.text)
    dy = torch.randn(y.shape, generator=seeded(2)).to(y.dtype)
    gradients = torch.autograd.grad(y, [rows, *parameters], dy, allow_unused=True)
    assert not statistics.requires_grad
    found = {"y": y.detach(), "statistics": statistics, "d rows": gradients[0]}
    found |= {f"d {name}": g for name, g in zip(layer.names, gradients[1:], strict=True)}
    return {name: value for name, value in found.items() if value is not None}


def random_moments(layer, nodes):
    """Means and variances to normalise by, all positive."""
    return torch.rand(nodes, layer.parsed.moments_floats, generator=seeded(3)) + 0.5


BY_NAME = pytest.mark.parametrize("name", OPS)
BY_POPULATION = pytest.mark.parametrize("population", POPULATIONS.values(), ids=POPULATIONS)
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda s: "x".join(map(str, s)))
BY_AFFINE = pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
