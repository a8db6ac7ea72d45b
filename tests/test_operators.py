"""The population layer's operators: one meaning, in eager mode, compiled, and by either kernel."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastshift import _operators_cpu, cpu, levels
from fastshift.layers import OpModule
from fastshift.operators import implementation, layer_backward, layer_infer, layer_train
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
from fastshift.population_layer import (
    LayerOp,
    LayerUnit,
    describe_layer,
    describe_op,
    parse_layer,
)
from fastshift.testing import FLOAT64_TOLERANCE, FLOORS, global_error

FLOOR = FLOORS[torch.float32]
ABSOLUTE = 1e-6  # of the layer's largest gradient, for one that is zero by symmetry


def _residual_shortcut(c):
    main = (Unit("depthwise", c, c, 3, 2), Unit("pointwise", c, 2 * c, activation=None))
    aside = (Unit("pointwise", c, 2 * c, stride=2, activation=None),)
    return Op("residual_shortcut", c, 2 * c, 2, main, Frame("residual", aside))


# Every frame, with and without a shortcut; choice 0 of the first is the identity.
OPS = {
    "s1": lambda c: [
        identity(c),
        inverted_residual(c, c, 1, 3, 3),
        shuffle_unit(c, c, 1, 5),
        conv(c, c, 3, 1),
        shuffle_xception(c, c, 1),
    ],
    "s2": lambda c: [
        projection(c, 2 * c, 2),
        inverted_residual(c, 2 * c, 2, 3, 5),
        shuffle_unit(c, 2 * c, 2, 7),
        _residual_shortcut(c),
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


class _Layer:
    """Modules of some ops, and what the operators take in their place."""

    def __init__(self, ops, affine=True, dtype=torch.float32):
        self.modules = nn.ModuleList(OpModule(op, affine) for op in ops)
        generator = _generator()
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
        return [p.detach().to(dtype).clone().requires_grad_(needs) for p in self.parameters]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _buffers(parent, choice):
    return torch.tensor(parent, dtype=torch.int32), torch.tensor(choice, dtype=torch.int32)


def _case(name, shape, population, **options):
    """A layer, random rows and the nodes' buffers."""
    n, c, h, w = shape
    layer = _Layer(OPS[name](c), **options)
    num, parent, choice = population
    rows = torch.randn(num, n, h, w, c, generator=_generator(1))
    return layer, rows, *_buffers(parent, [i % len(layer.modules) for i in choice])


def _trained(layer, rows, parent, choice, dtype=torch.float32, rows_type=None):
    """Rows, statistics and gradients by name."""
    rows = rows.detach().to(rows_type or dtype).requires_grad_()
    parameters = layer.given(dtype)
    y, statistics, _ = layer_train(rows, parent, choice, parameters, layer.text)
    dy = torch.randn(y.shape, generator=_generator(2)).to(y.dtype)
    gradients = torch.autograd.grad(y, [rows, *parameters], dy, allow_unused=True)
    assert not statistics.requires_grad
    found = {"y": y.detach(), "statistics": statistics, "d rows": gradients[0]}
    found |= {f"d {name}": g for name, g in zip(layer.names, gradients[1:], strict=True)}
    return {name: value for name, value in found.items() if value is not None}


def _random_moments(layer, nodes):
    return torch.rand(nodes, layer.parsed.moments_floats, generator=_generator(3)) + 0.5


def _norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def _error(found, exact):
    return float((found.double() - exact).norm())


def _assert_as_accurate(found, plain, exact):
    assert found.keys() == exact.keys() == plain.keys()
    scale = max((float(exact[name].norm()) for name in exact if name[:2] == "d "), default=0.0)
    for name in exact:
        assert found[name].shape == exact[name].shape, name
        error, bound = (_error(values[name], exact[name]) for values in (found, plain))
        floor = FLOOR * float(exact[name].norm())
        if name[:2] == "d ":
            floor = max(floor, ABSOLUTE * scale)
        assert error <= max(2 * bound, floor), f"{name}: error {error:.3g}, PyTorch's {bound:.3g}"


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Choose the implementation by its name; the machine's own without."""
    monkeypatch.delenv("FASTSHIFT_BACKEND", raising=False)
    return lambda name: monkeypatch.setenv("FASTSHIFT_BACKEND", name)


