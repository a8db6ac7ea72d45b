"""The population layer's operators, traced and compiled: one function serves every population."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_cases import seeded
from operator_cases import OPS, POPULATIONS, SHAPES, Layer, buffers, make_case, random_moments

from fastshift import cpu, operators, static_operators
from fastshift.operators import layer_infer, layer_train

pytestmark = pytest.mark.usefixtures("backend")

OPERATORS = [
    name
    for module in (operators, static_operators)
    for name in module.__all__
    if name.startswith("layer_")
]


def _samples(dtype):
    layer, rows, parent, choice = make_case("s1", (2, 4, 2, 4), POPULATIONS["every_choice"])
    rows = rows.to(dtype)
    moments = random_moments(layer, len(choice)).to(dtype)
    plain = layer.given(dtype, False)
    y, statistics, saved = layer_train(rows, parent, choice, plain, layer.text)
    nodes = (parent, choice)
    needs = [True, *(index % 3 > 0 for index in range(len(plain)))]
    wanting = (rows.clone().requires_grad_(), *nodes, layer.given(dtype), layer.text)
    out, sums = torch.empty_like(y), [torch.ones_like(p) for p in plain]
    into = [torch.empty_like(value) for value in (y, statistics, saved)]
    kept = (statistics, saved, layer.text)
    return {
        "layer_infer": [(rows, *nodes, plain, moments, layer.text)],
        "layer_train": [wanting, (rows, *nodes, plain, layer.text, False)],
        "layer_backward": [
            (y, rows, *nodes, plain, *kept, given)
            for given in (needs, [not needed for needed in needs])
        ],
        "layer_infer_into": [(out, rows, *nodes, plain, moments, layer.text)],
        "layer_train_into": [
            (*into, rows, *nodes, plain, layer.text),
            (*into[:2], saved.new_empty(0), rows, *nodes, plain, layer.text),
        ],
        "layer_backward_into": [
            (d_rows, sums, y, rows, *nodes, plain, *kept)
            for d_rows in (torch.empty_like(rows), rows.new_empty(0))
        ],
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the check's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
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
    return buffers(parent.tolist(), rng.integers(0, choices, nodes).tolist())


def _check_compiled(backend, populations):
    first, second = (Layer(OPS[name](4)) for name in OPS)
    rows = torch.randn(1, 3, 4, 4, 4, generator=seeded(1))
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
    layer, rows, *nodes = make_case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    moments, given = random_moments(layer, 5), layer.given(needs=False)

    def apply(rows, parent, choice):
        return layer_infer(rows, parent, choice, given, moments, layer.text) * 2

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(rows, *nodes), apply(rows, *nodes))


def test_the_first_call_loads_no_compiler(fresh):
    code = (
        "import sys, torch\n"
        "from fastshift.operators import layer_train\n"
        "nodes = torch.zeros(1, dtype=torch.int32)\n"
        "rows = torch.ones(1, 2, 3, 3, 4, requires_grad=True)\n"
        "layer_train(rows, nodes, nodes, [], '[null]')[0].sum().backward()\n"
        "assert rows.grad.eq(1).all()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    fresh(code)
