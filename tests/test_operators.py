"""The population layer's operators: one meaning, by the reference and by the compiled kernels."""

from __future__ import annotations

import pytest
import torch
from block_cases import assert_each_as_accurate, norms_of, seeded
from operator_cases import (
    BY_AFFINE,
    BY_NAME,
    BY_POPULATION,
    BY_SHAPE,
    POPULATIONS,
    SHAPES,
    make_case,
    random_moments,
    trained,
)

from fastshift import cpu
from fastshift.operators import implementation, layer_infer, layer_train
from fastshift.testing import FLOAT64_TOLERANCE, global_error

pytestmark = pytest.mark.usefixtures("backend")

# The reference is the modules, and the compiled kernels are the reference


@BY_NAME
@BY_SHAPE
@BY_AFFINE
def test_the_reference_is_the_modules_in_float64(name, shape, affine):
    layer, rows, parent, choice = make_case(
        name, shape, POPULATIONS["every_choice"], affine=affine, dtype=torch.float64
    )
    found = trained(layer, rows, parent, choice, torch.float64)
    leaf = rows.double().requires_grad_()
    out = []
    for node, (source, index) in enumerate(zip(parent.tolist(), choice.tolist(), strict=True)):
        module = layer.modules[index].train()
        for norm in norms_of(module):
            norm.momentum = 1.0
        out.append(module(leaf[source].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        own = found["statistics"][node]
        for norm in norms_of(module):
            mean, var = own[: 2 * norm.num_features].view(2, -1)
            own = own[5 * norm.num_features :]
            assert global_error([mean, var], [norm.running_mean, norm.running_var]) < 1e-10
        assert not own.any()
    y = torch.stack(out)
    assert global_error([found["y"]], [y]) < FLOAT64_TOLERANCE
    dy = torch.randn(y.shape, generator=seeded(2)).double()
    parameters = dict(layer.modules.named_parameters())
    exact = torch.autograd.grad(y, [leaf, *parameters.values()], dy)
    names = [f"d {key}" for key in ("rows", *parameters)]
    assert {*names, "y", "statistics"} == found.keys()
    assert global_error([found[key] for key in names], exact) < FLOAT64_TOLERANCE


@BY_NAME
@BY_SHAPE
@BY_AFFINE
def test_the_references_inference_is_the_modules_in_float64(name, shape, affine):
    layer, rows, parent, choice = make_case(
        name, shape, POPULATIONS["every_choice"], affine=affine, dtype=torch.float64
    )
    rows, moments = rows.double(), random_moments(layer, len(choice)).double()
    given = layer.given(torch.float64, False)
    found = layer_infer(rows, parent, choice, given, moments, layer.text)
    for node, (source, index) in enumerate(zip(parent.tolist(), choice.tolist(), strict=True)):
        module, own = layer.modules[index].eval(), moments[node]
        for norm in norms_of(module):
            norm.running_mean, norm.running_var = own[: 2 * norm.num_features].view(2, -1)
            own = own[2 * norm.num_features :]
        exact = module(rows[source].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert global_error([found[node]], [exact]) < FLOAT64_TOLERANCE


@BY_NAME
@BY_SHAPE
@BY_POPULATION
def test_training_and_every_gradient_are_as_accurate_as_pytorchs(name, shape, population, backend):
    layer, *case = make_case(name, shape, population)
    assert implementation(layer.parsed, case[0], layer.parameters) == "cpu"
    found = trained(layer, *case)
    exact = trained(layer, *case, torch.float64)
    backend("reference")
    assert implementation(layer.parsed, case[0], layer.parameters) == "reference"
    # The largest gradient is that of all ops of the level together.
    assert_each_as_accurate(found, [trained(layer, *case)], exact, nearly_zero=1e-2)


@BY_NAME
@BY_SHAPE
@BY_POPULATION
def test_inference_is_as_accurate_as_pytorchs(name, shape, population, backend):
    layer, rows, *nodes = make_case(name, shape, population)
    moments = random_moments(layer, len(nodes[0]))

    def inferred(dtype=torch.float32):
        given = layer.given(dtype, False)
        return {"y": layer_infer(rows.to(dtype), *nodes, given, moments.to(dtype), layer.text)}

    found, exact = inferred(), inferred(torch.float64)
    backend("reference")
    assert_each_as_accurate(found, [inferred()], exact)


@BY_AFFINE
def test_batch_norms_without_scale_and_shift(affine, backend):
    layer, *case = make_case("s1", SHAPES["odd"], POPULATIONS["every_choice"], affine=affine)
    assert any("norm" in name for name in layer.names) == affine
    found, exact = trained(layer, *case), trained(layer, *case, torch.float64)
    backend("reference")
    # The largest gradient is that of all ops of the level together.
    assert_each_as_accurate(found, [trained(layer, *case)], exact, nearly_zero=1e-2)


@BY_NAME
def test_the_references_gradient_is_that_of_small_differences(name):
    layer, rows, parent, choice = make_case(name, (2, 2, 3, 2), POPULATIONS["every_choice"])
    inputs = [rows.double().requires_grad_(), *layer.given(torch.float64)]

    def apply(rows, *parameters):
        return layer_train(rows, parent, choice, list(parameters), layer.text)[0]

    assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)


@BY_NAME
@BY_POPULATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_node_is_its_block_to_the_bit(name, population, dtype):
    """What the kernels give for one candidate op; sums over nodes in their order."""
    layer, rows, parent, choice = make_case(name, SHAPES["odd"], population)
    rows = rows.to(dtype)
    found = trained(layer, rows, parent, choice, rows_type=dtype)
    dy = torch.randn(found["y"].shape, generator=seeded(2)).to(dtype)
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
    layer, rows, *nodes = make_case(name, SHAPES["odd"], POPULATIONS["every_choice"])
    moments, given = random_moments(layer, len(nodes[0])), layer.given(needs=False)
    found = layer_infer(rows.bfloat16(), *nodes, given, moments, layer.text)
    assert found.dtype is torch.bfloat16
    exact = layer_infer(rows, *nodes, given, moments, layer.text)
    assert global_error([found], [exact]) < 2e-2


# What nodes share


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_population_is_its_nodes_one_at_a_time(name, backend):
    """Rows to the bit; the gradients of what nodes share are the sums of each node's."""
    backend(name)
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    rows = rows.requires_grad_()
    given = layer.given()
    y, _, _ = layer_train(rows, parent, choice, given, layer.text)
    dy = torch.randn(y.shape, generator=seeded(2))
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
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], (1, [0, 0], [1, 3]))
    given = layer.given()
    layer_train(rows, parent, choice, given, layer.text)[0].sum().backward()
    for own, p in zip(layer.names, given, strict=True):
        assert (p.grad is not None) == (own[0] in "13"), own


