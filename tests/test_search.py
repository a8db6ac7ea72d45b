from __future__ import annotations

import copy
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional

from fastshift import shift as shift_module
from fastshift.errors import CheckpointError, ConfigError, ConstraintError, NonFiniteLossError
from fastshift.evaluator import Evaluator, Scores
from fastshift.pretrain import pretrain
from fastshift.search import Search, SearchOptions, search, transfer
from fastshift.supernet import ChainSupernet
from fastshift.testing import (
    changed_tensors,
    global_error,
    micro_supernet,
    stop_at,
    synthetic_data,
    toy_supernet,
)

MODES = ("accumulate", "immediate", "every:2", "uniform", "none")
SMALL = {
    "generations": 1,
    "population": 4,
    "parents": 2,
    "mutation": 2,
    "crossover": 1,
    "mutation_prob": 0.5,
    "shift_steps": 2,
    "shift_batch_size": 6,
    "shift_lr": 0.02,
    "top_k": 3,
    "subtrie_size": 3,
}


TOY = {
    "generations": 8,
    "population": 16,
    "parents": 4,
    "shift_steps": 2,
    "shift_batch_size": 16,
    "shift_lr": 0.001,
    "score_by": "loss",
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Durability and TensorBoard have tests of their own; here they would only take time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an extra


def _data(**options):
    return synthetic_data(**{"validation": (8,), "calibration": (6, 5)} | options)


def _run(shift, out=None, *, net=None, data=None, start=search, **options):
    """Search with small numbers; gives the supernet, its data and the result."""
    net = micro_supernet() if net is None else net
    data = _data() if data is None else data
    return net, data, start(net, data, shift=shift, out=out, seed=3, **{**SMALL, **options})


def _lines(out):
    """The lines of scores.jsonl without their timings."""
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("seconds") >= 0
    return rows


def _plain(result):
    """A result as JSON values without its timings."""
    found = json.loads(json.dumps(result.to_dict()))
    for name in ("seconds", "archs_per_second"):
        assert found.pop(name) >= 0
    for record in found["generations"]:
        assert record.pop("seconds") >= 0
    return found


# Going on after a stop


def _assert_same_run(out, net, result, reference):
    lines, tensors, plain, version = reference
    assert result.stopped is None
    assert _lines(out) == lines
    assert _plain(result) == plain
    assert changed_tensors(tensors, net.tensors()) == set()
    assert net.version == version


def _reference(out, net, result):
    return _lines(out), net.tensors(), _plain(result), net.version


@pytest.mark.parametrize("shift", MODES)
def test_a_run_stopped_anywhere_and_resumed_equals_the_unbroken_run(shift, tmp_path):
    calls, options = 0, {"population": 2 if shift == "immediate" else 3, "mutation": 1}

    def count():
        nonlocal calls
        calls += 1
        return False

    net, _, result = _run(shift, tmp_path / "whole", stop=count, **options)
    reference = _reference(tmp_path / "whole", net, result)
    expected = {"immediate": 10, "every:2": 10, "none": 2}.get(shift, 6)
    assert calls == expected
    for call in range(1, calls + 1):
        out = tmp_path / f"stopped-{call}"
        _, _, part = _run(shift, out, stop=stop_at(call), **options)
        assert part.stopped == "interrupted"
        assert not (out / "result.json").exists()
        net, _, result = _run(shift, out, net=micro_supernet(seed=99), resume=True, **options)
        _assert_same_run(out, net, result, reference)


@pytest.mark.parametrize("shift", ["accumulate", "none", "transfer"])
def test_a_run_stopped_at_every_point_equals_the_unbroken_run(shift, tmp_path):
    options = {"generations": 2, "strategy": "sequential" if shift == "none" else "shared"}
    if shift == "transfer":
        options |= {"start": transfer, "head_warmup_steps": 3, "frozen_trunk_generations": 1}
        options |= {"head_lr_multiplier": 5.0}
    mode = "accumulate" if shift == "transfer" else shift
    net, _, result = _run(mode, tmp_path / "whole", **options)
    reference = _reference(tmp_path / "whole", net, result)
    out = tmp_path / "broken"
    for part in range(100):
        net = micro_supernet(seed=9 if part else 0)
        net, _, result = _run(mode, out, net=net, resume=True, stop=stop_at(1), **options)
        if result.stopped is None:
            break
    assert part == {"none": 3, "transfer": 12}.get(shift, 9)
    _assert_same_run(out, net, result, reference)


def test_a_search_object_goes_on_after_its_own_stop(tmp_path):
    net, _, result = _run("accumulate", tmp_path / "whole")
    reference = _reference(tmp_path / "whole", net, result)
    net = micro_supernet()
    options = SearchOptions(shift="accumulate", **SMALL)
    found = Search(net, _data(), options, seed=3, out=tmp_path / "again")
    for call in (2, 1, 1):
        assert found.run(stop_at(call)).stopped == "interrupted"
    _assert_same_run(tmp_path / "again", net, found.run(), reference)


def test_lines_written_after_the_last_checkpoint_are_cut_on_resume(tmp_path):
    net, _, result = _run("accumulate", tmp_path / "whole")
    reference = _reference(tmp_path / "whole", net, result)
    out = tmp_path / "cut"
    _run("accumulate", out, stop=stop_at(3))
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"arch": "000", "half a li')
    net, _, result = _run("accumulate", out, net=micro_supernet(seed=9), resume=True)
    _assert_same_run(out, net, result, reference)


def test_a_finished_run_gives_its_result_again(tmp_path):
    net, _, result = _run("accumulate", tmp_path)
    reference = _reference(tmp_path, net, result)
    written = (tmp_path / "result.json").read_bytes()
    net, _, again = _run("accumulate", tmp_path, net=micro_supernet(seed=9), resume=True)
    _assert_same_run(tmp_path, net, again, reference)
    assert again.seconds == result.seconds
    assert (tmp_path / "result.json").read_bytes() == written
    (tmp_path / "result.json").unlink()
    _run("accumulate", tmp_path, net=micro_supernet(seed=9), resume=True)
    assert (tmp_path / "result.json").read_bytes() == written


def test_checkpoints_by_the_clock_change_nothing(tmp_path):
    net, _, result = _run("accumulate", tmp_path / "whole")
    reference = _reference(tmp_path / "whole", net, result)
    net, out = micro_supernet(), tmp_path / "often"
    options = SearchOptions(shift="accumulate", **SMALL)
    result = Search(net, _data(), options, seed=3, out=out, checkpoint_seconds=0.0).run()
    _assert_same_run(out, net, result, reference)


def test_resume_starts_the_run_if_there_is_none(tmp_path):
    _, _, plain = _run("accumulate", tmp_path / "plain")
    _, _, result = _run("accumulate", tmp_path / "new", resume=True)
    assert _plain(result) == _plain(plain)


def test_a_directory_that_holds_a_run_is_refused_without_resume(tmp_path):
    _run("accumulate", tmp_path, stop=stop_at(2))
    with pytest.raises(CheckpointError, match="holds a run already"):
        _run("accumulate", tmp_path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"shift_lr": 0.01}, "shift_lr"),
        ({"population": 5}, "population"),
        ({"constraints": {"flops": "99%"}}, "constraints"),
        ({"data": synthetic_data(num_classes=4, seed=1)}, "data"),
        ({"net": micro_supernet(5)}, "space"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checkpoint_of_another_run_is_refused_by_what_differs(change, name, tmp_path):
    _run("accumulate", tmp_path, stop=stop_at(2))
    with pytest.raises(CheckpointError, match=name):
        _run("accumulate", tmp_path, resume=True, **change)


def test_a_run_needs_no_directory(tmp_path):
    first, _, result = _run("accumulate", tmp_path)
    second, _, without = _run("accumulate")
    assert _plain(result) == _plain(without)
    assert changed_tensors(first.tensors(), second.tensors()) == set()
    first, _, part = _run("accumulate", stop=stop_at(1))
    assert part.stopped == "interrupted"


# What a run is


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path):
    _, _, first = _run("accumulate")
    _, _, second = _run("accumulate")
    assert _plain(first) == _plain(second)
    net = micro_supernet()
    other = search(net, _data(), shift="accumulate", seed=4, **SMALL)
    assert other.generations[0]["op_frequency"] != first.generations[0]["op_frequency"]


