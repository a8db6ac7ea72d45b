from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastshift.batch_norm import (
    BatchNorms,
    MomentSums,
    MovingAverages,
    evaluation_mode,
    start_ema,
)
from fastshift.errors import DataError
from fastshift.evaluator import Evaluator
from fastshift.steps import Statistics, calibrate_step, train_step
from fastshift.supernet import recalibrate
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    assert_untouched,
    chain_supernet,
    changed_tensors,
    global_error,
    random_archs,
    snapshot,
    synthetic_data,
    tiny_supernet,
)
from fastshift.trie import Plan

MAKERS = {"described": tiny_supernet, "chain": chain_supernet}


def _statistics(net, archs, batches, size=3):
    plan, norms = Plan(archs, size), BatchNorms(net)
    statistics = Statistics.empty(plan)
    dtype = next(net.parameters()).dtype
    with evaluation_mode(net):
        for images, _ in batches:
            calibrate_step(net, norms, plan, images.to(dtype), statistics)
    return plan, norms, statistics


def _of_path(net, plan, norms, statistics, leaf):
    """The statistics of one candidate's norms, in the order of its own network's modules."""
    found = statistics.mean(statistics.stem, norms, net.stem)
    for level, choice in enumerate(plan.archs[leaf]):
        node = int(np.searchsorted(plan.offsets[level], leaf, side="right")) - 1
        op = net.blocks[level][int(choice)]
        if norms.of(op):
            found = found + statistics.mean(statistics.nodes[level][node], norms, op)
    if norms.of(net.head):
        found = found + statistics.mean(statistics.leaves[leaf], norms, net.head)
    return found


def _norms_of(subnet):
    return [
        module
        for module in subnet.modules()
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats
    ]


# recalibrate


@pytest.mark.parametrize("kind", MAKERS)
def test_recalibrated_statistics_of_every_node_are_those_of_cumulative_batch_norms(kind):
    """`nn.BatchNorm2d(momentum=None)` in the stand-alone network, training, is the definition."""
    net = MAKERS[kind]().double()
    batches = synthetic_data().calibration
    archs = random_archs(net.space, 5, seed=1)
    plan, norms, statistics = _statistics(net, archs, batches)
    for leaf, arch in enumerate(plan.archs):
        plain = net.subnet(arch)
        for norm in _norms_of(plain):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for images, _ in batches:
                plain(images.double())
        expected = [(norm.running_mean, norm.running_var) for norm in _norms_of(plain)]
        found = _of_path(net, plan, norms, statistics, leaf)
        assert len(found) == len(expected) > 0
        for pair, target in zip(found, expected, strict=True):
            assert global_error(pair, target) < FLOAT64_TOLERANCE


def test_recalibrating_on_one_batch_gives_that_batchs_moments():
    net = tiny_supernet().double()
    images = synthetic_data().calibration[0][0].double()
    plan, norms, statistics = _statistics(net, net.space.as_archs(["1000"]), [(images, None)])
    x = nn.functional.conv2d(images, net.stem.get_parameter("0.weight"), padding=1)
    mean, var = statistics.mean(statistics.stem, norms, net.stem)[0]
    assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-12)
    assert torch.allclose(var, x.var((0, 2, 3), unbiased=True), atol=1e-12)
    assert plan.num_leaves == 1


def test_the_recalibrate_function_is_the_same_definition():
    net = tiny_supernet()
    batches = synthetic_data().calibration
    plain = net.subnet("3211")
    momenta = [norm.momentum for norm in _norms_of(plain)]
    found = recalibrate(copy.deepcopy(plain), batches)
    assert not any(module.training for module in found.modules())
    assert [norm.momentum for norm in _norms_of(found)] == momenta
    for norm in _norms_of(plain):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for images, _ in batches:
            plain(images)
    for a, b in zip(_norms_of(found), _norms_of(plain), strict=True):
        assert torch.equal(a.running_mean, b.running_mean)
        assert torch.equal(a.running_var, b.running_var)
    with pytest.raises(ValueError, match="calibration"):
        recalibrate(plain, [])


