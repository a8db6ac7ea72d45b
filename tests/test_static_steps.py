"""Steps over static buffers compute what the modules compute, and say how they ran."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from static_cases import DATA, evaluator_of

from fastshift import Evaluator, pretrain, search
from fastshift.batch_norm import POLICIES, start_ema
from fastshift.errors import ConfigError, DataError
from fastshift.supernet import Supernet
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    assert_as_accurate,
    assert_untouched,
    chain_supernet,
    changed_tensors,
    global_error,
    random_archs,
    randomise,
    snapshot,
    synthetic_data,
    tiny_space,
    tiny_supernet,
)
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

# The loss and the update have their definition beside their kernel.
pytest.importorskip("triton", minversion="3.6")


@pytest.fixture
def static(monkeypatch):
    monkeypatch.setenv("FASTSHIFT_STEPS", "static")


def _both(monkeypatch, run):
    """What the modules' steps give and what the static ones give."""
    found = []
    for steps in ("modules", "static"):
        monkeypatch.setenv("FASTSHIFT_STEPS", steps)
        found.append(run())
    return found


# Scores


@pytest.mark.parametrize("policy", POLICIES)
def test_scores_are_those_of_the_modules(policy, monkeypatch):
    net = tiny_supernet().double()
    start_ema(net)
    archs = random_archs(net.space, 13, seed=1)
    plain, found = _both(monkeypatch, lambda: evaluator_of(net, policy).evaluate(archs))
    assert (plain.computed, found.computed) == ("modules: FASTSHIFT_STEPS=modules", "static")
    assert global_error([found.losses], [plain.losses]) < FLOAT64_TOLERANCE
    assert np.array_equal(found.errors, plain.errors)
    for name in ("images", "calibration_images", "sharing", "weights_version"):
        assert getattr(found, name) == getattr(plain, name)


@pytest.mark.parametrize(("policy", "precision"), [("recalibrate", "fp32"), ("batch", "bf16")])
def test_scores_of_narrow_types_are_as_accurate_as_one_path_at_a_time(policy, precision, static):
    net = tiny_supernet()
    archs = random_archs(net.space, 9, seed=1)
    options = {"policy": policy, "precision": precision}
    found = evaluator_of(net, **options).evaluate(archs)
    plain = evaluator_of(net, **options, strategy="sequential").evaluate(archs)
    exact = evaluator_of(copy.deepcopy(net).double(), policy).evaluate(archs)
    assert found.computed == "static"
    assert_as_accurate([found.losses], [plain.losses], [exact.losses])


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow), 16])
def test_no_cut_and_no_company_changes_a_score(size, static):
    net = tiny_supernet().double()
    archs = np.concatenate((random_archs(net.space, 11, seed=3), random_archs(net.space, 4, 3)))
    whole = evaluator_of(net).evaluate(archs).losses
    assert global_error([evaluator_of(net, size=size).evaluate(archs).losses], [whole]) < 1e-14
    alone = evaluator_of(net, size=size).evaluate(archs[2:3]).losses
    assert global_error([alone], [whole[2:3]]) < 1e-14


@pytest.mark.parametrize("policy", ["recalibrate", "running"])
def test_scoring_leaves_the_supernet_as_it_is(policy, static):
    net = tiny_supernet()
    before = snapshot(net)
    evaluator_of(net, policy).evaluate(random_archs(net.space, 6))
    assert_untouched(net, before)


def test_weights_that_changed_in_place_are_scored_as_they_are(monkeypatch):
    net = tiny_supernet().double()
    archs = random_archs(net.space, 4)
    monkeypatch.setenv("FASTSHIFT_STEPS", "static")
    evaluator_of(net).evaluate(archs)
    randomise(net, seed=5)
    plain, found = _both(monkeypatch, lambda: evaluator_of(net).evaluate(archs).losses)
    assert global_error([found], [plain]) < FLOAT64_TOLERANCE


def test_a_replaced_head_and_weights_that_moved_are_seen(monkeypatch):
    net = tiny_supernet().double()
    archs = random_archs(net.space, 4)
    monkeypatch.setenv("FASTSHIFT_STEPS", "static")
    evaluator_of(net).evaluate(archs)
    net.reset_head(7, seed=1)
    net.blocks[0][1]._modules["0"].weight.data = torch.randn_like(
        net.blocks[0][1]._modules["0"].weight
    )
    net.blocks[1][0]._modules["0"].norm.eps = 0.1
    plain, found = _both(monkeypatch, lambda: evaluator_of(net).evaluate(archs).losses)
    assert global_error([found], [plain]) < FLOAT64_TOLERANCE


