from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastshift import batch_norm, spaces
from fastshift.batch_norm import BatchNorms, evaluation_mode, start_ema
from fastshift.errors import ArchError, DataError, SpaceError
from fastshift.evaluator import Evaluator
from fastshift.steps import Statistics, calibrate_step, eval_step
from fastshift.supernet import Supernet
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    Residual,
    Zero,
    assert_as_accurate,
    assert_same_predictions,
    assert_untouched,
    chain_supernet,
    global_error,
    random_archs,
    randomise,
    snapshot,
    synthetic_data,
    tiny_supernet,
)
from fastshift.trie import Plan

POLICIES = batch_norm.POLICIES
MAKERS = {"described": tiny_supernet, "chain": chain_supernet}


@pytest.fixture(scope="module")
def data():
    return synthetic_data(validation=(12, 12), calibration=(9, 7))


def _with_ema(net, seed=5):
    """Give a supernet moving averages that differ from the running statistics."""
    start_ema(net)
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.ema.items():
        value += torch.rand(value.shape, generator=generator).to(value) * (
            0.5 if name.endswith("var") else 0.2
        )
    return net


def _make(kind, dtype=torch.float32):
    net = MAKERS[kind]().to(dtype)
    return _with_ema(net)


def _evaluator(net, data, strategy="shared", **options):
    return Evaluator(
        net, data.validation, calibration=data.calibration, strategy=strategy, **options
    )


def _shared_logits(net, data, archs, policy, size):
    """Logits of every row on every scored image, as the trie computes them: `[P, N, classes]`."""
    plan, norms = Plan(archs, size), BatchNorms(net)
    dtype = next(net.parameters()).dtype
    found = [[] for _ in range(plan.num_leaves)]
    with evaluation_mode(net):
        statistics = None
        if policy == "recalibrate":
            statistics = Statistics.empty(plan)
            for images, _ in data.calibration:
                calibrate_step(net, norms, plan, images.to(dtype), statistics)
        for images, labels in data.validation:
            eval_step(
                net, norms, plan, images.to(dtype), labels, policy, statistics,
                lambda leaf, logits: found[leaf].append(logits),
            )  # fmt: skip
    return torch.stack([torch.cat(found[leaf]) for leaf in plan.inverse])


@torch.no_grad()
def _plain_logits(net, data, archs, policy):
    """The same by plain modules, one stand-alone network at a time."""
    dtype, out = next(net.parameters()).dtype, []
    for arch in archs:
        plain = net.subnet(
            arch,
            calibration=data.calibration if policy == "recalibrate" else None,
            statistics="ema" if policy == "ema" else "running",
        )
        if policy == "batch":
            for module in plain.modules():
                module.training = isinstance(module, nn.BatchNorm2d)
        out.append(torch.cat([plain(images.to(dtype)) for images, _ in data.validation]))
    return torch.stack(out)


