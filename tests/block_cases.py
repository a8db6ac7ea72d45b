"""Blocks of every kind and shape, and what it means that a kernel computes them as PyTorch does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastshift import cpu
from fastshift.layers import OpModule
from fastshift.ops import (
    Frame,
    Op,
    Unit,
    conv,
    identity,
    inverted_residual,
    projection,
    shuffle_unit,
    shuffle_xception,
)
from fastshift.testing import FLOORS

# Of the op's largest gradient: the error of one that is zero by symmetry or nearly so, and what is
# nearly so. In bfloat16 of any.
ABSOLUTE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
NEARLY_ZERO = {torch.float32: 1e-4, torch.bfloat16: 1.0}
# Of so few values a channel, some of which hardly vary, several draws count together. So of a mean
# that is zero by symmetry, where one rounding stands beside another.
FEW, DRAWS, DRAWS_OF_ZERO = 16, 4, 40


def op_of(units, frame, stride=1, shortcut=()):
    """An op of (kind, in, out, kernel, stride, activation), its channels from its units'."""
    units, shortcut = (tuple(Unit(*u) for u in chain) for chain in (units, shortcut))
    c_in, c_out = units[0].in_channels, units[-1].out_channels
    return Op("op", c_in, c_out, stride, units, Frame(frame, shortcut))


def every_frame(c, expansion, kernels):
    """An op of each frame that keeps its rows' size; an identity first."""
    return [
        identity(c),
        inverted_residual(c, c, 1, expansion, kernels[0]),
        shuffle_unit(c, c, 1, kernels[1]),
        conv(c, c, 3, 1),
        shuffle_xception(c, c, 1),
    ]


def strided_shortcut(c):
    """Residual, with a strided 1x1 beside a depthwise unit and its product."""
    main = [("depthwise", c, c, 3, 2), ("pointwise", c, 2 * c, 1, 1, None)]
    return op_of(main, "residual", 2, [("pointwise", c, 2 * c, 1, 2, None)])


def chain(c):
    """Plain: a strided 1x1 first, a depthwise unit last."""
    units = (
        Unit("pointwise", c, c + 3, stride=2),
        Unit("pointwise", c + 3, 2 * c, activation=None),
        Unit("depthwise", 2 * c, 2 * c, 5),
    )
    return Op("chain", c, 2 * c, 2, units)


def _depthwise_chain(c):
    units = (Unit("depthwise", c, c, 3), Unit("depthwise", c, c, 7, 2, activation=None))
    return Op("depthwise_chain", c, c, 2, units)


def _residual_shortcut(c, stride):
    main = (
        Unit("depthwise", c, c, 3, stride),
        Unit("pointwise", c, 2 * c),
        Unit("depthwise", 2 * c, 2 * c, 5, activation=None),
    )
    aside = (Unit("pointwise", c, 2 * c, stride=stride, activation=None),)
    return Op("residual_shortcut", c, 2 * c, stride, main, Frame("residual", aside))


def _expansion_behind(c):
    """Channels grow behind another unit, between two depthwise ones."""
    units = (
        Unit("depthwise", c, c, 3),
        Unit("pointwise", c, 3 * c),
        Unit("depthwise", 3 * c, 3 * c, 5, 2),
    )
    return Op("expansion_behind", c, 3 * c, 2, units)


def _residual_relu(c):
    """A residual added to what a ReLU gave, the last unit depthwise."""
    units = (Unit("pointwise", c, c), Unit("depthwise", c, c, 3))
    return Op("residual_relu", c, c, 1, units, Frame("residual"))