BY_NAME = pytest.mark.parametrize("name", OPS)
BY_POPULATION = pytest.mark.parametrize("population", POPULATIONS.values(), ids=POPULATIONS)
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda s: "x".join(map(str, s)))
BY_AFFINE = pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])


# The reference is the modules, and the compiled kernels are the reference


@BY_NAME
@BY_SHAPE
@BY_AFFINE
def test_the_reference_is_the_modules_in_float64(name, shape, affine):
    layer, rows, parent, choice = _case(
        name, shape, POPULATIONS["every_choice"], affine=affine, dtype=torch.float64
    )
    found = _trained(layer, rows, parent, choice, torch.float64)
    leaf = rows.double().requires_grad_()
    out = []
    for node, (source, index) in enumerate(zip(parent.tolist(), choice.tolist(), strict=True)):
        module = layer.modules[index].train()
        for norm in _norms(module):
            norm.momentum = 1.0
        out.append(module(leaf[source].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        own = found["statistics"][node]
        for norm in _norms(module):
            mean, var = own[: 2 * norm.num_features].view(2, -1)
            own = own[5 * norm.num_features :]
            assert global_error([mean, var], [norm.running_mean, norm.running_var]) < 1e-10
        assert not own.any()
    y = torch.stack(out)
    assert global_error([found["y"]], [y]) < FLOAT64_TOLERANCE
    dy = torch.randn(y.shape, generator=_generator(2)).double()
    parameters = dict(layer.modules.named_parameters())
    exact = torch.autograd.grad(y, [leaf, *parameters.values()], dy)
    names = [f"d {key}" for key in ("rows", *parameters)]
    assert {*names, "y", "statistics"} == found.keys()
    assert global_error([found[key] for key in names], exact) < FLOAT64_TOLERANCE


@BY_NAME
@BY_SHAPE
@BY_AFFINE
def test_the_references_inference_is_the_modules_in_float64(name, shape, affine):
    layer, rows, parent, choice = _case(
        name, shape, POPULATIONS["every_choice"], affine=affine, dtype=torch.float64
    )
    rows, moments = rows.double(), _random_moments(layer, len(choice)).double()
    given = layer.given(torch.float64, False)
    found = layer_infer(rows, parent, choice, given, moments, layer.text)
    for node, (source, index) in enumerate(zip(parent.tolist(), choice.tolist(), strict=True)):
        module, own = layer.modules[index].eval(), moments[node]
        for norm in _norms(module):
            norm.running_mean, norm.running_var = own[: 2 * norm.num_features].view(2, -1)
            own = own[2 * norm.num_features :]
        exact = module(rows[source].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert global_error([found[node]], [exact]) < FLOAT64_TOLERANCE


@BY_NAME
@BY_SHAPE
@BY_POPULATION
def test_training_and_every_gradient_are_as_accurate_as_pytorchs(name, shape, population, backend):
    layer, *case = _case(name, shape, population)
    assert implementation(layer.parsed, case[0], layer.parameters) == "cpu"
    found = _trained(layer, *case)
    exact = _trained(layer, *case, torch.float64)
    backend("reference")
    assert implementation(layer.parsed, case[0], layer.parameters) == "reference"
    _assert_as_accurate(found, _trained(layer, *case), exact)


@BY_NAME
@BY_SHAPE
@BY_POPULATION
def test_inference_is_as_accurate_as_pytorchs(name, shape, population, backend):
    layer, rows, *nodes = _case(name, shape, population)
    moments = _random_moments(layer, len(nodes[0]))

    def inferred(dtype=torch.float32):
        given = layer.given(dtype, False)
        return {"y": layer_infer(rows.to(dtype), *nodes, given, moments.to(dtype), layer.text)}

    found, exact = inferred(), inferred(torch.float64)
    backend("reference")
    _assert_as_accurate(found, inferred(), exact)


@BY_AFFINE
def test_batch_norms_without_scale_and_shift(affine, backend):
    layer, *case = _case("s1", SHAPES["odd"], POPULATIONS["every_choice"], affine=affine)
    assert any("norm" in name for name in layer.names) == affine
    found, exact = _trained(layer, *case), _trained(layer, *case, torch.float64)
    backend("reference")
    _assert_as_accurate(found, _trained(layer, *case), exact)


@BY_NAME
def test_the_references_gradient_is_that_of_small_differences(name):
    layer, rows, parent, choice = _case(name, (2, 2, 3, 2), POPULATIONS["every_choice"])
    inputs = [rows.double().requires_grad_(), *layer.given(torch.float64)]

    def apply(rows, *parameters):
        return layer_train(rows, parent, choice, list(parameters), layer.text)[0]

    assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)


@BY_NAME
@BY_POPULATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_node_is_its_block_to_the_bit(name, population, dtype):
    """What the kernels give for one candidate op; sums over nodes in their order."""
    layer, rows, parent, choice = _case(name, SHAPES["odd"], population)
    rows = rows.to(dtype)
    found = _trained(layer, rows, parent, choice, rows_type=dtype)
    dy = torch.randn(found["y"].shape, generator=_generator(2)).to(dtype)
    names = {p: f"d {key}" for key, p in layer.modules.named_parameters()}
    exact = {}
    d_rows = torch.zeros_like(rows)

    def add(key, value):
        exact[key] = exact[key] + value if key in exact else value

    for node, (source, index) in enumerate(zip(parent.tolist(), choice.tolist(), strict=True)):
        if name == "s1" and index == 0:
            assert torch.equal(found["y"][node], rows[source])
            add(source, dy[node])
            continue
        x = rows[source].permute(0, 3, 1, 2).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y, moments = cpu.block_of(layer.modules[index], x).train(x)
        assert torch.equal(y.permute(0, 2, 3, 1), found["y"][node])
        mean, var = moments[0]
        assert torch.equal(found["statistics"][node, : 2 * len(mean)], torch.cat((mean, var)))
        own = list(layer.modules[index].parameters())
        gradients = torch.autograd.grad(y, [x, *own], dy[node].permute(0, 3, 1, 2))
        add(source, gradients[0].permute(0, 2, 3, 1))
        for p, g in zip(own, gradients[1:], strict=True):
            add(names[p], g)
    for key, value in exact.items():
        if isinstance(key, int):
            d_rows[key] = value
        else:
            assert torch.equal(found[key], value), key
    assert torch.equal(found["d rows"], d_rows)
    assert found.keys() - {"y", "statistics", "d rows"} == exact.keys() - set(range(len(rows)))


@BY_NAME
def test_inference_in_bfloat16_is_that_of_float32_rounded(name):
    layer, rows, *nodes = _case(name, SHAPES["odd"], POPULATIONS["every_choice"])
    moments, given = _random_moments(layer, len(nodes[0])), layer.given(needs=False)
    found = layer_infer(rows.bfloat16(), *nodes, given, moments, layer.text)
    assert found.dtype is torch.bfloat16
    exact = layer_infer(rows, *nodes, given, moments, layer.text)
    assert global_error([found], [exact]) < 2e-2


# What nodes share


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_population_is_its_nodes_one_at_a_time(name, backend):
    """Rows to the bit; the gradients of what nodes share are the sums of each node's."""
    backend(name)
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    rows = rows.requires_grad_()
    given = layer.given()
    y, _, _ = layer_train(rows, parent, choice, given, layer.text)
    dy = torch.randn(y.shape, generator=_generator(2))
    together = torch.autograd.grad(y, [rows, *given], dy, allow_unused=True)
    sums = [None] * len(together)
    for node in range(len(choice)):
        own = slice(node, node + 1)
        one, _, _ = layer_train(rows, parent[own], choice[own], given, layer.text)
        assert torch.equal(one[0], y[node])
        alone = torch.autograd.grad(one, [rows, *given], dy[own], allow_unused=True)
        for index, g in enumerate(alone):
            if g is not None:
                sums[index] = g.double() + (0 if sums[index] is None else sums[index])
    for found, total in zip(together, sums, strict=True):
        assert (found is None) == (total is None)
        assert found is None or global_error([found], [total]) < 1e-6


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_parameters_that_no_node_uses_get_no_gradient(name, backend):
    backend(name)
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], (1, [0, 0], [1, 3]))
    given = layer.given()
    layer_train(rows, parent, choice, given, layer.text)[0].sum().backward()
    for own, p in zip(layer.names, given, strict=True):
        assert (p.grad is not None) == (own[0] in "13"), own


