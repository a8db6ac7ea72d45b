"""The compiled CPU kernels: as accurate as PyTorch's, on every instruction set of the machine."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastshift import cpu
from fastshift._native import cpu as _cpu
from fastshift.batch_norm import BatchNorms
from fastshift.errors import ConfigError
from fastshift.layers import HeadModule, OpModule
from fastshift.ops import (
    Frame,
    Head,
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

# Of the op's largest gradient, for one that is zero by symmetry.
ABSOLUTE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def _chain(c):
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
    "chain": _chain,
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


def _fits(make, shape):
    return not (make in SHUFFLES.values() and shape[1] % 2) and not _has_lone_depthwise(
        make(shape[1])
    )


def _cases(shapes, *marks):
    return [
        pytest.param(make, shape, id=f"{name}-{'x'.join(map(str, shape))}", marks=marks)
        for shape in shapes.values()
        for name, make in {**OPS, **SHUFFLES}.items()
        if _fits(make, shape)
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
WHY_NOT = ("this machine ", "the system ", "the compiler ", "not asked for ")
ABLE = [name for name, reason in cpu.instruction_sets().items() if reason is None]


@pytest.fixture(params=ABLE, autouse=True)
def isa(request, monkeypatch):
    """Each instruction set that the machine has, one after the other."""
    monkeypatch.setenv("FASTSHIFT_CPU_ISA", request.param)
    monkeypatch.delenv("FASTSHIFT_BACKEND", raising=False)
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that `fastshift.cpu` asks for is full of NaN: what is not written shows."""
    poisoned = _Poisoned()
    monkeypatch.setattr(cpu, "torch", poisoned)
    memory = cpu._memory
    monkeypatch.setattr(cpu, "_memory", lambda floats: poisoned.count(memory(floats)))
    return poisoned


class _Poisoned:
    """`torch`, but its `empty` and the like give NaN."""

    def __init__(self):
        self.given = 0

    def __getattr__(self, name):
        found = getattr(torch, name)
        if not name.startswith("empty"):
            return found

        return lambda *arguments, **options: self.count(found(*arguments, **options))

    def count(self, given):
        """Fill what was given."""
        self.given += 1
        return given.fill_(torch.nan)