def test_only_what_needs_a_gradient_gets_one():
    layer, rows, parent, choice = make_case("s2", SHAPES["odd"], POPULATIONS["siblings"])
    whole = trained(layer, rows, parent, choice)
    given = layer.given()
    for p in given[::2]:
        p.requires_grad_(False)
    y, _, _ = layer_train(rows, parent, choice, given, layer.text)
    dy = torch.randn(y.shape, generator=seeded(2))
    y.backward(dy)
    assert rows.grad is None
    for index, (name, p) in enumerate(zip(layer.names, given, strict=True)):
        assert (p.grad is None) == (index % 2 == 0)
        assert p.grad is None or torch.equal(p.grad, whole[f"d {name}"]), name
    rows.requires_grad_()
    layer_train(rows, parent, choice, layer.given(needs=False), layer.text)[0].backward(dy)
    assert torch.equal(rows.grad, whole["d rows"])


def test_a_row_without_nodes_gets_zeros():
    layer, *case = make_case("s1", SHAPES["odd"], POPULATIONS["an_unread_row"])
    found = trained(layer, *case)["d rows"]
    assert [bool(row.any()) for row in found] == [True, False, True]


def test_an_identity_is_a_copy_that_shares_nothing():
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["first_choices"])
    y, statistics, _ = layer_train(rows, parent, choice, layer.given(), layer.text)
    assert torch.equal(y, rows)
    assert y.data_ptr() != rows.data_ptr()
    assert not statistics.any()