def test_only_what_needs_a_gradient_gets_one():
    layer, rows, parent, choice = _case("s2", SHAPES["odd"], POPULATIONS["siblings"])
    whole = _trained(layer, rows, parent, choice)
    given = layer.given()
    for p in given[::2]:
        p.requires_grad_(False)
    y, _, _ = layer_train(rows, parent, choice, given, layer.text)
    dy = torch.randn(y.shape, generator=_generator(2))
    y.backward(dy)
    assert rows.grad is None
    for index, (name, p) in enumerate(zip(layer.names, given, strict=True)):
        assert (p.grad is None) == (index % 2 == 0)
        assert p.grad is None or torch.equal(p.grad, whole[f"d {name}"]), name
    rows.requires_grad_()
    layer_train(rows, parent, choice, layer.given(needs=False), layer.text)[0].backward(dy)
    assert torch.equal(rows.grad, whole["d rows"])


def test_a_row_without_nodes_gets_zeros():
    layer, *case = _case("s1", SHAPES["odd"], POPULATIONS["an_unread_row"])
    found = _trained(layer, *case)["d rows"]
    assert [bool(row.any()) for row in found] == [True, False, True]


def test_an_identity_is_a_copy_that_shares_nothing():
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], POPULATIONS["first_choices"])
    y, statistics, _ = layer_train(rows, parent, choice, layer.given(), layer.text)
    assert torch.equal(y, rows)
    assert y.data_ptr() != rows.data_ptr()
    assert not statistics.any()