# shared == sequential


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_shared_scoring_equals_sequential_scoring_in_float64_at_every_cut(kind, policy, data):
    net = _make(kind, torch.float64)
    archs = random_archs(net.space, 6, seed=3)
    plain = _evaluator(net, data, "sequential", batch_norm=policy).evaluate(archs)
    exact = _plain_logits(net, data, archs, policy)
    for size in (1, 2, 99):
        shared = _evaluator(net, data, batch_norm=policy, subtrie_size=size).evaluate(archs)
        assert (shared.errors == plain.errors).all()
        assert global_error([shared.losses], [plain.losses]) < FLOAT64_TOLERANCE
    logits = _shared_logits(net, data, archs, policy, 3)
    assert global_error([logits], [exact]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_shared_scoring_in_fp32_is_as_accurate_as_sequential_scoring(kind, policy, data):
    net = _make(kind)
    archs = random_archs(net.space, 5, seed=4)
    plain = _plain_logits(net, data, archs, policy)
    exact = _plain_logits(copy.deepcopy(net).double(), data, archs, policy)
    for size in (1, 5):
        logits = _shared_logits(net, data, archs, policy, size)
        assert_as_accurate([logits], [plain], [exact])
        assert_same_predictions(logits, plain)


def test_fp32_losses_are_as_accurate_as_one_at_a_time(data):
    net = _make("described")
    archs = random_archs(net.space, 5, seed=4)
    plain = _evaluator(net, data, "sequential").evaluate(archs)
    exact = _evaluator(copy.deepcopy(net).double(), data, "sequential").evaluate(archs)
    shared = _evaluator(net, data).evaluate(archs)
    assert_as_accurate([shared.losses], [plain.losses], [exact.losses])


def _assert_equal_on(net, data, archs, policy):
    plain = _plain_logits(net, data, archs, policy)
    exact = _plain_logits(copy.deepcopy(net).double(), data, archs, policy)
    for size in (1, len(archs)):
        logits = _shared_logits(net, data, archs, policy, size)
        assert_as_accurate([logits], [plain], [exact])
        assert_same_predictions(logits, plain)
    double = copy.deepcopy(net).double()
    logits = _shared_logits(double, data, archs, policy, 2)
    assert global_error([logits], [exact]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("policy", POLICIES)
def test_shared_equals_sequential_on_the_digits_space(policy):
    net = _with_ema(randomise(Supernet(spaces.digits())))
    data = synthetic_data(num_classes=10, in_channels=1, validation=(6,), calibration=(5, 4))
    _assert_equal_on(net, data, net.space.as_archs(["012301", "012311", "333333"]), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_shared_equals_sequential_on_the_nasbench_macro_space(policy):
    net = _with_ema(randomise(Supernet(spaces.nasbench_macro(width=0.25))))
    data = synthetic_data(num_classes=10, image_size=32, validation=(4,), calibration=(4,))
    archs = net.space.as_archs(["20101202", "20101201", "00000000"])
    _assert_equal_on(net, data, archs, policy)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, marks=() if policy == "recalibrate" else pytest.mark.slow)
        for policy in POLICIES
    ],
)
def test_shared_equals_sequential_on_the_shufflenet_space(policy):
    space = spaces.shufflenet_v2(image_size=32, num_classes=10, width=0.25)
    net = _with_ema(randomise(Supernet(space)))
    data = synthetic_data(num_classes=10, image_size=32, validation=(2,), calibration=(2,))
    last = "0123" * 4
    _assert_equal_on(net, data, net.space.as_archs([last + "0123", last + "0120"]), policy)


def test_a_trie_of_the_whole_space_equals_one_architecture_at_a_time(data):
    net = _make("described", torch.float64)
    archs = np.array(list(itertools.product(*map(range, net.space.num_choices.tolist()))), np.uint8)
    shared = _evaluator(net, data, subtrie_size=7).evaluate(archs)
    some = archs[::19]
    plain = _evaluator(net, data, "sequential").evaluate(some)
    assert (shared.errors[::19] == plain.errors).all()
    assert global_error([shared.losses[::19]], [plain.losses]) < FLOAT64_TOLERANCE
    assert shared.sharing > 2


@pytest.mark.parametrize("policy", ["recalibrate", "batch"])
def test_statistics_far_from_zero_lose_no_accuracy(policy, data):
    """Mean / std = 100 in the input, where sums of squares cancel."""
    net = _make("described")
    far = copy.copy(data)
    far.validation = [(x + 100, y) for x, y in data.validation]
    far.calibration = [(x + 100, y) for x, y in data.calibration]
    archs = random_archs(net.space, 4, seed=8)
    plain = _plain_logits(net, far, archs, policy)
    exact = _plain_logits(copy.deepcopy(net).double(), far, archs, policy)
    logits = _shared_logits(net, far, archs, policy, 3)
    assert_as_accurate([logits], [plain], [exact])
    assert global_error([logits], [exact]) < 1e-2


# What a score does not depend on


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_scores_do_not_depend_on_order_or_company(kind, policy, data):
    net = _make(kind)
    score = _evaluator(net, data, batch_norm=policy, subtrie_size=4)
    archs = random_archs(net.space, 7, seed=1)
    together = score.evaluate(archs)
    order = np.random.default_rng(0).permutation(7)
    shuffled = score.evaluate(archs[order])
    assert (shuffled.errors == together.errors[order]).all()
    assert (shuffled.losses == together.losses[order]).all()
    for row in (0, 6):
        alone = score.evaluate(archs[row])
        assert alone.errors[0] == together.errors[row]
        assert alone.losses[0] == together.losses[row]