def test_the_immediate_search_is_the_released_procedure(tmp_path):
    """Redone with plain modules: SGD on a candidate, then its score by the moving averages."""
    net, data, _ = _run("immediate", tmp_path, net=micro_supernet(dropout=0.0).double())
    rows = [row for row in _lines(tmp_path) if "final" not in row]
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
    net, data, _ = _run("accumulate", tmp_path, net=micro_supernet(dropout=0.0).double(), **options)
    rows = [row for row in _lines(tmp_path) if "final" not in row]
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
    first, _, result = _run("immediate", tmp_path / "a")
    second, _, other = _run("every:1", tmp_path / "b")
    assert _lines(tmp_path / "a") == _lines(tmp_path / "b")
    assert _plain(result) == _plain(other)
    assert changed_tensors(first.tensors(), second.tensors()) == set()


def test_every_whole_generation_is_accumulate_scored_after_exactly(tmp_path):
    first, _, result = _run("every:4", tmp_path / "a")
    second, _, other = _run("accumulate", tmp_path / "b", score="after")
    assert _lines(tmp_path / "a") == _lines(tmp_path / "b")
    assert changed_tensors(first.tensors(), second.tensors()) == set()
    assert [s.arch for s in result.top] == [s.arch for s in other.top]
    third, _, _ = _run("every:400", tmp_path / "c")
    assert _lines(tmp_path / "a") == _lines(tmp_path / "c")
    assert changed_tensors(first.tensors(), third.tensors()) == set()


