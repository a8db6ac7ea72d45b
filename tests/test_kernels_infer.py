"""Inference of a population layer by Triton: its kernel is the reference, whatever the nodes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from block_cases import Poisoned
from kernel_cases import DEVICE, NAMES, interpreted, layer_text, op_of

from fastshift import _operators_ref
from fastshift.kernels import infer as kernels
from fastshift.kernels import infer_bands, infer_tiles
from fastshift.kernels.cards import CARDS, card_of
from fastshift.kernels.infer_bands import Machine, plan_bands, seconds_by_steps
from fastshift.kernels.infer_plan import plan_infer
from fastshift.operators import implementation, layer_infer
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
from fastshift.population_layer import parse_layer
from fastshift.testing import FLOORS

pytestmark = pytest.mark.usefixtures("like_a_device")


def _rare(c, kernel=3):
    """What the ready-made spaces have not: other ends of chains, dense ones, other shortcuts."""
    wide = ("pointwise", c, 2 * c, 1, 1, None)
    return [
        op_of([wide, ("depthwise", 2 * c, 2 * c, 3, 2)], "plain", 2),
        op_of([("depthwise", c, c, kernel, 2), ("depthwise", c, c, 3, 1, None), wide], "plain", 2),
        op_of(
            [("depthwise", c, c, 3, 2), wide],
            "residual",
            2,
            [("dense", c, c, 3, 2), ("depthwise", c, c, 3), wide],
        ),
        op_of([("dense", c, 2 * c, 3, 2)], "residual", 2, [("pointwise", c, 2 * c, 1, 2, None)]),
    ]


OPS = {
    "s1": lambda c, kernel=3: [
        identity(c),
        inverted_residual(c, c, 1, 3, kernel),
        shuffle_unit(c, c, 1, 3),
        conv(c, c, 3, 1),
        shuffle_xception(c, c, 1),
    ],
    "s2": lambda c, kernel=3: [
        projection(c, 2 * c, 2),
        inverted_residual(c, 2 * c, 2, 3, 3),
        shuffle_unit(c, 2 * c, 2, kernel),
        shuffle_xception(c, 2 * c, 2),
        op_of(
            [("depthwise", c, c, 3, 2), ("pointwise", c, 2 * c, 1, 1, None)],
            "residual",
            2,
            [("pointwise", c, 2 * c, 1, 2, None)],
        ),
    ],
    "rare": _rare,
    "end_in_depthwise": lambda c, kernel=3: [
        op_of([("pointwise", c, c), ("depthwise", c, c, kernel, 1, None)], "residual"),
        Op(
            "shuffle",
            c,
            c,
            1,
            (Unit("depthwise", c // 2, c // 2, 3), Unit("depthwise", c // 2, c // 2, 3)),
            Frame("shuffle"),
        ),
        Op("dense", c, c, 1, (Unit("dense", c // 2, c // 2, 3),), Frame("shuffle")),
    ],
}
LAUNCHES = {"s1": 3, "s2": 3, "rare": 3, "end_in_depthwise": 2}
SHAPES = {"easy": (2, 8, 4, 4), "odd": (3, 6, 5, 3), "tiny": (2, 4, 1, 1)}  # N, C, H, W
KERNELS = {"easy": 5, "odd": 7, "tiny": 3}  # the largest depthwise one
EVERY_CHOICE = (2, (1, 0, 0, 1, 1), (4, 3, 2, 1, 0))  # rows above; parent, choice of each node


class _Case:
    """A layer, rows, nodes, parameters and moments."""

    def __init__(self, ops, shape, population=EVERY_CHOICE, dtype=torch.float32, affine=True):
        n, c, h, w = shape
        generator = torch.Generator().manual_seed(0)
        self.text = layer_text(ops, affine)
        self.layer = parse_layer(self.text)
        num_rows, parent, choice = population
        self.rows = torch.randn(num_rows, n, h, w, c, generator=generator).to(DEVICE, dtype)
        self.parent = torch.tensor(parent, dtype=torch.int32, device=DEVICE)
        choice = [index % len(ops) if index >= 0 else index for index in choice]
        self.choice = torch.tensor(choice, dtype=torch.int32, device=DEVICE)
        self.parameters = []
        for size in self.layer.shapes:
            scale = math.sqrt(2 / math.prod(size[1:])) if len(size) > 1 else 1.0
            self.parameters.append((torch.randn(size, generator=generator) * scale).to(DEVICE))
        size = (len(choice), self.layer.moments_floats)
        variance = torch.rand(size, generator=generator) + 0.5
        # Means and variances take turns; a mean may be negative, a variance not.
        self.moments = (variance * torch.rand(size, generator=generator)).to(DEVICE) + 0.1
        self.shape = self.layer.output_shape(h, w, c)

    def run(self, **given):
        own = {n: given.get(n, getattr(self, n)) for n in ("rows", "parent", "choice")}
        parameters = given.get("parameters", self.parameters)
        moments = given.get("moments", self.moments)
        return kernels.infer(*own.values(), parameters, moments, self.layer, self.shape)

    def reference(self, dtype=None):
        """Rows of the nodes that are there, in a type, or the rows' with wider parameters."""
        there = self.choice >= 0
        rows, wide = (self.rows.to(dtype), dtype) if dtype else (self.rows, torch.float32)
        return _operators_ref.infer(
            rows,
            self.parent[there].tolist(),
            self.choice[there].tolist(),
            [p.to(wide) for p in self.parameters],
            self.moments[there].to(wide),
            self.layer,
        )

    def assert_accurate(self, found):
        """Node by node."""
        assert found.dtype is self.rows.dtype
        assert found.shape == (len(self.choice), self.rows.shape[1], *self.shape)
        floor = FLOORS[self.rows.dtype]
        there = (self.choice >= 0).nonzero()[:, 0].tolist()
        exact, plain = self.reference(torch.float64), self.reference()
        for node, right, own in zip(there, exact, plain, strict=True):
            error, bound = (float((y.double() - right).norm()) for y in (found[node], own))
            limit = max(2 * bound, floor * float(right.norm()))
            choice = int(self.choice[node])
            assert error <= limit, f"node {node}, choice {choice}: {error:.3g} > {limit:.3g}"


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    monkeypatch.setattr(kernels, "torch", Poisoned())


