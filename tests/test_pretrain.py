from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastshift import pretrain as pretrain_function
from fastshift import spaces
from fastshift.batch_norm import start_ema
from fastshift.errors import (
    CheckpointError,
    ConfigError,
    ConstraintError,
    DataError,
    NonFiniteLossError,
    SpaceError,
)
from fastshift.evaluator import Evaluator
from fastshift.pretrain import PathTrainer, PretrainOptions, pretrain, sample_paths
from fastshift.sampler import FeasibleSampler
from fastshift.supernet import ChainSupernet, Supernet
from fastshift.testing import (
    chain_supernet,
    changed_tensors,
    global_error,
    micro_supernet,
    random_archs,
    stop_at,
    synthetic_data,
    tiny_space,
    tiny_supernet,
    toy_supernet,
)
from fastshift.trie import Plan

OPTIONS = {"steps": 5, "batch_size": 6, "lr": 0.05, "warmup_steps": 2, "clip_norm": 1.5}


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def _run(out=None, net=None, data=None, **options):
    net = micro_supernet() if net is None else net
    data = synthetic_data() if data is None else data
    return net, pretrain(net, data, out=out, seed=3, **{**OPTIONS, **options})


# Paths


def test_uniform_paths_use_every_choice_equally_often():
    space = tiny_space()
    options = PretrainOptions(paths_per_step=3)
    paths = np.concatenate([sample_paths(space, options, 0, step) for step in range(2000)])
    assert paths.dtype == np.uint8
    assert paths.shape == (6000, 4)
    for block, count in enumerate(space.num_choices.tolist()):
        found = np.bincount(paths[:, block], minlength=count)
        assert len(found) == count
        chi_square = float(((found - 6000 / count) ** 2 / (6000 / count)).sum())
        assert chi_square < 20  # p < 0.001 beyond 16.3 at most
    pairs = Counter(map(tuple, paths[:, 2:].tolist()))
    assert len(pairs) == 6
    assert max(pairs.values()) < 1.15 * 1000


