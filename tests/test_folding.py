from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastshift.batch_norm import BatchNorms, evaluation_mode
from fastshift.channel_moments import normalise_by_batch
from fastshift.errors import SpaceError
from fastshift.evaluator import Evaluator
from fastshift.folding import Fold, FoldCache, fold
from fastshift.steps import Statistics, calibrate_step, eval_step
from fastshift.supernet import ChainSupernet
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    assert_untouched,
    chain_supernet,
    changed_tensors,
    global_error,
    randomise,
    snapshot,
    synthetic_data,
)
from fastshift.tracing import ACTIVATIONS, Pair, conv_norm_pairs
from fastshift.trie import Plan

WIDTH = 6


class Calls(nn.Module):
    """A module made of parts and a function of them and the row."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


class Skip(nn.Module):
    """Its second argument is not given: a trace that made one up would take the other branch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.norm(y) if skip is None else self.norm(y + skip)


class Attention(nn.Module):
    """Self-attention over pixels, that needs plain rows."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = conv(1), norm()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        n, c, h, w = x.shape
        rows = self.norm(self.mix(x)).reshape(n, c, h * w).transpose(1, 2)
        y = self.attend(rows, rows, rows, need_weights=False)[0]
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class Gate(nn.Module):
    """Squeeze and excitation, without a norm."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(WIDTH, 3, 1), nn.Conv2d(3, WIDTH, 1)

    def forward(self, x):
        y = functional.adaptive_avg_pool2d(x, 1)
        return x * functional.hardsigmoid(self.up(functional.relu(self.down(y))))