# Images and rows of a band at a time, and whether a depthwise convolution and its product are two
# jobs; None is a launch for each stage.
FORMS = {"stages": None, "rows": (1, 3, False), "parts": (1, 4, True), "images": (2, 99, False)}


def _take(form, monkeypatch, programs=3):
    """Have layers computed in bands of a size, with few programs, or stage by stage."""

    def choose(plan, machine):
        found = plan_bands(plan, machine, form[2:]) if form else None
        return found and replace(found, programs=programs)

    def bands(images, chain, *, of=infer_bands._bands):
        height = next(job["out_height"] for job in chain if not job["to_hidden"])
        wanted = form[0], min(form[1], height)
        found = [band for band in of(images, chain) if (band.images, band.rows) == wanted]
        return found or list(of(images, chain))[-1:]

    monkeypatch.setattr(kernels, "choose_bands", choose)
    if form:
        monkeypatch.setattr(infer_bands, "_bands", bands)
    for name in ("_bands", "_launches"):  # which keep what they once chose
        monkeypatch.setattr(kernels, name, cache(getattr(kernels, name).__wrapped__))


_QUICK = ("stages", "rows")
_FORMS = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in FORMS]


@pytest.fixture(params=_FORMS)
def form(request, monkeypatch):
    """Each form of a layer's launches."""
    _take(FORMS[request.param], monkeypatch)
    return request.param


@pytest.fixture(params=["stages", "parts"])
def one_form_of_each(request, monkeypatch):
    """A launch for each stage, and one for all."""
    _take(FORMS[request.param], monkeypatch)
    return request.param


BY_NAME = pytest.mark.parametrize("name", OPS)
BY_DTYPE = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())


# Every choice, frame, stride and type against the reference in float64


def _assert_every_choice_is_accurate(name, size, kernel):
    shape = SHAPES[size]
    case = _Case(OPS[name](shape[1], kernel), shape)
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
    case = _Case(OPS[name](6), SHAPES["odd"], dtype=dtype)
    case.assert_accurate(case.run())


@pytest.mark.usefixtures("one_form_of_each")
def test_several_tiles_of_positions_output_channels_and_input_channels(monkeypatch):
    small = infer_tiles.Blocks(16, 16, 16, 4, 128, 3)
    for module in (kernels, infer_bands):
        monkeypatch.setattr(module, "block_sizes", lambda *_: small)
    ops = [inverted_residual(20, 20, 1, 1, 3), shuffle_unit(20, 20, 1, 3, mid=18), identity(20)]
    case = _Case(ops, (3, 20, 3, 3), (1, (0, 0, 0), (0, 1, 2)))
    case.assert_accurate(case.run())


