"""Scores of a search: whose they are, which win, and what happens where one is not finite."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from search_cases import MODES, SMALL, lines_of, run_small, small_data

from fastshift.errors import NonFiniteLossError
from fastshift.evaluator import Evaluator, Scores
from fastshift.search import Search, SearchOptions
from fastshift.testing import changed_tensors, micro_supernet, stop_at

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

# Scores and whose they are


@pytest.mark.parametrize("shift", MODES)
def test_every_score_carries_the_version_of_its_weights(shift, tmp_path):
    net, _, result = run_small(shift, tmp_path, generations=2)
    rows = [row for row in lines_of(tmp_path) if "final" not in row]
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
    found = Search(micro_supernet(), small_data(), options, seed=3, out=tmp_path)
    assert found.run(stop_at(2)).stopped == "interrupted"  # inside the generation
    assert found.run().stopped is None
    rows = {row["arch"]: row for row in lines_of(tmp_path) if "final" not in row}
    kept = found.evolution.top_k(4)
    versions = {scored.weights_version for scored in kept}
    assert len(versions) == {"accumulate": 1, "immediate": 4}.get(shift, 2)
    for scored in kept:
        row = rows["".join(map(str, scored.arch))]
        assert (scored.weights_version, scored.loss) == (row["weights_version"], row["loss"])


@pytest.mark.parametrize("shift", ["immediate", "every:2"])
def test_the_result_of_an_interrupted_run_carries_the_versions_too(shift, tmp_path):
    _, _, result = run_small(shift, tmp_path, stop=stop_at(9 if shift == "immediate" else 5))
    rows = {row["arch"]: row for row in lines_of(tmp_path)}
    assert len(result.top) == 3
    for scored in result.top:
        row = rows["".join(map(str, scored.arch))]
        assert scored.weights_version == row["weights_version"]
        assert scored.loss == row["loss"]


@pytest.mark.parametrize("shift", ["accumulate", "every:2", "uniform", "immediate"])
def test_parents_are_scored_again_in_each_generation_but_in_immediate_mode(shift, tmp_path):
    run_small(shift, tmp_path, generations=2)
    rows = [row for row in lines_of(tmp_path) if "final" not in row]
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
    net, data, result = run_small("accumulate", tmp_path)
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
    _, _, result = run_small(shift, generations=2)
    assert result.best.arch == seen[-1]
    assert [s.arch for s in result.top] == seen[:-4:-1]


def test_ties_go_to_the_lower_loss_then_the_lower_flops_then_the_string(monkeypatch):
    _fake(monkeypatch, lambda arch: (0.5, 1.0))
    _, _, result = run_small("none", population=27, generations=0, top_k=27)
    found = [(s.flops, s.arch) for s in result.top]
    assert len(found) == 27
    assert found == sorted(found)
    _fake(monkeypatch, lambda arch: (0.5, sum(arch) / 10))
    _, _, result = run_small("none", population=27, generations=0, top_k=27)
    found = [(s.loss, s.flops, s.arch) for s in result.top]
    assert found == sorted(found)


def test_the_score_can_be_the_loss(monkeypatch):
    _fake(monkeypatch, lambda arch: (sum(arch) / 10, -sum(arch) / 10))
    for score_by, best in (("error", (0, 0, 0)), ("loss", (2, 2, 2))):
        _, _, result = run_small("none", population=27, generations=0, score_by=score_by)
        assert result.best.arch == best
        ends = {result.pareto[0].flops, result.pareto[-1].flops}
        assert len(result.pareto) == 1 or len(ends) == 2


def test_a_failed_score_never_wins_and_is_counted(monkeypatch):
    _fake(monkeypatch, lambda arch: (math.nan, math.nan) if arch[0] == 0 else (0.5, 1.0))
    _, _, result = run_small("none", population=27, generations=0, top_k=27)
    assert len(result.top) == 18
    assert all(s.arch[0] != 0 for s in result.top)
    assert result.generations[0]["failed"] == 9
    json.dumps(result.to_dict(), allow_nan=False)


def test_an_architecture_that_fails_under_the_final_weights_is_not_the_best(monkeypatch):
    _fake(monkeypatch, lambda arch: (sum(arch) / 10, 1.0))
    _, _, plain = run_small("accumulate")
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
    _, _, result = run_small("accumulate")
    assert result.best.arch != best
    assert best not in {scored.arch for scored in (*result.top, *result.pareto)}


def test_a_search_whose_every_score_fails_ends_with_no_winner(monkeypatch, tmp_path):
    _fake(monkeypatch, lambda arch: (math.nan, math.nan))
    _, _, result = run_small("accumulate", tmp_path)
    assert result.best is None
    assert result.top == result.pareto == []
    assert json.loads((tmp_path / "result.json").read_text())["best"] is None
    assert {(row["error"], row["loss"]) for row in lines_of(tmp_path)} == {(None, None)}


# Losses that are not finite


def spoil_at(*indices):
    def spoil(stream, index, images):
        if stream == "shift" and index in indices:
            images[0, 0, 0, 0] = math.nan

    return spoil


@pytest.mark.parametrize("shift", ["accumulate", "immediate", "uniform"])
def test_one_batch_with_nan_skips_one_update_and_the_search_goes_on(shift, tmp_path):
    data = small_data()
    data.train.spoil = spoil_at(1)
    net, _, result = run_small(shift, tmp_path, data=data)
    _, _, clean = run_small(shift)
    assert result.budget["skipped_updates"] == 1
    assert result.budget["updates"] == clean.budget["updates"] - 1 == net.version
    assert all(torch.isfinite(tensor).all() for tensor in net.tensors().values())
    assert all(math.isfinite(row["loss"]) for row in lines_of(tmp_path))


def test_a_skipped_update_leaves_everything_as_it_was():
    data = small_data()
    data.train.spoil = spoil_at(0, 1)
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
    data = small_data()
    data.train.spoil = spoil_at(1, 2, 3)
    net = micro_supernet()
    with pytest.raises(NonFiniteLossError, match="3 updates in a row"):
        run_small(shift, tmp_path, net=net, data=data)
    assert not (tmp_path / "result.json").exists()
    assert net.version == 1
    data.train.spoil = None
    fresh, _, result = run_small(
        shift, tmp_path, net=micro_supernet(seed=9), data=data, resume=True
    )
    assert result.budget["skipped_updates"] == 3
    assert (tmp_path / "result.json").exists()
    assert fresh.version == result.budget["updates"]


def test_two_pairs_of_bad_batches_do_not_stop_a_run():
    data = small_data()
    data.train.spoil = spoil_at(0, 1, 3, 4)
    _, _, result = run_small("accumulate", data=data, generations=2)
    assert result.budget["skipped_updates"] == 4