@pytest.fixture
def threads():
    """Set the number of torch's threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _randomised(module, seed=0):
    """Weights, scales, shifts and running statistics of which none has its neutral value."""
    generator = _generator(seed)
    for parameter in module.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.normal_(0.0, (2.0 / fan) ** 0.5, generator=generator)
    for norm in _norms(module):
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.running_mean.normal_(0.0, 0.3, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def _op(make, channels, *, affine=True, seed=0):
    return _randomised(OpModule(make(channels), affine), seed)


def _norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def _batch_norms(module):
    """The norms of one module, as of a supernet that has nothing else."""
    parts = {"stem": module, "blocks": [], "head": nn.Identity(), "memory_format": None}
    return BatchNorms(SimpleNamespace(**parts))


def _rows(shape, seed=1):
    """Random values, channels innermost."""
    x = torch.randn(shape, generator=_generator(seed))
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


def _autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)


def _reference(module, x, dy, dtype, need_dx=True):
    """The same by PyTorch's own ops in a dtype, in `x`'s memory format."""
    kept = torch.float32 if dtype is torch.bfloat16 else dtype
    module = copy.deepcopy(module).to(kept).train()
    norms = _norms(module)
    for norm in norms:
        norm.momentum = 1.0
        norm.running_var.zero_()
        norm.running_mean.zero_()
    x = x.detach().to(kept).requires_grad_(need_dx)
    with _autocast(dtype):
        y = module(x)
    moments = [(norm.running_mean, norm.running_var) for norm in norms]
    return _named(module, x, y, moments, dy.to(y.dtype))


def _compiled(module, x, dy, need_dx=True, dtype=torch.float32):
    """The same by the compiled kernels."""
    x = x.detach().requires_grad_(need_dx)
    with _autocast(dtype):
        y, moments = cpu.block_of(module, x).train(x)
    assert y.dtype is dtype
    return _named(module, x, y, moments, dy.to(dtype))


def _error(found, exact):
    return float((found.double() - exact).norm())


def _assert_as_accurate(found, plain, exact, dtype=torch.float32):
    """Each named result is at most twice as far from float64 as PyTorch's, or under the floor.

    A gradient that is zero by symmetry, such as that of a shift which the next batch norm takes
    away, is rounding alone: it may be off by a little of the op's largest.
    """
    assert found.keys() == exact.keys()
    scale = max((float(exact[name].norm()) for name in exact if name[:2] == "d "), default=0.0)
    for name in exact:
        assert found[name].shape == exact[name].shape, name
        error = _error(found[name], exact[name])
        bound = max(_error(values[name], exact[name]) for values in plain)
        floor = FLOORS[dtype] * float(exact[name].norm())
        if name[:2] == "d ":
            floor = max(floor, ABSOLUTE[dtype] * scale)
        assert error <= max(2 * bound, floor), f"{name}: error {error:.3g}, PyTorch's {bound:.3g}"


def _three(module, x, *, need_dx=True, dtype=torch.float32):
    """A training pass by the kernels, by PyTorch in both memory formats, and in float64."""
    with torch.no_grad():
        dy = torch.randn(copy.deepcopy(module)(x).shape, generator=_generator(2))
    found = _compiled(module, x, dy, need_dx, dtype)
    exact = _reference(module, x, dy, torch.float64, need_dx)
    formats = (torch.contiguous_format, torch.channels_last)
    rows = [x.detach().contiguous(memory_format=layout) for layout in formats]
    return found, [_reference(module, row, dy, dtype, need_dx) for row in rows], exact


def _check(module, x, *, need_dx=True, dtype=torch.float32):
    """Compare training passes; PyTorch's error is the larger of those in both memory formats."""
    found, plain, exact = _three(module, x, need_dx=need_dx, dtype=dtype)
    _assert_as_accurate(found, plain, exact, dtype)
    return found


# As accurate as PyTorch


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_a_training_pass_and_every_gradient_are_as_accurate_as_pytorchs(make, shape):
    found = _check(_op(make, shape[1]), _rows(shape))
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_inference_is_as_accurate_as_pytorchs(make, shape):
    module = _op(make, shape[1]).eval()
    x = _rows(shape)
    found = _infer(module, x)
    _assert_same_rows(module, x, found)


@pytest.fixture
def own_products(isa):
    """Levels whose bfloat16 products are their own; the others widen rows and share the code."""
    if isa not in (ABLE[0], "avx512_bf16", "emulated_avx512_bf16", "emulated_amx"):
        pytest.skip("the code of another level")


def _ratios(module, x, bounded=False):
    """Error in bfloat16 over PyTorch's, by name.

    Below a thousandth of the value, or of the op's largest gradient, an error counts for nothing.
    Where bounded, one beyond a tenth may not be eight times PyTorch's.
    """
    found, plain, exact = _three(module, x, dtype=torch.bfloat16)
    assert all(torch.isfinite(value).all() for value in found.values())
    largest = max(float(exact[name].norm()) for name in exact if name[:2] == "d ")
    ratios = {}
    for name in exact:
        least = 1e-3 * (largest if name[:2] == "d " else float(exact[name].norm()))
        theirs = max(_error(values[name], exact[name]) for values in plain)
        own = _error(found[name], exact[name])
        ratios[name] = max(own, least) / max(theirs, least)
        assert not bounded or own <= max(8 * theirs, 100 * least), name
    return ratios


def _geometric_mean(values):
    return float(torch.tensor(list(values)).log().mean().exp())


# In bfloat16 a value near zero may fall on either side of a ReLU, in PyTorch as in the kernels, and
# moves a gradient by more than all other rounding. Gradients are compared on average: over shapes,
# and each by itself over draws.
@pytest.mark.parametrize("make", MAKERS)
def test_training_in_bfloat16_is_as_accurate_as_pytorchs_on_average(make, own_products):
    ratios = []
    for name, shape in SHAPES.items():
        if _fits(make, shape):
            bounded = name in ("easy", "odd")
            ratios += _ratios(_op(make, shape[1]), _rows(shape), bounded).values()
    assert _geometric_mean(ratios) <= 1.25