# Memory and threads


class _Poisoned:
    """`torch`, but its `empty` and the like give NaN."""

    def __init__(self):
        self.given = 0

    def __getattr__(self, name):
        found = getattr(torch, name)
        if not name.startswith("empty"):
            return found
        return lambda *arguments, **options: self.count(found(*arguments, **options))

    def count(self, tensor):
        self.given += 1
        return tensor.fill_(torch.nan)


@BY_NAME
@BY_POPULATION
def test_outputs_are_memory_that_was_full_of_nan(name, population, monkeypatch):
    layer, *case = _case(name, SHAPES["odd"], population)
    moments = _random_moments(layer, len(case[1]))
    given = layer.given(needs=False)
    expected = _trained(layer, *case)
    scored = layer_infer(*case, given, moments, layer.text)
    poison, memory = _Poisoned(), cpu._memory
    monkeypatch.setattr(_operators_cpu, "torch", poison)
    monkeypatch.setattr(cpu, "_memory", lambda floats: poison.count(memory(floats)))
    found = _trained(layer, *case)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(layer_infer(*case, given, moments, layer.text), scored)
    assert poison.given >= 4


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_packed_once_for_all_nodes_change_no_bit(name, dtype, monkeypatch):
    """A choice's nodes share them, forward, backward and in inference."""
    layer, rows, *nodes = _case(name, SHAPES["odd"], (2, [0, 1, 1, 0, 1], [1, 2, 1, 2, 3]))
    moments, given = _random_moments(layer, len(nodes[0])), layer.given(needs=False)

    def results():
        found = _trained(layer, rows, *nodes, rows_type=dtype)
        found["scored"] = layer_infer(rows.to(dtype), *nodes, given, moments, layer.text)
        return found

    shared, made = results(), []
    monkeypatch.setattr(_operators_cpu._Call, "packed", lambda _, choice: made.append(choice))
    alone = results()
    assert len(made) == 3 * len(nodes[0])
    assert shared.keys() == alone.keys()
    assert all(torch.equal(shared[key], alone[key]) for key in alone)