def test_scoring_before_and_after_differ_only_in_the_weights_of_the_scores(tmp_path):
    _run("accumulate", tmp_path / "a", generations=0)
    _run("accumulate", tmp_path / "b", generations=0, score="after")
    before = [row for row in _lines(tmp_path / "a") if "final" not in row]
    after = [row for row in _lines(tmp_path / "b") if "final" not in row]
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
    _, data, shifted = _run("accumulate", constraints=bound, generations=2)
    asked = data.train.asked
    groups = len(plans)
    net, data, control = _run("uniform", constraints=bound, generations=2)
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
    net, _, _ = _run("uniform", tmp_path, generations=0, population=9)
    candidates = {row["arch"] for row in _lines(tmp_path) if "final" not in row}
    assert set(net.space.format_all(plans[0])) != candidates


def test_none_never_moves_a_weight(tmp_path):
    net = micro_supernet()
    before = {name: tensor.clone() for name, tensor in net.tensors().items()}
    _, data, result = _run("none", tmp_path, net=net, generations=3)
    assert changed_tensors(before, net.tensors()) == set()
    assert net.version == 0
    assert data.train.asked == []
    assert result.budget["updates"] == 0
    archs = [row["arch"] for row in _lines(tmp_path)]
    assert len(archs) == len(set(archs)) == 16  # nothing is scored twice, at the end neither


def test_the_shift_learning_rate_is_that_of_the_sum(tmp_path):
    for reduction, given, expected in (
        ("sum", None, 1e-4),
        ("mean", None, 4e-4),
        ("mean", 0.3, 0.3),
        ("sum", 0.3, 0.3),
    ):
        options = SearchOptions(**{**SMALL, "reduction": reduction, "shift_lr": given})
        found = Search(micro_supernet(), _data(), options)
        assert found.shifter.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert found.run().shift["lr"] == pytest.approx(expected)


def test_the_mean_at_the_default_rate_moves_as_far_as_the_sum():
    nets = {}
    for reduction in ("sum", "mean"):
        net = micro_supernet().double()
        options = {"shift_lr": None, "shift_weight_decay": 0.0, "generations": 0}
        nets[reduction], _, _ = _run("accumulate", net=net, reduction=reduction, **options)
    assert changed_tensors(nets["sum"].tensors(), micro_supernet().double().tensors())
    assert global_error(nets["mean"].parameters(), nets["sum"].parameters()) < 1e-12


# Scores and whose they are