# Of few values a flip is a larger part: single draws differ by ten, and more of them tell.
DRAWS = {"easy": 9, "odd": 9, "many_channels": 9, "one_image": 40, "under_the_kernel": 40}


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=() if s == "easy" else pytest.mark.slow) for s in DRAWS]
)
@pytest.mark.parametrize("make", MAKERS)
def test_each_gradient_in_bfloat16_is_as_accurate_as_pytorchs_over_draws(make, shape, own_products):
    ratios, draws = {}, DRAWS[shape]
    shape = {**SHAPES, **LARGER}[shape]
    for seed in range(draws):
        module, x = _op(make, shape[1], seed=seed), _rows(shape, seed=seed + 100)
        for name, ratio in _ratios(module, x).items():
            ratios.setdefault(name, []).append(ratio)
    for name, found in ratios.items():
        assert _geometric_mean(found) <= 2, name


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_inference_in_bfloat16_is_as_accurate_as_pytorchs(make, shape):
    module = _op(make, shape[1]).eval()
    x = _rows(shape)
    with _autocast(torch.bfloat16):
        found = _infer(module, x)
        _assert_same_rows(module, x, found, torch.bfloat16)


def test_rows_in_bfloat16_stay_so_and_others_are_taken_too():
    module = _op(OPS["inverted_residual-e3-k3-s1"], 16)
    x = _rows((4, 16, 6, 6))
    with _autocast(torch.bfloat16):
        y, moments = cpu.block_of(module, x).train(x)
        again, _ = cpu.block_of(module, x.bfloat16()).train(x.bfloat16())
    assert y.dtype is torch.bfloat16
    assert moments[0][0].dtype is torch.float32
    assert torch.equal(y, again)


def _moments(module):
    """The statistics that a module in evaluation mode normalises by."""
    return [(norm.running_mean, norm.running_var) for norm in _norms(module)]


@torch.no_grad()
def _infer(module, x):
    return cpu.block_of(module, x).infer(x, _moments(module))


@torch.no_grad()
def _assert_same_rows(module, x, found, dtype=torch.float32):
    with torch.autocast("cpu", enabled=False):
        exact = copy.deepcopy(module).double()(x.double())
    _assert_as_accurate({"y": found}, [{"y": module(x)}], {"y": exact}, dtype)


@pytest.mark.parametrize("shape", [(4, 16, 4, 4), (3, 14, 3, 5), (2, 2, 1, 1), (1, 6, 2, 1)])
@pytest.mark.parametrize("units", [1, 2])
def test_a_classifier_is_as_accurate_as_pytorchs(shape, units):
    channels = shape[1]
    chain = (Unit("pointwise", channels, 20), Unit("depthwise", 20, 20, 3))[:units]
    module = _randomised(HeadModule(Head(channels, chain, 7)))
    found = _check(module, _rows(shape)) if shape[0] > 1 else {}
    assert ("d classifier.bias" in found) == (shape[0] > 1)
    module.eval()
    _assert_same_rows(module, _rows(shape), _infer(module, _rows(shape)))


def test_a_replaced_classifier_is_the_one_that_runs():
    module = _randomised(HeadModule(Head(6, (Unit("pointwise", 6, 20),), 7)))
    x = _rows((3, 6, 4, 4))
    assert cpu.block_of(module, x).train(x)[0].shape == (3, 7)
    module.classifier = nn.Linear(20, 5)
    assert cpu.block_of(module, x).train(x)[0].shape == (3, 5)


@pytest.mark.parametrize("make", SOME)
def test_batch_norms_without_scale_and_shift(make):
    found = _check(_op(make, 6, affine=False), _rows((3, 6, 5, 4)))
    assert not any("norm" in name for name in found)
    module = _op(make, 6, affine=False).eval()
    _assert_same_rows(module, _rows((3, 6, 5, 4)), _infer(module, _rows((3, 6, 5, 4))))


