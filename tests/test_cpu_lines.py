"""Inference of images too large for the cache: a few lines at a time, and no seam between them."""

from __future__ import annotations

import pytest
import torch
from block_cases import OPS, SHUFFLES, assert_same_rows, autocast, infer, make_op, make_rows

from fastshift import cpu
from fastshift.ops import Op, Unit

pytestmark = pytest.mark.usefixtures("poison")


def _dense_first(c):
    """A dense unit with a stride, which reads rows that are whole, and others behind it."""
    units = (
        Unit("dense", c, 2 * c, 3, 2),
        Unit("depthwise", 2 * c, 2 * c, 5),
        Unit("pointwise", 2 * c, c),
        Unit("pointwise", c, 2 * c),
        Unit("depthwise", 2 * c, 2 * c, 3, 2),
    )
    return Op("dense_first", c, 2 * c, 4, units)


# Channels with which an op's hidden rows of 111 x 67 positions are more than the cache's share, in
# either type; and chains that are gone through some lines at a time.
HEIGHT, WIDTH = 111, 67
MAKERS = {
    **{name: (make, 18, 1) for name, make in OPS.items() if "inverted_residual" in name},
    **{name: (make, 32, 1) for name, make in SHUFFLES.items()},
    "chain": (OPS["chain"], 48, 1),
    "depthwise_chain": (OPS["depthwise_chain"], 48, 1),
    "expansion_behind": (OPS["expansion_behind"], 18, 1),
    "residual_relu": (OPS["residual_relu"], 32, 1),
    "residual_shortcut-s1": (OPS["residual_shortcut-s1"], 18, 1),
    "residual_shortcut-s2": (OPS["residual_shortcut-s2"], 48, 1),
    "shuffle-k3-s2": (SHUFFLES["shuffle-k3-s2"], 112, 2),
    "shuffle-k7-s2": (SHUFFLES["shuffle-k7-s2"], 112, 2),
    "xception-s2": (SHUFFLES["xception-s2"], 112, 2),
    "dense_first": (_dense_first, 40, 1),
}
CASES = [pytest.param(*case, id=name) for name, case in MAKERS.items()]
SOME = [case for case in CASES if case.id in ("dense_first", "shuffle-k7-s1", "xception-s2")]
SOME_QUICK = [
    case if case in SOME else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
    for case in CASES
]
BOTH_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _chains_in_lines(op, module, x):
    """How many chains of an op are not gone through an image at a time."""
    chains = [units for units in (op.units, op.frame.shortcut) if units]
    heights = [(x.shape[2] - 1) // units[0].stride + 1 for units in chains]
    with autocast(x.dtype):
        core = cpu.block_of(module, x).core
    lines = core.inference_lines((len(x), *x.shape[2:]), x.dtype is torch.bfloat16)
    assert len(lines) == len(heights)
    return sum(own < height for own, height in zip(lines, heights, strict=True))


def _case(make, channels, count, dtype):
    module = make_op(make, channels).eval()
    return module, make_rows((count, channels, HEIGHT, WIDTH)).to(dtype)


@BOTH_TYPES
@pytest.mark.parametrize(("make", "channels", "chains"), CASES)
def test_a_large_image_is_as_accurate_as_pytorchs(make, channels, chains, dtype):
    module, x = _case(make, channels, 1, dtype)
    assert _chains_in_lines(make(channels), module, x) == chains
    with autocast(dtype):
        found = infer(module, x)
        assert_same_rows(module, x, found, dtype)
    assert torch.isfinite(found).all()


@BOTH_TYPES
@pytest.mark.parametrize(("make", "channels", "chains"), SOME)
def test_every_instruction_set_goes_through_large_images(make, channels, chains, dtype, isa):
    module, x = _case(make, channels, 1, dtype)
    with autocast(dtype):
        assert_same_rows(module, x, infer(module, x), dtype)


@BOTH_TYPES
@pytest.mark.parametrize(("make", "channels", "chains"), SOME_QUICK)
def test_images_and_threads_change_no_bit_of_a_large_image(make, channels, chains, dtype, threads):
    module, x = _case(make, channels, 3, dtype)
    with autocast(dtype):
        each = [infer(module, x[i : i + 1]) for i in range(3)]
        for number in (1, 2, 3):
            threads(number)
            assert torch.equal(infer(module, x), torch.cat(each))


# Lines that fit one or two at a time, and lines of one position.
@pytest.mark.parametrize("shape", [(1, 18, 700, 7), (1, 32, 9, 900), (2, 32, 6000, 1)])
@pytest.mark.parametrize("name", ["inverted_residual-e6-k5-s2", "shuffle-k7-s1", "xception-s1"])
def test_many_short_and_few_long_lines_are_as_accurate_as_pytorchs(name, shape):
    make = {**OPS, **SHUFFLES}[name]
    module = make_op(make, shape[1]).eval()
    x = make_rows(shape)
    assert _chains_in_lines(make(shape[1]), module, x) == 1
    assert_same_rows(module, x, infer(module, x))


def test_small_images_are_gone_through_whole():
    make = OPS["inverted_residual-e6-k3-s1"]
    module, x = make_op(make, 18).eval(), make_rows((2, 18, 14, 14))
    assert _chains_in_lines(make(18), module, x) == 0
