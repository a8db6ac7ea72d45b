"""The walk through the trie: a level is one call of an operator, or goes node by node."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastshift import levels
from fastshift.batch_norm import BatchNorms, MovingAverages
from fastshift.errors import SpaceError
from fastshift.steps import Statistics, calibrate_step, eval_step, train_step
from fastshift.testing import global_error, random_archs, synthetic_data, tiny_supernet
from fastshift.trie import Plan

ARCHS = ["0000", "0001", "1000", "1100", "3210"]  # blocks 0, 2 and 3 have identities
NODES = [3, 4, 4, 5]


@pytest.fixture
def calls(monkeypatch):
    """Name and number of nodes of each call of an operator."""
    found = []
    for name in ("layer_train", "layer_infer"):
        plain = getattr(levels, name)

        def counted(rows, parent, *rest, name=name, plain=plain):
            found.append((name, len(parent)))
            return plain(rows, parent, *rest)

        monkeypatch.setattr(levels, name, counted)
    return found


@pytest.fixture
def batch(monkeypatch):
    monkeypatch.delenv("FASTSHIFT_BACKEND", raising=False)
    return synthetic_data().train.batch(0, 10)


def test_a_level_is_one_call(calls, batch):
    net = tiny_supernet().eval()
    plan, norms = Plan(net.space.as_archs(ARCHS)), BatchNorms(net)
    assert [len(choice) for choice in plan.choice] == NODES
    statistics = Statistics.empty(plan)
    calibrate_step(net, norms, plan, batch[0], statistics)
    for level, own in enumerate(statistics.nodes):
        for sums, choice in zip(own, plan.choice[level], strict=True):
            assert (sums.count == 0) == net.identities[level][choice]
    eval_step(net, norms, plan, *batch, "recalibrate", statistics)
    train_step(net.train(), norms, plan, *batch, MovingAverages(norms), key=(0, 0))
    names = ["layer_train", "layer_infer", "layer_train"]
    assert calls == [(name, count) for name in names for count in NODES]


def _calibrated(net, plan, batches, labels):
    """Losses after calibration on some batches."""
    norms, statistics = BatchNorms(net), Statistics.empty(plan)
    for images in batches:
        calibrate_step(net, norms, plan, images, statistics)
    _, losses = eval_step(net, norms, plan, batches[0], labels, "recalibrate", statistics)
    return losses


# One image goes node by node: the sums of a level's nodes in one tensor become each one's own.
@pytest.mark.parametrize("sizes", [(10, 4), (10, 1), (10, 1, 4), (10, 4, 1, 3), (10, 3, 2)])
def test_calibration_by_levels_and_by_nodes_adds_up_alike(sizes, batch, monkeypatch):
    torch.manual_seed(0)
    net = tiny_supernet().eval()
    plan = Plan(net.space.as_archs(ARCHS))
    images = [torch.randn(size, *batch[0].shape[1:]) + 1 for size in sizes]
    exact = copy.deepcopy(net).double()
    expected = _calibrated(exact, plan, [x.double() for x in images], batch[1])
    found = _calibrated(net, plan, images, batch[1])
    assert global_error([found], [expected]) < 1e-5
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    assert global_error([_calibrated(net, plan, images, batch[1])], [expected]) < 1e-5


def _results(net, plan, images, labels, policy):
    """Losses, gradients and moving averages of a calibration, a score and a training step."""
    net = copy.deepcopy(net).to(images.dtype).eval()
    norms, statistics = BatchNorms(net), Statistics.empty(plan)
    calibrate_step(net, norms, plan, images, statistics)
    _, losses = eval_step(net, norms, plan, images, labels, policy, statistics)
    averages = MovingAverages(norms)
    train_step(net.train(), norms, plan, images, labels, averages, key=(0, 0))
    averages.apply()
    return [losses, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize("policy", ["recalibrate", "batch", "running"])
@pytest.mark.parametrize("how", ["all", "one_hooked", "one_foreign", "reference"])
def test_a_level_gives_what_its_nodes_give(how, policy, calls, batch, monkeypatch):
    """Also where some levels go node by node: for a hook, or for a module of another kind."""
    net = tiny_supernet()
    if how == "one_hooked":
        net.blocks[1][1].register_forward_hook(lambda *_: None)
    elif how == "one_foreign":
        net.blocks[1][1] = nn.Sequential(*net.blocks[1][1].children())
    elif how == "reference":
        monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    images, labels = batch
    plan = Plan(random_archs(net.space, 9, seed=2), 3)
    found = _results(net, plan, images, labels, policy)
    assert bool(calls) == (how != "reference")
    assert global_error(found, _results(net, plan, images.double(), labels, policy)) < 1e-5


def test_other_nodes_of_a_level_whose_hooks_nobody_needs_stay_one_call(calls, batch):
    net = tiny_supernet().eval()
    net.blocks[0][2].register_forward_hook(lambda *_: None)  # no candidate has it
    eval_step(net, BatchNorms(net), Plan(net.space.as_archs(ARCHS)), *batch, "batch")
    assert calls == [("layer_train", count) for count in NODES]


def test_one_image_is_trained_on_node_by_node_and_scored_by_level(calls, batch):
    net = tiny_supernet().eval()
    norms, plan = BatchNorms(net), Plan(net.space.as_archs(ARCHS))
    image, label = batch[0][:1], batch[1][:1]
    calibrate_step(net, norms, plan, image, Statistics.empty(plan))
    assert calls == []
    eval_step(net, norms, plan, image, label, "running")
    assert calls == [("layer_infer", count) for count in NODES]


def test_under_autocast_a_level_is_one_call_too(calls, batch):
    net = tiny_supernet().eval()
    norms, plan = BatchNorms(net), Plan(net.space.as_archs(ARCHS))
    _, plain = eval_step(net, norms, plan, *batch, "batch")
    expected = list(calls)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        _, found = eval_step(net, norms, plan, *batch, "batch")
        train_step(net.train(), norms, plan, *batch, MovingAverages(norms), key=(0, 0))
    assert calls == expected * 2
    assert 0 < global_error([found], [plain]) < 0.05


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_changed_batch_norm_is_read_at_the_next_step(size, batch):
    net = tiny_supernet().eval()
    norms, plan = BatchNorms(net), Plan(net.space.as_archs(ARCHS), size)
    _, before = eval_step(net, norms, plan, *batch, "batch")
    for norm in (norm for name, norm in norms.items() if name.startswith("blocks")):
        norm.eps = 0.5
    _, after = eval_step(net, norms, plan, *batch, "batch")
    exact = copy.deepcopy(net).double()
    images = batch[0].double()
    _, expected = eval_step(exact, BatchNorms(exact), plan, images, batch[1], "batch")
    assert not torch.allclose(before, after, rtol=1e-3)
    assert global_error([after], [expected]) < 1e-5


def test_a_level_of_identities_is_the_level_above():
    net = tiny_supernet()
    [root] = Plan(net.space.as_archs(["0002", "1002", "2002"])).roots
    row = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    given = []

    def level(number, first, nodes, rows, parent):
        given.append(number)
        out, _ = nodes.train(rows, parent)
        given.append(out)
        return out

    with torch.no_grad():
        found = levels.last_rows(net, root, row, levels.Visit(None, level))
    assert given[::2] == [0, 1]  # blocks 2 and 3 are identities only
    assert found is given[-1]
    assert len(found) == 3


def test_a_lone_row_is_never_copied():
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    packed = levels.Rows([x]).packed
    assert packed.data_ptr() == x.data_ptr()
    assert levels.Rows(packed=packed).each[0].data_ptr() == x.data_ptr()
    first = torch.randn(2, 6, 5, 4)
    assert torch.equal(levels.Rows([first, x]).packed[0].permute(0, 3, 1, 2), first)


@pytest.mark.parametrize("size", [1, 8])
def test_a_head_that_writes_into_a_row_is_refused(size, batch):
    net = tiny_supernet()
    net.head = nn.Sequential(nn.ReLU(inplace=True), net.head)
    norms, plan = BatchNorms(net), Plan(net.space.as_archs(ARCHS[:3]), size)
    with pytest.raises(SpaceError, match="in place"):
        eval_step(net.eval(), norms, plan, *batch, "batch")
    with pytest.raises(SpaceError, match="in place"):
        train_step(net.train(), norms, plan, *batch, MovingAverages(norms), key=(0, 0))