@pytest.mark.parametrize("make", SOME)
def test_each_batch_norms_own_eps_counts(make):
    module = _op(make, 6)
    for index, norm in enumerate(_norms(module)):
        norm.eps = 0.3 / (index + 1)
    found = _check(module, _rows((3, 6, 5, 4)))
    usual = _compiled(_op(make, 6), _rows((3, 6, 5, 4)), torch.ones_like(found["y"]))
    assert not torch.allclose(found["y"], usual["y"], rtol=1e-3)


@pytest.mark.parametrize("make", SOME)
def test_moments_at_a_hundred_standard_deviations_from_zero_keep_their_digits(make):
    """Sums of squares would cancel: variance 1 beside a squared mean of 10,000."""
    if not any(unit.kind == "pointwise" for unit in make(6).units[:1] + make(6).frame.shortcut[:1]):
        pytest.skip("a depthwise unit's border has a variance of its own")
    module = _op(make, 6)
    x = _rows((7, 6, 9, 8)) + 100
    with torch.no_grad():
        for unit in module.modules():
            if isinstance(unit, nn.Conv2d):
                unit.weight.abs_()  # nothing cancels a mean
        for norm in _norms(module):
            norm.bias.fill_(100)
    found = _check(module, x)
    exact = _reference(module, x, torch.ones_like(found["y"]), torch.float64)
    indices = range(len(_norms(module)))
    assert max((exact[f"mean {i}"] ** 2 / exact[f"var {i}"]).max() for i in indices) > 9000
    for i in indices:
        var = exact[f"var {i}"]
        assert _error(found[f"var {i}"], var) < 1e-4 * float(var.norm()), i


# Whatever the memory


def _layouts(shape, dtype=torch.float32):
    """The same values in other memory."""
    n, c, h, w = shape
    rows = _rows(shape).to(dtype)
    offset = torch.empty(rows.numel() + 1, dtype=dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    wide = torch.full((n, c + 3, h, w), torch.nan, dtype=dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    apart = torch.full((n, c, 2 * h, 3 * w), torch.nan, dtype=dtype)
    views = {
        "channels_first": rows.contiguous(),
        "unaligned": offset,
        "some_channels": wide[:, 2:-1],
        "every_third": apart[:, :, ::2, ::3],
        "transposed": torch.empty(n, c, w, h, dtype=dtype).transpose(2, 3),
    }
    for view in views.values():
        view.copy_(rows)
    assert views["unaligned"].data_ptr() % 8 == rows.element_size()
    return rows, views


@pytest.mark.parametrize("layout", _layouts((1, 1, 1, 1))[1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", SOME)
def test_any_memory_of_input_and_gradient_gives_the_same_bits(make, dtype, layout):
    module = _op(make, 6)
    rows, views = _layouts((3, 6, 5, 4), dtype)
    dy, gradients = _layouts(module(rows.float()).shape, dtype)
    expected = _compiled(module, rows, dy, dtype=dtype)
    for x, g in ((views[layout], dy), (rows, gradients[layout])):
        found = _compiled(module, x, g, dtype=dtype)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    module.eval()
    with _autocast(dtype):
        assert torch.equal(_infer(module, views[layout]), _infer(module, rows))


def test_a_gradient_that_is_one_number_for_all():
    module = _op(_chain, 6)
    x = _rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    [expanded] = torch.autograd.grad(y.sum(), [x], retain_graph=True)
    [whole] = torch.autograd.grad(y, [x], torch.ones_like(y))
    assert torch.equal(expanded, whole)


@pytest.mark.parametrize("make", SOME)
def test_what_an_earlier_call_left_in_scratch_memory_never_shows(make):
    module, x = _op(make, 6).eval(), _rows((3, 6, 5, 4))  # PyTorch's passes leave it alone
    larger = torch.full((5, 6, 9, 8), torch.nan)
    dy = torch.randn(module(x).shape, generator=_generator(2))
    expected = _compiled(module, x, dy), _infer(module, x)
    for left in (larger, torch.full_like(x, torch.nan)):
        _compiled(module, left, torch.full(module(left).shape, torch.nan))
        _infer(module, left)
    found = _compiled(module, x, dy), _infer(module, x)
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])


def test_outputs_are_memory_that_was_full_of_nan(poison):
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4))
    _check(module, x)
    given = poison.given
    assert given > 0
    _infer(module, x)
    assert poison.given > given