# By what differs: frame, kernel, stride, expansion. All take any number of channels, those of a
# shuffle an even one.
OPS = {
    **{
        f"inverted_residual-e{e}-k{k}-s{s}": lambda c, e=e, k=k, s=s: inverted_residual(
            c, c if s == 1 else 2 * c, s, e, k
        )
        for e in (3, 6)
        for k in (3, 5)
        for s in (1, 2)
    },
    "inverted_residual-plain": lambda c: inverted_residual(c, c + 1, 1, 3, 3),
    "projection-s1": lambda c: projection(c, c + 5, 1),
    "projection-s2": lambda c: projection(c, 2 * c, 2),
    "conv_k1": lambda c: conv(c, c, 1, 1),
    "conv_k3-s1": lambda c: conv(c, c + 2, 3, 1),
    "conv_k3-s2": lambda c: conv(c, 2 * c, 3, 2),
    "conv_k5-hidden": lambda c: Op(
        "hidden", c, c, 1, (Unit("pointwise", c, c + 3), Unit("dense", c + 3, c, 5))
    ),
    "chain": chain,
    "depthwise_chain": _depthwise_chain,
    "residual_shortcut-s1": lambda c: _residual_shortcut(c, 1),
    "residual_shortcut-s2": lambda c: _residual_shortcut(c, 2),
    "residual_relu": _residual_relu,
    "expansion_behind": _expansion_behind,
}
SHUFFLES = {
    **{
        f"shuffle-k{k}-s{s}": lambda c, k=k, s=s: shuffle_unit(c, c * s, s, k)
        for k in (3, 5, 7)
        for s in (1, 2)
    },
    "shuffle-mid": lambda c: shuffle_unit(c, c, 1, 3, mid=c + 1),
    "xception-s1": lambda c: shuffle_xception(c, c, 1),
    "xception-s2": lambda c: shuffle_xception(c, 2 * c, 2),
}
SHAPES = {
    "easy": (4, 16, 8, 8),
    "odd": (3, 14, 7, 9),
    "one_image": (1, 10, 5, 3),
    "under_the_kernel": (2, 4, 2, 2),
    "one_position": (5, 4, 1, 1),
    "one_channel": (3, 1, 4, 3),
}
LARGER = {
    "narrow": (3, 6, 13, 1),
    "many_images": (19, 8, 3, 5),
    "many_positions": (1, 18, 17, 13),
    "many_channels": (4, 40, 5, 4),
}


def _has_lone_depthwise(op):
    """One filter over one channel: to PyTorch no depthwise convolution, and none to the kernels."""
    return any(
        u.kind == "depthwise" and u.in_channels == 1 for u in (*op.units, *op.frame.shortcut)
    )


def fits(make, shape):
    """Whether an op can be made with a shape's channels, and the kernels have it."""
    return not (make in SHUFFLES.values() and shape[1] % 2) and not _has_lone_depthwise(
        make(shape[1])
    )


def _cases(shapes, *marks):
    return [
        pytest.param(make, shape, id=f"{name}-{'x'.join(map(str, shape))}", marks=marks)
        for shape in shapes.values()
        for name, make in {**OPS, **SHUFFLES}.items()
        if fits(make, shape)
    ]


CASES = _cases(SHAPES) + _cases(LARGER, pytest.mark.slow)
SOME_NAMES = (
    "inverted_residual-e3-k3-s1",
    "projection-s2",
    "residual_shortcut-s2",
    "shuffle-k5-s2",
    "xception-s1",
)
SOME = [pytest.param({**OPS, **SHUFFLES}[name], id=name) for name in SOME_NAMES]
MAKERS = [
    pytest.param(make, id=name, marks=() if name in SOME_NAMES else pytest.mark.slow)
    for name, make in {**OPS, **SHUFFLES}.items()
]
# The instruction sets that this machine has.
ABLE = [name for name, reason in cpu.instruction_sets().items() if reason is None]
# Levels whose products take bfloat16; the others widen rows first.
PRODUCTS_IN_BF16 = ("amx", "avx512_bf16", "emulated_amx", "emulated_avx512_bf16")
# Quick are all cases on the best of them, and odd shapes on the others.
on_each_set = pytest.mark.parametrize(
    ("isa", "make", "shape"),
    [
        pytest.param(
            isa,
            *case.values,
            id=f"{isa}-{case.id}",
            marks=case.marks
            if isa == ABLE[0] or case.values[1] == SHAPES["odd"]
            else pytest.mark.slow,
        )
        for isa in ABLE
        for case in CASES
    ],
    indirect=["isa"],
)


