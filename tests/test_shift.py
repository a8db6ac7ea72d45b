from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from fastshift.errors import ConfigError
from fastshift.shift import HeadWarmup, Shifter, ShiftOptions
from fastshift.testing import (
    FLOAT64_TOLERANCE,
    changed_tensors,
    global_error,
    micro_supernet,
    path_gradients,
    synthetic_data,
    tiny_supernet,
)

SMALL = {"shift_steps": 2, "shift_batch_size": 6, "shift_lr": 0.05}


def _shifter(net, population=4, data=None, **options):
    subtrie = options.pop("subtrie_size", 8)
    constraints = options.pop("constraints", None)
    return Shifter(
        net,
        synthetic_data() if data is None else data,
        ShiftOptions(**{**SMALL, **options}),
        population=population,
        constraints=constraints,
        seed=1,
        subtrie_size=subtrie,
    )


def _clones(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def _owner(name):
    name = name.removeprefix("ema.")
    return ".".join(name.split(".")[:3]) if name.startswith("blocks") else name.split(".")[0]


# What moves


def test_only_what_some_candidate_uses_moves_bit_for_bit():
    net = tiny_supernet()
    shifter = _shifter(net)
    everything = net.space.as_archs(["0000", "1111", "2202", "3300"])
    shifter.update(everything)  # momenta for all
    archs = net.space.as_archs(["1100", "1101"])
    used = {"stem", "head", "blocks.0.1", "blocks.1.1", "blocks.3.0", "blocks.3.1"}
    tensors = _clones(net.tensors())
    momenta = _clones(shifter.trainer.optimizer.momenta())
    assert {_owner(name) for name in momenta} > used
    for _ in range(2):
        shifter.update(archs)
    moved = changed_tensors(tensors, net.tensors())
    assert {_owner(name) for name in moved} == used
    # A shift just before another norm has no gradient to speak of; kernels have.
    kernels = {name for name, p in net.named_parameters() if p.dim() > 1}
    assert moved & kernels == {name for name in kernels if _owner(name) in used}
    assert {n for n in moved if n.startswith("ema.")} == {
        name for name in tensors if name.startswith("ema.") and _owner(name) in used
    }
    after = shifter.trainer.optimizer.momenta()
    assert {_owner(name) for name in changed_tensors(momenta, after)} == used


def test_running_statistics_stay_while_the_moving_averages_move():
    net = tiny_supernet()
    shifter = _shifter(net)
    before = _clones(net.tensors())
    shifter.update(net.space.as_archs(["1100", "2201"]))
    moved = changed_tensors(before, net.tensors())
    assert not {name for name in moved if "running" in name and not name.startswith("ema.")}
    assert not {name for name in moved if "tracked" in name}
    assert "ema.stem.0.norm.running_mean" in moved


def test_drift_lets_unsampled_parameters_move_as_torch_1_did():
    net = tiny_supernet()
    shifter = _shifter(net, drift=True)
    shifter.update(net.space.as_archs(["2202"]))
    before = _clones(dict(net.named_parameters()))
    shifter.update(net.space.as_archs(["1100"]))
    moved = changed_tensors(before, dict(net.named_parameters()))
    assert any(name.startswith("blocks.0.2.") for name in moved)  # by its momentum
    still = {n for n in moved if n.startswith("blocks.0.3.") and before[n].dim() <= 1}
    assert still == set()  # neither momentum nor decay


def test_an_update_steps_on_the_sum_of_the_candidates_losses():
    net = tiny_supernet().double()
    archs = net.space.as_archs(["1100", "2201", "0012", "2201"])
    data = synthetic_data()
    images, labels = data.train.batch(0, 6, "shift")
    gradients, losses = path_gradients(net, archs, images.double(), labels, label_smoothing=0.1)
    before = _clones(dict(net.named_parameters()))
    found = _shifter(net, data=data, shift_momentum=0.0, shift_weight_decay=0.0).update(archs)
    assert found == pytest.approx(np.mean(losses), rel=1e-9)
    steps = [(before[name] - p.detach()) / 0.05 for name, p in net.named_parameters()]
    assert global_error(steps, gradients.values()) < FLOAT64_TOLERANCE


def test_the_cut_and_the_order_of_a_group_do_not_matter():
    nets = {}
    for size, order in ((1, (0, 1, 2, 3)), (2, (3, 1, 0, 2)), (8, (2, 3, 1, 0))):
        net = micro_supernet().double()
        shifter = _shifter(net, subtrie_size=size, shift_clip_norm=1.0)
        archs = net.space.as_archs(["012", "120", "111", "001"])[list(order)]
        for _ in range(2):
            shifter.update(archs)
        nets[size] = net.tensors()
    for found in (nets[2], nets[8]):
        assert global_error(found.values(), nets[1].values()) < FLOAT64_TOLERANCE


def test_each_update_takes_a_fresh_mini_batch_of_the_shift_stream():
    net, data = micro_supernet(), synthetic_data()
    shifter = _shifter(net, data=data)
    for _ in range(3):
        shifter.update(net.space.as_archs(["012", "120"]))
    assert data.train.asked == [("shift", 0, 6), ("shift", 1, 6), ("shift", 2, 6)]
    assert shifter.position == 3


def test_momenta_last_from_one_group_to_the_next():
    net = micro_supernet()
    shifter = _shifter(net)
    shifter.update(net.space.as_archs(["111"]))
    first = _clones(shifter.trainer.optimizer.momenta())
    shifter.update(net.space.as_archs(["222"]))
    second = shifter.trainer.optimizer.momenta()
    assert set(second) > set(first)
    kept = {name for name in first if name.startswith("blocks")}
    assert changed_tensors({n: first[n] for n in kept}, {n: second[n] for n in kept}) == set()


# The control


def test_the_control_ignores_the_candidates_and_draws_feasible_paths():
    net = micro_supernet()
    shifter = _shifter(net, shift="uniform", constraints={"flops": "80%"})
    seen = []
    update = shifter.trainer.update
    shifter.trainer.update = lambda plan, *a, **k: seen.append(plan) or update(plan, *a, **k)
    for _ in range(20):
        shifter.update(net.space.as_archs(["222"] * 4))
    rows = np.concatenate([plan.archs[plan.inverse] for plan in seen])
    assert rows.shape == (80, 3)
    most = 0.8 * net.space.largest("flops")
    assert (net.space.flops(rows) <= most).all()
    feasible = [
        (a, b, c)
        for a in range(3)
        for b in range(3)
        for c in range(3)
        if net.space.flops([(a, b, c)])[0] <= most
    ]
    assert {tuple(row) for row in rows.tolist()} == set(feasible)


@pytest.mark.parametrize("shift", ["accumulate", "uniform"])
def test_a_shifters_state_comes_back_exactly(shift):
    nets = [micro_supernet(), micro_supernet(seed=4)]
    archs = nets[0].space.as_archs(["012", "111"])
    first, second = (_shifter(net, shift=shift) for net in nets)
    first.update(archs)
    second.load_state(copy.deepcopy(first.state()))
    nets[1].load_tensors(_clones(nets[0].tensors()), nets[0].version)
    second.trainer.optimizer.load_momenta(first.trainer.optimizer.momenta())
    for shifter in (first, second):
        shifter.update(archs)
    assert changed_tensors(nets[0].tensors(), nets[1].tensors()) == set()
    assert first.state() == second.state()


# Freezing the trunk


def test_a_frozen_trunk_keeps_its_parameters_and_lets_its_averages_move():
    net = tiny_supernet()
    shifter = _shifter(net)
    shifter.freeze_trunk(True)
    before = _clones(net.tensors())
    shifter.update(net.space.as_archs(["1100", "2211"]))
    moved = changed_tensors(before, net.tensors())
    assert {_owner(name) for name in moved if not name.startswith("ema.")} == {"head"}
    assert any(name.startswith("ema.blocks") for name in moved)
    shifter.freeze_trunk(False)
    shifter.update(net.space.as_archs(["1100", "2211"]))
    assert "stem.0.weight" in changed_tensors(before, net.tensors())


def test_parameters_the_caller_froze_stay_frozen():
    net = tiny_supernet()
    net.stem.requires_grad_(False)
    shifter = _shifter(net)
    for frozen in (True, False):
        shifter.freeze_trunk(frozen)
        assert not any(p.requires_grad for p in net.stem.parameters())
        assert all(p.requires_grad != frozen for p in net.blocks.parameters())


# The head's warm-up


def _warmup(net, data=None, **options):
    return HeadWarmup(
        net,
        synthetic_data() if data is None else data,
        ShiftOptions(**{**SMALL, "head_warmup_lr": 0.1, **options}),
        seed=1,
    )


def test_the_warm_up_trains_the_head_alone():
    net, data = tiny_supernet(), synthetic_data()
    warmup = _warmup(net, data)
    before = _clones(net.tensors())
    for _ in range(3):
        warmup.update()
    moved = changed_tensors(before, net.tensors())
    assert {_owner(name) for name in moved if not name.startswith("ema.")} == {"head"}
    assert all(p.requires_grad for p in net.parameters())
    assert data.train.asked == [("head", 0, 6), ("head", 1, 6), ("head", 2, 6)]
    assert set(warmup.trainer.optimizer.momenta()) == {
        name for name, _ in net.named_parameters() if name.startswith("head")
    }


def test_the_warm_up_takes_other_paths_and_other_batches_than_the_control():
    net = tiny_supernet()
    warm, control = _warmup(net), _shifter(net, shift="uniform")
    drawn = [part.sample(40) for part in (warm.sampler, control.control)]
    assert not (drawn[0] == drawn[1]).all(axis=1).any() or (drawn[0] == drawn[1]).mean() < 0.5


# Options


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shift": "sometimes"}, "shift"),
        ({"shift": "every:0"}, "shift"),
        ({"shift": "every:x"}, "shift"),
        ({"shift": "every:"}, "shift"),
        ({"shift": "every:G"}, "shift"),
        ({"reduction": "median"}, "reduction"),
        ({"score": "during"}, "score"),
        ({"shift": "immediate", "score": "before"}, "score"),
        ({"shift": "every:3", "score": "before"}, "score"),
        ({"shift_steps": 0}, "shift_steps"),
        ({"shift_batch_size": 0}, "shift_batch_size"),
        ({"shift_lr": math.nan}, "shift_lr"),
        ({"shift_momentum": -0.1}, "shift_momentum"),
        ({"head_warmup_steps": -1}, "head_warmup_steps"),
        ({"frozen_trunk_generations": -1}, "frozen_trunk_generations"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(options, name):
    with pytest.raises(ConfigError, match=f"^{name}:"):
        ShiftOptions(**options)


def test_the_defaults_are_those_of_the_paper_and_the_released_code():
    options = ShiftOptions()
    assert (options.shift, options.shift_steps, options.shift_batch_size) == ("accumulate", 20, 150)
    assert (options.reduction, options.shift_label_smoothing) == ("sum", 0.1)
    assert (options.shift_momentum, options.shift_weight_decay) == (0.9, 4e-5)
    assert not options.drift
    assert options.lr_for(50) == 1e-4
    assert not options.scores_after
    assert options.default_batch_norm == "recalibrate"
    assert options.rescores_parents
    immediate = ShiftOptions(shift="immediate")
    assert immediate.default_batch_norm == "ema"
    assert immediate.scores_after
    assert not immediate.rescores_parents
    assert immediate.lr_for(50) == 1e-4
    assert ShiftOptions(shift="every:5").scores_after
    assert not ShiftOptions(shift="none").moves


def test_the_default_rate_of_the_mean_is_that_of_the_sum_times_the_candidates_of_an_update():
    assert ShiftOptions(reduction="mean").lr_for(50) == pytest.approx(50e-4)
    assert ShiftOptions(reduction="mean", shift="every:5").lr_for(50) == pytest.approx(5e-4)
    assert ShiftOptions(reduction="mean", shift="every:80").lr_for(50) == pytest.approx(50e-4)
    assert ShiftOptions(reduction="mean", shift="immediate").lr_for(50) == pytest.approx(1e-4)
    assert ShiftOptions(reduction="mean", shift_lr=0.3).lr_for(50) == 0.3


def test_every_one_candidate_is_named_immediate():
    assert ShiftOptions(shift="every:1") == ShiftOptions(shift="immediate")


def test_a_bf16_shift_moves_fp32_weights():
    nets = [micro_supernet(), micro_supernet()]
    archs = nets[0].space.as_archs(["012", "121", "200"])
    for net, precision in zip(nets, ("fp32", "bf16"), strict=True):
        shifter = Shifter(
            net,
            synthetic_data(),
            ShiftOptions(**SMALL),
            population=3,
            precision=precision,
            subtrie_size=1,
        )
        assert math.isfinite(shifter.update(archs))
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert 0 < global_error(nets[1].parameters(), nets[0].parameters()) < 0.02
