"""The compiled CPU kernels: as accurate as PyTorch's, on every instruction set of the machine."""

from __future__ import annotations

import math

import pytest
import torch
from block_cases import (
    ABLE,
    LARGER,
    MAKERS,
    OPS,
    PRODUCTS_IN_BF16,
    SHAPES,
    SOME,
    assert_same_rows,
    autocast,
    by_kernels,
    by_pytorch,
    check_training,
    error_of,
    fits,
    geometric_mean,
    infer,
    make_op,
    make_rows,
    norms_of,
    on_each_set,
    randomised,
    three_ways,
)
from torch import nn

from fastshift import cpu
from fastshift.layers import HeadModule
from fastshift.ops import Head, Unit

pytestmark = pytest.mark.usefixtures("isa", "poison")


@on_each_set
def test_a_training_pass_and_every_gradient_are_as_accurate_as_pytorchs(make, shape):
    found = check_training(make_op(make, shape[1]), make_rows(shape))
    assert all(torch.isfinite(value).all() for value in found.values())


@on_each_set
def test_inference_is_as_accurate_as_pytorchs(make, shape):
    module = make_op(make, shape[1]).eval()
    x = make_rows(shape)
    found = infer(module, x)
    assert_same_rows(module, x, found)


@pytest.fixture
def own_products(isa):
    """Levels whose bfloat16 products are their own; the others widen rows and share the code."""
    if isa not in (ABLE[0], *PRODUCTS_IN_BF16):
        pytest.skip("the code of another level")


def _ratios(module, x, bounded=False):
    """Error in bfloat16 over PyTorch's, by name.

    Below a thousandth of the value, or of the op's largest gradient, an error counts for nothing.
    Where bounded, one beyond a tenth may not be eight times PyTorch's.
    """
    found, plain, exact = three_ways(module, x, dtype=torch.bfloat16)
    assert all(torch.isfinite(value).all() for value in found.values())
    largest = max(float(exact[name].norm()) for name in exact if name[:2] == "d ")
    ratios = {}
    for name in exact:
        least = 1e-3 * (largest if name[:2] == "d " else float(exact[name].norm()))
        errors = [error_of(values[name], exact[name]) for values in plain]
        theirs = max(filter(math.isfinite, errors), default=None)
        own = error_of(found[name], exact[name])
        if theirs is None:  # all NaN, of a map smaller than the kernel: nothing to compare with
            assert own <= 100 * least, name
            continue
        ratios[name] = max(own, least) / max(theirs, least)
        assert not bounded or own <= max(8 * theirs, 100 * least), name
    return ratios


# In bfloat16 a value near zero may fall on either side of a ReLU, in PyTorch as in the kernels, and
# moves a gradient by more than all other rounding. Gradients are compared on average: over shapes,
# and each by itself over draws.
@pytest.mark.parametrize("make", MAKERS)
def test_training_in_bfloat16_is_as_accurate_as_pytorchs_on_average(make, own_products):
    ratios = []
    for name, shape in SHAPES.items():
        if fits(make, shape):
            bounded = name in ("easy", "odd")
            ratios += _ratios(make_op(make, shape[1]), make_rows(shape), bounded).values()
            for seed in range(10, 12):  # of one draw a flip may be most of the mean
                module, x = make_op(make, shape[1], seed=seed), make_rows(shape, seed=seed)
                ratios += _ratios(module, x).values()
    assert geometric_mean(ratios) <= 1.25


# Of few values a flip is a larger part: single draws differ by ten, and more of them tell.
DRAWS = {"easy": 9, "odd": 9, "many_channels": 40, "one_image": 40, "under_the_kernel": 40}


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=() if s == "easy" else pytest.mark.slow) for s in DRAWS]
)
@pytest.mark.parametrize("make", MAKERS)
def test_each_gradient_in_bfloat16_is_as_accurate_as_pytorchs_over_draws(make, shape, own_products):
    ratios, draws = {}, DRAWS[shape]
    shape = {**SHAPES, **LARGER}[shape]
    for seed in range(draws):
        module, x = make_op(make, shape[1], seed=seed), make_rows(shape, seed=seed + 100)
        for name, ratio in _ratios(module, x).items():
            ratios.setdefault(name, []).append(ratio)
    for name, found in ratios.items():
        assert geometric_mean(found) <= 2, name