@pytest.mark.usefixtures("one_form_of_each")
def test_batch_norms_without_scale_and_shift():
    case = _Case([shuffle_unit(4, 8, 2, 3)], SHAPES["tiny"], (1, (0,), (0,)), affine=False)
    case.assert_accurate(case.run())


def test_a_mean_far_from_zero_costs_no_more_digits_than_the_references():
    case = _Case([projection(16, 8, 1)], (4, 16, 3, 3), (1, (0,), (0,)))
    case.rows += 100.0
    raw = case.rows[0].double() @ case.parameters[0].double()[:, :, 0, 0].T
    mean, variance = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
    assert float((mean.abs() / variance.sqrt()).median()) > 10
    case.moments = torch.cat((mean, variance)).float()[None]
    case.assert_accurate(case.run())


@pytest.mark.usefixtures("one_form_of_each")
def test_a_nan_stays_one_through_activations():
    case = _Case([inverted_residual(4, 4, 1, 2, 3)], SHAPES["tiny"], (1, (0,), (0,)))
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
    case = _Case(OPS[name](shape[1], 5), shape, population, dtype, affine)
    case.assert_accurate(case.run())


# What does not change a node


@pytest.mark.usefixtures("one_form_of_each")
def test_a_padding_node_is_not_written_and_disturbs_no_other():
    population = (2, (0, 1, 0, 1, 0), (1, -1, 4, -1, 0))
    case = _Case(OPS["s1"](4), SHAPES["tiny"], population)
    found = case.run()
    assert found[[1, 3]].isnan().all()
    case.assert_accurate(found)


@pytest.mark.usefixtures("one_form_of_each")
def test_results_repeat_to_the_bit_whatever_stands_beside_a_node():
    ops = [identity(6), inverted_residual(6, 6, 1, 2, 3), shuffle_unit(6, 6, 1, 3)]
    case = _Case(ops, SHAPES["odd"])
    found = case.run()
    order = [3, 1, 4]
    again = case.run(
        parent=case.parent[order], choice=case.choice[order], moments=case.moments[order]
    )
    assert torch.equal(found[order], again)


@interpreted
@pytest.mark.usefixtures("one_form_of_each")
def test_no_bit_depends_on_the_order_of_programs(last_program_first):
    case = _Case(OPS["s1"](6), SHAPES["odd"], (2, (1, 0, 1), (4, 2, 1)))
    found = case.run()
    last_program_first()
    assert torch.equal(case.run(), found)


@pytest.mark.usefixtures("one_form_of_each")
def test_an_identity_is_a_copy_and_even_channels_pass_to_the_bit():
    case = _Case(OPS["s1"](6), SHAPES["odd"], (2, (1, 0), (0, 2)), torch.bfloat16)
    found = case.run()
    assert torch.equal(found[0], case.rows[1])
    assert found.data_ptr() != case.rows.data_ptr()
    assert torch.equal(found[1, ..., :3], case.rows[0, ..., ::2])


@pytest.mark.usefixtures("one_form_of_each")
def test_memory_of_any_stride_is_read():
    ops = [projection(4, 8, 2), shuffle_unit(4, 8, 2, 3)]
    case = _Case(ops, SHAPES["tiny"], (2, (1, 0, 1), (1, 0, 1)))
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
    case = _Case(OPS["s2"](4), SHAPES["tiny"])
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
    _take(FORMS[chosen], monkeypatch)
    population = (2, (1,) * nodes, tuple(range(nodes)))
    case = _Case(OPS[name](4), SHAPES["tiny"], population)
    case.run()
    assert len(recorder.launches) == (1 if chosen == "rows" else LAUNCHES[name])


def test_without_an_xception_a_level_takes_two_launches(recorder, monkeypatch):
    _take(None, monkeypatch)
    kinds = [identity(8), inverted_residual(8, 8, 1, 6, 5), shuffle_unit(8, 8, 1, 7)]
    _Case(kinds, SHAPES["easy"]).run()
    assert len(recorder.launches) == 2
    recorder.launches.clear()
    stem = [projection(8, 16, 2), inverted_residual(8, 16, 2, 3, 3), shuffle_unit(8, 16, 2, 5)]
    _Case(stem, SHAPES["easy"]).run()
    assert len(recorder.launches) == 2


