"""Inference of a population layer by Triton: its kernel is the reference, whatever the nodes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from block_cases import Poisoned
from infer_cases import FORMS, KERNELS, OPS, SHAPES, InferCase, take
from kernel_cases import DEVICE, NAMES, interpreted

from fastshift.kernels import infer as kernels
from fastshift.kernels import infer_bands, infer_tiles
from fastshift.kernels.cards import card_of
from fastshift.kernels.infer_bands import plan_bands
from fastshift.operators import implementation, layer_infer
from fastshift.ops import (
    identity,
    inverted_residual,
    projection,
    shuffle_unit,
)

pytestmark = pytest.mark.usefixtures("like_a_device")


LAUNCHES = {"s1": 3, "s2": 3, "rare": 3, "end_in_depthwise": 2}


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    monkeypatch.setattr(kernels, "torch", Poisoned())


_QUICK = ("stages", "rows")
_FORMS = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in FORMS]


@pytest.fixture(params=_FORMS)
def form(request, monkeypatch):
    """Each form of a layer's launches."""
    take(FORMS[request.param], monkeypatch)
    return request.param


@pytest.fixture(params=["stages", "parts"])
def one_form_of_each(request, monkeypatch):
    """A launch for each stage, and one for all."""
    take(FORMS[request.param], monkeypatch)
    return request.param


BY_NAME = pytest.mark.parametrize("name", OPS)
BY_DTYPE = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())


# Every choice, frame, stride and type against the reference in float64


def _assert_every_choice_is_accurate(name, size, kernel):
    shape = SHAPES[size]
    case = InferCase(OPS[name](shape[1], kernel), shape)
    case.assert_accurate(case.run())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("form", "name", "size"),
    [
        # Of the two in which bands have some rows of an image the interpreter takes long for one.
        pytest.param(*case, marks=[pytest.mark.slow] if case == ("rows", "s1", "odd") else [])
        for case in product(FORMS, ("s1", "s2"), SHAPES)
    ],
    indirect=["form"],
)
def test_every_choice_is_as_accurate_as_the_reference(name, size):
    _assert_every_choice_is_accurate(name, size, KERNELS[size])


@pytest.mark.usefixtures("one_form_of_each")
@pytest.mark.parametrize("name", ["rare", "end_in_depthwise"])
def test_chains_that_no_ready_made_space_has(name):
    _assert_every_choice_is_accurate(name, "odd", 3)


@pytest.mark.slow
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("name", ["rare", "end_in_depthwise"])
def test_chains_that_no_ready_made_space_has_in_every_form(name, size):
    _assert_every_choice_is_accurate(name, size, KERNELS[size])


@pytest.mark.usefixtures("one_form_of_each")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("s1", torch.bfloat16), ("s2", torch.bfloat16), ("s1", torch.float16)],
    ids=lambda value: NAMES.get(value, value),
)
def test_narrow_rows_are_as_accurate_as_their_type(name, dtype):
    case = InferCase(OPS[name](6), (2, 6, 5, 2), dtype=dtype)
    case.assert_accurate(case.run())


@pytest.mark.usefixtures("one_form_of_each")
def test_several_tiles_of_positions_output_channels_and_input_channels(monkeypatch):
    small = infer_tiles.Blocks(16, 16, 16, 4, 128, 3)
    monkeypatch.setattr(infer_bands, "block_sizes", lambda *_: small)
    ops = [inverted_residual(20, 20, 1, 1, 3), shuffle_unit(20, 20, 1, 3, mid=18), identity(20)]
    case = InferCase(ops, (3, 20, 3, 3), (1, (0, 0, 0), (0, 1, 2)))
    case.assert_accurate(case.run())


@pytest.mark.usefixtures("one_form_of_each")
def test_batch_norms_without_scale_and_shift():
    case = InferCase([shuffle_unit(4, 8, 2, 3)], SHAPES["tiny"], (1, (0,), (0,)), affine=False)
    case.assert_accurate(case.run())


def test_a_mean_far_from_zero_costs_no_more_digits_than_the_references():
    case = InferCase([projection(16, 8, 1)], (4, 16, 3, 3), (1, (0,), (0,)))
    case.rows += 1000.0
    raw = case.rows[0].double() @ case.parameters[0].double()[:, :, 0, 0].T
    mean, variance = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
    assert float((mean.abs() / variance.sqrt()).median()) > 100
    case.moments = torch.cat((mean, variance)).float()[None]
    case.assert_accurate(case.run())