class Keeps(nn.Module):
    """Shows its convolution's output to whoever asks later."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.seen = conv(), norm(), []

    def forward(self, x):
        y = self.conv(x)
        self.seen = [y]
        return self.norm(y)


def conv(kernel=3, width=WIDTH, out=WIDTH, **options):
    dilation = options.get("dilation", 1)
    return nn.Conv2d(width, out, kernel, padding=dilation * (kernel // 2), **options)


def norm(width=WIDTH, **options):
    return nn.BatchNorm2d(width, **options)


def _twice(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def _shared(m, x):
    return m.norm(m.conv(m.conv(x)))


def _shared_norm(m, x):
    return m.norm(m.conv(m.norm(x)))


def _between(m, x):
    y = m.conv(x)
    y.mul_(0.5)
    return m.norm(y)


def _reads(m, x):
    return m.norm(m.conv(x)) + m.conv.weight.mean() + m.norm.running_var.mean()


def _depends(m, x):
    y = m.conv(x)
    return m.norm(y) + y if x.mean() > -100 else m.norm(y)


def _functional(m, x):
    return functional.relu(m.norm(m.conv(x)))


def _parts(**options):
    return {"conv": conv(**options), "norm": norm()}


# What a module is made of, and how many of its convolutions take over a norm.
ZOO = {
    "bias": (lambda: nn.Sequential(conv(), norm()), 1),
    "no bias": (lambda: nn.Sequential(conv(bias=False), norm(), nn.ReLU(inplace=True)), 1),
    "no affine": (lambda: nn.Sequential(conv(), norm(affine=False), nn.SiLU()), 1),
    "eps": (lambda: nn.Sequential(conv(), norm(eps=0.5)), 1),
    "relu": (lambda: nn.Sequential(conv(), norm(), nn.ReLU(), conv(1)), 1),
    "relu6": (lambda: nn.Sequential(conv(), norm(), nn.ReLU6(), conv(1)), 1),
    "same padding": (
        lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding="same"), norm(), nn.Hardswish()),
        1,
    ),
    "reflected": (lambda: nn.Sequential(conv(padding_mode="reflect"), norm(), nn.SiLU()), 1),
    "no statistics": (lambda: nn.Sequential(conv(), norm(track_running_stats=False)), 0),
    "grouped": (lambda: nn.Sequential(conv(groups=3), norm(), nn.Hardswish()), 1),
    "dilated": (lambda: nn.Sequential(conv(dilation=2), norm()), 1),
    "circular": (lambda: nn.Sequential(conv(padding_mode="circular"), norm()), 1),
    "depthwise": (lambda: nn.Sequential(conv(5, groups=WIDTH), norm(), conv(1), norm()), 2),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Sequential(conv()), norm()), conv()), 1),
    "norm first": (lambda: nn.Sequential(norm(), nn.ReLU(), conv()), 0),
    "norm between": (lambda: nn.Sequential(norm(), conv(), norm(), nn.ReLU(), conv()), 1),
    "excited": (lambda: nn.Sequential(conv(), norm(), Gate(), conv(1), norm()), 2),
    "gate alone": (Gate, 0),
    "attention": (Attention, 1),
    "functional": (lambda: Calls(_functional, **_parts()), 1),
    "read twice": (lambda: Calls(_twice, **_parts()), 0),
    "shared conv": (lambda: Calls(_shared, **_parts()), 0),
    "shared norm": (lambda: Calls(_shared_norm, **_parts()), 0),
    "changed between": (lambda: Calls(_between, **_parts()), 0),
    "tensors read": (lambda: Calls(_reads, **_parts()), 0),
    "control flow": (lambda: Calls(_depends, **_parts()), 0),
    "default argument": (Skip, 1),
    "keeps": (Keeps, 0),
    "subclass": (lambda: nn.Sequential(conv(), type("Own", (nn.BatchNorm2d,), {})(WIDTH)), 0),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), norm()),
        0,
    ),
}


def _supernet(make, seed=0):
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1, bias=False), norm(), nn.Hardswish())
    head = nn.Sequential(conv(1), norm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head.append(nn.Linear(WIDTH, 4))
    blocks = [[make(), nn.Identity()], [conv(1), make()]]
    return randomise(ChainSupernet(stem, blocks, head), seed)


@pytest.fixture(scope="module")
def data():
    return synthetic_data(validation=(10, 6), calibration=(8, 5))


ARCHS = np.array([(0, 0), (0, 1), (1, 1)], np.uint8)


def _logits(net, data, policy="running", archs=ARCHS, precision=None):
    """Logits of every arch on every batch."""
    plan, norms, found = Plan(archs), BatchNorms(net), []
    dtype = next(net.parameters()).dtype
    statistics = Statistics.empty(plan) if policy == "recalibrate" else None
    with evaluation_mode(net), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
        for images, _ in data.calibration if statistics else ():
            calibrate_step(net, norms, plan, images.to(dtype), statistics)
        for images, labels in data.validation:
            eval_step(
                net,
                norms,
                plan,
                images.to(dtype),
                labels,
                policy,
                statistics,
                lambda leaf, logits: found.append(logits),
            )
    return torch.cat(found)


def _three(net, data, monkeypatch, policy, precision=None):
    """What is scored, what the modules themselves give, and what they give in float64."""
    found = _logits(net, data, policy, precision=precision)
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    plain = _logits(net, data, policy, precision=precision)
    exact = _logits(copy.deepcopy(net).double(), data, policy)
    monkeypatch.delenv("FASTSHIFT_BACKEND")
    return found, plain, exact


# What is folded


@pytest.mark.parametrize("name", ZOO)
def test_a_pair_is_found_where_nothing_else_sees_the_convolutions_output(name):
    make, pairs = ZOO[name]
    torch.manual_seed(0)
    module = make()
    parts = {m: dict(vars(m)) for m in module.modules()}
    assert len(conv_norm_pairs(module)) == pairs
    assert parts == {m: dict(vars(m)) for m in module.modules()}


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *((name, policy) for name in ZOO for policy in ("recalibrate", "running")),
        *((name, policy) for name in ("depthwise", "attention") for policy in ("batch", "ema")),
    ],
)
def test_scores_are_those_of_the_modules_themselves(name, policy, data, monkeypatch):
    net = _supernet(ZOO[name][0])
    net.ema = {k: v.abs() + 0.1 for k, v in net.named_buffers() if "running" in k}
    before = snapshot(net)
    found, plain, exact = _three(net, data, monkeypatch, policy)
    assert global_error([found], [exact]) < max(2 * global_error([plain], [exact]), 1e-5)
    assert_untouched(net, before)
    double = net.double()
    double.ema = {k: v.double() for k, v in net.ema.items()}
    assert global_error([_logits(double, data, policy)], [exact]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("name", ["bias", "no affine", "eps", "depthwise", "excited"])
def test_bfloat16_is_as_accurate_folded(name, data, monkeypatch):
    found, plain, exact = _three(_supernet(ZOO[name][0]), data, monkeypatch, "recalibrate", "bf16")
    assert found.dtype is torch.float32
    assert global_error([found], [exact]) < 2 * global_error([plain], [exact])


def test_a_fold_is_what_its_pair_computes():
    torch.manual_seed(0)
    pair = conv(groups=2).double(), norm(eps=0.1).double()
    mean, var = torch.randn(WIDTH).double(), torch.rand(WIDTH).double()
    nn.init.normal_(pair[1].weight)
    nn.init.normal_(pair[1].bias)
    pair[1].running_mean, pair[1].running_var = mean, var
    x = torch.randn(2, WIDTH, 5, 5).double()
    weight, bias = fold(*pair, mean, var)
    with torch.no_grad():
        plain = nn.Sequential(*pair).eval()(x)
        assert torch.allclose(pair[0]._conv_forward(x, weight, bias), plain, atol=1e-12)


def _norm_read_twice(m, x):
    y = m.norm(m.conv(x))
    return m.activation(y) + y


def _activated_twice(m, x):
    return m.activation(m.norm(m.conv(m.activation(x))))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_goes_along_where_it_alone_reads_the_norms_output(kind):
    def taken(module):
        return [pair.activation for pair in conv_norm_pairs(module)]

    follows, between = nn.Sequential(conv(), norm(), kind()), conv(1)
    assert taken(follows) == [follows[2]]
    assert taken(nn.Sequential(conv(), norm(), between, kind())) == [None]
    for run in (_norm_read_twice, _activated_twice):
        assert taken(Calls(run, activation=kind(), **_parts())) == [None]
    assert taken(nn.Sequential(conv(), norm(), type("Own", (kind,), {})())) == [None]
    follows[2] = nn.Identity()
    assert taken(follows) == [None]


class _Fused(TorchDispatchMode):
    """Counts oneDNN's convolutions with an activation, and activations of their own."""

    def __init__(self):
        super().__init__()
        self.fused = self.alone = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += func is torch.ops.mkldnn._convolution_pointwise.default
        self.alone += func._schema.name.startswith(("aten::hardswish", "aten::silu"))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("kind", [nn.Hardswish, nn.SiLU])
