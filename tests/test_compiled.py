from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import fastshift as fs
from fastshift import compiled
from fastshift.batch_norm import start_ema
from fastshift.errors import SpaceError
from fastshift.space import SearchSpace
from fastshift.supernet import Supernet
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    assert_as_accurate,
    chain_supernet,
    global_error,
    path_gradients,
    random_archs,
    randomise,
    synthetic_data,
    tiny_space,
)


def _supernet(dropout=0.0):
    """Two blocks, with every kind of frame, an identity, and features in the head."""
    space = tiny_space(dropout=dropout)
    blocks = [space.blocks[0][:3], space.blocks[1][1:]]
    return randomise(
        Supernet(
            SearchSpace(
                "two",
                stem=space.stem,
                blocks=blocks,
                head=space.head,
                in_channels=3,
                image_size=8,
                affine=True,
            )
        )
    )


IMAGES, LABELS = synthetic_data().train.batch(0, 6)


@pytest.fixture(autouse=True)
def _fresh_counters():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _plain(net, archs, images):
    with torch.no_grad():
        return torch.stack([net(images, arch) for arch in archs])


@pytest.mark.parametrize(
    "policy", ["batch", "ema", pytest.param("running", marks=pytest.mark.slow)]
)
def test_logits_are_those_of_one_path_at_a_time(policy):
    net = _supernet().double()
    start_ema(net)
    net.train(policy == "batch")
    archs = random_archs(net.space, 7, seed=2)
    compiled = fs.CompiledSupernet(net, batch_norm=policy, subtrie_size=4, backend="eager")
    with torch.no_grad():
        found = compiled(IMAGES.double(), archs)
    assert global_error([found], [_plain(net, archs, IMAGES.double())]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("trains", [False, True])
def test_twenty_populations_of_a_bucket_are_compiled_once(trains):
    net, rng = _supernet().train(trains), np.random.default_rng(0)
    compiled = fs.CompiledSupernet(net, backend="aot_eager")
    whole = np.array(list(np.ndindex(3, 3)), np.uint8)
    populations = [whole[rng.permutation(len(whole))[: 5 + size % 4]] for size in range(20)]
    assert len({frozenset(map(tuple, archs.tolist())) for archs in populations}) == 20
    with torch.set_grad_enabled(trains):
        for archs in populations:
            logits = compiled(IMAGES, archs)
            if trains:
                logits.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert compiled.shapes == {(8, 6, trains)}


def test_another_bucket_and_another_batch_are_compiled_once_each():
    net = _supernet()
    compiled = fs.CompiledSupernet(net, backend="eager")
    with torch.no_grad():
        for archs in (["00"], ["11"], ["00", "11"], ["22"], ["01", "22"]):
            compiled(IMAGES, archs)
        for archs in (["12"], ["20"]):
            compiled(IMAGES[:4], archs)
    assert counters["stats"]["unique_graphs"] == 3
    assert compiled.shapes == {(1, 6, False), (2, 6, False), (1, 4, False)}


def test_gradients_are_those_of_one_path_at_a_time():
    net = _supernet().double().train()
    archs = np.unique(random_archs(net.space, 5, seed=1), axis=0)
    compiled = fs.CompiledSupernet(net, backend="aot_eager")
    logits = compiled(IMAGES.double(), archs)
    loss = sum(torch.nn.functional.cross_entropy(row, LABELS) for row in logits)
    loss.backward()
    plain, _ = path_gradients(net, archs, IMAGES.double(), LABELS)
    found = {name: p.grad for name, p in net.named_parameters()}
    assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE


def test_weights_are_read_at_each_call():
    net = _supernet().double().train()
    archs = random_archs(net.space, 3)
    compiled = fs.CompiledSupernet(net, backend="eager")
    with torch.no_grad():
        compiled(IMAGES.double(), archs)
        net.head.classifier.weight.mul_(-2.0)
        found = compiled(IMAGES.double(), archs)
    assert global_error([found], [_plain(net, archs, IMAGES.double())]) < FLOAT64_TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1


def _replace_a_block(net, other):
    net.blocks[0] = other.blocks[0]


def _assign_weights(net, other):
    net.load_state_dict(other.state_dict(), assign=True)


def _replace_the_classifier(net, other):
    net.head.classifier = other.head.classifier


@pytest.mark.parametrize("policy", ["batch", "running"])
@pytest.mark.parametrize("change", [_replace_a_block, _assign_weights, _replace_the_classifier])
def test_parts_that_were_replaced_are_read_at_the_next_call(change, policy):
    net, other = _supernet().double(), randomise(_supernet().double(), seed=9)
    net.train(policy == "batch")
    other.train(policy == "batch")
    archs = random_archs(net.space, 3)
    compiled = fs.CompiledSupernet(net, batch_norm=policy, backend="eager")
    with torch.no_grad():
        compiled(IMAGES.double(), archs)
        change(net, other)
        found = compiled(IMAGES.double(), archs)
    assert global_error([found], [_plain(net, archs, IMAGES.double())]) < FLOAT64_TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1


def test_what_stands_in_for_a_node_that_is_not_there_may_be_anything(monkeypatch):
    def train(rows, parent, choice, *rest):
        found = plain(rows, parent, choice, *rest)
        missing = (choice < 0).view(-1, 1, 1, 1, 1)
        return torch.where(missing, torch.nan, found[0]), *found[1:]

    plain = compiled.layer_train
    monkeypatch.setattr(compiled, "layer_train", train)
    net = _supernet().eval()
    call = fs.CompiledSupernet(net, backend="eager", batch_norm="batch")
    call(IMAGES, random_archs(net.space, 3, seed=5)).square().sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


def test_a_call_with_gradients_is_another_compilation_than_one_without():
    net = _supernet().train()
    compiled = fs.CompiledSupernet(net, backend="eager")
    for _ in range(2):
        compiled(IMAGES, ["00"])
        with torch.no_grad():
            compiled(IMAGES, ["11"])
    assert compiled.shapes == {(1, 6, True), (1, 6, False)}
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_under_fixed_statistics_no_part_of_a_gradient_comes_back(name, monkeypatch):
    monkeypatch.setenv("FASTSHIFT_BACKEND", name)
    net = _supernet().eval()
    logits = fs.CompiledSupernet(net, backend="eager", batch_norm="running")(IMAGES, ["00"])
    assert not logits.requires_grad


def test_statistics_are_put_together_once_a_call(monkeypatch):
    net = _supernet()
    compiled = fs.CompiledSupernet(net, batch_norm="running", subtrie_size=2, backend="eager")
    asked, plain = [], compiled._moments
    monkeypatch.setattr(compiled, "_moments", lambda levels: asked.append(1) or plain(levels))
    with torch.no_grad():
        compiled(IMAGES, np.unique(random_archs(net.space, 20), axis=0))
    assert len(asked) == 1


def test_what_cannot_be_one_function_is_refused():
    with pytest.raises(SpaceError, match="its modules have no kernels"):
        fs.CompiledSupernet(chain_supernet(), backend="eager")(IMAGES, ["00000"])
    with pytest.raises(SpaceError, match=r"head\.dropout"):
        fs.CompiledSupernet(_supernet(dropout=0.1).train(), backend="eager")(IMAGES, ["00"])
    with pytest.raises(ValueError, match="'recalibrate'; expected one of batch, running, ema"):
        fs.CompiledSupernet(_supernet(), batch_norm="recalibrate")
    with pytest.raises(ValueError, match="before the first shift step"):
        fs.CompiledSupernet(_supernet(), batch_norm="ema")(IMAGES, ["00"])
    on_a_gpu = fs.CompiledSupernet(_supernet(), mode="reduce-overhead")
    on_a_gpu.supernet = SimpleNamespace(
        space=_supernet().space,
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]),
    )
    with pytest.raises(ValueError, match="'reduce-overhead' captures graphs"):
        on_a_gpu(IMAGES, ["00"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_inductor_compiles_it_whole(mode):
    net = _supernet().train()
    archs = random_archs(net.space, 5, seed=2)
    compiled = fs.CompiledSupernet(net, mode=mode)
    with torch.no_grad():
        found = compiled(IMAGES, archs)
    exact = _supernet().double().train()
    plain = _plain(net, archs, IMAGES)
    assert_as_accurate([found], [plain], [_plain(exact, archs, IMAGES.double())])