def test_programs_and_their_scratch_do_not_grow_with_the_population(recorder, monkeypatch):
    _take(FORMS["rows"], monkeypatch)
    monkeypatch.setattr(kernels, "choose_bands", plan_bands)
    for nodes in (1, 500):
        population = (1, (0,) * nodes, (1,) * nodes)
        _Case(OPS["s1"](4), SHAPES["tiny"], population).run()
    (few, given, _), (many, others, _) = recorder.launches
    assert few == many
    assert given[1].shape == others[1].shape
    card, _ = card_of(given[1].device)
    assert 0 < given[1].nbytes <= card.cache // 2


@pytest.mark.usefixtures("one_form_of_each")
def test_launches_of_two_populations_differ_in_device_buffers_alone(recorder):
    case = _Case(OPS["s1"](4), SHAPES["tiny"])
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


# Which form, and its bands


def _machine(rate="bf16", item_size=2, **changes):
    card = replace(CARDS[80], **changes)
    return Machine(card, card.multiprocessors, item_size, rate)


def _plan(ops, *size):
    return plan_infer(parse_layer(layer_text(ops)), *size)


def test_one_launch_is_chosen_where_memory_binds_and_stages_where_arithmetic_does():
    narrow = _plan([inverted_residual(32, 32, 1, 3, 3)], 150, 16, 16, 32)
    assert infer_bands.choose_bands(narrow, _machine())
    # Nothing is gained on a card of endless bandwidth, whose bands compute rows anew.
    tall = _plan([inverted_residual(16, 16, 1, 6, 7)], 150, 56, 56, 16)
    found = plan_bands(tall, _machine(bandwidth=1e18))
    assert found.seconds > seconds_by_steps(tall, _machine(bandwidth=1e18))
    assert infer_bands.choose_bands(tall, _machine(bandwidth=1e18)) is None
    assert infer_bands.choose_bands(tall, _machine(bandwidth=1e10))


def test_a_layer_of_one_stage_and_one_whose_rows_fit_no_scratch_go_by_stages():
    assert plan_bands(_plan([projection(8, 8, 1)], 2, 4, 4, 8), _machine()) is None
    wide = _plan([inverted_residual(64, 64, 1, 6, 3)], 2, 4, 512, 64)
    assert plan_bands(wide, _machine()) is None
    assert plan_bands(wide, _machine(cache=2**32))


