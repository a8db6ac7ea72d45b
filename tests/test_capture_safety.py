"""What a captured step must not do, looked for without a GPU: every operator that it calls is seen.

The operators of the population layer, the loss and the update are one call each at first. What
launches their kernels on a CUDA device is looked at as well, but for the launches themselves.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastshift.graphs import CapturedStep
from fastshift.optim import PathSGD
from fastshift.population_pass import PopulationPass
from fastshift.space import SearchSpace
from fastshift.static_operators import layer_backward_into, layer_infer_into, layer_train_into
from fastshift.static_state import StaticState
from fastshift.static_supernet import _Passes, _saved_of
from fastshift.static_update import StaticUpdate
from fastshift.supernet import Supernet
from fastshift.testing import random_archs, randomise, tiny_space
from fastshift.training_pass import TrainingPass
from fastshift.trie import Plan

pytest.importorskip("triton", minversion="3.6")

IMAGES = 6
# Reading a value back, and shapes that depend on values.
SYNCHRONISING = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "equal",
)
# A tensor made from numbers that Python holds: its copy to the device is not part of a graph.
FROM_PYTHON = ("lift_fresh", "lift", "scalar_tensor", "full", "arange", "eye", "linspace")
RANDOM = ("bernoulli", "bernoulli_", "native_dropout", "normal_", "rand", "randn", "uniform_")


class UnsafeError(Exception):
    """An operator that cannot stand in a captured step."""


class Watch(TorchDispatchMode):
    """Note every operator, its sizes and numbers, and refuse those that no graph may hold."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name in SYNCHRONISING + FROM_PYTHON + RANDOM:
            raise UnsafeError(f"{name}: refused")
        inputs = _tensors((args, kwargs))
        if name.startswith("index") and any(t.dtype is torch.bool for t in inputs):
            raise UnsafeError(f"{name}: as many elements as a mask has")
        out = func(*args, **(kwargs or {}))
        outputs = _tensors(out)
        devices = {tensor.device for tensor in inputs + outputs}
        if len(devices) > 1:
            raise UnsafeError(f"{name}: a copy between devices {sorted(map(str, devices))}")
        self.calls.append((func.name(), _sizes(inputs), _sizes(outputs), _others((args, kwargs))))
        return out


def _tensors(values):
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _others(values):
    """What an operator is given beside tensors: a graph goes on with the numbers of its capture."""
    found = tree_flatten(values)[0]
    return [repr(value) for value in found if not isinstance(value, torch.Tensor)]


def _sizes(tensors):
    return [(tuple(t.shape), t.stride(), t.dtype, str(t.device)) for t in tensors]


@cache
def _space():
    """The first half of the tiny space, which has every kind of frame."""
    whole = tiny_space()
    return SearchSpace(
        "short",
        stem=whole.stem,
        blocks=whole.blocks[:2],
        head=whole.head,
        in_channels=whole.in_channels,
        image_size=whole.image_size,
    )


def _supernet():
    return randomise(Supernet(_space()))


def _state(net, dtype=torch.float32):
    return StaticState(net, (3, 8, 8), 4, 32, dtype)


def _scoring(state):
    return _Passes(state).of((), lambda: PopulationPass(state, IMAGES))


def _training(state, net):
    update = StaticUpdate(state, net, PathSGD(net, 0.1), clip_norm=1.0, ema=None)
    saved = _saved_of(state, IMAGES)
    options = {"saved": saved, "label_smoothing": 0.1, "dropout": 0.0}
    return _Passes(state).of((), lambda: TrainingPass(state, update, IMAGES, **options))


@cache
def _two_populations():
    """Two populations, no candidate in common, of the same levels and buckets; with a trunk."""
    found, state = {}, _state(_supernet())
    for seed in range(1000):
        plan = Plan(random_archs(_space(), 6, seed), 3)
        if not any(root.children for root in plan.roots):
            continue
        shape = str(state.tables(plan).shape())
        before = found.setdefault(shape, plan)
        if set(map(bytes, before.archs)).isdisjoint(map(bytes, plan.archs)):
            return before, plan
    raise AssertionError("no two populations of one shape")


def _two_plans(state):
    """Both on a state's device."""
    one, two = (state.tables(plan) for plan in _two_populations())
    assert str(one.shape()) == str(two.shape())
    return one, two