def test_moments_at_a_hundred_standard_deviations_from_zero_keep_their_digits():
    """Sums of squares would cancel: variance 1 beside a squared mean of 10,000."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, 8, 8, generator=generator) + 100
    net = chain_supernet(blocks=[[nn.BatchNorm2d(6)]])
    norms = BatchNorms(net)
    exact = x.double()
    for part in (x, x[:1]):
        _, moments = norms.collect(net.blocks[0][0], part)
        mean, var = moments[0]
        exact = part.double()
        assert global_error([mean], [exact.mean((0, 2, 3))]) < 1e-6
        assert global_error([var], [exact.var((0, 2, 3))]) < 1e-4
    sums = MomentSums()
    for part in x.split(16):
        sums.add(norms.collect(net.blocks[0][0], part)[1])
    mean, var = sums.mean(norms.of(net.blocks[0][0]))[0]
    exact = torch.stack([part.double().var((0, 2, 3)) for part in x.split(16)]).mean(0)
    assert global_error([mean], [x.double().mean((0, 2, 3))]) < 1e-6
    assert global_error([var], [exact]) < 1e-4


def test_calibration_batches_of_unequal_size_count_alike():
    """As a cumulative batch norm counts them: the mean of batch means, not the mean over images."""
    net = tiny_supernet()
    sums = MomentSums()
    sums.add([(torch.zeros(8), torch.ones(8))])
    sums.add([(torch.ones(8), torch.full((8,), 3.0))])
    mean, var = sums.mean(BatchNorms(net).of(net.stem))[0]
    assert torch.equal(mean, torch.full((8,), 0.5))
    assert torch.equal(var, torch.full((8,), 2.0))


def test_the_order_of_calibration_batches_does_not_matter():
    net = tiny_supernet()
    data = synthetic_data()
    scores = [
        Evaluator(net, data.validation, calibration=batches).evaluate(["3111", "2010"]).losses
        for batches in (data.calibration, data.calibration[::-1])
    ]
    np.testing.assert_allclose(*scores, rtol=1e-6)


# Collecting and imposing leave the modules alone


def test_collecting_and_imposing_statistics_leave_the_modules_untouched():
    net = chain_supernet()
    norms = BatchNorms(net)
    images = synthetic_data().calibration[0][0]
    before = snapshot(net)
    y, moments = norms.collect(net.stem, images)
    found = norms.impose(net.stem, images, moments)
    assert_untouched(net, before)
    assert len(moments) == len(norms.of(net.stem)) == 1
    count = y.numel() / y.shape[1]
    exact = [(mean, var * (count - 1) / count) for mean, var in moments]
    assert torch.allclose(norms.impose(net.stem, images, exact), y, atol=1e-5)
    assert not torch.equal(found, y)  # imposed statistics are the unbiased ones


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [1, 2])
def test_one_image_that_ends_as_one_pixel_is_refused_in_our_words(backend, size, monkeypatch):
    monkeypatch.setenv("FASTSHIFT_BACKEND", backend)
    net = tiny_supernet()
    norms = BatchNorms(net)
    owners = [(op, 8) for op in net.blocks[1]]  # of stride 2: either size leaves one pixel
    owners += [(net.head, 16)] if size == 1 else []
    for owner, channels in owners:
        words = r"^batch of 1 image: .* expected batches of at least 2"
        with pytest.raises(DataError, match=words):
            norms.collect(owner, torch.rand(1, channels, size, size))
        for images, side in ((1, 3), (2, size)):
            y, moments = norms.collect(owner, torch.rand(images, channels, side, side))
            assert y.isfinite().all()
            assert all(var.isfinite().all() for _, var in moments)


def test_batch_norms_are_found_by_their_names_in_the_state_dict():
    net = chain_supernet()
    keys = net.state_dict().keys()
    names = [name for name, _ in BatchNorms(net).items()]
    assert sorted(f"{name}.running_mean" for name in names) == sorted(
        key for key in keys if key.endswith("running_mean")
    )


def test_a_bare_batch_norm_can_be_a_candidate_op():
    net = chain_supernet(blocks=[[nn.BatchNorm2d(6), nn.Identity()]])
    assert "blocks.0.0" in dict(BatchNorms(net).items())
    data = synthetic_data()
    for policy in ("recalibrate", "batch", "running"):
        losses = [
            Evaluator(
                net, data.validation, calibration=data.calibration, batch_norm=policy, strategy=s
            )
            .evaluate([(0,), (1,)])
            .losses
            for s in ("shared", "sequential")
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)


def test_evaluation_mode_gives_back_each_parts_own_mode():
    net = chain_supernet()
    net.train()
    net.head.eval()
    net.blocks[1][1][1].eval()
    modes = [module.training for module in net.modules()]
    with evaluation_mode(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(KeyError), evaluation_mode(net):
        raise KeyError
    assert [module.training for module in net.modules()] == modes


# Moving averages


def _averaged(net, archs, size, ema=False, images=None):
    """A copy of a supernet after the moving-average update of one training step."""
    net = copy.deepcopy(net).train()
    norms = BatchNorms(net)
    averages = MovingAverages(norms)
    images, labels = synthetic_data().train.batch(0, 8)
    images = images.to(next(net.parameters()).dtype)
    train_step(net, norms, Plan(archs, size), images, labels, averages, key=(0, 0))
    if ema:
        start_ema(net)
    averages.apply(net.ema if ema else None)
    return net


def _statistics_of(net):
    return {
        name: value
        for name, value in net.state_dict().items()
        if "running" in name or "tracked" in name
    }


@pytest.mark.parametrize("kind", MAKERS)
def test_a_lone_paths_update_is_the_one_its_batch_norms_would_make(kind):
    net = MAKERS[kind]().double()
    arch = random_archs(net.space, 1, seed=2)
    found = _averaged(net, arch, 1)
    plain = copy.deepcopy(net).train()
    plain(synthetic_data().train.batch(0, 8)[0].double(), arch[0])
    for name, value in _statistics_of(plain).items():
        assert global_error([_statistics_of(found)[name]], [value]) < FLOAT64_TOLERANCE, name


def test_moments_in_one_tensor_count_as_each_for_itself():
    """Also where some of an op's nodes come the one way and some the other."""
    generator = torch.Generator().manual_seed(0)
    weights = [3, 1, 7, 2]
    found = []
    for packed in ([False] * 4, [True] * 4, [True, False, False, True]):
        net = tiny_supernet()
        op, norms = net.blocks[0][1], BatchNorms(net)
        sizes = [len(norm.running_mean) for _, norm in norms.of(op)]
        averages = MovingAverages(norms)
        generator.manual_seed(1)
        for weight, together in zip(weights, packed, strict=True):
            parts = [size for size in sizes for size in (size, size, 3 * size)]
            moments = torch.rand(sum(parts), generator=generator)
            if together:
                averages.add_packed(op, moments, parts, weight)
            else:
                each = moments.split(parts)
                averages.add(op, list(zip(each[::3], each[1::3], strict=True)), weight)
        averages.apply()
        found.append(_statistics_of(net))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    assert not torch.equal(found[0]["blocks.0.1.0.norm.running_mean"], torch.zeros(sizes[0]))


