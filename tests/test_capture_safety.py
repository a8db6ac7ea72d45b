"""What a captured step must not do, looked for without a GPU: every operator that it calls is seen.

The operators of the population layer, the loss and the update are one call each here; that they
are safe themselves is for their own tests.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastshift.graphs import CapturedStep
from fastshift.optim import PathSGD
from fastshift.population_pass import PopulationPass
from fastshift.static_state import StaticState
from fastshift.static_supernet import _Passes
from fastshift.static_update import StaticUpdate
from fastshift.supernet import Supernet
from fastshift.testing import random_archs, randomise, tiny_space
from fastshift.training_pass import TrainingPass
from fastshift.trie import Plan

pytest.importorskip("triton")

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
    """Note every operator with its sizes, and refuse those that no graph may hold."""

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
        self.calls.append((func.name(), _sizes(inputs), _sizes(outputs)))
        return out


def _tensors(values):
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _sizes(tensors):
    return [(tuple(t.shape), t.stride(), t.dtype, str(t.device)) for t in tensors]


def _supernet(dropout=0.0):
    return randomise(Supernet(tiny_space(dropout=dropout)))


def _state(net, dtype=torch.float32):
    return StaticState(net, (3, 8, 8), 4, 32, dtype)


def _scoring(state):
    return _Passes(state).of((), lambda: PopulationPass(state, IMAGES))


def _training(state, net):
    update = StaticUpdate(state, net, PathSGD(net, 0.1), clip_norm=1.0, ema=None)
    options = {"saved": [64] * len(state.levels), "label_smoothing": 0.1, "dropout": 0.0}
    if state.device.type == "cpu":
        from fastshift.static_supernet import _saved_of

        options["saved"] = _saved_of(state, IMAGES)
    return _Passes(state).of((), lambda: TrainingPass(state, update, IMAGES, **options))


def _two_plans(state):
    """Two populations, no candidate in common, of the same levels and buckets; with a trunk."""
    found = {}
    for seed in range(1000):
        plan = Plan(random_archs(tiny_space(), 6, seed), 3)
        if not any(root.children for root in plan.roots):
            continue
        tables = state.tables(plan)
        before = found.setdefault(str(tables.shape()), tables)
        if set(map(bytes, before.plan.archs)).isdisjoint(map(bytes, plan.archs)):
            return before, tables
    raise AssertionError("no two populations of one shape")


def _watched(run, populations):
    found = []
    for tables in populations:
        with Watch() as watch:
            run(tables)
        found.append(watch.calls)
    return found


KINDS = ["calibrate", "infer", "train"]


def _run(kind, state, net):
    """A whole pass of a kind through a population."""
    if kind == "train":
        made = _training(state, net)
        made.prepare()
        return lambda tables: made.train(tables, key=(0, 0))
    made = _scoring(state)
    made.prepare(kind)
    return lambda tables: made.run(kind, tables, score=True)


@pytest.mark.parametrize("kind", KINDS)
def test_two_populations_take_the_same_operators_and_sizes_and_none_that_waits(kind):
    net = _supernet()
    state = _state(net)
    run = _run(kind, state, net)
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


# On a CUDA device that is none: values do not exist, devices do


@pytest.fixture
def pretended(monkeypatch):
    """Have steps run as they are on fake CUDA tensors."""
    import fastshift.kernels.sgd as sgd
    from fastshift import static_state, static_update

    def tables(parameters, *_):
        made = torch.zeros(1, 3, dtype=torch.int64, device="cuda")
        small = made.int()
        return sgd.SgdTables(made.expand(len(parameters), 3), small, small[:, :2], True)

    monkeypatch.setattr(CapturedStep, "capture", lambda step: step)
    monkeypatch.setattr(CapturedStep, "replay", lambda step: step.function())
    monkeypatch.setattr(static_state, "shared_pool", lambda device: None)
    monkeypatch.setattr(sgd, "sgd_tables", tables)
    assert static_update
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def _on_cuda():
    with torch.device("cuda"):  # a fake module cannot be moved
        return Supernet(tiny_space())


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
    run = _run(kind, state, net)
    tables = state.tables(Plan(random_archs(tiny_space(), 3), 2))
    assert tables.table.device.type == "cuda"
    (calls,) = _watched(run, [tables])
    assert {device for _, inputs, _ in calls for *_, device in inputs} <= {"cuda:0"}


def test_a_value_that_a_step_reads_is_refused_there(pretended):
    state = _state(_on_cuda())
    made = _Passes(state).of((), lambda: Unsafe(state, "read a choice"))
    made.prepare = lambda kind: None
    with pytest.raises(DataDependentOutputException):
        made._score(1)


def test_batches_come_from_any_device(pretended):
    made = _scoring(_state(_on_cuda()))
    made.load(torch.zeros(IMAGES, 3, 8, 8), torch.zeros(IMAGES, dtype=torch.int64))
    assert made.images.device.type == "cuda"