@pytest.mark.parametrize("strategy", ["shared", "sequential"])
def test_repeated_architectures_get_equal_scores_in_their_places(strategy, data):
    net = _make("described")
    archs = random_archs(net.space, 4, seed=2)
    rows = [2, 0, 0, 3, 1, 2]
    score = _evaluator(net, data, strategy)
    plain, repeated = score.evaluate(archs), score.evaluate(archs[rows])
    assert (repeated.losses == plain.losses[rows]).all()
    assert (repeated.errors == plain.errors[rows]).all()


@pytest.mark.parametrize("strategy", ["shared", "sequential"])
def test_an_empty_population_has_no_scores(strategy, data):
    net = _make("described")
    scores = _evaluator(net, data, strategy).evaluate([])
    assert scores.errors.shape == scores.losses.shape == (0,)
    assert scores.errors.dtype == np.float32


def test_strings_tuples_and_arrays_name_the_same_architectures(data):
    net = _make("described")
    score = _evaluator(net, data)
    expected = score(["0112", "3201"])
    assert expected.dtype == np.float32
    assert (score([(0, 1, 1, 2), (3, 2, 0, 1)]) == expected).all()
    assert (score(np.array([[0, 1, 1, 2], [3, 2, 0, 1]])) == expected).all()
    assert (score("0112") == expected[:1]).all()


def test_an_architecture_outside_the_space_is_refused(data):
    score = _evaluator(_make("described"), data)
    with pytest.raises(ArchError, match="choice 3 of block 3"):
        score(["0003"])
    with pytest.raises(ArchError):
        score([(0, 0, 0)])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", ["shared", "sequential"])
@pytest.mark.parametrize("kind", MAKERS)
def test_scoring_leaves_the_supernet_untouched_bit_for_bit(kind, strategy, policy, data):
    net = _make(kind)
    net.train()
    net.blocks[1][0].eval()
    images, labels = data.train.batch(0)
    functional.cross_entropy(net(images, random_archs(net.space, 1)[0]), labels).backward()
    net.stem.requires_grad_(False)
    kept = [(x.clone(), y.clone()) for x, y in (*data.validation, *data.calibration)]
    generator = torch.get_rng_state()
    before = snapshot(net)
    _evaluator(net, data, strategy, batch_norm=policy, subtrie_size=2)(random_archs(net.space, 4))
    assert_untouched(net, before)
    assert torch.equal(torch.get_rng_state(), generator)
    for (x, y), (old_x, old_y) in zip((*data.validation, *data.calibration), kept, strict=True):
        assert torch.equal(x, old_x)
        assert torch.equal(y, old_y)


def test_scoring_stays_untouched_when_it_fails(data):
    blocks = [[nn.Identity(), _Raises()], [Residual(6)]]
    net = chain_supernet(blocks=blocks)
    net.train()
    net.blocks[0][1].is_armed = True
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="armed"):
        _evaluator(net, data)([(0, 0), (1, 0)])
    assert_untouched(net, before)


class _Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.is_armed = False

    def forward(self, x):
        x = self.norm(x)
        if self.is_armed:
            raise RuntimeError("armed")
        return x


def test_scores_follow_the_weights_between_calls(data):
    net = _make("described")
    score = _evaluator(net, data)
    before = score.evaluate(["1111"])
    with torch.no_grad():
        net.blocks[0][1].get_parameter("0.weight").mul_(-1)
    net.version = 17
    after = score.evaluate(["1111"])
    assert after.losses[0] != before.losses[0]
    assert (before.weights_version, after.weights_version) == (0, 17)


# What is computed