@pytest.mark.parametrize("cache", [2**25, 2**27, 2**29])
@pytest.mark.parametrize("kernel", [3, 7])
def test_scratches_fit_their_share_of_the_cache_and_bands_make_up_all_rows(cache, kernel):
    ops = [identity(32), inverted_residual(32, 32, 1, 3, kernel), shuffle_xception(32, 32, 1)]
    plan = _plan(ops, 150, 16, 16, 32)
    found = plan_bands(plan, _machine(cache=cache))
    assert found.programs % 108 == 0
    assert 2 * found.programs * found.scratch <= infer_bands.CACHE_SHARE * cache
    for jobs in found.step.jobs:
        (images,), (rows,), (down,) = (
            {job[name] for job in jobs} for name in ("band_images", "band_rows", "bands_down")
        )
        assert down * rows >= 16 > (down - 1) * rows
        assert images == 1 or rows == 16
        assert -(-150 // images) * down <= found.bands
    assert seconds_by_steps(plan, _machine(cache=cache)) == seconds_by_steps(plan, _machine())


def test_a_larger_cache_computes_no_more_anew():
    plan = _plan([inverted_residual(32, 32, 1, 6, 7)], 150, 56, 56, 32)
    times = [plan_bands(plan, _machine(cache=2**power)).seconds for power in (26, 27, 28, 29)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_a_convolution_in_front_of_a_wide_product_is_a_job_of_its_own():
    wide = _plan([shuffle_unit(320, 320, 1, 7)], 150, 14, 14, 320)
    together, apart = (plan_bands(wide, _machine(), (parts,)) for parts in (False, True))
    kinds = [[job.kind_name for job in found.step.jobs[0]] for found in (together, apart)]
    assert sorted(kinds[0]) == ["copy", "pair", "pointwise"]
    assert sorted(kinds[1]) == ["copy", "depthwise", "pointwise", "pointwise"]
    assert plan_bands(wide, _machine()).seconds == apart.seconds < together.seconds
    narrow = _plan([shuffle_unit(32, 32, 1, 3)], 150, 16, 16, 32)
    found = plan_bands(narrow, _machine())
    assert sorted(job.kind_name for job in found.step.jobs[0]) == ["copy", "pair", "pointwise"]


def test_rows_that_a_band_needs_are_those_that_its_convolutions_read():
    ops = [shuffle_xception(8, 16, 2)]  # depthwise of stride 2, then two of stride 1
    (jobs,) = zip(*(step.jobs[0] for step in _plan(ops, 1, 12, 12, 8).steps), strict=False)
    main = [job for job in jobs if job["out_channels"]]
    assert [(job["times"], job["before"], job["reach"]) for job in main] == [
        (1, 2, 5),
        (1, 1, 3),
        (1, 0, 1),
    ]


def test_a_device_that_is_none_has_the_figures_of_the_smallest_card():
    card, count = card_of(torch.device("meta"))
    assert card is CARDS[80]
    assert count == card.multiprocessors == 108


def test_a_card_that_is_not_listed_has_its_own_cache(monkeypatch):
    own = SimpleNamespace(
        multi_processor_count=82, L2_cache_size=6 << 20, shared_memory_per_multiprocessor=100 << 10
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
    card, count = card_of(torch.device("cuda"))
    assert (card.cache, card.shared, count) == (6 << 20, 100 << 10, 82)
    assert card.rates == CARDS[80].rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("channels", [4, 24, 160, 640])
def test_tiles_are_powers_of_two_that_fit_the_registers(channels, dtype):
    layer = parse_layer(layer_text(OPS["s2"](channels)))
    plan = plan_infer(layer, 150, 28, 28, channels)
    for step in plan.steps:
        blocks = infer_tiles.block_sizes(step, 150, dtype.itemsize, dtype is not torch.float32)
        for size in (blocks.positions, blocks.channels, blocks.depth, blocks.warps):
            assert size == triton.next_power_of_2(size)
        assert min(blocks.positions, blocks.channels, blocks.depth) >= 16
        assert blocks.positions * blocks.channels <= 32 * 32 * blocks.warps
        assert blocks.positions * blocks.depth <= 16 * 32 * blocks.warps
        assert blocks.warps <= 16


def test_rows_beyond_the_offsets_are_refused():
    layer = parse_layer(layer_text([projection(1024, 1024, 1)]))
    with pytest.raises(ValueError, match="rows: 268435456 elements"):
        plan_infer(layer, 1, 512, 512, 1024)
    with pytest.raises(ValueError, match="rows: 1073741824 positions"):
        plan_infer(layer, 65536, 128, 128, 1024)


# The operator


@pytest.fixture
def operator_runs_triton(monkeypatch):
    monkeypatch.setenv("FASTSHIFT_BACKEND", "triton")


@pytest.mark.usefixtures("operator_runs_triton")
@BY_DTYPE
def test_the_operator_runs_the_kernel(dtype):
    case = _Case([identity(4), shuffle_unit(4, 4, 1, 3)], SHAPES["tiny"], dtype=dtype)
    assert implementation(case.layer, case.rows, case.parameters) == "triton"
    # Memory of another order, such as a dense kernel's in channels last.
    given = [p.mT.contiguous().mT if p.dim() > 1 else p for p in case.parameters]
    nodes = case.parent, case.choice
    found = layer_infer(case.rows, *nodes, given, case.moments, case.text)
    assert torch.equal(found, case.run())


@pytest.mark.usefixtures("operator_runs_triton")
def test_the_operator_keeps_what_compilers_rely_on():
    case = _Case([identity(4), projection(4, 4, 1)], SHAPES["tiny"], (2, (1, 0), (1, 0)))
    sample = case.rows, case.parent, case.choice, case.parameters, case.moments, case.text
    torch.library.opcheck(torch.ops.fastshift.layer_infer.default, sample)


@pytest.mark.usefixtures("operator_runs_triton")
def test_a_compiled_function_serves_every_population_of_a_size():
    case = _Case([identity(4), projection(4, 4, 1)], SHAPES["tiny"], (2, (1, 0, 0), (1, 0, 1)))

    def score(parent, choice):
        nodes = case.rows, parent, choice
        return 2 * layer_infer(*nodes, case.parameters, case.moments, case.text)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    rng = np.random.default_rng(0)
    for index in range(20):
        parent, choice = (
            torch.tensor(rng.integers(0, 2, 3), dtype=torch.int32, device=DEVICE) for _ in range(2)
        )
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            found = compiled(parent, choice)
        assert torch.equal(found, score(parent, choice))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
