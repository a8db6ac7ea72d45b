"""The population layer's operators in a caller's hands: memory, threads, and what is refused."""

from __future__ import annotations

import pytest
import torch
from block_cases import Poisoned, seeded
from operator_cases import (
    BY_NAME,
    BY_POPULATION,
    POPULATIONS,
    SHAPES,
    buffers,
    make_case,
    random_moments,
    trained,
)

from fastshift import _operators_cpu, cpu
from fastshift.operators import implementation, layer_backward, layer_infer, layer_train
from fastshift.population_layer import LayerOp, LayerUnit, describe_layer, describe_op, parse_layer

pytestmark = pytest.mark.usefixtures("backend")

# Memory and threads


@BY_NAME
@BY_POPULATION
def test_outputs_are_memory_that_was_full_of_nan(name, population, monkeypatch):
    layer, *case = make_case(name, SHAPES["odd"], population)
    moments = random_moments(layer, len(case[1]))
    given = layer.given(needs=False)
    expected = trained(layer, *case)
    scored = layer_infer(*case, given, moments, layer.text)
    poison, memory = Poisoned(), cpu._memory
    monkeypatch.setattr(_operators_cpu, "torch", poison)
    monkeypatch.setattr(cpu, "_memory", lambda floats: poison.count(memory(floats)))
    found = trained(layer, *case)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(layer_infer(*case, given, moments, layer.text), scored)
    assert poison.given >= 4


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_packed_once_for_all_nodes_change_no_bit(name, dtype, monkeypatch):
    """A choice's nodes share them, forward, backward and in inference."""
    layer, rows, *nodes = make_case(name, SHAPES["odd"], (2, [0, 1, 1, 0, 1], [1, 2, 1, 2, 3]))
    moments, given = random_moments(layer, len(nodes[0])), layer.given(needs=False)

    def results():
        found = trained(layer, rows, *nodes, rows_type=dtype)
        found["scored"] = layer_infer(rows.to(dtype), *nodes, given, moments, layer.text)
        return found

    shared, made = results(), []
    monkeypatch.setattr(_operators_cpu._Call, "packed", lambda _, choice: made.append(choice))
    alone = results()
    assert len(made) == 3 * len(nodes[0])
    assert shared.keys() == alone.keys()
    assert all(torch.equal(shared[key], alone[key]) for key in alone)


def test_the_number_of_threads_changes_no_bit():
    layer, *case = make_case("s1", (19, 6, 5, 4), POPULATIONS["cousins"])
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(trained(layer, *case))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(found[key], results[0][key]) for key in found)


def test_without_a_backward_to_come_nothing_is_kept():
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    given = layer.given(needs=False)
    kept = layer_train(rows, parent, choice, given, layer.text)
    not_kept = layer_train(rows, parent, choice, given, layer.text, False)
    assert len(kept[2]) > 0
    assert len(not_kept[2]) == 0
    assert all(map(torch.equal, kept[:2], not_kept[:2]))
    with pytest.raises(ValueError, match="keep: False"):
        layer_train(rows.requires_grad_(), parent, choice, given, layer.text, False)


def test_any_memory_of_rows_and_parameters_gives_the_same_bits():
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    expected = trained(layer, rows, parent, choice)
    layer.parameters = [
        p.detach().contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p
        for p in layer.parameters
    ]
    channels_first = rows.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert not channels_first.is_contiguous()
    found = trained(layer, channels_first, parent, choice)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_weight_that_moved_between_forward_and_backward_is_noticed():
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["lone"])
    given = layer.given()
    y, _, _ = layer_train(rows, parent, choice, given, layer.text)
    with torch.no_grad():
        given[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused_and_not_made_up():
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["lone"])
    rows.requires_grad_()
    y, _, _ = layer_train(rows, parent, choice, layer.given(), layer.text)
    [first] = torch.autograd.grad(y.square().sum(), [rows], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first.square().sum() + y.sum()).backward()


# What does not fit


def test_arguments_that_do_not_fit_are_refused_by_name():
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["cousins"])
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
    wanted = parse_layer(text).moments_floats
    empty = torch.empty(len(choice), wanted, device="meta")
    with pytest.raises(ValueError, match=r"moments: .* on meta; expected .* on cpu"):
        layer_infer(rows, parent, choice, given, empty, text)
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
        ([(False, 4, 4, 1, 2)], 1, "residual"),
        ([(False, 4, 4, 1, 2)], 1, "shuffle"),
        ([(False, 4, 4, 1, 2), (False, 4, 4, 1, 1)], 1, "residual"),
        ([(False, 4, 4, 1, 1), (False, 4, 4, 1, 1)], 1, "plain"),
    ],
)
def test_units_that_do_not_follow_each_other_are_refused(units, main, frame):
    with pytest.raises(ValueError, match="units that do not follow each other"):
        LayerOp(tuple(LayerUnit(*unit, True, 1e-5) for unit in units), main, frame)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_no_part_of_a_gradient_comes_back_through_inference(name, monkeypatch):
    monkeypatch.setenv("FASTSHIFT_BACKEND", name)
    layer, rows, parent, choice = make_case("s1", SHAPES["odd"], POPULATIONS["cousins"])
    moments = torch.ones(len(choice), parse_layer(layer.text).moments_floats)
    given = layer.given(needs=True)
    out = layer_infer(rows.requires_grad_(), parent, choice, given, moments, layer.text)
    assert not out.requires_grad


def _one_unit(*unit):
    return describe_op(LayerOp((LayerUnit(*unit),), 1, "plain"))


def test_choices_of_different_shapes_are_refused():
    text = describe_layer(["null", _one_unit(False, 4, 5, 1, 1, True, 1e-5, False, False)])
    rows, nodes = torch.zeros(1, 3, 5, 4, 4), buffers([0], [0])
    with pytest.raises(ValueError, match="its choices map"):
        layer_train(rows, *nodes, [torch.zeros(5, 4, 1, 1)], text)


def test_a_unit_that_the_kernels_do_not_have_is_the_references():
    text = describe_layer([_one_unit(True, 4, 4, 9, 3, True, 1e-5, True, False)])
    rows, nodes = torch.randn(1, 3, 5, 4, 4, generator=seeded()), buffers([0], [0])
    weight, scale = torch.randn(4, 1, 9, 9, generator=seeded()), torch.ones(4)
    assert implementation(parse_layer(text), rows, [weight, scale]) == "reference"
    y, statistics, saved = layer_train(rows.requires_grad_(), *nodes, [weight, scale], text)
    assert y.shape == (1, 3, 2, 2, 4)
    assert statistics.shape == (1, 20)
    assert len(saved) == 0
    y.square().sum().backward()
    assert rows.grad.isfinite().all()


def test_no_nodes_and_no_images_give_no_rows():
    layer, rows, parent, choice = make_case("s2", SHAPES["odd"], POPULATIONS["lone"])
    moments = random_moments(layer, 1)
    for dtype in (torch.float32, torch.float64):
        own, x, m = layer.given(dtype, False), rows.to(dtype), moments.to(dtype)
        y = layer_infer(x, parent[:0], choice[:0], own, m[:0], layer.text)
        assert y.shape == (0, 3, 3, 2, 12)
        y = layer_infer(x[:, :0], parent, choice, own, m, layer.text)
        assert y.shape == (1, 0, 3, 2, 12)
