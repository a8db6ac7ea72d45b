"""The block description: costs follow from it, and what does not fit together is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastshift import ops
from fastshift.errors import SpaceError
from fastshift.ops import Frame, Head, Op, Unit

UNITS = [
    Unit("dense", 3, 16, 3, 2),
    Unit("dense", 4, 6, 5),
    Unit("pointwise", 8, 12),
    Unit("pointwise", 7, 5, stride=2, activation=None),
    Unit("depthwise", 6, 6, 3),
    Unit("depthwise", 10, 10, 7, 2, activation=None),
]


@pytest.mark.parametrize("size", [1, 7, 8])
@pytest.mark.parametrize(
    "unit", UNITS, ids=lambda unit: f"{unit.kind}-k{unit.kernel}-s{unit.stride}"
)
def test_a_unit_costs_what_torch_says_its_convolution_and_batch_norm_cost(unit, size):
    module = nn.Conv2d(
        unit.in_channels,
        unit.out_channels,
        unit.kernel,
        unit.stride,
        unit.kernel // 2,
        groups=unit.groups,
        bias=False,
        device="meta",
    )
    y = module(torch.empty(1, unit.in_channels, size, size, device="meta"))
    norm = nn.BatchNorm2d(unit.out_channels)
    assert tuple(y.shape) == (1, unit.out_channels, *(unit.output_size(size),) * 2)
    assert unit.params(affine=False) == module.weight.numel()
    assert unit.params() == module.weight.numel() + sum(p.numel() for p in norm.parameters())
    taps = module.weight[0].numel()  # multiply-adds of one output value
    assert unit.flops(size) == y.numel() * taps


def test_a_unit_without_norm_has_only_its_weights():
    assert Unit("pointwise", 4, 8, norm=False).params(affine=True) == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sparse", 4, 4), "unit kind must be one of pointwise, depthwise, dense, got 'sparse'"),
        (("dense", 0, 4, 3), "in_channels must be a positive integer, got 0"),
        (("dense", 4, -1, 3), "out_channels must be a positive integer, got -1"),
        (("dense", 4, 4.0, 3), "out_channels must be a positive integer, got 4.0"),
        (("dense", True, 4, 3), "in_channels must be a positive integer, got True"),
        (("dense", 4, 4, 4), "kernel must be odd, got 4"),
        (("dense", 4, 4, 3, 0), "stride must be a positive integer, got 0"),
        (("pointwise", 4, 4, 3), "kernel must be 1, got 3"),
        (("depthwise", 4, 8, 3), "out_channels must equal in_channels 4, got 8"),
        (("dense", 4, 4, 3, 1, "gelu"), "activation must be 'relu' or None, got 'gelu'"),
    ],
)
def test_a_unit_refuses_values_that_make_no_convolution(arguments, message):
    with pytest.raises(SpaceError, match=message):
        Unit(*arguments)


def test_the_identity_costs_nothing_and_is_the_only_identity():
    op = ops.identity(8)
    assert op.is_identity
    assert (op.flops(8), op.params(), op.output_size(8)) == (0, 0, 8)
    for other in (ops.projection(8, 8, 1), ops.conv(8, 8, 1, 1), ops.shuffle_unit(8, 8, 1, 3)):
        assert not other.is_identity


def test_a_projection_is_linear():
    op = ops.projection(8, 16, 2)
    assert [unit.activation for unit in op.units] == [None]
    assert (op.flops(9), op.output_size(9)) == (8 * 16 * 25, 5)


def test_conv_is_one_dense_unit_or_a_pointwise_one():
    assert ops.conv(4, 8, 3, 2).units == (Unit("dense", 4, 8, 3, 2),)
    assert ops.conv(4, 8, 1, 1).units == (Unit("pointwise", 4, 8),)


@pytest.mark.parametrize(
    ("out_channels", "stride", "frame"), [(8, 1, "residual"), (8, 2, "plain"), (16, 1, "plain")]
)
def test_an_inverted_residual_adds_its_input_only_where_the_shape_allows(
    out_channels, stride, frame
):
    op = ops.inverted_residual(8, out_channels, stride, expansion=6, kernel=5)
    assert op.frame == Frame(frame)
    assert [unit.kind for unit in op.units] == ["pointwise", "depthwise", "pointwise"]
    assert [unit.activation for unit in op.units] == ["relu", "relu", None]
    assert op.units[1] == Unit("depthwise", 48, 48, 5, stride)


def test_a_shuffle_unit_of_stride_1_works_on_half_of_the_channels():
    op = ops.shuffle_unit(64, 64, 1, kernel=5)
    assert op.frame == Frame("shuffle")
    assert op.units == (
        Unit("pointwise", 32, 32),
        Unit("depthwise", 32, 32, 5, activation=None),
        Unit("pointwise", 32, 32),
    )


def test_a_shuffle_unit_of_stride_1_may_change_channels():
    op = ops.shuffle_unit(16, 64, 1, kernel=3)
    assert op.frame == Frame("shuffle")
    assert (op.units[0].in_channels, op.units[0].out_channels) == (8, 32)
    assert op.units[-1].out_channels == 64 - 8


def test_a_shuffle_unit_of_stride_2_convolves_its_shortcut():
    op = ops.shuffle_unit(64, 160, 2, kernel=7)
    assert op.frame.shortcut == (
        Unit("depthwise", 64, 64, 7, 2, activation=None),
        Unit("pointwise", 64, 64),
    )
    assert op.units[0] == Unit("pointwise", 64, 80)
    assert op.units[-1] == Unit("pointwise", 80, 160 - 64)
    assert op.output_size(13) == 7


def test_the_xception_op_strides_first_and_its_shortcut_has_kernel_3():
    op = ops.shuffle_xception(16, 64, 2)
    assert [unit.kind for unit in op.units] == ["depthwise", "pointwise"] * 3
    assert [unit.stride for unit in op.units] == [2, 1, 1, 1, 1, 1]
    assert [unit.activation for unit in op.units] == [None, "relu"] * 3
    assert op.frame.shortcut[0].kernel == 3
    assert (op.params(affine=False), op.flops(112)) == (4192, 13146112)


def test_hidden_channels_of_a_shuffle_unit_can_be_given():
    assert ops.shuffle_unit(64, 64, 1, 3, mid=24).units[1].in_channels == 24
    assert ops.shuffle_xception(64, 64, 1, mid=24).units[2].in_channels == 24


def test_a_residual_with_a_shortcut_counts_both_paths():
    shortcut = (Unit("pointwise", 4, 8, stride=2, activation=None),)
    main = (Unit("dense", 4, 8, 3, 2), Unit("dense", 8, 8, 3, activation=None))
    op = Op("basic", 4, 8, 2, main, Frame("residual", shortcut))
    assert op.flops(8) == 16 * (4 * 8 * 9 + 8 * 8 * 9 + 4 * 8)
    assert op.params() == 4 * 8 * 9 + 8 * 8 * 9 + 4 * 8 + 3 * 2 * 8


HALF = Unit("pointwise", 4, 4)
FULL = Unit("pointwise", 8, 8)
DOWN = Unit("depthwise", 8, 8, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 16, 1, ()), "gives 8 channels, out_channels is 16"),
        ((8, 8, 2, ()), "its units have stride 1, stride is 2"),
        ((8, 8, 1, (FULL, HALF)), "unit 1 takes 4 channels, 8 reach it"),
        ((8, 8, 1, (DOWN,)), "its units have stride 2, stride is 1"),
        ((8, 8, 1, (), Frame("residual")), "a residual frame needs at least one unit"),
        ((8, 8, 1, (), Frame("shuffle")), "a shuffle frame needs at least one unit"),
        ((8, 8, 2, (DOWN,), Frame("residual")), "units have stride 2, the other path 1"),
        ((8, 16, 1, (Unit("pointwise", 8, 16),), Frame("residual")), "adds 8 channels to 16"),
        ((8, 8, 1, (FULL,), Frame("residual", (DOWN,))), "units have stride 1, the other path 2"),
        ((9, 9, 1, (HALF,), Frame("shuffle")), "splits an even number, not 9"),
        ((8, 8, 1, (FULL,), Frame("shuffle")), "unit 0 takes 8 channels, 4 reach it"),
        ((8, 12, 1, (HALF,), Frame("shuffle")), "gives 8 channels, out_channels is 12"),
        ((8, 8, 2, (DOWN,), Frame("shuffle", (DOWN,))), "gives 16 channels, out_channels is 8"),
        ((8, 16, 2, (DOWN,), Frame("shuffle", (FULL,))), "units have stride 2, the other path 1"),
        ((8, 8, 1, (FULL,), Frame("residual", (HALF,))), "shortcut: unit 0 takes 4 channels"),
        ((8, 8, 1, ("conv",)), "must hold units, got 'conv'"),
        ((8, 8, 1, (FULL,), "residual"), "frame must be a Frame, got 'residual'"),
        ((8, 0, 1, (FULL,)), "out_channels must be a positive integer, got 0"),
    ],
)
def test_an_op_refuses_units_that_do_not_fit_its_shape_or_frame(arguments, message):
    with pytest.raises(SpaceError, match=message):
        Op("bad", *arguments)


def test_a_frame_refuses_an_unknown_kind_and_a_plain_shortcut():
    with pytest.raises(SpaceError, match="plain, residual, shuffle, got 'dense'"):
        Frame("dense")
    with pytest.raises(SpaceError, match="plain frame has no shortcut"):
        Frame("plain", (FULL,))


def test_lists_of_units_become_tuples_so_that_ops_can_be_hashed():
    op = Op("conv", 8, 8, 1, [FULL], Frame("residual", [FULL]))
    assert op == Op("conv", 8, 8, 1, (FULL,), Frame("residual", (FULL,)))
    assert len({op, Op("conv", 8, 8, 1, (FULL,), Frame("residual", (FULL,)))}) == 1


def test_a_head_counts_its_units_and_its_linear_layer():
    head = Head(8, (Unit("pointwise", 8, 20),), 10, dropout=0.1, bias=True)
    assert head.num_features == 20
    assert head.flops(4) == 16 * 160 + 200
    assert head.params() == 160 + 40 + 200 + 10
    assert Head(8, (), 10, bias=False).params() == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (), 10), "in_channels must be a positive integer, got 0"),
        ((8, (), 0), "num_classes must be a positive integer, got 0"),
        ((8, (HALF,), 10), "unit 0 takes 4 channels, 8 reach it"),
        ((8, (), 10, 1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        ((8, (), 10, "a"), r"dropout must lie in \[0, 1\), got 'a'"),
        ((8, (), 10, float("nan")), r"dropout must lie in \[0, 1\), got nan"),
    ],
)
def test_a_head_refuses_values_out_of_range(arguments, message):
    with pytest.raises(SpaceError, match=message):
        Head(*arguments)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), "1", True, None])
def test_a_width_must_be_a_positive_number(width):
    with pytest.raises(SpaceError, match="width must be a positive number"):
        ops.scale_channels(64, width)


def test_scaled_channels_are_multiples_of_8_and_never_none():
    assert [ops.scale_channels(64, width) for width in (1, 0.5, 0.3, 0.01)] == [64, 32, 16, 8]