def test_the_number_of_threads_changes_no_bit():
    layer, *case = _case("s1", (19, 6, 5, 4), POPULATIONS["cousins"])
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_trained(layer, *case))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(found[key], results[0][key]) for key in found)


def test_without_a_backward_to_come_nothing_is_kept():
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    given = layer.given(needs=False)
    kept = layer_train(rows, parent, choice, given, layer.text)
    not_kept = layer_train(rows, parent, choice, given, layer.text, False)
    assert len(kept[2]) > 0
    assert len(not_kept[2]) == 0
    assert all(map(torch.equal, kept[:2], not_kept[:2]))
    with pytest.raises(ValueError, match="keep: False"):
        layer_train(rows.requires_grad_(), parent, choice, given, layer.text, False)


def test_any_memory_of_rows_and_parameters_gives_the_same_bits():
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    expected = _trained(layer, rows, parent, choice)
    layer.parameters = [
        p.detach().contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p
        for p in layer.parameters
    ]
    channels_first = rows.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert not channels_first.is_contiguous()
    found = _trained(layer, channels_first, parent, choice)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_weight_that_moved_between_forward_and_backward_is_noticed():
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], POPULATIONS["lone"])
    given = layer.given()
    y, _, _ = layer_train(rows, parent, choice, given, layer.text)
    with torch.no_grad():
        given[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused_and_not_made_up():
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], POPULATIONS["lone"])
    rows.requires_grad_()
    y, _, _ = layer_train(rows, parent, choice, layer.given(), layer.text)
    [first] = torch.autograd.grad(y.square().sum(), [rows], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first.square().sum() + y.sum()).backward()


# What does not fit


def test_arguments_that_do_not_fit_are_refused_by_name():
    layer, rows, parent, choice = _case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    given, text = layer.given(needs=False), layer.text
    train = layer_train
    with pytest.raises(ValueError, match="rows: shape"):
        train(rows[0], parent, choice, given, text)
    with pytest.raises(ValueError, match="rows: 4 channels; expected 6"):
        train(rows[..., :4], parent, choice, given, text)
    with pytest.raises(ValueError, match="parent, choice: shapes"):
        train(rows, parent[1:], choice, given, text)
    with pytest.raises(ValueError, match="parameters: "):
        train(rows, parent, choice, given[1:], text)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="parent: "):
            train(rows, parent.clone().fill_(wrong), choice, given, text)
    for wrong in (5, 6):
        with pytest.raises(ValueError, match="choice: "):
            train(rows, parent, choice.clone().fill_(wrong), given, text)
    for nodes in ((parent.float(), choice), (parent, choice.bool())):
        with pytest.raises(ValueError, match="expected integers"):
            train(rows, *nodes, given, text)
    with pytest.raises(ValueError, match="moments: "):
        layer_infer(rows, parent, choice, given, torch.zeros(5, 3), text)
    with pytest.raises(ValueError, match=r"parameters: \(.*\) on cpu; expected \("):
        train(rows, parent, choice, [*given[1:], given[0]], text)
    with pytest.raises(ValueError, match="expected some"):
        train(rows[:, :, :0], parent, choice, given, text)
    with pytest.raises(ValueError, match="expected two values a channel"):
        train(rows[:, :0], parent, choice, given, text)
    for wrong in ("", "[1]", '[{"main": 1}]', "[[]"):
        with pytest.raises(ValueError, match="expected the text of a layer"):
            train(rows, parent, choice, given, wrong)
    y, statistics, saved = train(rows, parent, choice, given, text)
    needs = [True] * (1 + len(given))
    for d_out, sums, kept, says in (
        (y, statistics, torch.empty(0), r"saved: \(0,\)"),
        (y, statistics, saved.bfloat16(), "saved: .* of torch.bfloat16"),
        (y, statistics, torch.stack((saved, saved), 1)[:, 0], "saved: .*contiguous"),
        (y[:1], statistics, saved, "d_out: "),
        (y.bfloat16(), statistics, saved, "d_out: "),
        (y, statistics[:1], saved, "statistics: shape"),
    ):
        with pytest.raises(ValueError, match=says):
            layer_backward(d_out, rows, parent, choice, given, sums, kept, text, needs)