@pytest.mark.parametrize("shift", MODES)
def test_every_score_carries_the_version_of_its_weights(shift, tmp_path):
    net, _, result = _run(shift, tmp_path, generations=2)
    rows = [row for row in _lines(tmp_path) if "final" not in row]
    for generation in range(3):
        versions = [row["weights_version"] for row in rows if row["generation"] == generation]
        parents = 0 if generation == 0 else 2
        if shift == "none":
            assert versions == [0] * 4
        elif shift == "immediate":
            assert versions == [8 * generation + 2 * i for i in (1, 2, 3, 4)]
        elif shift == "every:2":
            last = 4 * generation + 4
            assert versions[:2] == [last - 2] * 2
            assert set(versions[2:]) == {last}
        else:
            assert set(versions) == {2 * generation}
        assert 4 <= len(versions) <= 4 + parents  # a parent bred again is scored once
        record = result.generations[generation]
        assert record["weights_version"] == versions[-1]
        assert record["scored"] == len(versions)
    assert (
        net.version
        == result.budget["updates"]
        == {"none": 0, "immediate": 24, "every:2": 12}.get(shift, 6)
    )
    assert {s.weights_version for s in result.top} == {net.version}
    assert {s.weights_version for s in result.pareto} == {net.version}


@pytest.mark.parametrize("shift", ["accumulate", "immediate", "every:2", "every:3"])
def test_the_population_keeps_each_scores_own_version(shift, tmp_path):
    options = SearchOptions(shift=shift, **SMALL | {"generations": 0, "top_k": 4})
    found = Search(micro_supernet(), _data(), options, seed=3, out=tmp_path)
    assert found.run(stop_at(2)).stopped == "interrupted"  # inside the generation
    assert found.run().stopped is None
    rows = {row["arch"]: row for row in _lines(tmp_path) if "final" not in row}
    kept = found.evolution.top_k(4)
    versions = {scored.weights_version for scored in kept}
    assert len(versions) == {"accumulate": 1, "immediate": 4}.get(shift, 2)
    for scored in kept:
        row = rows["".join(map(str, scored.arch))]
        assert (scored.weights_version, scored.loss) == (row["weights_version"], row["loss"])


@pytest.mark.parametrize("shift", ["immediate", "every:2"])
def test_the_result_of_an_interrupted_run_carries_the_versions_too(shift, tmp_path):
    _, _, result = _run(shift, tmp_path, stop=stop_at(9 if shift == "immediate" else 5))
    rows = {row["arch"]: row for row in _lines(tmp_path)}
    assert len(result.top) == 3
    for scored in result.top:
        row = rows["".join(map(str, scored.arch))]
        assert scored.weights_version == row["weights_version"]
        assert scored.loss == row["loss"]


@pytest.mark.parametrize("shift", ["accumulate", "every:2", "uniform", "immediate"])
def test_parents_are_scored_again_in_each_generation_but_in_immediate_mode(shift, tmp_path):
    _run(shift, tmp_path, generations=2)
    rows = [row for row in _lines(tmp_path) if "final" not in row]
    for generation in (1, 2):
        earlier = {row["arch"]: row for row in rows if row["generation"] < generation}
        now = {row["arch"]: row for row in rows if row["generation"] == generation}
        before = [row for row in rows if row["generation"] == generation - 1]
        order = sorted(
            before, key=lambda row: (row["error"], row["loss"], row["flops"], row["arch"])
        )
        parents = [row["arch"] for row in order[:2]]
        if shift == "immediate":
            assert len(now) == sum(row["generation"] == generation for row in rows) == 4
        elif shift != "every:2":  # whose groups were scored under weights of their own
            assert set(parents) <= set(now)
            for arch in parents:
                assert now[arch]["weights_version"] > earlier[arch]["weights_version"]
        else:
            assert len(now) >= 4