def _watched(run, populations):
    found = []
    for tables in populations:
        with Watch() as watch:
            run(tables)
        found.append(watch.calls)
    return found


KINDS = ["calibrate", "infer", "train"]
# Kernels that a pass of a kind launches beside those of its layers.
LAUNCHED = {
    "calibrate": set(),
    "infer": {"loss_fwd_kernel"},
    "train": {"loss_fwd_kernel", "loss_bwd_kernel", "_sgd_kernel"},
}


def _run(kind, state, net):
    """A whole pass of a kind through a population, and what makes it."""
    if kind == "train":
        made = _training(state, net)
        made.prepare()
        return lambda tables: made.train(tables, key=(0, 0)), made
    made = _scoring(state)
    made.prepare(kind)
    return lambda tables: made.run(kind, tables, score=True), made


@pytest.mark.parametrize("kind", KINDS)
def test_two_populations_take_the_same_operators_sizes_and_numbers_and_none_that_waits(kind):
    net = _supernet()
    state = _state(net)
    run, _ = _run(kind, state, net)
    one, two = _watched(run, _two_plans(state))
    assert len(one) > 100
    assert one == two


class Unsafe(PopulationPass):
    """A pass whose scoring does what a captured step must not."""

    def __init__(self, state, how):
        super().__init__(state, IMAGES)
        self.how = how

    def _score(self, nodes):
        super()._score(nodes)
        losses, choice = self.state.losses, self.state.nodes(1, 1).choice
        if self.how == "decide on a loss":
            if losses.sum() > 0:
                losses.zero_()
        elif self.how == "read a choice":
            self.state.means[0][int(choice)].zero_()
        elif self.how == "a number of Python":
            losses.add_(torch.tensor(1.0))
        elif self.how == "as many as there are":
            losses.add_(choice[choice >= 0].sum())
        elif self.how == "a mask":
            losses[losses > 0] = losses[0]
        elif self.how == "a random number":
            losses.uniform_()
        elif self.how == "to the host":
            losses.cpu()
        elif self.how == "a list":
            losses.tolist()
        elif self.how == "from the host":
            losses.copy_(torch.zeros(losses.shape, dtype=losses.dtype, device="cpu"))
        elif self.how == "an index of the host":
            losses[torch.zeros(1, dtype=torch.int64, device="cpu")] = 0.0
        elif self.how == "a wait":
            torch.cuda.synchronize()


@pytest.mark.parametrize(
    "how",
    [
        "decide on a loss",
        "read a choice",
        "a number of Python",
        "as many as there are",
        "a mask",
        "a random number",
    ],
)
def test_the_watch_sees_an_unsafe_step(how):
    state = _state(_supernet())
    made = _Passes(state).of((), lambda: Unsafe(state, how))
    made.prepare("infer")
    with pytest.raises(UnsafeError):
        _watched(lambda tables: made.run("infer", tables, score=True), _two_plans(state))


def test_the_watch_sees_sizes_that_depend_on_the_population():
    state = _state(_supernet())
    made = _scoring(state)
    made.prepare("infer")

    def run(tables):
        made.run("infer", tables, score=True)
        torch.empty(int(tables.plan.choice[0].sum()))

    one, two = _watched(run, _two_plans(state))
    assert one != two


@pytest.mark.parametrize("how", ["fill_", "new_full", "full_like", "mul_", "a slice"])
def test_the_watch_sees_a_number_that_varies(how):
    state = _state(_supernet())
    made = _scoring(state)
    made.prepare("infer")

    def run(tables):
        made.run("infer", tables, score=True)
        losses, number = state.losses, int(tables.plan.archs.sum())
        if how == "new_full":
            losses.copy_(losses.new_full(losses.shape, number))
        elif how == "full_like":
            losses.copy_(torch.full_like(losses, number))
        elif how == "a slice":
            losses[number : number + 2].zero_()
        else:
            getattr(losses, how)(number)

    one, two = _watched(run, _two_plans(state))
    assert one != two
    assert [call[:3] for call in one] == [call[:3] for call in two]


# Recorded, with values that do not exist, and played back


def _recording(step):
    """The operators of a step, traced over fake tensors: what needs a value raises."""
    with torch.no_grad():
        return make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)()