class Poisoned:
    """`torch`, but its `empty` and the like give NaN, or an address that no one may read.

    Attributes:
        given: tensors made so far.
    """

    def __init__(self):
        self.given = 0

    def __getattr__(self, name):
        found = getattr(torch, name)
        if not name.startswith("empty"):
            return found
        return lambda *arguments, **options: self.count(found(*arguments, **options))

    def count(self, made):
        """Fill a tensor, and count it."""
        self.given += 1
        return made.fill_(torch.nan if made.is_floating_point() else 1)


def seeded(seed=0):
    """Make a generator of random numbers."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomised(module, seed=0):
    """Weights, scales, shifts and running statistics of which none has its neutral value."""
    generator = seeded(seed)
    for parameter in module.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.normal_(0.0, (2.0 / fan) ** 0.5, generator=generator)
    for norm in norms_of(module):
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.running_mean.normal_(0.0, 0.3, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def make_op(make, channels, *, affine=True, seed=0):
    """A module of an op, its values random."""
    return randomised(OpModule(make(channels), affine), seed)


def norms_of(module):
    """A module's batch norms, in their order."""
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def moments_of(module):
    """The statistics that a module in evaluation mode normalises by."""
    return [(norm.running_mean, norm.running_var) for norm in norms_of(module)]


def make_rows(shape, seed=1):
    """Random values, channels innermost."""
    x = torch.randn(shape, generator=seeded(seed))
    return x.contiguous(memory_format=torch.channels_last)