def test_the_final_scores_are_those_under_the_final_weights(tmp_path):
    net, data, result = _run("accumulate", tmp_path)
    score = Evaluator(net, data.validation, calibration=data.calibration, subtrie_size=3)
    for scored in (*result.top, *result.pareto):
        found = score.evaluate([scored.arch])
        assert scored.error == float(found.errors[0])
        assert scored.loss == float(found.losses[0])
        assert scored.flops == int(net.space.flops([scored.arch])[0])
        assert scored.params == int(net.space.params([scored.arch])[0])
    keys = [(s.error, s.loss, s.flops, s.arch) for s in result.top]
    assert keys == sorted(keys)
    assert result.best == result.top[0]
    flops = [s.flops for s in result.pareto]
    errors = [s.error for s in result.pareto]
    assert flops == sorted(flops)
    assert errors == sorted(errors, reverse=True)


def _fake(monkeypatch, table):
    """Let `table(arch)` say (error, loss) of an architecture, under any weights."""

    def evaluate(self, archs):
        rows = self.supernet.space.as_archs(archs)
        pairs = [table(tuple(row)) for row in rows.tolist()]
        errors, losses = (np.array(part) for part in zip(*pairs, strict=True))
        version = self.supernet.version
        return Scores(errors.astype(np.float32), losses, version, 8, 0, 1.0, 0.0)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)


@pytest.mark.parametrize("shift", MODES)
def test_the_last_generation_counts(shift, monkeypatch):
    seen = []

    def table(arch):
        if arch not in seen:
            seen.append(arch)
        return 0.5 - seen.index(arch) / 100, 1.0

    _fake(monkeypatch, table)
    _, _, result = _run(shift, generations=2)
    assert result.best.arch == seen[-1]
    assert [s.arch for s in result.top] == seen[:-4:-1]


def test_ties_go_to_the_lower_loss_then_the_lower_flops_then_the_string(monkeypatch):
    _fake(monkeypatch, lambda arch: (0.5, 1.0))
    _, _, result = _run("none", population=27, generations=0, top_k=27)
    found = [(s.flops, s.arch) for s in result.top]
    assert len(found) == 27
    assert found == sorted(found)
    _fake(monkeypatch, lambda arch: (0.5, sum(arch) / 10))
    _, _, result = _run("none", population=27, generations=0, top_k=27)
    found = [(s.loss, s.flops, s.arch) for s in result.top]
    assert found == sorted(found)


def test_the_score_can_be_the_loss(monkeypatch):
    _fake(monkeypatch, lambda arch: (sum(arch) / 10, -sum(arch) / 10))
    for score_by, best in (("error", (0, 0, 0)), ("loss", (2, 2, 2))):
        _, _, result = _run("none", population=27, generations=0, score_by=score_by)
        assert result.best.arch == best
        ends = {result.pareto[0].flops, result.pareto[-1].flops}
        assert len(result.pareto) == 1 or len(ends) == 2


def test_a_failed_score_never_wins_and_is_counted(monkeypatch):
    _fake(monkeypatch, lambda arch: (math.nan, math.nan) if arch[0] == 0 else (0.5, 1.0))
    _, _, result = _run("none", population=27, generations=0, top_k=27)
    assert len(result.top) == 18
    assert all(s.arch[0] != 0 for s in result.top)
    assert result.generations[0]["failed"] == 9
    json.dumps(result.to_dict(), allow_nan=False)


def test_an_architecture_that_fails_under_the_final_weights_is_not_the_best(monkeypatch):
    _fake(monkeypatch, lambda arch: (sum(arch) / 10, 1.0))
    _, _, plain = _run("accumulate")
    best = plain.best.arch
    real = Evaluator.evaluate

    def evaluate(self, archs):
        scores = real(self, archs)
        if self.supernet.version == 4:
            rows = self.supernet.space.as_archs(archs)
            failed = (rows == np.array(best)).all(axis=1)
            scores.errors[failed] = scores.losses[failed] = math.nan
        return scores

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    _, _, result = _run("accumulate")
    assert result.best.arch != best
    assert best not in {scored.arch for scored in (*result.top, *result.pareto)}


def test_a_search_whose_every_score_fails_ends_with_no_winner(monkeypatch, tmp_path):
    _fake(monkeypatch, lambda arch: (math.nan, math.nan))
    _, _, result = _run("accumulate", tmp_path)
    assert result.best is None
    assert result.top == result.pareto == []
    assert json.loads((tmp_path / "result.json").read_text())["best"] is None
    assert {(row["error"], row["loss"]) for row in _lines(tmp_path)} == {(None, None)}


