from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from block_cases import PRODUCTS_IN_BF16, geometric_mean
from torch import nn
from torch.nn import functional

from fastshift import spaces
from fastshift.batch_norm import BatchNorms, MovingAverages
from fastshift.errors import SpaceError
from fastshift.evaluator import precision_scope
from fastshift.steps import Statistics, calibrate_step, eval_step, refuse_random_trunk, train_step
from fastshift.supernet import ChainSupernet, Supernet
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    Residual,
    Zero,
    assert_as_accurate,
    chain_supernet,
    changed_tensors,
    global_error,
    path_gradients,
    random_archs,
    randomise,
    synthetic_data,
    tiny_supernet,
)
from fastshift.trie import Plan

MAKERS = {"described": tiny_supernet, "chain": chain_supernet}


@pytest.fixture(scope="module")
def batch():
    return synthetic_data().train.batch(0, 10)


def _gradients(net, archs, batch, size=3, key=(0, 0), **options):
    """Gradients and losses of one training step, the supernet's own state left alone."""
    net = copy.deepcopy(net).train()
    net.zero_grad(set_to_none=True)
    norms = BatchNorms(net)
    averages = MovingAverages(norms)
    images, labels = batch
    images = images.to(next(net.parameters()).dtype)
    plan = Plan(archs, size)
    losses = train_step(net, norms, plan, images, labels, averages, key=key, **options)
    return {name: p.grad for name, p in net.named_parameters()}, losses[plan.inverse]


def _names(gradients):
    return {name for name, gradient in gradients.items() if gradient is not None}


def _double(net, batch):
    return copy.deepcopy(net).double(), (batch[0].double(), batch[1])