# Values that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("make", SOME)
def test_what_is_not_finite_spreads_as_in_pytorch(make, value):
    module, x = _op(make, 6), _rows((3, 6, 5, 4))
    x[1, 3, 2, 2] = value
    with torch.no_grad():
        y, _ = cpu.block_of(module, x).train(x)
        plain = copy.deepcopy(module)(x)
        assert torch.equal(y.isnan(), plain.isnan())
        assert y.isnan().any()
        module.eval()
        y, plain = _infer(module, x), module(x)
        assert torch.equal(y.isfinite(), plain.isfinite())
        assert not y.isfinite().all()
        ordinary = plain.isfinite()
        assert torch.allclose(y[ordinary], plain[ordinary], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_reaches_every_parameter():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4))
    y = module(x)
    dy = torch.ones_like(y)
    dy[0, :, 0, 0] = torch.nan
    found = _compiled(module, x, dy)
    plain = _reference(module, x, dy, torch.float32)
    for name in plain:
        if name[:2] == "d ":
            assert found[name].isnan().any() == plain[name].isnan().any(), name


# Threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", SOME)
def test_the_number_of_threads_changes_no_bit(make, dtype, threads):
    module, x = _op(make, 6), _rows((19, 6, 5, 4))
    dy = torch.randn(module(x).shape, generator=_generator(2))
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        with _autocast(dtype):
            inferred = _infer(module, x)
        results.append({**_compiled(module, x, dy, dtype=dtype), "infer": inferred})
    for found in results[1:]:
        assert all(torch.equal(found[name], results[0][name]) for name in found)


COUNTS = """
import os, torch
from fastshift import cpu
from fastshift.layers import OpModule
from fastshift.ops import projection

def running():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
module, x = OpModule(projection(6, 8, 1)), torch.randn(19, 6, 5, 4)
block = cpu.block_of(module, x)
counts = []
for threads in (1, 2, 1, 3):
    torch.set_num_threads(threads)
    before = running()  # torch may have started some of its own
    block.train(x)
    counts.append(running() - before)
print(*counts)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_as_many_threads_work_as_torch_is_told_to_use(isa):
    if isa != ABLE[0]:
        pytest.skip("counted once")
    found = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["0", "1", "0", "1"]


def test_calls_from_several_threads_at_once_do_not_mix(threads):
    threads(2)
    modules = [_op(_chain, 6, seed=seed) for seed in range(4)]
    x = _rows((9, 6, 5, 4))
    dy = torch.randn(modules[0](x).shape, generator=_generator(2))
    expected = [_compiled(module, x, dy) for module in modules]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(_compiled, modules[i], x, dy)) for i in [*range(4)] * 8]
        for index, job in jobs:
            found = job.result(timeout=60)
            assert all(torch.equal(found[name], expected[index][name]) for name in found)


FORK = """
import os, sys, torch
from fastshift import cpu
from fastshift.layers import OpModule
from fastshift.ops import inverted_residual

torch.set_num_threads(2)
op = OpModule(inverted_residual(6, 6, 1, 3, 3))
x = torch.randn(5, 6, 4, 4)

def trained():
    torch.set_num_threads(2)
    y, _ = cpu.block_of(op, x).train(x)
    return torch.cat([y.flatten(), *(g.flatten() for g in
                      torch.autograd.grad(y.square().sum(), list(op.parameters())))])