def test_a_batch_of_one_pixel_is_refused_where_moments_are_taken(static):
    net = randomise(Supernet(tiny_space(image_size=2)))
    data = synthetic_data(image_size=2, validation=(4,), calibration=(1,))
    archs = random_archs(net.space, 2)
    with pytest.raises(DataError, match="batch of 1 image"):
        Evaluator(net, data.validation, calibration=data.calibration).evaluate(archs)
    found = Evaluator(net, data.validation, batch_norm="running").evaluate(archs)
    assert np.isfinite(found.losses).all()


def test_a_loss_that_is_not_finite_is_nan(static):
    net = tiny_supernet()
    with torch.no_grad():
        net.blocks[2][1]._modules["0"].weight.fill_(torch.nan)
    archs = np.array([[0, 0, 0, 0], [0, 0, 1, 0]], np.uint8)
    found = evaluator_of(net).evaluate(archs)
    assert np.isnan(found.errors).tolist() == [False, True]
    assert np.isnan(found.losses).tolist() == [False, True]


@pytest.mark.parametrize("steps", ["static", "modules"])
def test_a_callers_autocast_changes_nothing(steps, monkeypatch):
    monkeypatch.setenv("FASTSHIFT_STEPS", steps)
    net = tiny_supernet()
    archs = random_archs(net.space, 5)

    def everything():
        trained = copy.deepcopy(net)
        loss = PathTrainer(trained, lr=0.1).update(Plan(archs), *DATA.train.batch(0, 8), position=0)
        return evaluator_of(net).evaluate(archs).losses, loss, trained.state_dict()

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    assert np.array_equal(found[0], plain[0])
    assert found[1] == plain[1]
    assert changed_tensors(plain[2], found[2]) == set()