# Losses that are not finite


def _spoil(*indices):
    def spoil(stream, index, images):
        if stream == "shift" and index in indices:
            images[0, 0, 0, 0] = math.nan

    return spoil


@pytest.mark.parametrize("shift", ["accumulate", "immediate", "uniform"])
def test_one_batch_with_nan_skips_one_update_and_the_search_goes_on(shift, tmp_path):
    data = _data()
    data.train.spoil = _spoil(1)
    net, _, result = _run(shift, tmp_path, data=data)
    _, _, clean = _run(shift)
    assert result.budget["skipped_updates"] == 1
    assert result.budget["updates"] == clean.budget["updates"] - 1 == net.version
    assert all(torch.isfinite(tensor).all() for tensor in net.tensors().values())
    assert all(math.isfinite(row["loss"]) for row in _lines(tmp_path))


def test_a_skipped_update_leaves_everything_as_it_was():
    data = _data()
    data.train.spoil = _spoil(0, 1)
    net = micro_supernet()
    before = {name: tensor.clone() for name, tensor in net.tensors().items()}
    found = Search(net, data, SearchOptions(**{**SMALL, "generations": 0}))
    found.run(stop_at(2))
    assert found.shifter.trainer.skipped == 2
    changed = changed_tensors(before, net.tensors())
    assert all(name.startswith("ema.") for name in changed)  # they begin here
    for name in changed:
        assert torch.equal(net.tensors()[name], before[name.removeprefix("ema.")])
    assert all(p.grad is None for p in net.parameters())
    assert found.shifter.trainer.optimizer.momenta() == {}


@pytest.mark.parametrize("shift", ["accumulate", "immediate"])
def test_three_losses_in_a_row_that_are_not_finite_stop_the_run_with_its_state_saved(
    shift, tmp_path
):
    data = _data()
    data.train.spoil = _spoil(1, 2, 3)
    net = micro_supernet()
    with pytest.raises(NonFiniteLossError, match="3 updates in a row"):
        _run(shift, tmp_path, net=net, data=data)
    assert not (tmp_path / "result.json").exists()
    assert net.version == 1
    data.train.spoil = None
    fresh, _, result = _run(shift, tmp_path, net=micro_supernet(seed=9), data=data, resume=True)
    assert result.budget["skipped_updates"] == 3
    assert (tmp_path / "result.json").exists()
    assert fresh.version == result.budget["updates"]


def test_two_pairs_of_bad_batches_do_not_stop_a_run():
    data = _data()
    data.train.spoil = _spoil(0, 1, 3, 4)
    _, _, result = _run("accumulate", data=data, generations=2)
    assert result.budget["skipped_updates"] == 4


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
    net, _, result = _run(shift, tmp_path, constraints={"flops": "85%"}, generations=2)
    most = 0.85 * net.space.largest("flops")
    assert all(row["flops"] <= most for row in _lines(tmp_path))
    assert result.shift["constraints"] == {"flops": "85%"}


def test_an_infeasible_constraint_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConstraintError, match="cheapest"):
        _run("accumulate", tmp_path / "new", constraints={"flops": ":700"})
    assert not (tmp_path / "new").exists()