@pytest.mark.usefixtures("one_form_of_each")
def test_a_nan_stays_one_through_activations():
    case = InferCase([inverted_residual(4, 4, 1, 2, 3)], SHAPES["tiny"], (1, (0,), (0,)))
    case.rows[0, 1] = torch.nan
    found = case.run()
    assert found[0, 1].isnan().all()
    assert not found[0, 0].isnan().any()


@pytest.mark.slow
@pytest.mark.usefixtures("one_form_of_each")
@BY_NAME
@BY_DTYPE
@pytest.mark.parametrize(
    ("shape", "affine"),
    [((5, 12, 7, 6), True), ((1, 16, 9, 1), False)],
    ids=["5x12x7x6-affine", "1x16x9x1-plain"],
)
def test_larger_rows_of_every_type(name, dtype, shape, affine):
    population = (3, (2, 2, 0, 0, 1, 2), (0, 1, 2, 3, 4, 1))
    case = InferCase(OPS[name](shape[1], 5), shape, population, dtype, affine)
    case.assert_accurate(case.run())


# What does not change a node


@pytest.mark.usefixtures("one_form_of_each")
def test_a_padding_node_is_not_written_and_disturbs_no_other():
    population = (2, (0, 1, 0, 1, 0), (1, -1, 4, -1, 0))
    case = InferCase(OPS["s1"](4), SHAPES["tiny"], population)
    found = case.run()
    assert found[[1, 3]].isnan().all()
    case.assert_accurate(found)


@pytest.mark.usefixtures("one_form_of_each")
def test_results_repeat_to_the_bit_whatever_stands_beside_a_node():
    ops = [identity(6), inverted_residual(6, 6, 1, 2, 3), shuffle_unit(6, 6, 1, 3)]
    case = InferCase(ops, (1, 6, 5, 2))
    found = case.run()
    order = [3, 1, 4]
    again = case.run(
        parent=case.parent[order], choice=case.choice[order], moments=case.moments[order]
    )
    assert torch.equal(found[order], again)


@interpreted
@pytest.mark.usefixtures("one_form_of_each")
def test_no_bit_depends_on_the_order_of_programs(last_program_first):
    case = InferCase(OPS["s1"](6), (1, 6, 5, 2), (2, (1, 0, 1), (4, 2, 1)))
    found = case.run()
    last_program_first()
    assert torch.equal(case.run(), found)


@pytest.mark.usefixtures("one_form_of_each")
def test_an_identity_is_a_copy_and_even_channels_pass_to_the_bit():
    case = InferCase(OPS["s1"](6), SHAPES["odd"], (2, (1, 0), (0, 2)), torch.bfloat16)
    found = case.run()
    assert torch.equal(found[0], case.rows[1])
    assert found.data_ptr() != case.rows.data_ptr()
    assert torch.equal(found[1, ..., :3], case.rows[0, ..., ::2])


@pytest.mark.usefixtures("one_form_of_each")
def test_memory_of_any_stride_is_read():
    ops = [projection(4, 8, 2), shuffle_unit(4, 8, 2, 3)]
    case = InferCase(ops, SHAPES["tiny"], (2, (1, 0, 1), (1, 0, 1)))
    found = case.run()
    channels_first = case.rows.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    aside = torch.zeros(len(case.choice), 2, dtype=torch.int32, device=DEVICE)
    aside[:, 1] = case.choice
    # A parameter that begins at no multiple of 16 bytes.
    moved = [torch.cat((p.new_zeros(1), p.flatten()))[1:].view(p.shape) for p in case.parameters]
    wide = torch.cat((case.moments, case.moments), dim=1)[:, : case.moments.shape[1]]
    again = case.run(rows=channels_first, choice=aside[:, 1], moments=wide, parameters=moved)
    assert torch.equal(found, again)


@pytest.mark.usefixtures("one_form_of_each")
def test_no_nodes_and_no_images_give_empty_rows():
    case = InferCase(OPS["s2"](4), SHAPES["tiny"])
    none = case.run(parent=case.parent[:0], choice=case.choice[:0], moments=case.moments[:0])
    assert none.shape == (0, 2, 1, 1, 8)
    assert case.run(rows=case.rows[:, :0]).shape == (5, 0, 1, 1, 8)


# Launches