expected = trained()
child = os.fork()
if child == 0:
    with torch.no_grad():  # autograd's own threads do not live through a fork
        y, _ = cpu.block_of(op, x).train(x)
    os._exit(0 if torch.equal(y.flatten(), expected[: y.numel()]) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(trained(), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(isa):
    if isa != ABLE[0]:
        pytest.skip("threads do not depend on the instruction set")
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


# What autograd asks for


@pytest.mark.parametrize("make", SOME)
def test_an_input_that_needs_no_gradient_gets_none(make):
    module, x = _op(make, 6), _rows((3, 6, 5, 4))
    without = _check(module, x, need_dx=False)
    with_it = _check(module, x)
    assert "d x" not in without
    assert all(torch.equal(without[name], with_it[name]) for name in without)


@pytest.mark.parametrize("make", SOME)
def test_frozen_parameters_get_no_gradient_and_others_theirs(make):
    module, x = _op(make, 6), _rows((3, 6, 5, 4))
    whole = _check(module, x)
    frozen = [name for name, _ in module.named_parameters()][::2]
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    found = _check(module, x)
    assert found.keys() == whole.keys() - {f"d {name}" for name in frozen}
    assert all(torch.equal(found[name], whole[name]) for name in found)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert not cpu.block_of(module, x).train(x)[0].requires_grad


def test_moments_carry_no_gradient():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4)).requires_grad_()
    y, moments = cpu.block_of(module, x).train(x)
    assert y.requires_grad
    assert not any(value.requires_grad for pair in moments for value in pair)


def test_a_second_derivative_is_refused_and_not_made_up():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    [first] = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first.square().sum() + y.sum()).backward()


def test_a_weight_that_moved_between_forward_and_backward_is_noticed():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_can_be_walked_twice():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    first = torch.autograd.grad(y.sum(), [x, *module.parameters()], retain_graph=True)
    again = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_weights_are_read_anew_at_each_call():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4))
    block = cpu.block_of(module, x)
    before, _ = block.train(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-1.5)
    after, _ = block.train(x)
    assert not torch.equal(before, after)
    assert torch.allclose(after, copy.deepcopy(module)(x), atol=1e-4)


# What the kernels do not have


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(Op("nine", 4, 4, 1, (Unit("depthwise", 4, 4, 9),)), id="kernel-9"),
        pytest.param(Op("three", 4, 4, 3, (Unit("depthwise", 4, 4, 3, 3),)), id="stride-3"),
        pytest.param(Op("bare", 4, 4, 1, (Unit("pointwise", 4, 4, norm=False),)), id="no-norm"),
        pytest.param(identity(4), id="identity"),
    ],
)
def test_an_op_that_the_kernels_do_not_have_is_pytorchs(op):
    module = _randomised(OpModule(op))
    x = _rows((3, op.in_channels, 5, 4))
    assert cpu.block_of(module, x) is None
    norms = _batch_norms(module)
    with torch.no_grad():
        assert torch.equal(norms.collect(module, x)[0], copy.deepcopy(module)(x))


def test_rows_of_other_channels_are_refused():
    module = _op(_chain, 6)
    block = cpu.block_of(module, _rows((3, 6, 5, 4)))
    for shape in ((3, 5, 5, 4), (3, 8, 5, 4), (3, 6, 5)):
        with pytest.raises(ValueError, match=r"expected \[N, 6, H, W\]"):
            block.train(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"expected \[N, 6, H, W\]"):
            block.infer(torch.zeros(shape), _moments(module))


def test_no_images_give_no_rows():
    module = _op(_chain, 6).eval()
    x = torch.zeros(0, 6, 5, 4)
    assert _infer(module, x).shape == module(x).shape == (0, 12, 3, 2)


# The instruction set


def test_every_instruction_set_runs_or_says_why_not():
    known = cpu.instruction_sets()
    assert list(known)[:5] == ["amx", "avx512_bf16", "avx512", "avx2", "generic"]
    assert known["generic"] is None
    for name in list(known)[:4]:
        assert known[name] is None or known[name].startswith(WHY_NOT)


def test_the_best_instruction_set_runs_unless_another_is_asked_for(isa, monkeypatch):
    assert cpu.instruction_set() == isa
    for name in (None, ""):
        if name is None:
            monkeypatch.delenv("FASTSHIFT_CPU_ISA")
        else:
            monkeypatch.setenv("FASTSHIFT_CPU_ISA", name)
        assert cpu.instruction_set() == ABLE[0]