def test_a_smooth_activation_is_computed_with_its_convolution(kind, data, monkeypatch):
    net = _supernet(lambda: nn.Sequential(conv(), norm(), kind()))
    with _Fused() as counted:
        _logits(net, data)
    assert counted.fused > 0 == counted.alone
    with _Fused() as counted:
        _logits(net, data, precision="bf16")
    assert counted.fused == 0 < counted.alone
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with _Fused() as counted:
        _logits(net, data)
    assert counted.fused == 0 < counted.alone


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden_by_an_activation(kind, value, monkeypatch):
    net = _supernet(lambda: nn.Sequential(conv(), norm(), kind()))
    op, x = net.blocks[0][0].eval(), torch.randn(2, WIDTH, 5, 5)
    x[0, 1, 2, 2] = value
    norms, moments = BatchNorms(net), [(op[1].running_mean, op[1].running_var)]
    with torch.no_grad():
        found = norms.impose(op, x, moments)
        monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
        plain = norms.impose(op, x, moments)
    assert not plain[0].isfinite().all() or kind is nn.ReLU6
    assert torch.equal(found.isnan(), plain.isnan())
    assert torch.equal(found.isinf(), plain.isinf())


def test_one_dimensional_rows_and_inference_mode_are_scored_alike(data):
    net = _supernet(ZOO["excited"][0]).eval()
    plain = _logits(net, data)
    with torch.inference_mode():
        assert torch.equal(_logits(net, data), plain)