def test_a_space_that_is_exhausted_ends_with_what_there_is():
    _, _, result = _run("none", generations=20, population=10)
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
        _run("accumulate", tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(ConfigError, match="shift_steps"):
        _run("accumulate", steps=3)


@pytest.mark.parametrize("policy", ["recalibrate", "batch", "running", "ema"])
@pytest.mark.parametrize("shift", ["accumulate", "immediate"])
def test_a_search_can_use_every_policy(shift, policy):
    net, data, result = _run(shift, batch_norm=policy)
    assert result.shift["batch_norm"] == policy
    score = Evaluator(net, data.validation, calibration=data.calibration, batch_norm=policy)
    assert float(score([result.best.arch])[0]) == result.best.error


def test_running_statistics_stay_and_the_moving_averages_of_the_shift_move():
    net = micro_supernet()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
    _run("accumulate", net=net)
    after = {name: value for name, value in net.state_dict().items() if "running" in name}
    assert changed_tensors(before, after) == set()
    assert net.ema.keys() == before.keys()
    assert changed_tensors(before, net.ema)


def test_the_strategies_make_the_same_search():
    shared, _, first = _run("accumulate", net=micro_supernet().double())
    plain, _, second = _run("accumulate", net=micro_supernet().double(), strategy="sequential")
    assert [s.arch for s in first.top] == [s.arch for s in second.top]
    assert global_error(shared.parameters(), plain.parameters()) < 1e-10


def test_a_bf16_search_runs(tmp_path):
    net, _, result = _run("accumulate", tmp_path, precision="bf16")
    assert result.best is not None
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_the_budget_counts_what_was_spent(tmp_path):
    _, _, result = _run("accumulate", tmp_path)
    lines = _lines(tmp_path)
    assert result.budget["scored"] == len(lines)
    assert result.budget["validation_images"] == 8 * len(lines)
    assert result.budget["calibration_images"] == 11 * len(lines)
    assert result.budget["updates"] == 4
    assert result.budget["train_images"] == 4 * 6
    assert result.budget["path_image_pairs"] == 4 * 6 * 4


def test_a_search_without_a_fresh_head_warms_nothing_up():
    _, data, result = _run("accumulate")
    assert result.shift["head_warmup_steps"] == 0
    assert {stream for stream, _, _ in data.train.asked} == {"shift"}


def test_an_architecture_keeps_the_generation_that_proposed_it_last(tmp_path):
    _, _, result = _run("accumulate", tmp_path, generations=3, population=8, mutation=4)
    asked: dict[str, int] = {}
    evolved = [row for row in _lines(tmp_path) if "final" not in row]
    for generation in range(4):
        rows = [row["arch"] for row in evolved if row["generation"] == generation]
        asked |= dict.fromkeys(rows[:8], generation)  # candidates first, then parents
    for scored in (*result.top, *result.pareto):
        assert scored.generation == asked["".join(map(str, scored.arch))]


def test_no_row_of_a_generation_is_scored_twice_under_the_same_weights(tmp_path):
    _, _, result = _run("accumulate", tmp_path, generations=4, population=8, mutation=4)
    rows = [(row["arch"], row["weights_version"]) for row in _lines(tmp_path)]
    assert len(set(rows)) == len(rows) == result.budget["scored"]


@pytest.mark.parametrize(
    "change", [{"precision": "bf16"}, {"data": 44}, {"fresh_head": True}, {"cost": 9}]
)
def test_a_search_is_not_resumed_with_other_data_precision_head_or_costs(
    change, tmp_path, monkeypatch
):
    first = dict(SMALL, generations=0)
    search(micro_supernet(), _data(), out=tmp_path, seed=3, **first)
    net, data, options = micro_supernet(), _data(), {}
    described = data.describe()
    if "data" in change:
        monkeypatch.setattr(data, "describe", lambda: {**described, "validation_images": 44}, False)
    elif "cost" in change:
        table = np.arange(9.0).reshape(3, 3)
        net.space.add_cost("energy", table)
    else:
        options = change
    with pytest.raises(CheckpointError, match="another run"):
        search(net, data, out=tmp_path, seed=3, resume=True, **first, **options)


def test_a_search_from_python_records_its_options_and_versions(tmp_path):
    _run("none", tmp_path)
    found = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert found["seed"] == 3
    assert found["options"]["population"] == 4
    assert found["versions"]["torch"] == torch.__version__


def test_options_keep_their_own_mode_unless_another_is_named():
    options = SearchOptions(**SMALL, shift="none")
    assert search(micro_supernet(), _data(), options=options).shift["mode"] == "none"
    named = search(micro_supernet(), _data(), options=options, shift="uniform")
    assert named.shift["mode"] == "uniform"


def test_a_constraint_on_flops_that_nobody_counted_is_refused():
    net = micro_supernet()
    blind = ChainSupernet(net.stem, net.blocks, net.head)
    with pytest.raises(ConstraintError, match="input_shape"):
        search(blind, _data(), {"flops": "60%"}, **SMALL)