@pytest.mark.parametrize("steps", ["static", "modules"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_callers_mode_keeps_nothing_from_being_trained(mode, steps, monkeypatch):
    monkeypatch.setenv("FASTSHIFT_STEPS", steps)
    net = tiny_supernet()
    options = {"generations": 1, "population": 4, "parents": 2, "top_k": 2, "shift_steps": 2}
    options |= {"shift_batch_size": 8, "batch_norm": "ema", "quiet": True}

    def everything(trained, updated):
        pretrain(trained, DATA, steps=2, batch_size=8, lr=0.1, quiet=True)
        search(trained, DATA, **options)
        trainer = PathTrainer(updated, lr=0.1)
        trainer.update(Plan(random_archs(net.space, 3)), *DATA.train.batch(0, 8), position=0)
        return trained.state_dict(), updated.state_dict()

    plain = everything(copy.deepcopy(net), copy.deepcopy(net))
    copies = copy.deepcopy(net), copy.deepcopy(net)
    with mode():
        found = everything(*copies)
    assert changed_tensors(net.state_dict(), plain[1])
    for one, other in zip(found, plain, strict=True):
        assert changed_tensors(one, other) == set()
        assert not any(value.is_inference() for value in one.values())


# Updates


def _train(steps=3, dtype=torch.float64, dropout=0.2, frozen=False, ema=True, size=3, **options):
    """Everything that updates change, the losses, and how they ran."""
    net = tiny_supernet(dropout=dropout).to(dtype)
    if ema:
        start_ema(net)
    for p in net.trunk_parameters():
        p.requires_grad_(not frozen)
    options = {"lr": 0.05, "weight_decay": 1e-2, "ema": ema} | options
    trainer = PathTrainer(net, **options)
    losses = []
    for position in range(steps):
        images, labels = DATA.train.batch(position, 10)
        plan = Plan(random_archs(net.space, 7, seed=position % 2), size)
        lr = 0.05 / (1 + position)
        losses.append(trainer.update(plan, images, labels, position=position, lr=lr))
    return net.tensors() | trainer.optimizer.momenta(), losses, trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.0, "ema": False, "reduction": "mean", "nesterov": True},
        {"clip_norm": 0.5, "head_lr_multiplier": 3.0},
        {"frozen": True, "clip_norm": 0.5},
        {"drift": True, "size": 8},
        pytest.param({"momentum": 0.0, "label_smoothing": 0.0, "size": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options) or "shift",
)
def test_updates_are_those_of_the_modules(options, monkeypatch):
    plain, found = _both(monkeypatch, lambda: _train(**options))
    assert found[2].computed == "static"
    assert plain[0].keys() == found[0].keys()
    assert global_error(found[0].values(), plain[0].values()) < FLOAT64_TOLERANCE
    assert global_error([found[1]], [plain[1]]) < FLOAT64_TOLERANCE
    assert found[2].counters() == plain[2].counters()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_narrow_updates_are_as_accurate_as_one_path_at_a_time(precision, monkeypatch):
    plain, found = _both(
        monkeypatch, lambda: _train(dtype=torch.float32, precision=precision, size=1, steps=1)
    )
    exact = _train(steps=1)[0]
    start = tiny_supernet(dropout=0.2).double().tensors()
    moved = [
        [run[name].double() - start[name] for name in start if start[name].is_floating_point()]
        for run in (found[0], plain[0], exact)
    ]
    assert_as_accurate(*moved)


def _loses_momenta(trainer):
    trainer.optimizer.state.clear()


def _takes_others(trainer):
    state = copy.deepcopy(trainer.optimizer.state_dict())
    for values in state["state"].values():
        values["momentum_buffer"].mul_(-3)
    trainer.optimizer.load_state_dict(state)


def _takes_nesterovs(trainer):
    for group in trainer.optimizer.param_groups:
        group["nesterov"] = True


def _drops_nothing(trainer):
    trainer.supernet.head.dropout.eval()


def _leaves_gradients(trainer):
    images = DATA.train.batch(9, 4)[0].double()
    trainer.supernet(images, random_archs(trainer.supernet.space, 1)[0]).sum().backward()


@pytest.mark.parametrize(
    "change",
    [_loses_momenta, _takes_others, _takes_nesterovs, _drops_nothing, _leaves_gradients],
    ids=lambda change: change.__name__[1:],
)
def test_what_a_caller_changes_between_updates_is_seen_by_either_form(change, monkeypatch):
    def run():
        net = tiny_supernet(dropout=0.5).double()
        trainer = PathTrainer(net, lr=0.05)
        losses = []
        for position in range(4):
            if position == 2:
                change(trainer)
            plan = Plan(random_archs(net.space, 5, seed=position), 3)
            losses.append(trainer.update(plan, *DATA.train.batch(position, 8), position=position))
        return net.state_dict(), losses

    plain, found = _both(monkeypatch, run)
    assert global_error(found[0].values(), plain[0].values()) < FLOAT64_TOLERANCE
    assert global_error([found[1]], [plain[1]]) < FLOAT64_TOLERANCE


def test_what_no_path_used_keeps_its_bits(static):
    net = tiny_supernet(dropout=0.2)
    trainer = PathTrainer(net, lr=0.1, weight_decay=0.1)
    before = {name: value.clone() for name, value in net.tensors().items()}
    archs = np.array([[1, 0, 1, 0], [2, 0, 0, 0]], np.uint8)
    for position in range(2):
        trainer.update(Plan(archs), *DATA.train.batch(position, 8), position=position)
    used = {f"blocks.{level}.{choice}" for row in archs for level, choice in enumerate(row)}
    moved = {".".join(name.split(".")[:3]) for name in changed_tensors(before, net.tensors())}
    assert {name for name in moved if name.startswith("blocks")} == used - {"blocks.2.0"}
    assert {n for n in trainer.optimizer.momenta() if n.startswith("blocks.3.1")} == set()


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_an_update_that_is_not_finite_moves_nothing_and_the_next_one_does(spoiled, static):
    net = tiny_supernet()
    trainer = PathTrainer(net, lr=0.1)
    plan = Plan(random_archs(net.space, 3))
    images, labels = DATA.train.batch(0, 8)
    trainer.update(plan, images, labels, position=0)
    before = {**net.tensors(), **{f"m.{k}": v for k, v in trainer.optimizer.momenta().items()}}
    before = {name: value.clone() for name, value in before.items()}
    bad = images.clone()
    bad[0] = torch.nan
    if spoiled == "gradient":
        bad = images
        trainer.seed, scale = 0, net.head.classifier.weight
        with torch.no_grad():
            kept = scale.clone()
            scale.mul_(1e30)
            before["head.classifier.weight"] = scale.clone()
    trainer.update(plan, bad, labels, position=1)
    after = {**net.tensors(), **{f"m.{k}": v for k, v in trainer.optimizer.momenta().items()}}
    assert changed_tensors(before, after) == set()
    assert (trainer.updates, trainer.skipped) == (1, 1)
    if spoiled == "gradient":
        with torch.no_grad():
            scale.copy_(kept)
    assert np.isfinite(trainer.update(plan, images, labels, position=2))
    assert (trainer.updates, trainer.skipped_in_row) == (2, 0)


def test_momenta_go_into_a_checkpoint_and_come_back(monkeypatch):
    def run():
        trainer = _train(steps=2)[2]
        net = trainer.supernet
        momenta = {name: value.clone() for name, value in trainer.optimizer.momenta().items()}
        trainer.optimizer.load_momenta({k: v for k, v in momenta.items() if "stem" not in k})
        plan = Plan(random_archs(net.space, 7, seed=4), 3)
        trainer.update(plan, *DATA.train.batch(5, 10), position=5)
        return net.tensors() | trainer.optimizer.momenta()

    plain, found = _both(monkeypatch, run)
    assert plain.keys() == found.keys()
    assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("like_a_device")
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here"
)
def test_through_the_triton_kernels_padding_and_memory_are_as_the_steps_want_them(monkeypatch):
    data = synthetic_data(image_size=4, validation=(3,), calibration=(3,))
    archs = random_archs(tiny_space(), 3, seed=1)
    monkeypatch.setenv("FASTSHIFT_STEPS", "static")

    def run(backend, dtype=torch.float32):
        monkeypatch.setenv("FASTSHIFT_BACKEND", backend)
        net = randomise(Supernet(tiny_space(image_size=4))).to(dtype)
        start = {name: value.double().clone() for name, value in net.tensors().items()}
        evaluator = Evaluator(net, data.validation, calibration=data.calibration, subtrie_size=3)
        scores = evaluator.evaluate(archs)
        trainer = PathTrainer(net, lr=0.05)
        trainer.update(Plan(archs, 3), *data.train.batch(0, 3), position=0)
        assert scores.computed == trainer.computed == "static"
        assert trainer.updates == 1
        return [scores.losses], [value - start[name] for name, value in net.tensors().items()]

    found, plain, exact = run("triton"), run("cpu"), run("cpu", torch.float64)
    for own in zip(found, plain, exact, strict=True):
        assert_as_accurate(*own)