# What must be seen


@pytest.mark.parametrize("name", ["forward", "pre", "global"])
def test_a_hook_sees_the_module_it_hangs_on(name):
    module = nn.Sequential(conv(), norm()).eval()
    seen = []
    if name == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    elif name == "pre":
        handle = module[1].register_forward_pre_hook(lambda *_: seen.append(1))
    else:
        handle = module[0].register_forward_hook(lambda *_: seen.append(1))
    assert conv_norm_pairs(module) == ()
    assert not seen
    handle.remove()
    assert len(conv_norm_pairs(module)) == 1


def test_weights_that_moved_between_evaluations_are_seen(data):
    net = _supernet(ZOO["depthwise"][0])
    score = Evaluator(net, data.validation, calibration=data.calibration, batch_norm="running")
    first = score.evaluate(ARCHS).losses
    assert (score.evaluate(ARCHS).losses == first).all()
    for move in (
        lambda p: p.data.mul_(1.1),
        lambda p: setattr(p, "data", p.data * 1.1),
        lambda p: p.detach().add_(0.01),
    ):
        for parameter in net.blocks.parameters():
            move(parameter)
        plain = Evaluator(net, data.validation, batch_norm="running", strategy="sequential")
        found = score.evaluate(ARCHS).losses
        assert (found != first).all()
        np.testing.assert_allclose(found, plain.evaluate(ARCHS).losses, rtol=1e-5)
        first = found


def test_statistics_and_weights_that_moved_are_seen_by_one_that_keeps_folds(data):
    net = _supernet(ZOO["bias"][0]).eval()
    norms, owner = BatchNorms(net), net.blocks[0][0]
    x = torch.randn(2, WIDTH, 4, 4)
    moments = [(owner[1].running_mean, owner[1].running_var)]
    with torch.no_grad():
        for change in (owner[0].weight, owner[0].bias, owner[1].bias, owner[1].running_var):
            norms.impose(owner, x, moments)
            change.mul_(1.5)
            assert torch.allclose(norms.impose(owner, x, moments), owner(x), atol=1e-5)
        owner[1].eps = 1.0
        assert torch.allclose(norms.impose(owner, x, moments), owner(x), atol=1e-5)


def test_a_module_that_changed_is_traced_again():
    module = nn.Sequential(conv(), norm(), conv())
    (first,) = conv_norm_pairs(module)
    module[1] = norm()
    (second,) = conv_norm_pairs(module)
    assert first[1] is not second[1] is module[1]
    module[1] = nn.GroupNorm(2, WIDTH)
    assert conv_norm_pairs(module) == ()


def test_a_run_that_differs_from_the_trace_is_done_again_unfolded(data):
    switch = {"on": False}

    def run(m, x):
        y = m.conv(x)
        return m.norm(y * 2) if switch["on"] else m.norm(y)

    # A trace cannot know of the switch: it is neither the module's nor a tensor's.
    net = _supernet(lambda: Calls(run, **_parts()))
    assert len(conv_norm_pairs(net.blocks[0][0])) == 1
    switch["on"] = True
    score, plain = (
        Evaluator(net, data.validation, batch_norm="running", strategy=strategy)
        for strategy in ("shared", "sequential")
    )
    np.testing.assert_allclose(
        score.evaluate(ARCHS).losses, plain.evaluate(ARCHS).losses, rtol=1e-5
    )
    assert conv_norm_pairs(net.blocks[0][0]) == ()


def test_training_folds_nothing():
    net = _supernet(ZOO["bias"][0]).train()
    owner = net.blocks[0][0]
    x = torch.randn(3, WIDTH, 4, 4, requires_grad=True)
    y, _ = BatchNorms(net).collect(owner, x)
    assert torch.equal(y, copy.deepcopy(owner)(x))
    y.sum().backward()
    assert all(p.grad is not None for p in owner.parameters())