def test_fair_paths_use_every_choice_of_every_block_in_every_step():
    space = tiny_space()
    options = PretrainOptions(sampler="fair")
    totals = np.zeros((4, 4))
    for step in range(40):
        paths = sample_paths(space, options, 0, step)
        assert paths.shape == (4, 4)
        for block, count in enumerate(space.num_choices.tolist()):
            found = np.bincount(paths[:, block], minlength=count)
            totals[block, :count] += found
            assert found.min() >= 4 // count
            assert found.max() <= -(-4 // count)
    assert (totals[:2] == 40).all()
    assert (totals[2, :2] == 80).all()


def test_paths_are_a_function_of_seed_and_step():
    space, options = tiny_space(), PretrainOptions(paths_per_step=2)
    assert (sample_paths(space, options, 1, 7) == sample_paths(space, options, 1, 7)).all()
    different = {sample_paths(space, options, s, t).tobytes() for s in range(3) for t in range(9)}
    assert len(different) > 20


def test_constrained_paths_are_uniform_among_the_feasible():
    space = tiny_space()
    options = PretrainOptions(paths_per_step=3, constraints={"flops": "60%", "params": ":90%"})
    paths = np.concatenate([sample_paths(space, options, 0, step) for step in range(1500)])
    assert paths.shape == (4500, 4)
    everything = np.array(list(np.ndindex(*space.num_choices.tolist())), np.uint8)
    feasible = everything[
        (space.flops(everything) <= 0.6 * space.largest("flops"))
        & (space.params(everything) <= 0.9 * space.largest("params"))
    ]
    assert 1 < len(feasible) < len(everything)
    found = Counter(map(bytes, paths))
    assert found.keys() == set(map(bytes, feasible))
    expected = 4500 / len(feasible)
    chi_square = sum((count - expected) ** 2 / expected for count in found.values())
    assert chi_square < len(feasible) + 4 * (2 * len(feasible)) ** 0.5


def test_constrained_paths_are_a_function_of_seed_and_step():
    space, options = tiny_space(), PretrainOptions(paths_per_step=2, constraints={"flops": "60%"})
    sampler = FeasibleSampler(space, options.constraints, seed=5)
    sampler.sample(3)
    for step in (7, 3, 7):
        own = sample_paths(space, options, 1, step)
        assert (own == sample_paths(space, options, 1, step, sampler)).all()
    different = {sample_paths(space, options, s, t).tobytes() for s in range(3) for t in range(9)}
    assert len(different) > 20


# Schedules


def test_the_linear_schedule_falls_from_the_peak_to_zero():
    options = PretrainOptions(steps=10, lr=0.4)
    assert [options.lr_at(step) for step in range(11)] == pytest.approx(
        [0.4 * (1 - step / 10) for step in range(11)]
    )


def test_the_cosine_schedule_is_at_half_the_peak_half_way():
    options = PretrainOptions(steps=10, lr=0.4, schedule="cosine")
    assert options.lr_at(0) == pytest.approx(0.4)
    assert options.lr_at(5) == pytest.approx(0.2)
    assert options.lr_at(2) == pytest.approx(0.2 * (1 + math.cos(math.pi / 5)))
    assert options.lr_at(10) == pytest.approx(0)


def test_the_rate_rises_from_near_zero_to_the_peak_in_the_warm_up():
    for schedule in ("linear", "cosine", "constant"):
        options = PretrainOptions(steps=10, lr=0.4, schedule=schedule, warmup_steps=4)
        assert [options.lr_at(step) for step in range(5)] == pytest.approx(
            [0.1, 0.2, 0.3, 0.4, 0.4]
        )
    assert options.lr_at(9) == 0.4


def test_the_default_peak_rate_grows_with_the_batch():
    assert PretrainOptions(batch_size=1024).peak_lr == 0.5
    assert PretrainOptions(batch_size=128).peak_lr == 0.0625
    assert PretrainOptions(batch_size=128, lr=0.3).peak_lr == 0.3


# Training


def _plain_steps(net, data, clip=None, reduction="mean", **options):
    """Pre-training with plain modules and `torch.optim.SGD`."""
    options = PretrainOptions(**options)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 4e-5},
        {"params": [p for p in net.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    for step in range(options.steps):
        paths = sample_paths(net.space, options, 3, step)
        images, labels = data.train.batch(step, options.batch_size, "pretrain")
        optimizer.zero_grad(set_to_none=True)
        net.train()
        losses = [
            functional.cross_entropy(net(images.double(), path), labels, label_smoothing=0.1)
            for path in paths
        ]
        (sum(losses) / (len(losses) if reduction == "mean" else 1)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(
                [p for p in net.parameters() if p.grad is not None], clip
            )
        for group in optimizer.param_groups:
            group["lr"] = options.lr_at(step)
        optimizer.step()
    return net


@pytest.mark.parametrize(
    ("options", "reduction"),
    [({}, "mean"), ({"paths_per_step": 3}, "mean"), ({"sampler": "fair"}, "sum")],
    ids=["one path", "three paths", "fair"],
)
def test_pre_training_is_plain_sgd_on_the_sampled_paths(options, reduction):
    data = synthetic_data()
    net, _ = _run(net=micro_supernet(dropout=0.0).double(), data=data, **options)
    settings = {name: value for name, value in OPTIONS.items() if name != "clip_norm"} | options
    plain = _plain_steps(
        micro_supernet(dropout=0.0).double(), data, clip=1.5, reduction=reduction, **settings
    )
    for (name, p), q in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert global_error([q], [p]) < 1e-9, name
    if options == {}:
        for (name, p), q in zip(plain.named_buffers(), net.buffers(), strict=True):
            assert global_error([q], [p]) < 1e-9, name
    assert net.version == 5


def test_pre_training_teaches():
    data = synthetic_data(in_channels=1, validation=(60,), calibration=(8,))
    net = toy_supernet((0, 1, 2))
    score = Evaluator(net, data.validation, calibration=data.calibration)
    before = score(["012"])[0]
    result = pretrain(net, data, steps=40, batch_size=16, lr=0.1)
    assert result.loss < math.log(4)
    assert score(["012"])[0] < 0.1 < before


def test_clipping_bounds_the_whole_gradient_of_the_sampled_parameters():
    net = micro_supernet()
    trainer = PathTrainer(net, lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.01)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    images, labels = synthetic_data().train.batch(0, 6)
    trainer.update(Plan(random_archs(net.space, 3)), images, labels, position=0)
    moved = [p.detach() - before[name] for name, p in net.named_parameters()]
    norm = float(sum((step.double() ** 2).sum() for step in moved)) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_training_images_and_paths_are_counted():
    net = micro_supernet()
    trainer = PathTrainer(net, lr=0.1)
    images, labels = synthetic_data().train.batch(0, 6)
    archs = random_archs(net.space, 4)[[0, 1, 2, 3, 0]]
    loss = trainer.update(Plan(archs), images, labels, position=0)
    assert math.isfinite(loss)
    assert trainer.counters() == {
        "updates": 1, "skipped": 0, "skipped_in_row": 0, "path_images": 30, "images": 6,
    }  # fmt: skip
    assert net.version == 1


def test_the_loss_reported_is_the_mean_over_rows_repeats_included():
    net = micro_supernet(dropout=0.0).double()
    images, labels = synthetic_data().train.batch(0, 6)
    archs = net.space.as_archs(["012", "012", "210"])
    trainer = PathTrainer(net, lr=0.0, label_smoothing=0.0)
    expected = []
    net.train()
    for arch in archs:
        state = {name: value.clone() for name, value in net.state_dict().items()}
        logits = net(images.double(), arch)
        expected.append(float(functional.cross_entropy(logits, labels).detach()))
        net.load_state_dict(state)
    found = trainer.update(Plan(archs), images, labels, position=0)
    assert found == pytest.approx(np.mean(expected), rel=1e-9)


def test_bf16_pre_training_runs_and_keeps_fp32_weights():
    net, result = _run(precision="bf16")
    plain, _ = _run()
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert math.isfinite(result.loss)
    assert 0 < global_error(net.parameters(), plain.parameters()) < 0.05


def test_dropout_masks_depend_on_the_seed_and_the_position_alone():
    net = micro_supernet(dropout=0.5)
    images, labels = synthetic_data().train.batch(0, 6)
    plan = Plan(net.space.as_archs(["012", "120"]))

    def loss(seed, position):
        return PathTrainer(net, lr=0.0, seed=seed).update(plan, images, labels, position=position)

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(seed, position) for seed in (0, 1) for position in (3, 4)}) == 4


def test_random_modules_before_the_head_are_refused_where_paths_share_them():
    blocks = [[torch.nn.Dropout(0.3), torch.nn.Identity()], [torch.nn.Conv2d(6, 6, 1)]]
    net = chain_supernet(blocks=blocks)
    with pytest.raises(SpaceError, match=r"blocks\.0\.0"):
        _run(net=net, sampler="fair")
    _run(net=net)


def test_averages_of_an_earlier_shift_do_not_outlive_more_pre_training():
    net = micro_supernet()
    start_ema(net)
    _run(net=net)
    assert net.ema == {}


# Losses that are not finite


def _spoil(*indices):
    def spoil(stream, index, images):
        if index in indices:
            images[0] = math.nan

    return spoil


def test_one_batch_with_nan_skips_one_step():
    data = synthetic_data()
    data.train.spoil = _spoil(2)
    net, result = _run(data=data)
    assert (result.steps, result.skipped, net.version) == (5, 1, 4)
    assert all(torch.isfinite(value).all() for value in net.tensors().values())
    assert math.isfinite(result.loss)  # of the steps that were made


def test_three_bad_steps_in_a_row_stop_with_the_state_saved(tmp_path):
    data = synthetic_data()
    data.train.spoil = _spoil(1, 2, 3)
    net = micro_supernet()
    with pytest.raises(NonFiniteLossError, match="3 updates in a row"):
        _run(tmp_path, net=net, data=data)
    assert net.version == 1
    data.train.spoil = None
    net, result = _run(tmp_path, net=micro_supernet(seed=5), data=data, resume=True)
    assert (result.steps, result.skipped, net.version) == (5, 3, 2)


# Going on after a stop


@pytest.mark.parametrize(
    "options",
    [{"sampler": "uniform"}, {"sampler": "fair"}, {"constraints": {"flops": (None, "70%")}}],
    ids=["uniform", "fair", "constrained"],
)
def test_pre_training_stopped_anywhere_and_resumed_equals_the_unbroken_run(options, tmp_path):
    whole, reference = _run(tmp_path / "whole", **options)
    assert reference.stopped is None
    for call in range(1, 6):
        out = tmp_path / str(call)
        _, part = _run(out, stop=stop_at(call), **options)
        assert (part.stopped, part.steps) == ("interrupted", call - 1)
        net, result = _run(out, net=micro_supernet(seed=9), resume=True, **options)
        assert changed_tensors(whole.tensors(), net.tensors()) == set()
        assert (result.loss, result.steps, result.skipped) == (reference.loss, 5, 0)
        assert net.version == 5


def test_pre_training_stopped_at_every_step_equals_the_unbroken_run(tmp_path):
    whole, reference = _run()
    for part in range(7):
        net, result = _run(
            tmp_path, net=micro_supernet(seed=9 if part else 0), resume=True, stop=stop_at(2)
        )
        if result.stopped is None:
            break
    assert part == 4
    assert changed_tensors(whole.tensors(), net.tensors()) == set()
    assert result.loss == reference.loss


def test_a_finished_pre_training_is_not_repeated(tmp_path):
    net, _ = _run(tmp_path)
    asked = synthetic_data()
    again, result = _run(tmp_path, net=micro_supernet(seed=9), data=asked, resume=True)
    assert asked.train.asked == []
    assert result.steps == 5
    assert changed_tensors(net.tensors(), again.tensors()) == set()


def test_pre_training_stays_within_its_constraints(monkeypatch):
    seen = []
    update = PathTrainer.update

    def watch(self, plan, *args, **keywords):
        seen.extend(plan.archs)
        return update(self, plan, *args, **keywords)

    monkeypatch.setattr(PathTrainer, "update", watch)
    net, _ = _run(paths_per_step=4, constraints={"params": "80%"})
    assert len(seen) >= 10
    assert (net.space.params(np.array(seen)) <= 0.8 * net.space.largest("params")).all()
    with pytest.raises(ConstraintError, match="no architecture of micro"):
        _run(constraints={"flops": 1})


def test_a_run_is_resumed_only_under_its_own_constraints(tmp_path):
    _run(tmp_path, constraints={"flops": "70%"})
    with pytest.raises(CheckpointError, match=r"options: constraints: flops is '70%' there"):
        _run(tmp_path, resume=True, constraints={"flops": "80%"})


def test_a_directory_with_a_run_is_refused(tmp_path):
    _run(tmp_path)
    with pytest.raises(CheckpointError, match="holds a run already"):
        _run(tmp_path)
    with pytest.raises(CheckpointError, match=r"lr is 0\.05 there, 0\.1 here"):
        _run(tmp_path, resume=True, lr=0.1)
    with pytest.raises(CheckpointError, match="space"):
        _run(tmp_path, resume=True, net=tiny_supernet())


# Options


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": "sandwich"}, "sampler"),
        ({"sampler": "fair", "constraints": {"flops": "60%"}}, "sampler"),
        ({"schedule": "step"}, "schedule"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"paths_per_step": 0}, "paths_per_step"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"nesterov": True, "momentum": 0.0}, "momentum"),
        ({"precision": "fp16"}, "precision"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_out_of_range_is_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name) as caught:
        _run(**options)
    assert isinstance(caught.value, ConfigError) or name == "precision"


