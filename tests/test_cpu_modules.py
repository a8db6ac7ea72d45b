"""Which modules the compiled CPU kernels take, and which they leave to PyTorch's own ops."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from fastshift import cpu
from fastshift._native import cpu as _cpu
from fastshift.layers import ConvUnit, HeadModule, OpModule
from fastshift.ops import Frame, Head, Op, Unit, inverted_residual, shuffle_unit
from fastshift.testing import randomise


def _chain(c):
    units = (
        Unit("pointwise", c, c + 3, stride=2),
        Unit("pointwise", c + 3, 2 * c, activation=None),
        Unit("depthwise", 2 * c, 2 * c, 5),
    )
    return Op("chain", c, 2 * c, 2, units)


def _module():
    torch.manual_seed(0)
    return randomise(OpModule(_chain(6)))


def _rows():
    return torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(1))


def _shuffles():
    aside = (Unit("depthwise", 6, 6, 3, 2, activation=None), Unit("pointwise", 6, 6))
    units = (Unit("pointwise", 6, 6), Unit("depthwise", 6, 6, 3, 2, activation=None))
    op = Op("shuffles", 6, 12, 2, units, Frame("shuffle", aside))
    return randomise(OpModule(op))


def test_where_pytorchs_ops_run(monkeypatch):
    module, x = _module(), _rows()
    assert isinstance(cpu.block_of(module, x), cpu.CpuBlock)
    assert cpu.block_of(module, x.double()) is None
    assert cpu.block_of(module, x.bfloat16()) is None
    assert cpu.block_of(module, x.to("meta")) is None
    assert cpu.block_of(copy.deepcopy(module).to("meta"), x) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert cpu.block_of(module, x) is None
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    assert cpu.block_of(module, x) is None
    for name in ("cpu", ""):
        monkeypatch.setenv("FASTSHIFT_BACKEND", name)
        assert cpu.block_of(module, x) is not None
    assert cpu.block_of(nn.Conv2d(6, 6, 1), x) is None


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.get_submodule("1.norm").register_forward_hook(lambda *_: None),
        lambda m: m.get_submodule("1").register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: register_module_forward_hook(lambda *_: None),
    ],
    ids=["norm", "unit", "gradient", "every module"],
)
def test_a_hooked_module_is_called(register):
    module, x = _module(), _rows()
    handle = register(module)
    try:
        assert cpu.block_of(module, x) is None
    finally:
        handle.remove()
    assert cpu.block_of(module, x) is not None


class _Negates(ConvUnit):
    def forward(self, x):
        return -super().forward(x)


def _own_forward(module):
    module.forward = lambda x: x


def _own_unit_forward(module):
    _own_forward(module.get_submodule("0"))


def _own_norm_forward(module):
    _own_forward(module.get_submodule("0.norm"))


def _subclass(module):
    module.get_submodule("0").__class__ = _Negates


def _compiled(module):
    module.get_submodule("0").compile(backend="eager")


def _no_unit(module):
    module._modules["1"] = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [_own_forward, _own_unit_forward, _own_norm_forward, _subclass, _compiled, _no_unit],
    ids=lambda change: change.__name__[1:],
)
def test_what_runs_other_than_its_class_says_is_called(change):
    module, x = _module(), _rows()
    assert cpu.block_of(module, x) is not None
    change(module)
    assert cpu.block_of(module, x) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dilation", (2, 2)),
        ("padding", (0, 0)),
        ("padding_mode", "reflect"),
        ("kernel_size", (1, 3)),
        ("stride", (2, 1)),
        ("groups", 3),
        ("bias", nn.Parameter(torch.zeros(12))),
    ],
)
def test_a_changed_convolution_is_pytorchs(name, value):
    module, x = _module(), _rows()
    assert cpu.block_of(module, x) is not None
    setattr(module.get_submodule("2"), name, value)
    assert cpu.block_of(module, x) is None


def _without_inputs(unit):
    unit.weight = nn.Parameter(unit.weight.detach()[:, :2].clone())


def _without_outputs(unit):
    unit.weight = nn.Parameter(unit.weight.detach()[:3].clone())


def _smaller_kernel(unit):
    unit.weight = nn.Parameter(unit.weight.detach()[..., :3, :3].clone())


def _short_scale(unit):
    unit.norm.weight = nn.Parameter(torch.ones(2))


def _short_shift(unit):
    unit.norm.bias = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, _without_inputs),
        (1, _without_outputs),
        (2, _smaller_kernel),
        (0, _short_scale),
        (2, _short_shift),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_parameter_of_another_shape_is_pytorchs_to_refuse(index, change, before):
    module, x = _module().eval(), _rows()
    if before:
        assert cpu.block_of(module, x) is not None
    change(module.get_submodule(str(index)))
    assert cpu.block_of(module, x) is None


def _replaced(module, index, unit):
    module._modules[str(index)] = unit
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: _replaced(_module(), 1, ConvUnit(Unit("pointwise", 4096, 12))),
        lambda: _replaced(_shuffles(), 1, ConvUnit(Unit("depthwise", 6, 6, 3, 1))),
        lambda: _replaced(
            OpModule(shuffle_unit(8, 8, 1, 3)), 1, ConvUnit(Unit("depthwise", 4, 4, 3, 2))
        ),
        lambda: _replaced(
            OpModule(inverted_residual(8, 8, 1, 3, 3)), 1, ConvUnit(Unit("depthwise", 24, 24, 3, 2))
        ),
    ],
    ids=["channels", "two strides", "split shuffle", "bare residual"],
)
def test_units_that_do_not_follow_each_other_are_pytorchs_to_refuse(make):
    module = make()
    x = torch.randn(2, next(iter(module.parameters())).shape[1] * 2, 7, 7)
    assert cpu.block_of(module, x) is None


@pytest.mark.parametrize(
    ("units", "main", "frame", "channels"),
    [
        ([(False, 4, 4, 1, 2, True)], 1, "shuffle", (8, 8)),
        ([(False, 4, 4, 1, 2, True)], 1, "residual", (4, 4)),
        ([(False, 4, 4, 1, 2, True), (False, 4, 4, 1, 1, True)], 1, "residual", (4, 4)),
        ([(False, 4, 5, 1, 1, True), (True, 4, 4, 3, 1, True)], 2, "plain", (4, 4)),
        ([(True, 4, 5, 3, 1, True)], 1, "plain", (4, 5)),
        ([(False, 4, 5, 1, 1, True)], 1, "plain", (4, 6)),
        ([(False, 4, 4, 1, 1, True), (False, 4, 4, 1, 1, True)], 1, "plain", (4, 4)),
        ([(False, 0, 4, 1, 1, True)], 1, "plain", (0, 4)),
    ],
)
def test_the_core_refuses_units_that_do_not_follow_each_other(units, main, frame, channels):
    with pytest.raises(ValueError, match=r"^units: "):
        _cpu.Block(units, main, frame, *channels)


def test_a_unit_that_was_taken_out_and_put_back_keeps_its_own_statistics():
    module = randomise(OpModule(shuffle_unit(8, 8, 1, 3))).eval()
    x = torch.randn(2, 8, 7, 7)
    assert cpu.block_of(module, x) is not None
    module.add_module("0", module._modules.pop("0"))
    assert cpu.block_of(module, x) is None


@pytest.mark.parametrize("kind", ["op", "sequential", "convolution"])
def test_a_shortcut_of_another_kind_is_pytorchs(kind):
    module, x = _shuffles(), torch.randn(3, 6, 7, 7)
    assert cpu.block_of(module, x) is not None
    aside = (Unit("depthwise", 6, 6, 3, 2, activation=None), Unit("pointwise", 6, 6))
    module.shortcut = {
        "op": lambda: OpModule(Op("aside", 6, 6, 2, aside)),
        "sequential": lambda: nn.Sequential(*module.shortcut.children()),
        "convolution": lambda: nn.Conv2d(6, 6, 3, 2, 1),
    }[kind]()
    assert cpu.block_of(module, x) is None


def test_a_classifier_with_a_batch_norm_is_pytorchs():
    head = HeadModule(Head(6, (Unit("pointwise", 6, 8),), 3))
    assert cpu.block_of(head, _rows()) is not None
    head.classifier = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert cpu.block_of(head, _rows()) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_a_block_refuses_rows_of_another_type(dtype):
    module, x = _module().eval(), _rows()
    block = cpu.block_of(module, x)
    moments = [(unit.norm.running_mean, unit.norm.running_var) for unit in block.units]
    with pytest.raises(ValueError, match=f"x: {dtype} on cpu; expected float32"):
        block.infer(x.to(dtype), moments)
    with pytest.raises(ValueError, match=f"x: {dtype} on cpu; expected float32"):
        block.train(x.to(dtype))
    with pytest.raises(ValueError, match="expected float32 on cpu"):
        block.infer(x.to("meta"), moments)


def test_one_value_a_channel_has_no_variance():
    module = _module()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cpu.block_of(module, _rows()).train(_rows()[:1, :, :1, :2])


def test_a_norm_in_another_type_is_pytorchs():
    module, x = _module(), _rows()
    assert cpu.block_of(module, x) is not None
    module.get_submodule("0.norm").double()
    assert cpu.block_of(module, x) is None


def _by_kernels(module, x):
    block = cpu.block_of(module, x)
    assert block is not None
    return block.train(x)[0]


def test_an_activation_that_is_taken_away_is_not_applied():
    module, x = _module(), _rows()
    _by_kernels(module, x)
    module.get_submodule("2").activation = None
    found = _by_kernels(module, x)
    assert found.min() < 0
    torch.testing.assert_close(found, copy.deepcopy(module)(x), rtol=1e-4, atol=1e-4)


def test_a_frame_that_is_changed_is_the_one_that_runs():
    module, x = _shuffles(), _rows()
    shuffled = _by_kernels(module, x)
    module.frame = "residual"
    found = _by_kernels(module, x)
    assert found.shape != shuffled.shape
    torch.testing.assert_close(found, copy.deepcopy(module)(x), rtol=1e-4, atol=1e-4)


def test_a_replaced_unit_is_the_one_that_runs():
    module, x = _module(), _rows()
    _by_kernels(module, x)
    module._modules["0"] = copy.deepcopy(module._modules["0"])
    with torch.no_grad():
        module._modules["0"].weight.neg_()
    found = _by_kernels(module, x)
    torch.testing.assert_close(found, copy.deepcopy(module)(x), rtol=1e-4, atol=1e-4)


class _Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_computed_weight_is_what_runs():
    module, x = _module(), _rows()
    parametrize.register_parametrization(module.get_submodule("1"), "weight", _Twice())
    found = _by_kernels(module, x)
    torch.testing.assert_close(found, copy.deepcopy(module)(x), rtol=1e-4, atol=1e-4)


def test_a_head_whose_unit_changes_changes():
    head, x = randomise(HeadModule(Head(6, (Unit("pointwise", 6, 8),), 3))), _rows()
    _by_kernels(head, x)
    head.features.get_submodule("0").activation = None
    found = _by_kernels(head, x)
    torch.testing.assert_close(found, copy.deepcopy(head)(x), rtol=1e-4, atol=1e-4)


def _moments(module):
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return [(norm.running_mean, norm.running_var) for norm in norms]


@torch.no_grad()
def test_moments_of_any_memory_and_type_are_read_as_they_are():
    module, x = _module().eval(), _rows()
    block = cpu.block_of(module, x)
    fixed = _moments(module)
    wanted = block.infer(x, fixed)
    spread = [tuple(torch.stack((m, m), 1)[:, 0] for m in pair) for pair in fixed]
    assert torch.equal(block.infer(x, spread), wanted)
    assert torch.equal(block.infer(x, [(m.double(), v.double()) for m, v in fixed]), wanted)
    ones = [(m, torch.ones(1).expand_as(v)) for m, v in fixed]
    assert torch.equal(
        block.infer(x, ones), block.infer(x, [(m, torch.ones_like(v)) for m, v in fixed])
    )


@torch.no_grad()
def test_moments_that_do_not_fit_are_refused():
    module, x = _module().eval(), _rows()
    block = cpu.block_of(module, x)
    fixed = _moments(module)
    for wrong in (
        fixed[:-1],
        [(m[:-1], v) for m, v in fixed],
        [(m, v.to("meta")) for m, v in fixed],
    ):
        with pytest.raises(ValueError, match="moments: "):
            block.infer(x, wrong)


def test_a_module_that_is_let_go_goes():
    gc.collect()
    for module in (_module(), randomise(HeadModule(Head(6, (Unit("pointwise", 6, 8),), 3)))):
        _by_kernels(module, _rows())
    gone = weakref.ref(module)
    del module
    assert gone() is None