@pytest.mark.parametrize("kind", MAKERS)
def test_one_update_a_step_from_the_candidate_weighted_mean(kind):
    """The moments each candidate would meet on its own, averaged over those that use the op."""
    net = MAKERS[kind]().double()
    archs = random_archs(net.space, 6, seed=4)[[0, 1, 2, 3, 4, 5, 0, 3]]
    found = _averaged(net, archs, 3)
    images = synthetic_data().train.batch(0, 8)[0].double()
    moments = {name: [] for name, _ in BatchNorms(net).items()}
    for arch in archs:
        plain = copy.deepcopy(net).train()
        for norm in dict(BatchNorms(plain).items()).values():
            norm.momentum = 1.0
            norm.running_mean.fill_(torch.nan)
            norm.running_var.fill_(0)
        plain(images, arch)
        for name, norm in BatchNorms(plain).items():
            if int(norm.num_batches_tracked) > 7:
                moments[name].append(_batch_moments(plain, name, images, arch))
    for name, norm in BatchNorms(net).items():
        after = dict(BatchNorms(found).items())[name]
        used = moments[name]
        if not used:
            assert torch.equal(after.running_mean, norm.running_mean)
            assert int(after.num_batches_tracked) == 7
            continue
        assert int(after.num_batches_tracked) == 8
        rate = 1 / 8 if norm.momentum is None else norm.momentum
        for index, kind_ in enumerate(("running_mean", "running_var")):
            mean = torch.stack([pair[index] for pair in used]).mean(0)
            expected = (1 - rate) * getattr(norm, kind_) + rate * mean
            assert global_error([getattr(after, kind_)], [expected]) < FLOAT64_TOLERANCE, name