def test_the_public_name_is_the_function():
    assert pretrain_function is pretrain


def test_a_gradient_that_is_not_finite_is_skipped_like_a_loss():
    net = tiny_supernet()
    trainer = PathTrainer(net, lr=0.1)
    before = {name: tensor.clone() for name, tensor in net.tensors().items()}
    images, labels = synthetic_data().train.batch(0, 8, "x")
    weight = next(p for p in net.head.parameters() if p.dim() > 1)
    hook = weight.register_hook(lambda grad: grad * math.inf)
    plan = Plan(np.zeros((1, net.space.num_blocks), np.uint8))
    trainer.update(plan, images, labels, position=0)
    assert (trainer.updates, trainer.skipped) == (0, 1)
    assert changed_tensors(before, net.tensors()) == set()
    hook.remove()
    trainer.update(plan, images, labels, position=1)
    assert (trainer.updates, trainer.skipped) == (1, 1)


def test_a_batch_of_one_image_that_ends_as_one_pixel_is_refused():
    net = Supernet(spaces.nasbench_macro(image_size=8, width=0.25))  # 1x1 maps in the last stage
    data = synthetic_data(num_classes=10)
    before = {name: tensor.clone() for name, tensor in net.tensors().items()}
    with pytest.raises(DataError, match=r"^batch of 1 image: .* expected batches of at least 2"):
        _run(net=net, data=data, batch_size=1, steps=1, warmup_steps=0)
    assert changed_tensors(before, net.tensors()) == set()
    assert math.isfinite(_run(net=net, data=data, batch_size=2, steps=1, warmup_steps=0)[1].loss)


def test_any_random_op_that_candidates_would_share_is_refused():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    blocks = [[nn.Conv2d(4, 4, 1), Noise()], [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)]]
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 4))
    net = ChainSupernet(nn.Conv2d(3, 4, 3, padding=1), blocks, head)
    trainer = PathTrainer(net, lr=0.1)
    images, labels = synthetic_data().train.batch(0, 4, "x")
    trainer.update(Plan(np.array([[1, 0]], np.uint8)), images, labels, position=0)
    with pytest.raises(SpaceError, match="random"):
        trainer.update(Plan(np.array([[1, 0], [1, 1]], np.uint8)), images, labels, position=1)


def test_the_batch_size_is_the_datas_own_unless_one_is_given():
    data = synthetic_data()
    data.train.batch_size = 5
    pretrain(tiny_supernet(), data, 1)
    pretrain(tiny_supernet(), data, 1, batch_size=7)
    assert [asked[2] for asked in data.train.asked] == [5, 7]