def test_an_identity_shares_its_parents_row(data):
    net = _make("described")
    seen, rows = [], []
    net.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.blocks[1][1].register_forward_hook(lambda _, __, y: rows.append(y))
    calls = []
    for block in net.blocks:
        for op in block:
            op.register_forward_hook(lambda *_: calls.append(1))
    archs = ["1100", "1102"]  # the second's last choice is an identity
    short = copy.copy(data)
    short.validation = data.validation[:1]
    _evaluator(net, short, batch_norm="running")(archs)
    assert len(calls) == 3  # blocks 0 and 1 once for both, block 2 is an identity, block 3 once
    assert sum(row is rows[0] for row in seen) == 1  # through two identities, not a copy
    assert len(seen) == 2


def test_each_node_is_computed_once_for_calibration_and_once_for_scoring(data):
    net = _make("chain")
    archs = random_archs(net.space, 10, seed=6)
    plan = Plan(archs, 3)
    nodes = sum(
        not net.identities[level][choice]
        for level, choices in enumerate(plan.choice)
        for choice in choices
    )
    calls = []
    for block in net.blocks:
        for op in block:
            op.register_forward_hook(lambda *_: calls.append(1))
    _evaluator(net, data, subtrie_size=3)(archs)
    assert len(calls) == nodes * (len(data.calibration) + len(data.validation))


def test_the_sharing_factor_is_the_cost_of_paths_over_the_cost_of_nodes(data):
    net = _make("described")
    table = net.space.flops_table
    scores = _evaluator(net, data).evaluate(["1100", "1101", "3210"])
    cost = [
        sum(int(row[int(choice)]) for row, choice in zip(table, arch, strict=True))
        for arch in ("1100", "1101", "3210")
    ]
    once = table[0, 1] + table[1, 1] + table[2, 0] + table[3, 0] + table[3, 1]
    assert scores.sharing == pytest.approx(sum(cost) / (once + cost[2]))
    assert _evaluator(net, data, "sequential").evaluate(["1100", "1101"]).sharing == 1


def test_images_are_counted_per_architecture(data):
    net = _make("described")
    for strategy in ("shared", "sequential"):
        scores = _evaluator(net, data, strategy).evaluate(["1100", "1101"])
        assert (scores.images, scores.calibration_images) == (24, 16)
        scores = _evaluator(net, data, strategy, batch_norm="running").evaluate(["1100"])
        assert (scores.images, scores.calibration_images) == (24, 0)


@pytest.mark.parametrize("strategy", ["shared", "sequential"])
def test_the_error_and_loss_are_those_of_the_stand_alone_network(strategy, data):
    net = _make("described")
    scores = _evaluator(net, data, strategy).evaluate(["3112", "0001"])
    for row, arch in enumerate(["3112", "0001"]):
        plain = net.subnet(arch, calibration=data.calibration)
        assert not plain.training
        images = torch.cat([x for x, _ in data.validation])
        labels = torch.cat([y for _, y in data.validation])
        with torch.no_grad():
            logits = plain(images)
        assert scores.errors[row] == pytest.approx(
            float((logits.argmax(1) != labels).double().mean()), abs=1e-7
        )
        loss = float(functional.cross_entropy(logits, labels))
        assert scores.losses[row] == pytest.approx(loss, rel=1e-5)


# What is refused, and what fails softly


@pytest.mark.parametrize("strategy", ["shared", "sequential"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_fail_the_architectures_that_use_them(strategy, value, data):
    net = _make("described")
    with torch.no_grad():
        net.blocks[0][1].get_parameter("0.weight")[0] = value
    scores = _evaluator(net, data, strategy).evaluate(["1100", "0100", "1211", "2200"])
    assert np.isnan(scores.errors).tolist() == [True, False, True, False]
    assert np.isnan(scores.losses).tolist() == [True, False, True, False]


def _leading_relu():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1))


@pytest.mark.parametrize("policy", ["recalibrate", "running"])
def test_a_candidate_op_that_changes_its_input_is_refused(policy, data):
    net = chain_supernet(blocks=[[Residual(6)], [nn.Identity(), _leading_relu(), Residual(6)]])
    before = snapshot(net)
    with pytest.raises(SpaceError, match="in place"):
        _evaluator(net, data, batch_norm=policy)([(0, 0), (0, 1), (0, 2)])
    assert_untouched(net, before)