# Gradients: the trie's equal the sum of one-at-a-time


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_step_adds_up_the_gradients_of_plain_single_paths_at_every_cut(kind, smoothing, batch):
    net, (images, labels) = _double(MAKERS[kind](), batch)
    archs = random_archs(net.space, 7, seed=2)
    plain, losses = path_gradients(net, archs, images, labels, label_smoothing=smoothing)
    for size in (1, 2, 3, 7):
        found, step_losses = _gradients(net, archs, batch, size, label_smoothing=smoothing)
        assert _names(found) == _names(plain)
        assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE
        assert global_error([step_losses], [losses]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("kind", MAKERS)
def test_fp32_gradients_are_as_accurate_as_one_at_a_time(kind, batch):
    net = MAKERS[kind]()
    archs = random_archs(net.space, 8, seed=3)
    plain, _ = path_gradients(net, archs, *batch)
    exact, _ = path_gradients(*_expand(net, archs, batch))
    for size in (1, 3, 8):
        found, _ = _gradients(net, archs, batch, size)
        assert_as_accurate(list(found.values()), list(plain.values()), list(exact.values()))


def _expand(net, archs, batch):
    net, (images, labels) = _double(net, batch)
    return net, archs, images, labels


@pytest.mark.parametrize(
    ("space", "texts"),
    [
        (spaces.digits(), ["012301", "012311", "000000"]),
        (spaces.nasbench_macro(width=0.25), ["20101202", "20101201"]),
        (spaces.shufflenet_v2(image_size=32, num_classes=4, width=0.25), ["0123" * 5, "0122" * 5]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_gradients_on_a_real_space_equal_one_at_a_time(space, texts):
    net = randomise(Supernet(space)).double()
    net.head.dropout.p = 0.0
    data = synthetic_data(in_channels=space.in_channels, image_size=space.image_size)
    images, labels = data.train.batch(0, 3)
    archs = space.as_archs(texts)
    plain, _ = path_gradients(net, archs, images.double(), labels)
    found, _ = _gradients(net, archs, (images, labels), 2)
    assert _names(found) == _names(plain)
    assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("kind", MAKERS)
def test_a_repeated_candidate_counts_as_often_as_it_stands_there(kind, batch):
    net, (images, labels) = _double(MAKERS[kind](), batch)
    archs = random_archs(net.space, 4, seed=5)[[2, 0, 2, 1, 2, 3, 0]]
    plain, losses = path_gradients(net, archs, images, labels)
    for size in (1, 2, 4):
        found, step_losses = _gradients(net, archs, batch, size)
        assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE
        assert global_error([step_losses], [losses]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("kind", MAKERS)
def test_head_dropout_draws_the_same_mask_in_any_company_order_and_cut(kind, batch):
    net = MAKERS[kind](dropout=0.4).double()
    archs = random_archs(net.space, 6, seed=7)[[0, 1, 2, 3, 4, 5, 2]]
    alone = [_gradients(net, arch[None], batch) for arch in archs]
    total = [
        sum((a[name] for a, _ in alone if a[name] is not None), torch.zeros_like(p))
        for name, p in net.named_parameters()
    ]
    for size, order in ((1, range(7)), (3, range(6, -1, -1)), (7, (3, 1, 0, 2, 6, 5, 4))):
        order = list(order)
        found, losses = _gradients(net, archs[order], batch, size)
        assert global_error(found.values(), total) < FLOAT64_TOLERANCE
        expected = [float(alone[i][1]) for i in order]
        assert global_error([losses], [expected]) < FLOAT64_TOLERANCE


def test_dropout_masks_differ_between_steps_seeds_and_candidates(batch):
    net = chain_supernet(blocks=[[Residual(6)], [nn.Identity(), nn.Identity()]], dropout=0.5)
    losses = {
        float(_gradients(net, np.array([[0, choice]], np.uint8), batch, key=key)[1])
        for choice in (0, 1)
        for key in ((0, 0), (0, 1), (1, 0))
    }
    assert len(losses) == 6


def test_the_dropout_of_a_lone_path_is_that_of_its_plain_forward_pass(batch):
    """Some features are dropped, and those that stay are scaled by 1 / (1 - p)."""
    net = chain_supernet(dropout=0.5).double()
    arch = random_archs(net.space, 1)
    masks = []
    net.head[4].register_forward_hook(lambda _, args, y: masks.append((args[0], y)))
    _gradients(net, arch, batch)
    x, y = masks[-1]
    kept = y != 0
    assert 0.2 < kept.double().mean() < 0.8
    assert torch.equal(y[kept], x[kept] * 2)


def test_a_step_leaves_the_global_generator_where_it_was(batch):
    net = tiny_supernet(dropout=0.3)
    before = torch.get_rng_state()
    _gradients(net, random_archs(net.space, 4), batch)
    _gradients(net, random_archs(net.space, 1), batch)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_the_scale_multiplies_the_gradient_and_not_the_reported_loss(scale, batch):
    net = tiny_supernet().double()
    archs = random_archs(net.space, 5)
    plain, losses = _gradients(net, archs, batch)
    found, scaled_losses = _gradients(net, archs, batch, scale=scale)
    plain = [None if g is None else g * scale for g in plain.values()]
    assert global_error(found.values(), plain) < FLOAT64_TOLERANCE
    assert torch.equal(losses, scaled_losses)


def test_a_step_adds_to_the_gradients_that_are_there(batch):
    net = tiny_supernet().double()
    archs = random_archs(net.space, 6, seed=9)
    images, labels = batch[0].double(), batch[1]
    together, _ = _gradients(net, archs, batch)
    net.train()
    norms = BatchNorms(net)
    for part in (archs[:2], archs[2:]):
        train_step(
            net, norms, Plan(part), images, labels, MovingAverages(norms), key=(0, 0)
        )  # fmt: skip
    found = [p.grad for p in net.parameters()]
    assert global_error(found, together.values()) < FLOAT64_TOLERANCE


def test_ops_no_candidate_uses_get_no_gradient(batch):
    net = tiny_supernet()
    found, _ = _gradients(net, net.space.as_archs(["1100", "2101"]), batch)
    used = {"stem", "head", "blocks.0.1", "blocks.0.2", "blocks.1.1", "blocks.3.0", "blocks.3.1"}
    for name, gradient in found.items():
        parts = name.split(".")
        owner = ".".join(parts[:3]) if parts[0] == "blocks" else parts[0]
        assert (gradient is not None) == (owner in used), name


def test_no_gradient_comes_back_through_an_op_that_lets_nothing_through(batch):
    blocks = [[Residual(6), Zero()], [Residual(6), nn.Identity()], [Zero(), Residual(6)]]
    net, (images, labels) = _double(chain_supernet(blocks=blocks), batch)
    for archs in (
        [(0, 0, 0), (0, 1, 0)],
        [(1, 0, 1), (1, 1, 1)],
        [(0, 0, 0)],
        [(0, 0, 0), (0, 0, 1)],
    ):
        archs = np.array(archs, np.uint8)
        plain, _ = path_gradients(net, archs, images, labels)
        for size in (1, 2):
            found, _ = _gradients(net, archs, batch, size)
            assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE


def test_identities_all_the_way_from_the_stem_to_the_head_train(batch):
    net, (images, labels) = _double(
        chain_supernet(blocks=[[nn.Identity(), Residual(6)] for _ in range(3)]), batch
    )
    archs = np.array([(0, 0, 0), (0, 0, 1), (0, 1, 0)], np.uint8)
    plain, _ = path_gradients(net, archs, images, labels)
    for size in (1, 2, 3):
        found, _ = _gradients(net, archs, batch, size)
        assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE


def test_a_stem_without_parameters_trains(batch):
    blocks = [[nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 5, padding=1)], [Residual(6)]]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    net = ChainSupernet(nn.Identity(), blocks, head)
    net, (images, labels) = _double(randomise(net), batch)
    archs = np.array([(0, 0), (1, 0)], np.uint8)
    plain, _ = path_gradients(net, archs, images, labels)
    found, _ = _gradients(net, archs, batch)
    assert global_error(found.values(), plain.values()) < FLOAT64_TOLERANCE


def test_a_frozen_trunk_gets_no_gradient_and_the_head_the_same_one(batch):
    net = tiny_supernet().double()
    archs = random_archs(net.space, 6)
    free, _ = _gradients(net, archs, batch)
    for p in net.trunk_parameters():
        p.requires_grad_(False)
    found, _ = _gradients(net, archs, batch, moving=False)
    for name, gradient in found.items():
        if name.startswith("head."):
            assert global_error([gradient], [free[name]]) < FLOAT64_TOLERANCE
        else:
            assert gradient is None


def _bf16_errors(net, archs, batch):
    """Of gradients in bf16 against fp32's, one sub-trie a candidate and one for all; and how they
    differ."""
    plain, _ = _gradients(net, archs, batch)
    found = []
    for size in (1, 6):
        with precision_scope("bf16", torch.device("cpu")):
            gradients, _ = _gradients(net, archs, batch, size)
        assert all(g is None or g.dtype == torch.float32 for g in gradients.values())
        found.append(gradients.values())
    return [global_error(g, plain.values()) for g in found], global_error(*found)


def test_bf16_gradients_point_where_fp32_gradients_do(batch, isa, backend):
    net = tiny_supernet()
    archs = random_archs(net.space, 6, seed=1)
    errors, between = _bf16_errors(net, archs, batch)
    bound = 0.1
    if isa in PRODUCTS_IN_BF16:  # what these read is rounded too, as PyTorch's products do
        backend("reference")
        bound = 2 * _bf16_errors(net, archs, batch)[0][1]
    assert min(errors) > 0
    assert max(errors) < bound
    assert between < 0.02


def test_bf16_gradients_are_as_accurate_as_pytorchs_on_average(isa, backend):
    ratios = []
    for seed in range(8):
        net = randomise(tiny_supernet(), seed)
        archs = random_archs(net.space, 6, seed=seed)
        batch = synthetic_data(seed=seed).train.batch(0, 10)
        backend("cpu")
        own = _bf16_errors(net, archs, batch)[0][1]
        backend("reference")
        theirs = _bf16_errors(net, archs, batch)[0][1]
        assert own <= 2 * theirs
        ratios.append(own / theirs)
    assert geometric_mean(ratios) <= 1.25


def test_a_row_is_not_kept_after_its_sub_trie_is_done(batch):
    """Memory is bounded by the cut: no candidate's logits outlive its leaf segment."""
    import weakref

    net = tiny_supernet()
    archs = random_archs(net.space, 12, seed=3)
    alive, most = [], 0

    def watch(_, args, y):
        nonlocal most
        alive.append(weakref.ref(y))
        most = max(most, sum(ref() is not None for ref in alive))

    net.head.register_forward_hook(watch)
    net.train()
    norms = BatchNorms(net)
    for size, bound in ((2, 2), (12, 12)):
        alive.clear()
        most = 0
        train_step(net, norms, Plan(archs, size), *batch, MovingAverages(norms), key=(0, 0))
        assert most <= bound
        assert len(alive) == len(np.unique(archs, axis=0))


# Random numbers and in-place writes before the split


def test_random_modules_before_the_head_are_refused_by_name():
    refuse_random_trunk(tiny_supernet(dropout=0.5))
    net = chain_supernet(blocks=[[Residual(6)], [nn.Identity(), nn.Sequential(nn.Dropout2d(0.2))]])
    with pytest.raises(SpaceError, match=r"blocks\.1\.1\.0: Dropout2d\(p=0.2\)"):
        refuse_random_trunk(net)
    net.blocks[1][1][0].p = 0.0
    refuse_random_trunk(net)
    net.stem.append(nn.Dropout(0.1))
    with pytest.raises(SpaceError, match=r"stem\.3"):
        refuse_random_trunk(net)


def test_a_lone_path_may_draw_random_numbers_anywhere_and_repeats_them(batch):
    net = chain_supernet(blocks=[[Residual(6)], [nn.Dropout(0.5)]], dropout=0.5)
    arch = np.zeros((1, 2), np.uint8)
    first, second = (_gradients(net, arch, batch, key=(0, 4))[1] for _ in range(2))
    other = _gradients(net, arch, batch, key=(0, 5))[1]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_masks_of_a_lone_path_before_and_in_the_head_are_unrelated():
    net = chain_supernet(blocks=[[nn.Dropout(0.5)]], dropout=0.5)
    net.stem = nn.Conv2d(3, 6, 8)  # 1 x 1 maps: both masks are [N, 6]
    kept = {}
    for name, module in (("trunk", net.blocks[0][0]), ("head", net.head[4])):
        module.register_forward_hook(
            lambda _, args, y, name=name: kept.update({name: (y != 0).flatten()})
        )
    images, labels = synthetic_data().train.batch(0, 64)
    net.head[1] = nn.Softplus()  # positive everywhere: a zero is the mask's
    net = net.double()
    _gradients(net, np.zeros((1, 1), np.uint8), (images, labels))
    agreement = (kept["trunk"] == kept["head"]).double().mean()
    assert 0.35 < agreement < 0.65


@pytest.mark.parametrize("archs", [[(0, 0), (0, 1)], [(0, 1)]])
def test_an_in_place_op_is_refused_in_training(archs, batch):
    inplace = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
    net = chain_supernet(blocks=[[nn.Identity(), Residual(6)], [Residual(6), inplace]])
    with pytest.raises(SpaceError, match="in place"):
        _gradients(net, np.array([(1, 0), *archs], np.uint8), batch)
    net = chain_supernet(blocks=[[Residual(6)], [nn.Identity(), Residual(6)]])
    net.head = nn.Sequential(nn.ReLU(inplace=True), *net.head)
    with pytest.raises(SpaceError, match="in place"):
        _gradients(net, np.array([(0, 1), *archs], np.uint8), batch)


# Scoring and calibrating one batch


def test_eval_step_counts_wrong_answers_and_sums_cross_entropies(batch):
    net = tiny_supernet().eval()
    archs = random_archs(net.space, 5, seed=1)
    plan = Plan(archs, 2)
    wrong, losses = eval_step(net, BatchNorms(net), plan, *batch, "running")
    assert wrong.dtype == torch.int64
    assert losses.dtype == torch.float64
    with torch.no_grad():
        for leaf, arch in enumerate(plan.archs):
            logits = net(batch[0], arch)
            assert int(wrong[leaf]) == int((logits.argmax(1) != batch[1]).sum())
            loss = float(functional.cross_entropy(logits, batch[1], reduction="sum"))
            assert float(losses[leaf]) == pytest.approx(loss, rel=1e-5)


def test_eval_and_calibrate_steps_build_no_graph(batch):
    net = tiny_supernet().eval()
    norms, plan = BatchNorms(net), Plan(random_archs(net.space, 4))
    statistics = Statistics.empty(plan)
    calibrate_step(net, norms, plan, batch[0], statistics)
    _, losses = eval_step(net, norms, plan, *batch, "recalibrate", statistics)
    assert not losses.requires_grad
    sums = [total for level in statistics.nodes for node in level for total in node.sums]
    assert sums
    assert not any(tensor.requires_grad for total in sums for tensor in total)


def test_a_training_step_moves_nothing_by_itself(batch):
    net = tiny_supernet().train()
    norms = BatchNorms(net)
    before = {name: tensor.clone() for name, tensor in net.tensors().items()}
    train_step(
        net, norms, Plan(random_archs(net.space, 5)), *batch, MovingAverages(norms), key=(0, 0)
    )
    assert changed_tensors(before, net.tensors()) == set()