def _same(one, two):
    return len(one) == len(two) and all(map(torch.equal, one, two))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_recorded_of_one_population_serves_another_bit_for_bit(kind):
    net = _supernet()
    state = _state(net)
    run, made = _run(kind, state, net)
    made.load(torch.randn(IMAGES, 3, 8, 8), torch.arange(IMAGES) % 4)
    one, two = _two_plans(state)
    if kind == "train":
        made.update.begin(one.plan, 1.0)
    state.clear_scores()
    recording = _recording(lambda: run(one))
    buffers = [*net.tensors().values(), state.losses, state.wrong, *state.sums]
    if kind == "train":
        buffers += [*made.update.momenta, made.update._report]
        made.update.begin(two.plan, 1.0)
    start = [value.clone() for value in buffers]
    found = []
    one.table.copy_(two.table)
    for play in (recording, lambda: run(two)):
        with torch.no_grad():
            torch._foreach_copy_(buffers, start)
            play()
        found.append([value.clone() for value in buffers])
    assert _same(*found)
    assert not _same(found[0], start)


def test_a_value_that_a_step_reads_is_refused_in_a_recording():
    state = _state(_supernet())
    made = _Passes(state).of((), lambda: Unsafe(state, "decide on a loss"))
    made.prepare("infer")
    one, _ = _two_plans(state)
    with pytest.raises(GuardOnDataDependentSymNode):
        _recording(lambda: made.run("infer", one, score=True))


# On a CUDA device that is none: values do not exist, devices do


def _wait(*_):
    raise UnsafeError("synchronize: waits for the device")


@pytest.fixture
def pretended(monkeypatch):
    """Have steps run as they are on fake CUDA tensors."""
    import fastshift.kernels.sgd as sgd
    from fastshift import population_pass, static_state

    def tables(parameters, *_):
        made = torch.zeros(1, 3, dtype=torch.int64, device="cuda")
        small = made.int()
        return sgd.SgdTables(made.expand(len(parameters), 3), small, small[:, :2], True)

    monkeypatch.setattr(CapturedStep, "capture", lambda step: step)
    monkeypatch.setattr(CapturedStep, "replay", lambda step: step.function())
    monkeypatch.setattr(static_state, "shared_pool", lambda device: None)
    # What has no values has no address, and no memory to pin.
    monkeypatch.setattr(static_state, "in_plain_memory", lambda parameters: None)
    monkeypatch.setattr(population_pass, "_pinned", lambda values, device: values)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", _wait)
    monkeypatch.setattr(sgd, "sgd_tables", tables)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def _on_cuda():
    with torch.device("cuda"):  # a fake module cannot be moved
        return Supernet(_space())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("train", torch.bfloat16),
        ("calibrate", torch.float32),
        pytest.param("train", torch.float32, marks=pytest.mark.slow),
        pytest.param("calibrate", torch.bfloat16, marks=pytest.mark.slow),
        ("infer", torch.bfloat16),
    ],
)
def test_on_a_gpu_every_buffer_is_there_and_nothing_comes_back(kind, dtype, pretended):
    net = _on_cuda()
    state = _state(net, dtype)
    run, _ = _run(kind, state, net)
    tables = state.tables(Plan(random_archs(_space(), 3), 2))
    assert tables.table.device.type == "cuda"
    (calls,) = _watched(run, [tables])
    assert {device for _, inputs, *_ in calls for *_, device in inputs} <= {"cuda:0"}