def _named(module, x, y, moments, dy):
    """Output, moments and gradients by name."""
    found = {"y": y.detach()}
    for index, (mean, var) in enumerate(moments):
        found |= {f"mean {index}": mean.detach(), f"var {index}": var.detach()}
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if x.requires_grad:
        wanted["x"] = x
    if wanted:
        gradients = torch.autograd.grad(y, list(wanted.values()), dy)
        found |= {f"d {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return found


def autocast(dtype):
    """Compute in bfloat16 inside, where that is the type."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)


def by_pytorch(module, x, dy, dtype, need_dx=True):
    """The same by PyTorch's own ops in a dtype, in `x`'s memory format."""
    kept = torch.float32 if dtype is torch.bfloat16 else dtype
    module = copy.deepcopy(module).to(kept).train()
    norms = norms_of(module)
    for norm in norms:
        norm.momentum = 1.0
        norm.running_var.zero_()
        norm.running_mean.zero_()
    x = x.detach().to(kept).requires_grad_(need_dx)
    with autocast(dtype):
        y = module(x)
    moments = [(norm.running_mean, norm.running_var) for norm in norms]
    return _named(module, x, y, moments, dy.to(y.dtype))


def by_kernels(module, x, dy, need_dx=True, dtype=torch.float32):
    """The same by the compiled kernels."""
    x = x.detach().requires_grad_(need_dx)
    with autocast(dtype):
        y, moments = cpu.block_of(module, x).train(x)
    assert y.dtype is dtype
    return _named(module, x, y, moments, dy.to(dtype))


@torch.no_grad()
def infer(module, x):
    """A module's rows by the compiled kernels, under its running statistics."""
    return cpu.block_of(module, x).infer(x, moments_of(module))


def error_of(found, exact):
    """Norm of the difference, in float64."""
    return float((found.double() - exact).norm())


def shares_of_bound(found, plain, exact, dtype=torch.float32, nearly_zero=None):
    """The error of each named result over what it may be: twice PyTorch's, or the floor.

    A gradient that is zero by symmetry, such as that of a shift which the next batch norm takes
    away, is rounding alone: it may be off by a little of the op's largest.
    """
    nearly_zero = nearly_zero or NEARLY_ZERO[dtype]
    assert found.keys() == exact.keys()
    scale = max((float(exact[name].norm()) for name in exact if name[:2] == "d "), default=0.0)
    shares = {}
    for name in exact:
        assert found[name].shape == exact[name].shape, name
        error = error_of(found[name], exact[name])
        # PyTorch's own may be NaN, in bfloat16 of a map smaller than the kernel.
        errors = [error_of(values[name], exact[name]) for values in plain]
        bound = max(filter(math.isfinite, errors), default=0.0)
        size = float(exact[name].norm())
        floor = FLOORS[dtype] * size
        if name[:2] == "d " and size <= nearly_zero * scale:
            floor = max(floor, ABSOLUTE[dtype] * scale)
        bound = max(2 * bound, floor)
        shares[name] = error / bound if bound else torch.inf if error else 0.0
    return shares


def assert_each_as_accurate(found, plain, exact, dtype=torch.float32, nearly_zero=None):
    """Each named result is within its bound."""
    for name, share in shares_of_bound(found, plain, exact, dtype, nearly_zero).items():
        assert share <= 1, f"{name}: {share:.3g} of the bound"


@torch.no_grad()
def assert_same_rows(module, x, found, dtype=torch.float32):
    """A module's rows are as accurate as PyTorch's."""
    with torch.autocast("cpu", enabled=False):
        exact = copy.deepcopy(module).double()(x.double())
    assert_each_as_accurate({"y": found}, [{"y": module(x)}], {"y": exact}, dtype)


def three_ways(module, x, *, need_dx=True, dtype=torch.float32):
    """A training pass by the kernels, by PyTorch in both memory formats, and in float64."""
    with torch.no_grad():
        dy = torch.randn(copy.deepcopy(module)(x).shape, generator=seeded(2))
    found = by_kernels(module, x, dy, need_dx, dtype)
    exact = by_pytorch(module, x, dy, torch.float64, need_dx)
    formats = (torch.contiguous_format, torch.channels_last)
    rows = [x.detach().contiguous(memory_format=layout) for layout in formats]
    return found, [by_pytorch(module, row, dy, dtype, need_dx) for row in rows], exact


def zero_means(exact):
    """Names of the means that are zero but for float64's rounding, beside their deviation."""
    return [
        name
        for name in exact
        if name[:5] == "mean "
        and exact[name].norm() <= 1e-12 * exact[name.replace("mean", "var")].sqrt().norm()
    ]


def check_training(module, x, *, need_dx=True, dtype=torch.float32):
    """Compare training passes; PyTorch's error is the larger of those in both memory formats.

    Of several draws the geometric mean counts, and what is not a number fails. Where the draws are
    for means of zero, anything else counts in the first draw as if it were alone.
    """
    few = x.numel() // x.shape[1] <= FEW
    passes = [three_ways(module, x, need_dx=need_dx, dtype=dtype)]
    zeros = zero_means(passes[0][2])
    if few:  # the first alone too, whatever size a gradient has
        assert_each_as_accurate(*passes[0], dtype, nearly_zero=1.0)
    for i in range(1, max(DRAWS if few else 1, DRAWS_OF_ZERO if zeros else 1)):
        draw = torch.randn(x.shape, generator=seeded(100 + i))
        passes.append(three_ways(module, draw, need_dx=need_dx, dtype=dtype))
    shares = [shares_of_bound(*each, dtype) for each in passes]
    for name in shares[0]:
        together = few or name in zeros
        each = [share[name] for share in (shares if together else shares[:1])]
        mean = geometric_mean(max(share, 0.1) for share in each)
        assert mean <= 1, f"{name}: {mean:.3g} of the bound over {len(each)} draws"
        assert max(each) <= (10 if together else 1), f"{name}: {max(each):.3g} of the bound"
    return passes[0][0]


def geometric_mean(values):
    return float(torch.tensor(list(values)).log().mean().exp())
