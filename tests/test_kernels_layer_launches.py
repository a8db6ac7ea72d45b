"""A population layer in training by Triton: its launches, and the operator that makes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from block_cases import Poisoned
from catalogue import record
from kernel_cases import DEVICE, NAMES, OPS, SHAPES, TrainingCase, buffer, interpreted, layer_text

from fastshift import backends, spaces
from fastshift.errors import ConfigError
from fastshift.kernels import _launch, addresses, infer, plan
from fastshift.kernels import layer as kernels
from fastshift.operators import implementation, layer_train
from fastshift.population_layer import LayerOp, LayerUnit, describe_layer, describe_op, parse_layer

pytestmark = pytest.mark.usefixtures("like_a_device")


@pytest.fixture(autouse=True)
def use(backend):
    """Choose the implementation by its name; at first the Triton kernels."""
    backend("triton")
    return backend


@pytest.fixture(autouse=True)
def _unwritten_is_nan(monkeypatch):
    monkeypatch.setattr(kernels, "torch", Poisoned())


# Launches


def _space_layers():
    for name in spaces.names():
        space = spaces.build(name)
        for ops in {tuple(ops): None for ops in space.blocks}:
            yield layer_text(ops), ops[0].in_channels
    for ops in OPS.values():
        yield layer_text(ops(8)), 8


@pytest.mark.parametrize("nodes", [1, 50])
def test_launches_are_two_more_than_the_longest_chains_convolutions(nodes, monkeypatch):
    launches = []
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self: launches.append(self))
    monkeypatch.setattr(kernels, "torch", torch)
    for text, channels in _space_layers():
        layer = parse_layer(text)
        chains = [n for op in layer.ops if op for n in (op.main, len(op.units) - op.main)]
        longest = max(chains, default=0)
        own = plan.plan_layer(layer, 2, 8, 8, channels)
        rows = torch.empty(1, 2, 8, 8, channels, device="meta")
        buffers = [torch.empty(nodes, dtype=torch.int32, device="meta") for _ in range(2)]
        given = [torch.empty(shape, device="meta") for shape in layer.shapes]
        y, statistics, saved = kernels.train(rows, *buffers, given, own, True)
        assert 0 < len(launches) <= longest + 2
        launches.clear()
        kernels.backward(y, rows, *buffers, given, statistics, saved, own, True)
        assert 0 < len(launches) <= longest + 2
        launches.clear()


@pytest.mark.parametrize("name", ["s1", "s2", "rare", "kernels"])
@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.get)
def test_one_machine_code_serves_every_population(name, dtype, monkeypatch):
    """Whatever the nodes, the parents and their numbers, Triton specialises a launch once."""
    monkeypatch.setattr(kernels, "torch", torch)
    case = TrainingCase(name, SHAPES["easy"], dtype=dtype)
    own = plan.plan_layer(case.layer, *case.rows.shape[1:])
    moments_floats, size = case.layer.moments_floats, (*own.out_size, own.channels[1])
    rng = np.random.default_rng(0)
    keys = set()
    # Nodes and rows: numbers that Triton has a code for (1, multiples of 16) and others, with each.
    for index, (nodes, num_rows) in enumerate(
        [(37, 5), (1, 1), (16, 1), (1, 32), (64, 16), (3, 2)]
    ):
        parent = buffer(rng.integers(0, num_rows, nodes).tolist())
        choice = buffer(rng.integers(-1, len(case.layer.ops), nodes).tolist())
        rows = case.rows.new_empty(num_rows, *case.rows.shape[1:])
        given = (rows, parent, choice, case.parameters)
        moments = torch.empty(nodes, moments_floats, device=DEVICE)
        if index == 0:
            kernels.address_table(case.parameters, rows.device)
        with record() as found:
            y, statistics, saved = kernels.train(*given, own, True)
            kernels.backward(y, *given, statistics, saved, own, True)
            infer.infer(*given, moments, case.layer, size)
        keys.add(tuple(launch.key for launch in found.launches))
    assert len(keys) == 1


def test_a_shortest_sequence_of_steps():
    assert plan.supersequence(["PDP", "P", "DP"]) == "PDP"
    assert plan.supersequence(["PDP", "DPDPDP"]) == "DPDPDP"
    assert len(plan.supersequence(["PDP", "DPD"])) == 4
    assert plan.supersequence([]) == ""


def test_what_is_not_on_the_device_is_not_copied_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda = torch.device("cuda", 0)
    layer = parse_layer(layer_text(OPS["one"](4)))
    with pytest.raises(RuntimeError, match="a layer's plan is not on cuda:0 yet"):
        plan.LayerPlan(layer, 2, 3, 3, 4).tables(cuda, kept=True)
    with pytest.raises(RuntimeError, match="call the function once before the capture"):
        addresses.address_table([torch.zeros(3)], cuda)


# The operator


@interpreted
def test_what_the_kernels_do_not_have_is_the_references(use):
    case = TrainingCase("one", (2, 4, 2, 2), (1, [0], [1]))
    rows, given = case.rows, case.parameters
    assert implementation(case.layer, rows.double(), [p.double() for p in given]) == "reference"
    assert implementation(case.layer, rows, [p.double() for p in given]) == "reference"
    unit = LayerUnit(True, 4, 4, 9, 1, True, 1e-5)
    wide = parse_layer(describe_layer([describe_op(LayerOp((unit,), 1, "plain"))]))
    assert implementation(wide, rows, []) == "reference"
    assert implementation(case.layer, rows.half(), given) == "triton"
    use("cpu")
    assert implementation(case.layer, rows, given) == "cpu"
    assert implementation(case.layer, rows.half(), given) == "reference"
    use("reference")
    assert implementation(case.layer, rows, given) == "reference"


def test_triton_says_why_it_cannot_run(use, monkeypatch):
    case = TrainingCase("one", (2, 4, 2, 2), (1, [0], [1]))
    rows = case.rows.cpu()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no CUDA device, and TRITON_INTERPRET=1"):
        implementation(case.layer, rows, case.parameters)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backends.backends()["triton"] is None
    with pytest.raises(ConfigError, match="rows are on a CPU, and TRITON_INTERPRET=1"):
        implementation(case.layer, rows, case.parameters)
    monkeypatch.setattr(backends, "_lacks_triton", lambda: "triton is not installed")
    with pytest.raises(ConfigError, match="triton is not installed"):
        implementation(case.layer, rows, case.parameters)


def test_buffers_of_another_type_are_refused():
    case = TrainingCase("one", (2, 4, 2, 2), (1, [0], [1]))
    with pytest.raises(ValueError, match=r"choice: torch\.int64"):
        layer_train(case.rows, case.parent, case.choice.long(), case.parameters, case.text)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the check's own
@pytest.mark.parametrize("name", ["layer_train", "layer_backward"])
def test_pytorchs_own_check_of_operators(name, monkeypatch):
    monkeypatch.setattr(kernels, "torch", torch)
    plain = kernels._raw_rows  # what is kept has gaps that no one writes, and must compare equal
    monkeypatch.setattr(kernels, "_raw_rows", lambda *given: plain(*given).zero_())
    case = TrainingCase("one", (2, 4, 1, 1), (1, [0], [1]))
    nodes, given = (case.parent, case.choice), case.parameters
    y, statistics, saved = layer_train(case.rows, *nodes, given, case.text)
    wanting = [p.clone().requires_grad_() for p in given]
    sample = {
        "layer_train": (case.rows.clone().requires_grad_(), *nodes, wanting, case.text),
        "layer_backward": (
            *(y, case.rows, *nodes, given, statistics, saved, case.text),
            [True, True, False, True],
        ),
    }[name]
    torch.library.opcheck(getattr(torch.ops.fastshift, name).default, sample)


def test_a_compiled_function_serves_every_population_of_a_size():
    case = TrainingCase("one", (2, 4, 1, 1), (2, [0, 1, 1], [1, 0, 1]))

    def gradients(apply, parent, choice):
        rows = case.rows.clone().requires_grad_()
        given = [p.clone().requires_grad_() for p in case.parameters]
        loss, statistics = apply(rows, parent, choice, given)
        loss.backward()
        return [loss.detach(), statistics, rows.grad, *(p.grad for p in given)]

    def apply(rows, parent, choice, given):
        y, statistics, _ = layer_train(rows, parent, choice, given, case.text)
        return y.square().mean(), statistics.sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    different = np.random.default_rng(0).permutation(64)[:20]
    for index, population in enumerate(different):
        bits = [int(population) >> bit & 1 for bit in range(6)]
        nodes = [buffer(bits[:3]), buffer(bits[3:])]
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            found = gradients(compiled, *nodes)
        if index % 5 == 0:
            for ours, plain in zip(found, gradients(apply, *nodes), strict=True):
                expected = torch.zeros_like(ours) if plain is None else plain
                assert torch.equal(ours, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