# A whole search, and what says how it ran


def test_a_search_gives_what_it_gives_by_modules(monkeypatch):
    options = {"generations": 1, "population": 4, "parents": 2, "top_k": 2, "shift_steps": 2}
    options |= {"shift_batch_size": 8, "head_warmup_steps": 1, "subtrie_size": 3}

    def run():
        net = tiny_supernet(dropout=0.1).double()
        return search(net, DATA, **options, seed=3), net

    (plain, one), (found, two) = _both(monkeypatch, run)
    assert [row.arch for row in found.top] == [row.arch for row in plain.top]
    assert global_error(two.tensors().values(), one.tensors().values()) < FLOAT64_TOLERANCE
    assert found.computed == {"score": ["static"], "train": ["static"]}
    assert plain.computed["score"] == ["modules: FASTSHIFT_STEPS=modules"]


def _with_hook(net):
    net.blocks[1][2].register_forward_hook(lambda *_: None)
    return net


def _with_own_forward(net):
    net.blocks[0][1].forward = lambda x: x
    return net


def _with_other_padding(net):
    next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).padding_mode = "circular"
    return net


def _without_norm(net):
    net.blocks[0][2]._modules["0"].norm = None
    return net


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (chain_supernet, "ChainSupernet: its modules have no kernels"),
        (lambda: _with_hook(tiny_supernet()), "blocks.1.2: it has hooks"),
        (lambda: _with_own_forward(tiny_supernet()), "blocks.0.1: it has hooks or a forward of"),
        (lambda: _with_other_padding(tiny_supernet()), "stem.0: it was changed into"),
        (lambda: _without_norm(tiny_supernet()), "blocks.0.2.0: it has no batch norm"),
    ],
)
def test_a_supernet_without_kernels_runs_by_its_modules_and_says_why(make, why, static):
    net = make()
    found = evaluator_of(net).evaluate(random_archs(net.space, 3))
    assert found.computed.startswith(f"modules: {why}")
    trainer = PathTrainer(net, lr=0.1)
    plan = Plan(random_archs(net.space, 2))
    trainer.update(plan, *DATA.train.batch(0, 4), position=0)
    assert trainer.computed.startswith(f"modules: {why}")


def test_on_a_cpu_the_modules_run_unless_asked_and_another_word_is_refused(monkeypatch):
    monkeypatch.delenv("FASTSHIFT_STEPS", raising=False)
    net = tiny_supernet()
    archs = random_archs(net.space, 2)
    assert evaluator_of(net).evaluate(archs).computed == "modules: graphs need a CUDA device"
    monkeypatch.setenv("FASTSHIFT_STEPS", "graphs")
    with pytest.raises(ConfigError, match=r"'graphs'; expected one of static, modules"):
        evaluator_of(net).evaluate(archs)