def _batch_moments(net, name, images, arch):
    """Mean and unbiased variance of what reaches a batch norm on one plain pass."""
    seen = []
    module = dict(net.named_modules())[name]
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    net(images, arch)
    handle.remove()
    x = seen[0]
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)


@pytest.mark.parametrize("ema", [False, True])
def test_the_update_does_not_depend_on_order_or_cut(ema):
    net = chain_supernet().double()
    archs = random_archs(net.space, 7, seed=4)
    reference = _averaged(net, archs, 7, ema)
    for size, order in ((1, range(7)), (2, range(6, -1, -1)), (3, (2, 0, 6, 1, 5, 3, 4))):
        found = _averaged(net, archs[list(order)], size, ema)
        for a, b in (
            (found.ema, reference.ema),
            (_statistics_of(found), _statistics_of(reference)),
        ):
            assert a.keys() == b.keys()
            assert global_error(a.values(), b.values()) < 1e-12


def test_statistics_of_ops_no_candidate_uses_stay_bit_for_bit():
    net = tiny_supernet()
    archs = net.space.as_archs(["1100", "1101"])
    used = {"blocks.0.1", "blocks.1.1", "blocks.3.0", "blocks.3.1"}
    found = _averaged(net, archs, 2)
    changed = changed_tensors(_statistics_of(net), _statistics_of(found))
    assert {".".join(name.split(".")[:3]) for name in changed if name.startswith("blocks")} == used
    found = _averaged(net, archs, 2, ema=True)
    assert changed_tensors(_statistics_of(net), _statistics_of(found)) == set()
    kept = {name: value for name, value in _statistics_of(net).items() if "running" in name}
    changed = changed_tensors(kept, found.ema)
    assert {".".join(name.split(".")[:3]) for name in changed if name.startswith("blocks")} == used


def test_the_moving_averages_of_the_shift_begin_where_pre_training_left_its_own():
    net = tiny_supernet()
    start_ema(net)
    for name, value in net.ema.items():
        assert torch.equal(value, net.state_dict()[name])
        assert value.data_ptr() != net.state_dict()[name].data_ptr()
    net.ema["stem.0.norm.running_mean"].fill_(5)
    start_ema(net)
    assert (net.ema["stem.0.norm.running_mean"] == 5).all()


def test_the_moving_averages_follow_the_weights_to_another_type():
    net = tiny_supernet()
    start_ema(net)
    assert all(value.dtype == torch.float64 for value in net.double().ema.values())
    copied = copy.deepcopy(net)
    assert changed_tensors(net.ema, copied.ema) == set()
    copied.ema["stem.0.norm.running_mean"].fill_(5)
    assert changed_tensors(net.ema, copied.ema) == {"stem.0.norm.running_mean"}