@pytest.mark.parametrize(("name", "why"), [("amx", "cannot run: broken"), ("sse9", "expected")])
def test_an_instruction_set_that_cannot_run_is_refused_with_the_reason(name, why, monkeypatch):
    known = {**cpu.instruction_sets(), "amx": "broken"}
    monkeypatch.setattr(cpu, "instruction_sets", lambda: known)
    cpu._instruction_set.cache_clear()
    monkeypatch.setenv("FASTSHIFT_CPU_ISA", name)
    with pytest.raises(ConfigError, match=f"FASTSHIFT_CPU_ISA: '{name}'.*{why}") as refused:
        cpu.instruction_set()
    assert "\n" not in str(refused.value)
    assert ", ".join(n for n in ABLE if n != "amx") in str(refused.value)
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4))
    with pytest.raises(ConfigError):
        cpu.block_of(module, x).train(x)


def test_instruction_sets_agree_up_to_rounding(monkeypatch, isa):
    if isa != ABLE[0]:
        pytest.skip("compared once")
    module, x = _op(_chain, 40), _rows((5, 40, 6, 7))
    found = []
    for name in ABLE:
        monkeypatch.setenv("FASTSHIFT_CPU_ISA", name)
        found.append(_compiled(module, x, torch.ones_like(found[0]["y"] if found else module(x))))
    for other in found[1:]:
        for name in other:
            assert torch.allclose(other[name], found[0][name], rtol=1e-4, atol=1e-3), name


# Through the statistics' policies


@pytest.mark.parametrize("make", SOME)
def test_collecting_and_imposing_agree_with_pytorchs_ops(make, monkeypatch):
    module, x = _op(make, 6), _rows((3, 6, 5, 4))
    norms = _batch_norms(module)
    results = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("FASTSHIFT_BACKEND", backend)
        with torch.no_grad():
            y, moments = norms.collect(module, x)
            results.append([y, norms.impose(module, x, moments), *sum(moments, ())])
    for found, plain in zip(*results, strict=True):
        assert functional.mse_loss(found, plain).sqrt() < 1e-5 * plain.square().mean().sqrt()


# Modules that changed after they were first seen


def test_a_kernel_in_channels_last_memory_is_the_same_kernel():
    module = _randomised(OpModule(conv(5, 6, 3, 1)))
    x = _rows((3, 5, 4, 4))
    plain = _infer(module.eval(), x), cpu.block_of(module, x).train(x)[0]
    module.to(memory_format=torch.channels_last)
    assert not module._modules["0"].weight.is_contiguous()
    found = _infer(module, x), cpu.block_of(module, x).train(x)[0]
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one, other)


def test_a_changed_epsilon_is_read_and_a_changed_norm_or_dtype_is_pytorchs():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4))
    before, _ = cpu.block_of(module, x).train(x)
    module._modules["0"].norm.eps = 1.0
    after, _ = cpu.block_of(module, x).train(x)
    assert not torch.equal(before, after)
    module._modules["0"].norm = torch.nn.GroupNorm(1, module._modules["0"].out_channels)
    assert cpu.block_of(module, x) is None
    module = _op(_chain, 6)
    assert cpu.block_of(module, x) is not None
    assert cpu.block_of(module.double(), x) is None


def test_memory_is_kept_up_to_the_most_in_use_and_handed_back_when_asked():
    cpu.release_memory()
    module, x = _op(_chain, 40), _rows((8, 40, 20, 20))
    for _ in range(3):
        y, _ = cpu.block_of(module, x).train(x)
        use = _cpu.memory_use()
        assert use["in_use"] + use["kept"] <= use["peak"]
    before = use["in_use"]
    del y
    assert _cpu.memory_use()["in_use"] < before
    cpu.release_memory()
    assert _cpu.memory_use()["kept"] == 0


