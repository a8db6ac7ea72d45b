"""What a search is: its modes, its mechanism on a problem with a known answer, and its options."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import yaml
from search_cases import MODES, SMALL, lines_of, run_small, small_data, values_of
from torch.nn import functional

from fastshift import shift as shift_module
from fastshift.errors import ConfigError, ConstraintError
from fastshift.evaluator import Evaluator
from fastshift.pretrain import pretrain
from fastshift.search import Search, SearchOptions, search
from fastshift.supernet import ChainSupernet
from fastshift.testing import (
    changed_tensors,
    global_error,
    micro_supernet,
    synthetic_data,
    toy_supernet,
)

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TOY = {
    "generations": 8,
    "population": 16,
    "parents": 4,
    "shift_steps": 2,
    "shift_batch_size": 16,
    "shift_lr": 0.001,
    "score_by": "loss",
}


# What a run is


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path):
    _, _, first = run_small("accumulate")
    _, _, second = run_small("accumulate")
    assert values_of(first) == values_of(second)
    net = micro_supernet()
    other = search(net, small_data(), shift="accumulate", seed=4, **SMALL)
    assert other.generations[0]["op_frequency"] != first.generations[0]["op_frequency"]


def test_the_immediate_search_is_the_released_procedure(tmp_path):
    """Redone with plain modules: SGD on a candidate, then its score by the moving averages."""
    net, data, _ = run_small("immediate", tmp_path, net=micro_supernet(dropout=0.0).double())
    rows = [row for row in lines_of(tmp_path) if "final" not in row]
    assert len(rows) == 8
    plain = micro_supernet(dropout=0.0).double()
    decays = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decays, "weight_decay": 4e-5}, {"params": others}], lr=0.02, momentum=0.9
    )
    images, labels = (torch.cat(part) for part in zip(*data.validation, strict=True))
    index = 0
    for row in rows:
        arch = plain.space.parse(row["arch"])
        plain.train()
        for _ in range(2):
            x, y = data.train.batch(index, 6, "shift")
            index += 1
            optimizer.zero_grad(set_to_none=True)
            logits = plain(x.double(), arch)
            functional.cross_entropy(logits, y, label_smoothing=0.1).backward()
            optimizer.step()
        plain.eval()
        with torch.no_grad():
            logits = plain(images.double(), arch)
        assert row["loss"] == pytest.approx(
            float(functional.cross_entropy(logits, labels)), rel=1e-9
        )
        assert row["error"] == pytest.approx(
            float((logits.argmax(1) != labels).double().mean()), abs=1e-6
        )
        assert row["weights_version"] == index
    for (name, p), q in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert global_error([q], [p]) < 1e-9, name
    for name, value in net.ema.items():
        assert global_error([value], [plain.state_dict()[name]]) < 1e-9, name


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_accumulating_search_is_the_papers_procedure(reduction, tmp_path):
    """Redone with plain modules: score all under one set of weights, add up the losses, step."""
    options = {"reduction": reduction, "shift_clip_norm": 2.0, "subtrie_size": 2}
    net, data, _ = run_small(
        "accumulate", tmp_path, net=micro_supernet(dropout=0.0).double(), **options
    )
    rows = [row for row in lines_of(tmp_path) if "final" not in row]
    plain = micro_supernet(dropout=0.0).double()
    decays = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decays, "weight_decay": 4e-5}, {"params": others}], lr=0.02, momentum=0.9
    )
    index, generations = 0, {0: rows[:4], 1: rows[4:]}
    # Generation 1 has four candidates, and with them those parents that were not bred again.
    assert len(rows[:4]) == 4 <= len(rows[4:]) <= 6
    for part in generations.values():
        score = Evaluator(
            plain, data.validation, calibration=data.calibration, strategy="sequential"
        )
        scores = score.evaluate([row["arch"] for row in part])
        assert [row["error"] for row in part] == [float(error) for error in scores.errors]
        assert global_error([[row["loss"] for row in part]], [scores.losses]) < 1e-9
        assert all(row["weights_version"] == index for row in part)
        for _ in range(2):
            x, y = data.train.batch(index, 6, "shift")
            index += 1
            optimizer.zero_grad(set_to_none=True)
            plain.train()
            losses = [
                functional.cross_entropy(plain(x.double(), row["arch"]), y, label_smoothing=0.1)
                for row in part[:4]
            ]
            total = sum(losses) / (4 if reduction == "mean" else 1)
            total.backward()
            torch.nn.utils.clip_grad_norm_(
                [p for p in plain.parameters() if p.grad is not None], 2.0
            )
            optimizer.step()
    for (name, p), q in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert global_error([q], [p]) < 1e-9, name


def test_every_candidate_is_immediate_exactly(tmp_path):
    first, _, result = run_small("immediate", tmp_path / "a")
    second, _, other = run_small("every:1", tmp_path / "b")
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    assert values_of(result) == values_of(other)
    assert changed_tensors(first.tensors(), second.tensors()) == set()


def test_every_whole_generation_is_accumulate_scored_after_exactly(tmp_path):
    first, _, result = run_small("every:4", tmp_path / "a")
    second, _, other = run_small("accumulate", tmp_path / "b", score="after")
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    assert changed_tensors(first.tensors(), second.tensors()) == set()
    assert [s.arch for s in result.top] == [s.arch for s in other.top]
    third, _, _ = run_small("every:400", tmp_path / "c")
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "c")
    assert changed_tensors(first.tensors(), third.tensors()) == set()


def test_scoring_before_and_after_differ_only_in_the_weights_of_the_scores(tmp_path):
    run_small("accumulate", tmp_path / "a", generations=0)
    run_small("accumulate", tmp_path / "b", generations=0, score="after")
    before = [row for row in lines_of(tmp_path / "a") if "final" not in row]
    after = [row for row in lines_of(tmp_path / "b") if "final" not in row]
    assert [row["arch"] for row in before] == [row["arch"] for row in after]
    assert {row["weights_version"] for row in before} == {0}
    assert {row["weights_version"] for row in after} == {2}


def test_the_uniform_control_spends_what_accumulate_spends(tmp_path, monkeypatch):
    plans = []
    real = shift_module.Plan
    monkeypatch.setattr(
        shift_module, "Plan", lambda archs, *rest: plans.append(archs.copy()) or real(archs, *rest)
    )
    bound = {"flops": "80%"}
    _, data, shifted = run_small("accumulate", constraints=bound, generations=2)
    asked = data.train.asked
    groups = len(plans)
    net, data, control = run_small("uniform", constraints=bound, generations=2)
    assert data.train.asked == asked
    assert {
        name: control.budget[name] for name in ("updates", "train_images", "path_image_pairs")
    } == {name: shifted.budget[name] for name in ("updates", "train_images", "path_image_pairs")}
    assert shifted.budget["updates"] == 6
    assert shifted.budget["path_image_pairs"] == 6 * 4 * 6
    assert groups == 3  # a generation's plan is made once
    drawn = plans[groups:]
    assert [len(archs) for archs in drawn] == [4] * 6
    assert len({archs.tobytes() for archs in drawn}) > 1
    most = 0.8 * net.space.largest("flops")
    for archs in drawn:
        assert (net.space.flops(archs) <= most).all()


def test_the_controls_paths_are_not_the_candidates(tmp_path, monkeypatch):
    plans = []
    real = shift_module.Plan
    monkeypatch.setattr(
        shift_module, "Plan", lambda archs, *rest: plans.append(archs.copy()) or real(archs, *rest)
    )
    net, _, _ = run_small("uniform", tmp_path, generations=0, population=9)
    candidates = {row["arch"] for row in lines_of(tmp_path) if "final" not in row}
    assert set(net.space.format_all(plans[0])) != candidates


def test_none_never_moves_a_weight(tmp_path):
    net = micro_supernet()
    before = {name: tensor.clone() for name, tensor in net.tensors().items()}
    _, data, result = run_small("none", tmp_path, net=net, generations=3)
    assert changed_tensors(before, net.tensors()) == set()
    assert net.version == 0
    assert data.train.asked == []
    assert result.budget["updates"] == 0
    archs = [row["arch"] for row in lines_of(tmp_path)]
    assert len(archs) == len(set(archs)) == 16  # nothing is scored twice, at the end neither


def test_the_shift_learning_rate_is_that_of_the_sum(tmp_path):
    for reduction, given, expected in (
        ("sum", None, 1e-4),
        ("mean", None, 4e-4),
        ("mean", 0.3, 0.3),
        ("sum", 0.3, 0.3),
    ):
        options = SearchOptions(**{**SMALL, "reduction": reduction, "shift_lr": given})
        found = Search(micro_supernet(), small_data(), options)
        assert found.shifter.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert found.run().shift["lr"] == pytest.approx(expected)


def test_the_mean_at_the_default_rate_moves_as_far_as_the_sum():
    nets = {}
    for reduction in ("sum", "mean"):
        net = micro_supernet().double()
        options = {"shift_lr": None, "shift_weight_decay": 0.0, "generations": 0}
        nets[reduction], _, _ = run_small("accumulate", net=net, reduction=reduction, **options)
    assert changed_tensors(nets["sum"].tensors(), micro_supernet().double().tensors())
    assert global_error(nets["mean"].parameters(), nets["sum"].parameters()) < 1e-12


# The mechanism, on a problem whose answer is known


@pytest.fixture(scope="module")
def toy():
    best = (1, 0, 2, 1, 2, 0)
    data = synthetic_data(in_channels=1, validation=(150,), calibration=(8,), noise=3.0)
    net = toy_supernet(best)
    pretrain(net, data, steps=60, batch_size=32, lr=0.1, seed=0)
    return best, data, net


@pytest.mark.parametrize("shift", ["accumulate", "every:4", "uniform", "none"])
def test_the_search_finds_the_known_best_architecture(shift, toy):
    best, data, net = toy
    result = search(copy.deepcopy(net), data, shift=shift, seed=1, **TOY)
    assert result.best.arch == best


def test_ops_of_the_best_architecture_are_trained_ever_more_often(toy, monkeypatch):
    best, data, net = toy
    trained = {}
    real = shift_module.PathTrainer.update

    def update(self, plan, *args, **options):
        rows = plan.archs[plan.inverse]
        trained[shift].append(float((rows == np.array(best)).mean()))
        return real(self, plan, *args, **options)

    monkeypatch.setattr(shift_module.PathTrainer, "update", update)
    frequencies = {}
    for shift in ("accumulate", "uniform"):
        trained[shift] = []
        result = search(copy.deepcopy(net), data, shift=shift, seed=1, **TOY)
        frequencies[shift] = [
            float(np.mean([row[c] for row, c in zip(record["op_frequency"], best, strict=True)]))
            for record in result.generations
        ]
        for record in result.generations:
            assert np.allclose([sum(row) for row in record["op_frequency"]], 1)
    assert frequencies["accumulate"][0] < 0.4
    assert np.mean(frequencies["accumulate"][-3:]) > 0.55
    assert np.mean(trained["accumulate"][-2:]) == pytest.approx(frequencies["accumulate"][-1])
    assert np.mean(trained["uniform"]) < 0.4


# Constraints, options and the record


@pytest.mark.parametrize("shift", MODES)
def test_no_architecture_outside_the_constraints_is_ever_scored(shift, tmp_path):
    net, _, result = run_small(shift, tmp_path, constraints={"flops": "85%"}, generations=2)
    most = 0.85 * net.space.largest("flops")
    assert all(row["flops"] <= most for row in lines_of(tmp_path))
    assert result.shift["constraints"] == {"flops": "85%"}


def test_an_infeasible_constraint_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConstraintError, match="cheapest"):
        run_small("accumulate", tmp_path / "new", constraints={"flops": ":700"})
    assert not (tmp_path / "new").exists()


def test_a_space_that_is_exhausted_ends_with_what_there_is():
    _, _, result = run_small("none", generations=20, population=10)
    assert sum(record["candidates"] for record in result.generations) == 27
    assert len(result.top) == 3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"generation": 3}, "generation"),
        ({"population": 0}, "population"),
        ({"parents": 0}, "parents"),
        ({"top_k": 0}, "top_k"),
        ({"generations": -1}, "generations"),
        ({"subtrie_size": 0}, "subtrie_size"),
        ({"mutation": 4, "crossover": 4}, "mutation"),
        ({"batch_norm": "fast"}, "batch_norm"),
        ({"score_by": "accuracy"}, "score_by"),
        ({"strategy": "parallel"}, "strategy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_out_of_range_is_refused_by_name(options, name, tmp_path):
    with pytest.raises(ValueError, match=name):
        run_small("accumulate", tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(ConfigError, match="shift_steps"):
        run_small("accumulate", steps=3)


@pytest.mark.parametrize("policy", ["recalibrate", "batch", "running", "ema"])
@pytest.mark.parametrize("shift", ["accumulate", "immediate"])
def test_a_search_can_use_every_policy(shift, policy):
    net, data, result = run_small(shift, batch_norm=policy)
    assert result.shift["batch_norm"] == policy
    score = Evaluator(net, data.validation, calibration=data.calibration, batch_norm=policy)
    assert float(score([result.best.arch])[0]) == result.best.error


def test_running_statistics_stay_and_the_moving_averages_of_the_shift_move():
    net = micro_supernet()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
    run_small("accumulate", net=net)
    after = {name: value for name, value in net.state_dict().items() if "running" in name}
    assert changed_tensors(before, after) == set()
    assert net.ema.keys() == before.keys()
    assert changed_tensors(before, net.ema)


def test_the_strategies_make_the_same_search():
    shared, _, first = run_small("accumulate", net=micro_supernet().double())
    plain, _, second = run_small("accumulate", net=micro_supernet().double(), strategy="sequential")
    assert [s.arch for s in first.top] == [s.arch for s in second.top]
    assert global_error(shared.parameters(), plain.parameters()) < 1e-10


def test_a_bf16_search_runs(tmp_path):
    net, _, result = run_small("accumulate", tmp_path, precision="bf16")
    assert result.best is not None
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_the_budget_counts_what_was_spent(tmp_path):
    _, _, result = run_small("accumulate", tmp_path)
    lines = lines_of(tmp_path)
    assert result.budget["scored"] == len(lines)
    assert result.budget["validation_images"] == 8 * len(lines)
    assert result.budget["calibration_images"] == 11 * len(lines)
    assert result.budget["updates"] == 4
    assert result.budget["train_images"] == 4 * 6
    assert result.budget["path_image_pairs"] == 4 * 6 * 4


def test_a_search_without_a_fresh_head_warms_nothing_up():
    _, data, result = run_small("accumulate")
    assert result.shift["head_warmup_steps"] == 0
    assert {stream for stream, _, _ in data.train.asked} == {"shift"}


def test_an_architecture_keeps_the_generation_that_proposed_it_last(tmp_path):
    _, _, result = run_small("accumulate", tmp_path, generations=3, population=8, mutation=4)
    asked: dict[str, int] = {}
    evolved = [row for row in lines_of(tmp_path) if "final" not in row]
    for generation in range(4):
        rows = [row["arch"] for row in evolved if row["generation"] == generation]
        asked |= dict.fromkeys(rows[:8], generation)  # candidates first, then parents
    for scored in (*result.top, *result.pareto):
        assert scored.generation == asked["".join(map(str, scored.arch))]


def test_no_row_of_a_generation_is_scored_twice_under_the_same_weights(tmp_path):
    _, _, result = run_small("accumulate", tmp_path, generations=4, population=8, mutation=4)
    rows = [(row["arch"], row["weights_version"]) for row in lines_of(tmp_path)]
    assert len(set(rows)) == len(rows) == result.budget["scored"]


def test_a_search_from_python_records_its_options_and_versions(tmp_path):
    run_small("none", tmp_path)
    found = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert found["seed"] == 3
    assert found["options"]["population"] == 4
    assert found["versions"]["torch"] == torch.__version__


def test_options_keep_their_own_mode_unless_another_is_named():
    options = SearchOptions(**SMALL, shift="none")
    assert search(micro_supernet(), small_data(), options=options).shift["mode"] == "none"
    named = search(micro_supernet(), small_data(), options=options, shift="uniform")
    assert named.shift["mode"] == "uniform"


def test_a_constraint_on_flops_that_nobody_counted_is_refused():
    net = micro_supernet()
    blind = ChainSupernet(net.stem, net.blocks, net.head)
    with pytest.raises(ConstraintError, match="input_shape"):
        search(blind, small_data(), {"flops": "60%"}, **SMALL)