@on_each_set
def test_inference_in_bfloat16_is_as_accurate_as_pytorchs(make, shape):
    module = make_op(make, shape[1]).eval()
    x = make_rows(shape)
    with autocast(torch.bfloat16):
        found = infer(module, x)
        assert_same_rows(module, x, found, torch.bfloat16)


def test_rows_in_bfloat16_stay_so_and_others_are_taken_too():
    module = make_op(OPS["inverted_residual-e3-k3-s1"], 16)
    x = make_rows((4, 16, 6, 6))
    with autocast(torch.bfloat16):
        y, moments = cpu.block_of(module, x).train(x)
        again, _ = cpu.block_of(module, x.bfloat16()).train(x.bfloat16())
    assert y.dtype is torch.bfloat16
    assert moments[0][0].dtype is torch.float32
    assert torch.equal(y, again)


@pytest.mark.parametrize("shape", [(4, 16, 4, 4), (3, 14, 3, 5), (2, 2, 1, 1), (1, 6, 2, 1)])
@pytest.mark.parametrize("units", [1, 2])
def test_a_classifier_is_as_accurate_as_pytorchs(shape, units):
    channels = shape[1]
    chain = (Unit("pointwise", channels, 20), Unit("depthwise", 20, 20, 3))[:units]
    module = randomised(HeadModule(Head(channels, chain, 7)))
    found = check_training(module, make_rows(shape)) if shape[0] > 1 else {}
    assert ("d classifier.bias" in found) == (shape[0] > 1)
    module.eval()
    assert_same_rows(module, make_rows(shape), infer(module, make_rows(shape)))


def test_a_replaced_classifier_is_the_one_that_runs():
    module = randomised(HeadModule(Head(6, (Unit("pointwise", 6, 20),), 7)))
    x = make_rows((3, 6, 4, 4))
    assert cpu.block_of(module, x).train(x)[0].shape == (3, 7)
    module.classifier = nn.Linear(20, 5)
    assert cpu.block_of(module, x).train(x)[0].shape == (3, 5)


@pytest.mark.parametrize("make", SOME)
def test_batch_norms_without_scale_and_shift(make):
    found = check_training(make_op(make, 6, affine=False), make_rows((3, 6, 5, 4)))
    assert not any("norm" in name for name in found)
    module = make_op(make, 6, affine=False).eval()
    assert_same_rows(module, make_rows((3, 6, 5, 4)), infer(module, make_rows((3, 6, 5, 4))))


@pytest.mark.parametrize("make", SOME)
def test_each_batch_norms_own_eps_counts(make):
    module = make_op(make, 6)
    for index, norm in enumerate(norms_of(module)):
        norm.eps = 0.3 / (index + 1)
    found = check_training(module, make_rows((3, 6, 5, 4)))
    usual = by_kernels(make_op(make, 6), make_rows((3, 6, 5, 4)), torch.ones_like(found["y"]))
    assert not torch.allclose(found["y"], usual["y"], rtol=1e-3)


@pytest.mark.parametrize("make", SOME)
def test_moments_at_a_hundred_standard_deviations_from_zero_keep_their_digits(make):
    """Sums of squares would cancel: variance 1 beside a squared mean of 10,000."""
    if not any(unit.kind == "pointwise" for unit in make(6).units[:1] + make(6).frame.shortcut[:1]):
        pytest.skip("a depthwise unit's border has a variance of its own")
    module = make_op(make, 6)
    x = make_rows((7, 6, 9, 8)) + 100
    with torch.no_grad():
        for unit in module.modules():
            if isinstance(unit, nn.Conv2d):
                unit.weight.abs_()  # nothing cancels a mean
        for norm in norms_of(module):
            norm.bias.fill_(100)
    found = check_training(module, x)
    exact = by_pytorch(module, x, torch.ones_like(found["y"]), torch.float64)
    indices = range(len(norms_of(module)))
    assert max((exact[f"mean {i}"] ** 2 / exact[f"var {i}"]).max() for i in indices) > 9000
    for i in indices:
        var = exact[f"var {i}"]
        assert error_of(found[f"var {i}"], var) < 1e-4 * float(var.norm()), i