class _Calls:
    """A block's core called by itself, on random rows."""

    def __init__(self, op, dtype=torch.float32):
        self.block = cpu.CpuBlock(OpModule(op))
        self.core, self.images = self.block.core, (3, 7, 5)
        self.bf16 = dtype is torch.bfloat16
        shape = 3, *self.block.sizes(7, 5)[self.block.main - 1], op.out_channels
        self.x = torch.randn(3, 7, 5, op.in_channels, generator=_generator()).to(dtype)
        self.dy = torch.randn(shape, generator=_generator()).to(dtype)
        self.parameters = [p.detach() for p in self.block.parameters()]

    def given(self, isa=None):
        isa = isa or cpu.instruction_set()
        parameters = [p.data_ptr() for p in self.parameters]
        return isa, self.images, self.x.data_ptr(), parameters, self.block.eps

    def train(self, gradients, isa=None, packed=None, **options):
        saved = torch.zeros(self.core.saved_floats(self.images, self.bf16))
        statistics = torch.zeros(self.core.statistics_floats())
        y, dx = torch.zeros_like(self.dy), torch.zeros_like(self.x)
        kept = saved.data_ptr(), statistics.data_ptr()
        self.core.forward(*self.given(isa), *kept, y.data_ptr(), 1, self.bf16, packed)
        ends = self.dy.data_ptr(), dx.data_ptr(), [g.data_ptr() for g in gradients]
        self.core.backward(*self.given(isa), *kept, *ends, 1, self.bf16, packed, **options)
        return [y, statistics, dx, *gradients]

    def gradients(self):
        return [torch.full_like(p, torch.nan) for p in self.parameters]


def test_packed_weights_are_packed_anew_for_other_kernels_other_rows_and_other_weights():
    op = inverted_residual(16, 16, 1, 3, 3)
    calls = {dtype: _Calls(op, dtype) for dtype in (torch.float32, torch.bfloat16)}
    first = calls[torch.float32]
    for other in calls.values():
        other.block, other.core, other.parameters = first.block, first.core, first.parameters
    packed = _cpu.PackedWeights(first.core)
    able = [name for name, reason in cpu.instruction_sets().items() if reason is None]
    moved = [p + 1 for p in first.parameters]
    for parameters in (first.parameters, moved):
        for isa in able:
            for call in calls.values():
                call.parameters = parameters
                found = call.train(call.gradients(), isa, packed)
                assert all(map(torch.equal, found, call.train(call.gradients(), isa)))


def test_packed_weights_of_another_block_are_refused():
    call, other = (_Calls(projection(4, 4, 1)) for _ in range(2))
    with pytest.raises(ValueError, match="packed: of another block"):
        call.train(call.gradients(), packed=_cpu.PackedWeights(other.core))


@pytest.mark.parametrize("isa", [name for name, why in cpu.instruction_sets().items() if not why])
@pytest.mark.parametrize("name", ["inverted_residual-e3-k3-s1", "conv_k3-s1", "chain"])
def test_gradients_that_are_there_are_added_to_when_asked(name, isa):
    """To the bit the sum of what is there and the gradient, rounded before."""
    call = _Calls(OPS[name](16))
    before = [torch.randn(p.shape, generator=_generator()) for p in call.parameters]
    once = call.train(call.gradients(), isa)
    twice = call.train([g.clone() for g in before], isa, add=True)
    others = len(once) - len(before)
    assert all(map(torch.equal, once[:others], twice[:others]))
    for g, there, total in zip(once[others:], before, twice[others:], strict=True):
        assert torch.equal(total, there + g)


def test_rows_without_pixels_are_refused():
    for shape in ((2, 6, 0, 4), (2, 6, 4, 0)):
        module, x = _op(_chain, 6), torch.zeros(shape)
        with pytest.raises(ValueError, match="no pixels"):
            cpu.block_of(module, x).train(x)
        with pytest.raises(ValueError, match="no pixels"):
            _infer(module, x)


def test_torchs_defaults_are_not_the_kernels_business():
    module, x = _op(_chain, 6), _rows((3, 6, 5, 4))
    y, moments = cpu.block_of(module, x).train(x)
    torch.set_default_dtype(torch.float64)
    try:
        again, found = cpu.block_of(module, x).train(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, again)
    assert all(
        torch.equal(a, b)
        for m, f in zip(moments, found, strict=True)
        for a, b in zip(m, f, strict=True)
    )