@pytest.mark.parametrize(
    ("units", "main", "frame"),
    [
        ([(False, 4, 5, 1, 1), (False, 6, 4, 1, 1)], 2, "plain"),
        ([(True, 4, 5, 3, 1)], 1, "plain"),
        ([(False, 4, 5, 2, 1)], 1, "plain"),
        ([(False, 4, 0, 1, 1)], 1, "plain"),
        ([(False, 4, 5, 1, 1)], 1, "residual"),
        ([(False, 4, 5, 1, 1), (False, 4, 6, 1, 1)], 1, "residual"),
        ([(False, 4, 5, 1, 1)], 2, "plain"),
        ([(False, 4, 5, 1, 1)], 1, "dense"),
    ],
)
def test_units_that_do_not_follow_each_other_are_refused(units, main, frame):
    with pytest.raises(ValueError, match="units that do not follow each other"):
        LayerOp(tuple(LayerUnit(*unit, True, 1e-5) for unit in units), main, frame)


def _one_unit(*unit):
    return describe_op(LayerOp((LayerUnit(*unit),), 1, "plain"))


def test_choices_of_different_shapes_are_refused():
    text = describe_layer(["null", _one_unit(False, 4, 5, 1, 1, True, 1e-5, False, False)])
    rows, nodes = torch.zeros(1, 3, 5, 4, 4), _buffers([0], [0])
    with pytest.raises(ValueError, match="its choices map"):
        layer_train(rows, *nodes, [torch.zeros(5, 4, 1, 1)], text)


def test_a_unit_that_the_kernels_do_not_have_is_the_references():
    text = describe_layer([_one_unit(True, 4, 4, 9, 3, True, 1e-5, True, False)])
    rows, nodes = torch.randn(1, 3, 5, 4, 4, generator=_generator()), _buffers([0], [0])
    weight, scale = torch.randn(4, 1, 9, 9, generator=_generator()), torch.ones(4)
    assert implementation(parse_layer(text), rows, [weight, scale]) == "reference"
    y, statistics, saved = layer_train(rows.requires_grad_(), *nodes, [weight, scale], text)
    assert y.shape == (1, 3, 2, 2, 4)
    assert statistics.shape == (1, 20)
    assert len(saved) == 0
    y.square().sum().backward()
    assert rows.grad.isfinite().all()


def test_no_nodes_and_no_images_give_no_rows():
    layer, rows, parent, choice = _case("s2", SHAPES["odd"], POPULATIONS["lone"])
    moments = _random_moments(layer, 1)
    for dtype in (torch.float32, torch.float64):
        own, x, m = layer.given(dtype, False), rows.to(dtype), moments.to(dtype)
        y = layer_infer(x, parent[:0], choice[:0], own, m[:0], layer.text)
        assert y.shape == (0, 3, 3, 2, 12)
        y = layer_infer(x[:, :0], parent, choice, own, m, layer.text)
        assert y.shape == (1, 0, 3, 2, 12)


# Traced and compiled


