"""The compiled CPU kernels in a caller's hands: autograd, instruction sets, and what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from block_cases import (
    ABLE,
    SOME,
    autocast,
    by_kernels,
    chain,
    check_training,
    infer,
    make_op,
    make_rows,
    moments_of,
    randomised,
)
from torch import nn
from torch.nn import functional

from fastshift import cpu
from fastshift.batch_norm import BatchNorms
from fastshift.errors import ConfigError
from fastshift.layers import OpModule
from fastshift.ops import Op, Unit, conv, identity

pytestmark = pytest.mark.usefixtures("isa", "poison")

WHY_NOT = ("this machine ", "the system ", "the compiler ", "not asked for ")


def _batch_norms(module):
    """The norms of one module, as of a supernet that has nothing else."""
    parts = {"stem": module, "blocks": [], "head": nn.Identity(), "memory_format": None}
    return BatchNorms(SimpleNamespace(**parts))


# What autograd asks for


@pytest.mark.parametrize("make", SOME)
def test_an_input_that_needs_no_gradient_gets_none(make):
    module, x = make_op(make, 6), make_rows((3, 6, 5, 4))
    without = check_training(module, x, need_dx=False)
    with_it = check_training(module, x)
    assert "d x" not in without
    assert all(torch.equal(without[name], with_it[name]) for name in without)


@pytest.mark.parametrize("make", SOME)
def test_frozen_parameters_get_no_gradient_and_others_theirs(make):
    module, x = make_op(make, 6), make_rows((3, 6, 5, 4))
    whole = check_training(module, x)
    frozen = [name for name, _ in module.named_parameters()][::2]
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    found = check_training(module, x)
    assert found.keys() == whole.keys() - {f"d {name}" for name in frozen}
    assert all(torch.equal(found[name], whole[name]) for name in found)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert not cpu.block_of(module, x).train(x)[0].requires_grad


def test_moments_carry_no_gradient():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4)).requires_grad_()
    y, moments = cpu.block_of(module, x).train(x)
    assert y.requires_grad
    assert not any(value.requires_grad for pair in moments for value in pair)


def test_a_second_derivative_is_refused_and_not_made_up():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    [first] = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first.square().sum() + y.sum()).backward()


def test_a_weight_that_moved_between_forward_and_backward_is_noticed():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_can_be_walked_twice():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4)).requires_grad_()
    y, _ = cpu.block_of(module, x).train(x)
    first = torch.autograd.grad(y.sum(), [x, *module.parameters()], retain_graph=True)
    again = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_weights_are_read_anew_at_each_call():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4))
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
    module = randomised(OpModule(op))
    x = make_rows((3, op.in_channels, 5, 4))
    assert cpu.block_of(module, x) is None
    norms = _batch_norms(module)
    with torch.no_grad():
        assert torch.equal(norms.collect(module, x)[0], copy.deepcopy(module)(x))


def test_rows_of_other_channels_are_refused():
    module = make_op(chain, 6)
    block = cpu.block_of(module, make_rows((3, 6, 5, 4)))
    for shape in ((3, 5, 5, 4), (3, 8, 5, 4), (3, 6, 5)):
        with pytest.raises(ValueError, match=r"expected \[N, 6, H, W\]"):
            block.train(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"expected \[N, 6, H, W\]"):
            block.infer(torch.zeros(shape), moments_of(module))


def test_rows_without_pixels_are_refused():
    for shape in ((2, 6, 0, 4), (2, 6, 4, 0)):
        module, x = make_op(chain, 6), torch.zeros(shape)
        with pytest.raises(ValueError, match="no pixels"):
            cpu.block_of(module, x).train(x)
        with pytest.raises(ValueError, match="no pixels"):
            infer(module, x)


def test_no_images_give_no_rows():
    module = make_op(chain, 6).eval()
    x = torch.zeros(0, 6, 5, 4)
    assert infer(module, x).shape == module(x).shape == (0, 12, 3, 2)


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
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4))
    with pytest.raises(ConfigError):
        cpu.block_of(module, x).train(x)


def test_instruction_sets_agree_up_to_rounding(monkeypatch, isa):
    if isa != ABLE[0]:
        pytest.skip("compared once")
    module, x = make_op(chain, 40), make_rows((5, 40, 6, 7))
    found = []
    for name in ABLE:
        monkeypatch.setenv("FASTSHIFT_CPU_ISA", name)
        found.append(by_kernels(module, x, torch.ones_like(found[0]["y"] if found else module(x))))
    for other in found[1:]:
        for name in other:
            assert torch.allclose(other[name], found[0][name], rtol=1e-4, atol=1e-3), name


@pytest.mark.parametrize("size", [(64, 64), (33, 17)], ids=str)
def test_pytorchs_own_products_in_bfloat16_are_left_alone(size):
    """Both have the machine's tiles set up in their own way, each behind the other's back."""
    rows, columns = size
    linear, x = nn.Linear(columns, 48), torch.randn(rows, columns)
    square = torch.randn(2, 3, rows, 32).bfloat16()
    module, images = make_op(chain, 40).eval(), make_rows((5, 40, 6, 7))
    calls = [
        lambda: linear(x),
        lambda: functional.scaled_dot_product_attention(square, square, square),
    ]
    with torch.no_grad(), autocast(torch.bfloat16):
        alone = [call() for call in calls]
        own = infer(module, images)
        for _ in range(2):
            for call, want in zip(calls, alone, strict=True):
                assert torch.equal(call(), want)
                assert torch.equal(infer(module, images), own)


# Through the statistics' policies


@pytest.mark.parametrize("make", SOME)
def test_collecting_and_imposing_agree_with_pytorchs_ops(make, monkeypatch):
    module, x = make_op(make, 6), make_rows((3, 6, 5, 4))
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
    module = randomised(OpModule(conv(5, 6, 3, 1)))
    x = make_rows((3, 5, 4, 4))
    plain = infer(module.eval(), x), cpu.block_of(module, x).train(x)[0]
    module.to(memory_format=torch.channels_last)
    assert not module._modules["0"].weight.is_contiguous()
    found = infer(module, x), cpu.block_of(module, x).train(x)[0]
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one, other)


def test_a_changed_epsilon_is_read_and_a_changed_norm_or_dtype_is_pytorchs():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4))
    before, _ = cpu.block_of(module, x).train(x)
    module._modules["0"].norm.eps = 1.0
    after, _ = cpu.block_of(module, x).train(x)
    assert not torch.equal(before, after)
    module._modules["0"].norm = torch.nn.GroupNorm(1, module._modules["0"].out_channels)
    assert cpu.block_of(module, x) is None
    module = make_op(chain, 6)
    assert cpu.block_of(module, x) is not None
    assert cpu.block_of(module.double(), x) is None


def test_torchs_defaults_are_not_the_kernels_business():
    module, x = make_op(chain, 6), make_rows((3, 6, 5, 4))
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
