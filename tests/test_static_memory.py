"""Steps over static buffers: made once for every population, and let go with who used them."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest

# The loss and the update have their definition beside their kernel.
pytest.importorskip("triton", minversion="3.6")

import torch
from catalogue import record
from static_cases import DATA, evaluator_of
from torch import nn

from fastshift import Evaluator, population_pass, search, static_operators
from fastshift.graphs import CapturedStep
from fastshift.kernels.cards import card_of
from fastshift.kernels.infer_bands import CACHE_SHARE
from fastshift.population_pass import PopulationPass, StepCache
from fastshift.row_buffers import Arena
from fastshift.spaces import build
from fastshift.static_levels import buckets
from fastshift.static_state import StaticState
from fastshift.static_supernet import static_supernet
from fastshift.supernet import Supernet
from fastshift.testing import changed_tensors, random_archs, synthetic_data, tiny_supernet
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan


@pytest.fixture
def static(monkeypatch):
    monkeypatch.setenv("FASTSHIFT_STEPS", "static")


def test_buckets_end_at_the_capacity():
    assert buckets(1) == [1]
    assert buckets(5) == [1, 2, 4, 5]
    assert buckets(8) == [1, 2, 4, 8]
    assert buckets(33) == [1, 2, 4, 8, 16, 24, 32, 33]


def test_every_population_takes_the_steps_that_the_first_made(static):
    net = tiny_supernet()
    sample = DATA.validation[0][0]
    evaluator = evaluator_of(net, size=8)
    evaluator.evaluate(random_archs(net.space, 12))
    found, _ = static_supernet(net, Plan(random_archs(net.space, 12)), lambda: sample)
    scoring = found._scoring_pass(24)
    steps = dict(scoring.steps.steps)
    memory = found.state.arena.memory.data_ptr()
    for seed in range(6):
        archs = random_archs(net.space, 1 + 5 * seed, seed=seed)
        evaluator.evaluate(archs)
        assert static_supernet(net, Plan(archs), lambda: sample)[0] is found
    assert scoring.steps.steps == steps
    assert found.state.arena.memory.data_ptr() == memory
    # Stem, trunks of 3 blocks, and 3, 4, 4, 4, 4 buckets of 4 blocks and the head.
    assert len([key for key in steps if key[0] == "infer"]) == 4 + 3 + 4 * 4


def test_memory_grows_with_the_sub_tries_and_not_with_the_population(static):
    sizes = {}
    for candidates, size in ((4, 4), (24, 4), (24, 8)):
        net = tiny_supernet()
        archs = random_archs(net.space, candidates)
        evaluator_of(net, size=size).evaluate(archs)
        trainer = PathTrainer(net, lr=0.1)
        trainer.update(Plan(archs, size), *DATA.train.batch(0, 24), position=0)
        found, _ = static_supernet(net, Plan(archs, size), lambda: DATA.validation[0][0])
        sizes[candidates, size] = found.state.arena.memory.numel()
    assert sizes[4, 4] == sizes[24, 4] < sizes[24, 8] < 2 * sizes[24, 4]


def test_a_supernet_is_let_go_with_its_buffers(static):
    net = tiny_supernet()
    evaluator_of(net).evaluate(random_archs(net.space, 3))
    trainer = PathTrainer(net, lr=0.1)
    trainer.update(Plan(random_archs(net.space, 2)), *DATA.train.batch(0, 4), position=0)
    gone = weakref.ref(net)
    del net, trainer
    gc.collect()
    assert gone() is None


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _found(net, size=4):
    sample = DATA.validation[0][0]
    return static_supernet(net, Plan(random_archs(net.space, 6), size), lambda: sample)[0]


@pytest.mark.usefixtures("static", "no_collector")
def test_memory_that_had_to_grow_and_what_was_captured_on_it_are_let_go_at_once():
    net = tiny_supernet()
    archs = random_archs(net.space, 6)
    evaluator_of(net, size=4).evaluate(archs)
    found = _found(net)
    memory = weakref.ref(found.state.arena.memory)
    scoring = weakref.ref(found._scoring_pass(24))
    small = memory().numel()
    trainer = PathTrainer(net, lr=0.1)
    trainer.update(Plan(archs, 4), *DATA.train.batch(0, 24), position=0)
    assert found.state.arena.memory.numel() > small
    assert memory() is None
    assert scoring() is None
    assert _found(net) is found


@pytest.mark.usefixtures("static", "no_collector")
def test_a_trainers_buffers_and_graphs_go_with_it_and_the_pool_stays():
    net = tiny_supernet()
    state = None
    for releases in (True, False):
        trainer = PathTrainer(net, lr=0.1)
        trainer.update(Plan(random_archs(net.space, 6), 4), *DATA.train.batch(0, 8), position=0)
        static = trainer._static
        assert state in (None, static.static.state)
        state = static.static.state
        one = weakref.ref(next(iter(static._passes._found.values())))
        gradients = weakref.ref(static.update_of._gradients)
        del static
        if releases:
            trainer.release()
        else:
            del trainer
        assert one() is None
        assert gradients() is None
        assert not state.arena.users - {_found(net)._passes}


def test_a_released_trainer_goes_on_as_it_would_have(static):
    nets, losses = [], []
    for releases in (False, True):
        net = tiny_supernet()
        trainer = PathTrainer(net, lr=0.1)
        for position in range(3):
            plan = Plan(random_archs(net.space, 4, seed=position), 4)
            losses.append(trainer.update(plan, *DATA.train.batch(position, 8), position=position))
            if releases:
                trainer.release()
        nets.append(net.tensors() | trainer.optimizer.momenta())
    assert changed_tensors(*nets) == set()
    assert losses[:3] == losses[3:]


def test_memory_is_reserved_once_for_scores_and_for_the_updates_that_follow(static, monkeypatch):
    made, reserved = [], []
    init, reserve = PopulationPass.__init__, Arena.reserve

    def count(found, *given, **options):
        made.append(type(found).__name__)
        init(found, *given, **options)

    def note(arena, num_bytes):
        before = arena.memory.numel()
        reserve(arena, num_bytes)
        if arena.memory.numel() != before:
            reserved.append(arena.memory.numel())

    monkeypatch.setattr(PopulationPass, "__init__", count)
    monkeypatch.setattr(Arena, "reserve", note)
    net = tiny_supernet()
    options = {"generations": 1, "population": 4, "parents": 2, "top_k": 2, "shift_steps": 2}
    search(net, DATA, **options, shift_batch_size=16, head_warmup_steps=0)
    assert len(reserved) == 1
    sizes = {len(images) for images, _ in (*DATA.validation, *DATA.calibration)}
    assert sorted(made) == ["PopulationPass"] * len(sizes) + ["TrainingPass"]


def test_a_second_search_makes_the_steps_of_its_updates_anew_and_none_for_scores(
    static, monkeypatch
):
    made, prepare = [], StepCache.prepare

    def note(cache, wanted):
        before = set(cache.steps)
        prepare(cache, wanted)
        made[-1] += [key[0] for key in cache.steps.keys() - before]

    monkeypatch.setattr(StepCache, "prepare", note)
    net = tiny_supernet()
    options = {"generations": 1, "population": 4, "parents": 2, "top_k": 2, "shift_steps": 1}
    for _ in range(2):
        made.append([])
        search(net, DATA, **options, shift_batch_size=8)
    first, second = (Counter(kinds) for kinds in made)
    scoring = {kind: first.pop(kind) for kind in ("calibrate", "infer", "score")}
    assert min(scoring.values()) > 0
    assert second == first
    assert set(second) == {"forward", "backward", "loss", "step", "clear"}


def test_scored_batches_of_several_sizes_are_made_room_for_at_once(static):
    net = tiny_supernet()
    data = synthetic_data(validation=(4, 16, 8), calibration=(6,))
    archs = random_archs(net.space, 6)
    Evaluator(net, data.validation, calibration=data.calibration, subtrie_size=4).evaluate(archs)
    assert sorted(key for (key,) in _found(net)._passes._found) == [4, 6, 8, 16]


@pytest.mark.parametrize("trains", [False, True])
def test_steps_are_made_in_falling_order_of_size(trains, static, monkeypatch):
    wanted, made = [], []
    prepare, capture = StepCache.prepare, CapturedStep.capture

    def note(cache, steps):
        steps = list(steps)
        wanted.append({id(step.function): step for step in steps})
        prepare(cache, steps)

    def record(step):
        made.append(wanted[-1][id(step.function)])
        return capture(step)

    monkeypatch.setattr(StepCache, "prepare", note)
    monkeypatch.setattr(CapturedStep, "capture", record)
    net = tiny_supernet()
    archs = random_archs(net.space, 6)
    if trains:
        PathTrainer(net, lr=0.1).update(Plan(archs, 4), *DATA.train.batch(0, 8), position=0)
    else:
        evaluator_of(net, "running", size=4).evaluate(archs)
    sizes = [step.num_bytes for step in made]
    assert sizes == sorted(sizes, reverse=True)
    assert len(made) == len(wanted[0]) > 20
    # A block's widest bucket comes before its narrower ones.
    name = "forward" if trains else "infer"
    nodes = [step.key[2] for step in made if step.key[:2] == (name, 2)]
    assert nodes == sorted(nodes, reverse=True)
    assert nodes[0] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["stages", "bands"])
def test_steps_of_scoring_are_made_in_the_order_of_the_memory_that_their_kernels_take(
    dtype, static, monkeypatch
):
    monkeypatch.setenv("FASTSHIFT_BACKEND", "triton")
    # The operator itself hides what its kernels' launcher allocates.
    monkeypatch.setattr(population_pass, "layer_infer_into", static_operators._infer_into)
    state = StaticState(tiny_supernet(), (3, 8, 8), 4, 4, dtype)
    made = PopulationPass(state, 16)
    state.arena.reserve(made.rows.num_bytes)
    made.rows.bind(state.arena)
    taken = {}
    for step in made._wanted("infer"):
        if step.key[0] != "infer":
            continue
        _, position, nodes, _ = step.key
        for _ in range(2):  # what the first makes once does not count
            with record() as found:
                step.function()
        moments = nodes * state.levels[position].layer.moments_floats * 4
        assert step.num_bytes == found.allocated_bytes - moments
        names = {launch.name for launch in found.launches}
        assert len(names) == 1
        taken.setdefault((*names, position), set()).add(step.num_bytes)
    in_bands = [sizes for (name, _), sizes in taken.items() if name == "infer_bands_kernel"]
    assert bool(in_bands) is (dtype is torch.bfloat16)
    for sizes in in_bands:  # all programs' scratches, whatever the number of nodes
        (size,) = sizes
        assert 0 < size <= CACHE_SHARE * card_of(state.device)[0].cache


def test_an_update_whose_parameters_no_unit_has_is_by_modules_and_says_why(static):
    net = tiny_supernet()
    net.stem.scale = nn.Parameter(torch.ones(1))
    trainer = PathTrainer(net, lr=0.1)
    trainer.update(Plan(random_archs(net.space, 2)), *DATA.train.batch(0, 4), position=0)
    assert trainer.computed == "modules: stem.scale: a parameter that no unit has"
    assert trainer.updates == 1


def test_a_dense_kernel_in_channels_last_memory_is_moved_into_the_plain_order(static):
    net = tiny_supernet().to(memory_format=torch.channels_last)
    archs = random_archs(net.space, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = evaluator_of(net).evaluate(archs)
    assert found.computed == "static"
    assert all(p.is_contiguous() for p in net.parameters())
    assert changed_tensors(before, net.state_dict()) == set()
    assert isinstance(net.stem._modules["0"].weight, nn.Parameter)


@pytest.mark.parametrize("space", ["tiny", "digits"])
def test_a_supernet_in_channels_last_memory_is_updated_as_one_in_plain_memory(space, static):
    def updated(memory_format):
        net = tiny_supernet() if space == "tiny" else Supernet(build("digits"))
        trainer = PathTrainer(net.to(memory_format=memory_format), lr=0.1)
        images = torch.randn(4, *((3, 8, 8) if space == "tiny" else (1, 8, 8)))
        trainer.update(Plan(random_archs(net.space, 3)), images, torch.arange(4), position=0)
        assert trainer.computed == "static"
        return net.state_dict()

    torch.manual_seed(0)
    plain = updated(torch.contiguous_format)
    torch.manual_seed(0)
    assert changed_tensors(plain, updated(torch.channels_last)) == set()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_supernet_that_was_scored_in_inference_mode_can_be_trained(memory_format, static):
    net = tiny_supernet().to(memory_format=memory_format)
    with torch.inference_mode():
        assert evaluator_of(net).evaluate(random_archs(net.space, 3)).computed == "static"
    assert not any(p.is_inference() for p in net.parameters())
    PathTrainer(net, lr=0.1).update(
        Plan(random_archs(net.space, 3)), *DATA.train.batch(0, 4), position=0
    )
    net(DATA.train.batch(0, 4)[0], random_archs(net.space, 1)[0]).sum().backward()


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_parameter_has_updates_run_by_modules(hook, static):
    net = tiny_supernet()
    trainer = PathTrainer(net, lr=0.1)
    plan, batch = Plan(random_archs(net.space, 2)), DATA.train.batch(0, 4)
    trainer.update(plan, *batch, position=0)
    assert trainer.computed == "static"
    called = []
    handle = getattr(net.head.classifier.weight, hook)(lambda given: called.append(1))
    trainer.update(plan, *batch, position=1)
    assert trainer.computed == "modules: a parameter has a hook, which expects its gradient"
    assert called
    handle.remove()
    trainer.update(plan, *batch, position=2)
    assert trainer.computed == "static"


def test_a_weight_that_begins_off_a_wide_access_is_moved_once(static):
    net = tiny_supernet()
    weight = net.blocks[0][1]._modules["0"].weight
    flat = torch.zeros(weight.numel() + 1)
    flat[1:] = weight.detach().flatten()
    weight.data = flat[1:].view(weight.shape)
    assert weight.data_ptr() % 16
    before = {name: value.clone() for name, value in net.state_dict().items()}
    archs = random_archs(net.space, 3)
    assert evaluator_of(net).evaluate(archs).computed == "static"
    place = weight.data_ptr()
    assert place % 16 == 0
    evaluator_of(net).evaluate(archs)
    assert weight.data_ptr() == place
    assert changed_tensors(before, net.state_dict()) == set()