@pytest.mark.parametrize("policy", ["recalibrate", "running"])
def test_a_head_or_stem_that_changes_its_input_is_refused(policy, data):
    net = chain_supernet(blocks=[[Residual(6)], [nn.Identity(), Residual(6)]])
    net.head = nn.Sequential(nn.ReLU(inplace=True), *net.head)
    with pytest.raises(SpaceError, match="in place"):
        _evaluator(net, data, batch_norm=policy)([(0, 0), (0, 1)])
    net = chain_supernet(blocks=[[Residual(6)], [nn.Identity(), Residual(6)]])
    net.stem = nn.Sequential(nn.ReLU(inplace=True), *net.stem)
    kept = data.validation[0][0].clone()
    copies = copy.deepcopy(data)
    with pytest.raises(SpaceError, match="in place"):
        _evaluator(net, copies, batch_norm=policy)([(0, 0), (0, 1)])
    assert torch.equal(data.validation[0][0], kept)


def test_an_op_without_gradient_or_parameters_can_be_a_candidate(data):
    net = chain_supernet(blocks=[[Residual(6), Zero()], [nn.Identity(), Zero(), Residual(6)]])
    archs = list(itertools.product(range(2), range(3)))
    shared = _evaluator(net, data).evaluate(archs)
    plain = _evaluator(net, data, "sequential").evaluate(archs)
    np.testing.assert_allclose(shared.losses, plain.losses, rtol=1e-5)


def test_recalibrate_without_batches_is_a_value_error(data):
    net = _make("described")
    with pytest.raises(ValueError, match="calibration"):
        Evaluator(net, data.validation)
    for strategy in ("shared", "sequential"):
        score = Evaluator(net, data.validation, calibration=[], strategy=strategy)
        with pytest.raises(ValueError, match="calibration"):
            score(["0000"])
        score = Evaluator(net, [], calibration=data.calibration, strategy=strategy)
        with pytest.raises(ValueError, match="batches"):
            score(["0000"])


@pytest.mark.parametrize("strategy", ["shared", "sequential"])
@pytest.mark.parametrize("policy", ["recalibrate", "batch"])
def test_one_image_that_ends_as_one_pixel_has_no_moments(policy, strategy):
    net = Supernet(spaces.nasbench_macro(image_size=8, width=0.25))  # 1x1 maps in the last stage
    options = {"num_classes": 10, "validation": (5, 1), "calibration": (4, 1)}
    data = synthetic_data(**options)
    score = _evaluator(net, data, strategy, batch_norm=policy)
    with pytest.raises(DataError, match=r"^batch of 1 image: .* expected batches of at least 2"):
        score(["1" * 8])
    running = _evaluator(net, data, strategy, batch_norm="running")
    assert np.isfinite(running(["1" * 8])).all()


def test_ema_before_any_shift_step_is_a_value_error(data):
    with pytest.raises(ValueError, match="ema"):
        _evaluator(tiny_supernet(), data, batch_norm="ema")(["0000"])


@pytest.mark.parametrize(
    ("name", "value"), [("batch_norm", "train"), ("strategy", "fast"), ("precision", "fp16")]
)
def test_an_unknown_option_is_refused_by_name(name, value, data):
    with pytest.raises(ValueError, match=rf"{name}: '{value}'"):
        Evaluator(tiny_supernet(), data.validation, calibration=data.calibration, **{name: value})


def test_a_supernet_can_be_scored_in_inference_mode(data):
    net = _make("described")
    expected = _evaluator(net, data)(["1100", "1201"])
    with torch.inference_mode():
        found = _evaluator(net, data)(["1100", "1201"])
    assert (found == expected).all()


@pytest.mark.parametrize("kind", MAKERS)
def test_bf16_scores_are_close_to_fp32_scores(kind, data):
    net = _make(kind)
    archs = random_archs(net.space, 3, seed=1)
    for policy in POLICIES:
        plain = _evaluator(net, data, batch_norm=policy).evaluate(archs)
        for strategy in ("shared", "sequential"):
            low = _evaluator(net, data, strategy, precision="bf16", batch_norm=policy)
            found = low.evaluate(archs)
            np.testing.assert_allclose(found.losses, plain.losses, rtol=0.05)
            assert (found.losses != plain.losses).any()