# Rows


class Viewing(nn.Module):
    """Reads its row as flat pixels, which channels last does not allow."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.seen = conv(), norm(), []

    def forward(self, x):
        self.seen.append(x.is_contiguous())
        return self.norm(self.conv(x.view(len(x), -1).view(x.shape)))


class Layouts(nn.Module):
    """Notes whether its rows are channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.seen = conv(), norm(), []

    def forward(self, x):
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.norm(self.conv(x))


def test_a_module_that_needs_plain_rows_gets_them_and_says_so_once(data, monkeypatch):
    net = _supernet(Viewing)
    with pytest.warns(RuntimeWarning, match=r"Viewing fails on channels-last rows \(Runtime"):
        found, plain, exact = _three(net, data, monkeypatch, "running")
    assert global_error([found], [exact]) < 2 * global_error([plain], [exact]) + 1e-6
    seen = net.blocks[0][0].seen
    seen.clear()
    _logits(net, data)
    assert seen
    assert all(seen)


def test_what_a_module_raises_on_any_row_comes_through_as_it_is(data):
    def run(m, x):
        raise KeyError("the user's own")

    net = _supernet(lambda: Calls(run, **_parts()))
    with pytest.raises(KeyError, match="the user's own") as caught:
        _logits(net, data)
    assert caught.value.__context__ is None
    assert not any("forward" in vars(m) for m in net.modules())


def test_a_module_that_changes_its_row_in_place_is_refused(data):
    net = _supernet(lambda: nn.Sequential(nn.ReLU(inplace=True), conv(), norm()))
    for policy in ("running", "recalibrate"):
        with pytest.raises(SpaceError, match="in place"):
            _logits(net, data, policy)


@pytest.mark.parametrize("memory_format", [None, torch.channels_last, torch.contiguous_format])
def test_the_supernets_memory_format_is_that_of_the_rows(memory_format, data):
    net = _supernet(Layouts)
    net.memory_format = memory_format
    _logits(net, data, "recalibrate")
    wanted = memory_format is not torch.contiguous_format
    assert set(net.blocks[0][0].seen) == {wanted}


# Statistics of channels-last rows


@pytest.mark.parametrize("shape", [(3, 5, 40, 40), (2, 6, 64, 32), (64, 7, 9, 9)])
def test_moments_of_channels_last_rows_keep_their_digits(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 200
    rows = x.contiguous(memory_format=torch.channels_last)
    own = nn.BatchNorm2d(shape[1], momentum=1.0).train()
    plain = copy.deepcopy(own).double()
    exact = plain(x.double())
    y = normalise_by_batch(own, rows)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert global_error([own.running_mean], [plain.running_mean]) < 1e-6
    assert global_error([own.running_var], [plain.running_var]) < 2e-6
    assert global_error([y], [exact]) < 1e-4


# Memory


def test_folds_are_kept_up_to_a_limit_and_made_again_beyond():
    size = conv().weight.nbytes
    cache = FoldCache(2 * size)
    pairs = [(Pair(conv(), norm(), None), torch.zeros(WIDTH), torch.ones(WIDTH)) for _ in range(3)]
    first = [cache.of(*pair) for pair in pairs]
    again = [cache.of(*pair) for pair in pairs]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]
    assert cache.bytes == 2 * size
    assert isinstance(again[2], Fold)
    assert torch.equal(again[2].weight, first[2].weight)


def test_a_chains_scores_equal_the_unfolded_ones(data, monkeypatch):
    net = chain_supernet()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    archs = ["00000", "01111", "02202", "03010", "01002"]
    score = Evaluator(net, data.validation, calibration=data.calibration, subtrie_size=2)
    found = score.evaluate(archs)
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    plain = score.evaluate(archs)
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-5)
    assert (found.errors == plain.errors).all()
    assert changed_tensors(state, net.state_dict()) == set()