@pytest.fixture
def launched(pretended, monkeypatch):
    """Have what launches the Triton kernels run, but for the launches, of which it takes notes."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from fastshift import _operators_triton, population_pass, static_operators, training_pass
    from fastshift.kernels import infer, layer, loss, plan, sgd

    found, addresses = [], torch.zeros(1, dtype=torch.int64, device="cuda")

    def launch(kernel, *given, grid, warmup, **options):
        sizes = _sizes(_tensors((given, options)))
        found.append((kernel.fn.__name__, sizes, _others((grid, given, options))))

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", launch)
    for name, launcher in (
        ("candidate_loss", loss._loss_fwd_triton),
        ("candidate_loss_backward", loss._loss_bwd_triton),
        ("sgd_step", sgd._sgd_triton),
    ):
        monkeypatch.setattr(torch.ops.fastshift, name, launcher)
    for module in (infer, layer):
        monkeypatch.setattr(module, "address_table", lambda tensors, device: (addresses, True))
    monkeypatch.setattr(_operators_triton, "plain", list)
    monkeypatch.setattr(_operators_triton, "_current", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # Tables of this fake device are nobody else's.
    for name in ("_bands", "_launches"):
        monkeypatch.setattr(infer, name, cache(getattr(infer, name).__wrapped__))
    monkeypatch.setattr(_operators_triton, "plan_layer", cache(plan.plan_layer.__wrapped__))
    monkeypatch.setattr(population_pass, "layer_infer_into", static_operators._infer_into)
    for module in (population_pass, training_pass):
        for name in ("train", "backward"):
            into = getattr(static_operators, f"_{name}_into")
            monkeypatch.setattr(module, f"layer_{name}_into", into, raising=False)
    return found


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.slow, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_launches_the_kernels_is_safe_and_the_same_for_two_populations(kind, dtype, launched):
    net = _on_cuda()
    state = _state(net, dtype)
    run, _ = _run(kind, state, net)
    populations = _two_plans(state)
    run(populations[0])  # which copies the layers' plans to the device
    launched.clear()
    one, two = _watched(run, populations)
    assert one == two
    half = len(launched) // 2
    assert half > 10
    assert launched[:half] == launched[half:]
    # Trunk and sub-tries: every level and bucket has launches of its own size.
    assert len({str(others) for *_, others in launched}) > 5
    assert {name for name, *_ in launched} >= LAUNCHED[kind]


def test_buffers_of_a_wrong_size_are_refused_over_fake_tensors(pretended):
    net = _on_cuda()
    state = _state(net)
    made = _training(state, net)
    level, own = state.level(1), state.nodes(1, 2)
    rows, out = made.rows.source(1, 2), made.rows.out(1, 2)
    statistics, saved = state.statistics[1][:2], made.rows.saved(1, 2)
    given = rows, own.parent, own.choice, level.parameters
    layer_train_into(out, statistics, saved, *given, level.text)
    for wrong in (
        (out[:1], statistics, saved),
        (out, statistics[:, 1:], saved),
        (out, statistics, saved[1:]),
        (out.half(), statistics, saved),
    ):
        with pytest.raises(ValueError, match="expected"):
            layer_train_into(*wrong, *given, level.text)
    moments = state.means[1][:2]
    layer_infer_into(out, *given, moments, level.text)
    with pytest.raises(ValueError, match=r"out: .*; expected"):
        layer_infer_into(out[:1], *given, moments, level.text)
    gradients = [made.update.gradients[p] for p in level.parameters]
    rest = out, *given, statistics, saved, level.text
    layer_backward_into(rows, gradients, *rest)
    layer_backward_into(rows.new_empty(0), gradients, *rest)
    with pytest.raises(ValueError, match=r"d_rows: .*; expected"):
        layer_backward_into(rows[:0], gradients, *rest)
    with pytest.raises(ValueError, match=r"gradients: .*; expected"):
        layer_backward_into(rows, gradients[1:], *rest)


def test_a_value_that_a_step_reads_is_refused_there(pretended):
    state = _state(_on_cuda())
    made = _Passes(state).of((), lambda: Unsafe(state, "read a choice"))
    made.prepare = lambda kind: None
    with pytest.raises(DataDependentOutputException):
        made._score(1)


@pytest.mark.parametrize(
    "how",
    [
        "to the host",
        "from the host",
        "an index of the host",
        "a number of Python",
        "a list",
        "a wait",
    ],
)
def test_a_step_that_leaves_its_device_is_seen_there(how, pretended):
    """On a CPU none of these calls an operator, or is known from one that may stand in a step."""
    state = _state(_on_cuda())
    made = _Passes(state).of((), lambda: Unsafe(state, how))
    made.prepare = lambda kind: None
    with Watch():
        PopulationPass._score(made, 1)
        with pytest.raises(UnsafeError):
            made._score(1)


def test_batches_come_from_any_device(pretended):
    made = _scoring(_state(_on_cuda()))
    made.load(torch.zeros(IMAGES, 3, 8, 8), torch.zeros(IMAGES, dtype=torch.int64))
    assert made.images.device.type == "cuda"