def _samples(dtype):
    layer, rows, parent, choice = _case("s1", (2, 4, 2, 4), POPULATIONS["every_choice"])
    rows = rows.to(dtype)
    moments = _random_moments(layer, len(choice)).to(dtype)
    plain = layer.given(dtype, False)
    y, statistics, saved = layer_train(rows, parent, choice, plain, layer.text)
    nodes = (parent, choice)
    needs = [True, *(index % 3 > 0 for index in range(len(plain)))]
    wanting = (rows.clone().requires_grad_(), *nodes, layer.given(dtype), layer.text)
    return {
        "layer_infer": [(rows, *nodes, plain, moments, layer.text)],
        "layer_train": [wanting, (rows, *nodes, plain, layer.text, False)],
        "layer_backward": [
            (y, rows, *nodes, plain, statistics, saved, layer.text, given)
            for given in (needs, [not needed for needed in needs])
        ],
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the check's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu", "reference"])
@pytest.mark.parametrize("name", ["layer_infer", "layer_train", "layer_backward"])
def test_pytorchs_own_check_of_operators(name, dtype, monkeypatch):
    memory = cpu._memory  # what is kept has parts that no one writes, and must compare equal
    monkeypatch.setattr(cpu, "_memory", lambda floats: memory(floats).zero_())
    for sample in _samples(dtype)[name]:
        torch.library.opcheck(getattr(torch.ops.fastshift, name).default, sample)


def _two_levels(first, second):
    def apply(rows, nodes, parameters):
        (parent, choice), (parent2, choice2) = nodes
        y, statistics, _ = layer_train(rows, parent, choice, parameters[0], first.text)
        y, more, _ = layer_train(y, parent2, choice2, parameters[1], second.text)
        return y.square().mean(), statistics.sum() + more.sum()

    return apply


def _random_nodes(rng, rows, nodes, choices):
    parent = np.sort(np.concatenate([np.arange(rows), rng.integers(0, rows, nodes - rows)]))
    return _buffers(parent.tolist(), rng.integers(0, choices, nodes).tolist())


def _check_compiled(backend, populations):
    first, second = (_Layer(OPS[name](4)) for name in OPS)
    rows = torch.randn(1, 3, 4, 4, 4, generator=_generator(1))
    plain = _two_levels(first, second)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(plain, fullgraph=True, backend=backend)
    rng = np.random.default_rng(0)

    def gradients(apply, nodes):
        x = rows.clone().requires_grad_()
        given = [first.given(), second.given()]
        loss, statistics = apply(x, nodes, given)
        loss.backward()
        return [loss.detach(), statistics], [x, *given[0], *given[1]]

    for index in range(populations):
        nodes = _random_nodes(rng, 1, 3, 5), _random_nodes(rng, 3, 5, 4)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            ours, leaves = gradients(compiled, nodes)
        eager, plain_leaves = gradients(plain, nodes)
        for found, expected in zip(ours, eager, strict=True):
            assert torch.allclose(found, expected, rtol=1e-5)
        for leaf, other in zip(leaves, plain_leaves, strict=True):
            # A compiled function gives zeros where eager mode gives nothing.
            expected = torch.zeros_like(leaf) if other.grad is None else other.grad
            assert torch.allclose(leaf.grad, expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_function_serves_every_population_of_a_size():
    _check_compiled("aot_eager", 20)


@pytest.mark.slow
def test_inductor_compiles_it_too():
    _check_compiled("inductor", 3)


def test_a_compiled_function_scores_too():
    layer, rows, *nodes = _case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    moments, given = _random_moments(layer, 5), layer.given(needs=False)

    def apply(rows, parent, choice):
        return layer_infer(rows, parent, choice, given, moments, layer.text) * 2

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(rows, *nodes), apply(rows, *nodes))


def test_the_first_call_loads_no_compiler():
    code = (
        "import sys, torch\n"
        "from fastshift.operators import layer_train\n"
        "nodes = torch.zeros(1, dtype=torch.int32)\n"
        "rows = torch.ones(1, 2, 3, 3, 4, requires_grad=True)\n"
        "layer_train(rows, nodes, nodes, [], '[null]')[0].sum().backward()\n"
        "assert rows.grad.eq(1).all()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
