"""Inference of a population layer in one launch: when it is chosen, and what its programs do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
from block_cases import Poisoned
from infer_cases import FORMS, OPS, InferCase, take
from interpreter_memory import watch
from kernel_cases import NAMES, interpreted, layer_text

from fastshift.kernels import infer as kernels
from fastshift.kernels import infer_bands, infer_tiles
from fastshift.kernels.cards import CARDS, card_of
from fastshift.kernels.infer_bands import Machine, plan_bands, seconds_by_steps
from fastshift.kernels.infer_jobs import COLUMNS
from fastshift.kernels.infer_plan import plan_infer
from fastshift.kernels.plan_records import LINE
from fastshift.ops import (
    conv,
    identity,
    inverted_residual,
    projection,
    shuffle_unit,
    shuffle_xception,
)
from fastshift.population_layer import parse_layer

PROGRAMS = 3  # of a launch in these tests
SIZE = (3, 4, 5, 3)  # N, C, H, W


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
@pytest.mark.parametrize("few_sums", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_tiles_are_powers_of_two_that_fit_the_registers(channels, dtype, few_sums, apart):
    layer = parse_layer(layer_text(OPS["s2"](channels)))
    plan = plan_infer(layer, 150, 28, 28, channels)
    for step in plan.steps:
        given = dtype.itemsize, dtype is not torch.float32, few_sums, apart
        blocks = infer_tiles.block_sizes(step, 150, *given)
        for size in (blocks.positions, blocks.channels, blocks.depth, blocks.warps):
            assert size == triton.next_power_of_2(size)
        assert min(blocks.positions, blocks.channels, blocks.depth) >= 16
        assert blocks.positions * blocks.channels <= 32 * 32 * blocks.warps
        assert blocks.positions * blocks.depth <= 16 * 32 * blocks.warps
        assert blocks.warps <= 16
        assert 32 * blocks.warps * blocks.registers <= 2**16


def test_a_thread_has_no_more_registers_than_leave_room_for_its_program():
    ops = [identity(64), conv(64, 64, 3, 1), projection(64, 64, 1)]
    [step, *_] = plan_infer(parse_layer(layer_text(ops)), 150, 16, 16, 64).steps
    blocks = infer_tiles.block_sizes(step, 150, 4, tensor_cores=False, few_sums=True)
    assert (blocks.warps, blocks.registers) == (16, 128)


def test_a_card_that_holds_few_sums_has_fewer_of_them_in_a_thread_where_jobs_are_of_many_kinds():
    layer = parse_layer(layer_text([shuffle_unit(160, 160, 1, 3), shuffle_xception(160, 160, 1)]))
    first, *_ = plan_infer(layer, 150, 8, 8, 160).steps

    def sums(tensor_cores, few_sums, apart=False):
        blocks = infer_tiles.block_sizes(first, 150, 2, tensor_cores, few_sums, apart)
        return blocks.positions * blocks.channels // (32 * blocks.warps)

    assert sums(False, True) < sums(False, False)
    assert sums(True, True, apart=True) < sums(True, False, apart=True)
    assert sums(True, True) == sums(True, False)


def test_rows_beyond_the_offsets_are_refused():
    layer = parse_layer(layer_text([projection(1024, 1024, 1)]))
    with pytest.raises(ValueError, match="rows: 268435456 elements"):
        plan_infer(layer, 1, 512, 512, 1024)
    with pytest.raises(ValueError, match="rows: 1073741824 positions"):
        plan_infer(layer, 65536, 128, 128, 1024)


# What its programs do


@pytest.fixture
def barriers(monkeypatch):
    """One entry for each time that a program goes through its loop."""
    from triton.runtime import interpreter

    found = []
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "create_barrier", lambda: found.append(builder.grid_idx))
    return found


@pytest.fixture
def in_bands(monkeypatch):
    """One launch for a layer, of few programs; new memory is NaN."""
    monkeypatch.setattr(kernels, "torch", Poisoned())
    take(FORMS["rows"], monkeypatch, PROGRAMS)


def _loaded(case):
    with watch() as found:
        rows = case.run()
    assert found.violations == []
    return rows, found


@interpreted
@pytest.mark.usefixtures("in_bands")
def test_a_program_passes_padding_in_one_step_a_node(barriers):
    padding = 12
    ops = [identity(4), inverted_residual(4, 4, 1, 2, 3)]
    parent, choice = (0, 1), (1, 0)
    case = InferCase(ops, SIZE, (2, parent, choice))
    rows, alone = _loaded(case)
    passes = len(barriers)
    padded = InferCase(ops, SIZE, (2, parent + (0,) * padding, choice + (-1,) * padding))
    padded.moments[:2] = case.moments
    found, beside = _loaded(padded)
    assert torch.equal(found[:2], rows)
    assert found[2:].isnan().all()
    assert len(barriers) == 2 * passes + PROGRAMS * padding
    # The node's choice, and numbers of a job's line.
    assert beside.loaded_bytes - alone.loaded_bytes <= PROGRAMS * padding * (4 + 8 * len(COLUMNS))
    assert beside.stored_bytes == alone.stored_bytes


@interpreted
def test_a_program_goes_through_the_jobs_and_bands_that_a_choice_has_and_no_others(
    barriers, monkeypatch
):
    every = infer_bands._bands
    take(FORMS["rows"], monkeypatch, PROGRAMS)
    some = infer_bands._bands

    def bands(images, chain):  # of a copy all rows of two images are one
        return list(every(images, chain))[-1:] if len(chain) == 1 else some(images, chain)

    monkeypatch.setattr(infer_bands, "_bands", bands)
    ops = [identity(4), inverted_residual(4, 4, 1, 2, 3), shuffle_xception(4, 4, 1)]
    plan = plan_infer(parse_layer(layer_text(ops)), 3, 5, 3, 4)
    jobs = kernels.choose_bands(plan, _machine()).step.jobs
    items = [-(-3 // own[0]["band_images"]) * own[0]["bands_down"] * len(own) for own in jobs]
    assert items == [2 * 1, 6 * 2, 6 * 4]
    for choices in ((0,), (0, -1, 2, 1)):
        barriers.clear()
        nodes = len(choices)
        case = InferCase(ops, SIZE, (1, (0,) * nodes, choices))
        case.assert_accurate(case.run())
        own = sum(items[choice] for choice in choices if choice >= 0)
        # Of each node a program may find once that its next band is none.
        assert own <= len(barriers) <= own + nodes * PROGRAMS


def _share_lines(monkeypatch):
    """Have the next programs' scratches begin a line before the end of the last."""
    choose = kernels.choose_bands

    def chosen(plan, machine):
        found = choose(plan, machine)
        return replace(found, scratch=found.scratch - LINE)

    monkeypatch.setattr(kernels, "choose_bands", chosen)
    for cached in (kernels._bands, kernels._launches):
        cached.cache_clear()


@interpreted
@pytest.mark.usefixtures("in_bands")
@pytest.mark.parametrize("name", ["s1", "s2"])
def test_no_program_touches_the_scratch_of_another(name, monkeypatch):
    case = InferCase(OPS[name](4), (2, 4, 4, 3), (1, (0, 0), (1, 3)))
    _, found = _loaded(case)
    assert found.programs == PROGRAMS
    _share_lines(monkeypatch)
    with watch() as found:
        InferCase(OPS[name](4), (2, 4, 4, 3), (1, (0, 0), (1, 3))).run()
    assert any("in another program's scratch" in line for line in found.violations)