class _Recorder:
    """Notes launches in the kernel's place."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants))


@pytest.fixture
def recorder(monkeypatch):
    found = _Recorder()
    for name in ("infer_bands_kernel", "infer_step_kernel"):
        monkeypatch.setattr(kernels, name, found)
    return found


@BY_NAME
@pytest.mark.parametrize("nodes", [1, 500])
@pytest.mark.parametrize("chosen", ["stages", "rows"])
def test_a_level_takes_one_launch_or_as_many_as_its_longest_chain_has_products(
    name, nodes, chosen, recorder, monkeypatch
):
    take(FORMS[chosen], monkeypatch)
    population = (2, (1,) * nodes, tuple(range(nodes)))
    case = InferCase(OPS[name](4), SHAPES["tiny"], population)
    case.run()
    assert len(recorder.launches) == (1 if chosen == "rows" else LAUNCHES[name])


def test_without_an_xception_a_level_takes_two_launches(recorder, monkeypatch):
    take(None, monkeypatch)
    kinds = [identity(8), inverted_residual(8, 8, 1, 6, 5), shuffle_unit(8, 8, 1, 7)]
    InferCase(kinds, SHAPES["easy"]).run()
    assert len(recorder.launches) == 2
    recorder.launches.clear()
    stem = [projection(8, 16, 2), inverted_residual(8, 16, 2, 3, 3), shuffle_unit(8, 16, 2, 5)]
    InferCase(stem, SHAPES["easy"]).run()
    assert len(recorder.launches) == 2


def test_programs_and_their_scratch_do_not_grow_with_the_population(recorder, monkeypatch):
    take(FORMS["rows"], monkeypatch)
    monkeypatch.setattr(kernels, "choose_bands", plan_bands)
    for nodes in (1, 500):
        population = (1, (0,) * nodes, (1,) * nodes)
        InferCase(OPS["s1"](4), SHAPES["tiny"], population).run()
    (few, given, _), (many, others, _) = recorder.launches
    assert few == many
    assert given[1].shape == others[1].shape
    card, _ = card_of(given[1].device)
    assert 0 < given[1].nbytes <= card.cache // 2


@pytest.mark.usefixtures("one_form_of_each")
def test_launches_of_two_populations_differ_in_device_buffers_alone(recorder):
    case = InferCase(OPS["s1"](4), SHAPES["tiny"])
    case.run()
    case.parent.copy_(torch.tensor([0, 0, 0, 1, 0]))
    case.choice.copy_(torch.tensor([-1, 2, 2, 0, 4]))
    case.run()
    half = len(recorder.launches) // 2
    first, second = recorder.launches[:half], recorder.launches[half:]
    for (grid, arguments, constants), (again, others, same) in zip(first, second, strict=True):
        assert grid == again
        assert constants == same
        for one, other in zip(arguments, others, strict=True):
            if isinstance(one, torch.Tensor):
                assert one.shape == other.shape
            else:
                assert one == other


# The operator


@pytest.fixture
def operator_runs_triton(monkeypatch):
    monkeypatch.setenv("FASTSHIFT_BACKEND", "triton")


@pytest.mark.usefixtures("operator_runs_triton")
@BY_DTYPE
def test_the_operator_runs_the_kernel(dtype):
    case = InferCase([identity(4), shuffle_unit(4, 4, 1, 3)], SHAPES["tiny"], dtype=dtype)
    assert implementation(case.layer, case.rows, case.parameters) == "triton"
    # Memory of another order, such as a dense kernel's in channels last.
    given = [p.mT.contiguous().mT if p.dim() > 1 else p for p in case.parameters]
    nodes = case.parent, case.choice
    found = layer_infer(case.rows, *nodes, given, case.moments, case.text)
    assert torch.equal(found, case.run())


@pytest.mark.usefixtures("operator_runs_triton")
def test_the_operator_keeps_what_compilers_rely_on():
    case = InferCase([identity(4), projection(4, 4, 1)], SHAPES["tiny"], (2, (1, 0), (1, 0)))
    sample = case.rows, case.parent, case.choice, case.parameters, case.moments, case.text
    torch.library.opcheck(torch.ops.fastshift.layer_infer.default, sample)


@pytest.mark.usefixtures("operator_runs_triton")
def test_a_compiled_function_serves_every_population_of_a_size():
    case = InferCase([identity(4), projection(4, 4, 1)], SHAPES["tiny"], (2, (1, 0, 0), (1, 0, 1)))

    def score(parent, choice):
        nodes = case.rows, parent, choice
        return 2 * layer_infer(*nodes, case.parameters, case.moments, case.text)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    different = np.random.default_rng(0).permutation(64)[:20]
    for index, population in enumerate(different):
        bits = [int(population) >> bit & 1 for bit in range(6)]
        parent, choice = (
            torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in (bits[:3], bits[3:])
        )
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            found = compiled(parent, choice)
        assert torch.equal(found, score(parent, choice))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
