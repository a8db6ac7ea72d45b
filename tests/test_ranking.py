from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastshift import ranking
from fastshift.errors import ArchError

needs_truth = pytest.mark.skipif(
    "FASTSHIFT_DATA" not in os.environ,
    reason="FASTSHIFT_DATA, the folder of nas_bench_macro.json, is unset",
)


@pytest.fixture(scope="module")
def macro() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Accuracies `[3969, 3]`, FLOPs `[3969]` and strings of the distinct networks."""
    truth = ranking.Truth.load(Path(os.environ["FASTSHIFT_DATA"]) / "nas_bench_macro.json")
    rows = truth.rows(sorted({_identities_last(arch) for arch in truth.archs}))
    return truth.accuracy[rows], truth.flops[rows], tuple(truth.archs[row] for row in rows)


def _identities_last(arch: str) -> str:
    stages = arch[:2], arch[2:5], arch[5:]
    rests = [stage[1:].replace("0", "") for stage in stages]
    return "".join(
        (stage[0] + rest).ljust(len(stage), "0") for stage, rest in zip(stages, rests, strict=True)
    )


@needs_truth
def test_the_truth_is_as_reliable_as_its_readme_says(macro):
    accuracy, _, archs = macro
    assert len(archs) == 3969
    mean = accuracy.mean(axis=1)
    for run in range(3):
        others = [ranking.kendall_tau(accuracy[:, run], accuracy[:, (run + 1) % 3])]
        assert others == pytest.approx([0.88], abs=0.005)
        assert ranking.kendall_tau(accuracy[:, run], mean) == pytest.approx(0.93, abs=0.005)
    best = np.argmax(mean)
    assert archs[best] == "22212220"
    assert mean[best] == pytest.approx(93.127, abs=0.001)
    assert archs[np.argmin(mean)] == "00000000"


@needs_truth
def test_flops_alone_order_the_truth_as_its_readme_says(macro):
    accuracy, flops, archs = macro
    found = ranking.order_preservation(
        -flops, accuracy, flops=flops, tie_break=[np.array(archs)], independent_run=0, resamples=50
    )
    assert found.tau_global == pytest.approx(0.546, abs=0.0005)
    assert found.top_mean == pytest.approx({10: 92.91, 50: 92.65}, abs=0.005)
    assert found.ideal_top_mean == pytest.approx({10: 93.06, 50: 92.92}, abs=0.005)
    assert found.regret == pytest.approx(0.17, abs=0.005)
    assert sum(part.num_archs for part in found.tau_per_bin) == 3969


@needs_truth
def test_a_perfect_score_has_no_regret(macro):
    accuracy, _, _ = macro
    found = ranking.order_preservation(-accuracy.mean(axis=1), accuracy, resamples=10)
    assert found.tau_global == pytest.approx(1)
    assert found.tau_local == pytest.approx(1)
    assert found.top_mean == found.ideal_top_mean
    assert found.regret == 0


def test_tau_counts_ties_as_tau_b_does():
    # Five concordant pairs, none discordant, one tied in `a`: 5 / sqrt(5 * 6).
    tau = ranking.kendall_tau(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4]))
    assert tau == pytest.approx(5 / np.sqrt(30))


def test_tau_leaves_out_rows_with_nan():
    a = np.array([1.0, np.nan, 2.0, 3.0, 9.0])
    b = np.array([1.0, 5.0, 3.0, 2.0, np.nan])
    assert ranking.kendall_tau(a, b) == pytest.approx(1 / 3)


def test_tau_of_a_constant_column_is_nan_without_a_warning():
    assert np.isnan(ranking.kendall_tau(np.zeros(3), np.arange(3)))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, np.nan], [1.0, 2.0], "share 1 rows"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"shapes \(2,\) and \(3,\)"),
        ([[1.0], [2.0]], [[1.0], [2.0]], r"expected two of \[n\]"),
    ],
)
def test_tau_refuses_what_has_no_order(a, b, message):
    with pytest.raises(ValueError, match=message):
        ranking.kendall_tau(np.array(a), np.array(b))


def test_the_bootstrap_is_seeded():
    values = np.random.default_rng(0).normal(size=50)
    first = ranking.bootstrap(np.mean, values, seed=3)
    assert first == ranking.bootstrap(np.mean, values, seed=3)
    assert first != ranking.bootstrap(np.mean, values, seed=4)


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    low, high = ranking.bootstrap(np.mean, values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = ranking.bootstrap(
            np.mean, generator.normal(size=40), resamples=200, confidence=0.8, seed=trial
        )
        covered += low <= 0 <= high
    assert 0.7 <= covered / 200 <= 0.88


def test_the_bootstrap_never_draws_a_row_with_nan():
    a = np.array([1.0, np.nan, 2.0, 3.0, 4.0])
    b = np.array([1.0, 2.0, np.nan, 3.0, 4.0])
    known = np.array([0, 3, 4])
    with_nan = ranking.bootstrap(ranking.kendall_tau, a, b, seed=1)
    assert with_nan == ranking.bootstrap(ranking.kendall_tau, a[known], b[known], seed=1)


def test_resamples_without_an_order_are_left_out_of_the_interval():
    # A quarter and more of the resamples of three rows hold one row only, where tau is NaN.
    low, high = ranking.bootstrap(ranking.kendall_tau, np.arange(3), np.arange(3))
    assert (low, high) == (pytest.approx(1), pytest.approx(1))
    assert np.isnan(ranking.bootstrap(lambda _: float("nan"), np.arange(3))).all()


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ([np.arange(3)], {"resamples": 0}, "resamples is 0"),
        ([np.arange(3)], {"confidence": 1.0}, "confidence is 1.0"),
        ([np.arange(3), np.arange(4)], {}, "columns have shapes"),
        ([np.array([1.0, np.nan])], {}, "share 1 rows"),
    ],
)
def test_the_bootstrap_refuses_what_it_cannot_use(columns, options, message):
    with pytest.raises(ValueError, match=message):
        ranking.bootstrap(np.mean, *columns, **options)


def test_equal_scores_are_decided_by_loss_then_flops_then_string():
    scores = np.array([0.2, 0.1, 0.1, 0.1, 0.1, np.nan])
    loss = np.array([0.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    flops = np.array([1, 1, 9, 5, 5, 1])
    archs = np.array(["000", "111", "222", "201", "120", "000"])
    ranked = ranking.best_first(scores, [loss, flops, archs])
    assert ranked.tolist() == [4, 3, 2, 1, 0, 5]


def test_figures_follow_a_hand_worked_example():
    scores = np.array([0.1, 0.2, 0.3, 0.4, np.nan])
    truth = np.array([90.0, 92.0, 91.0, 80.0, 95.0])
    found = ranking.order_preservation(scores, truth, top_k=(1, 2, 5, 6), resamples=20)
    # Pairs of the four known rows: 0-1 and 0-2 are the wrong way round, the other four right.
    assert found.tau_global == pytest.approx(2 / 6)
    assert found.num_archs == 5
    assert found.num_failed == 1
    assert found.top_mean == {1: 90.0, 2: 91.0, 5: pytest.approx(89.6)}
    assert found.ideal_top_mean == {1: 95.0, 2: 93.5, 5: pytest.approx(89.6)}
    assert found.regret == 5.0
    assert found.tau_local is None
    assert "not more than 500 architectures" in ranking.format_table(found)


def test_the_sub_space_is_chosen_by_one_run_and_judged_by_the_others():
    truth = np.array([[9.0, 1.0, 3.0], [8.0, 4.0, 4.0], [7.0, 5.0, 7.0], [1.0, 9.0, 9.9]])
    scores = np.array([0.3, 0.2, 0.1, 0.0])
    found = ranking.order_preservation(
        scores, truth, local_k=3, independent_run=0, resamples=20, top_k=(1,)
    )
    assert found.tau_local == pytest.approx(1)
    by_all_runs = ranking.order_preservation(scores, truth, local_k=3, resamples=20, top_k=(1,))
    assert by_all_runs.tau_local == pytest.approx(1)
    by_last = ranking.order_preservation(
        scores, truth, local_k=2, independent_run=2, resamples=20, top_k=(1,)
    )
    # The two best of run 2 are rows 3 and 2; the mean of runs 0 and 1 puts row 2 first.
    assert by_last.tau_local == pytest.approx(-1)


def test_choosing_the_sub_space_by_the_judging_runs_biases_tau_down():
    generator = np.random.default_rng(0)
    quality = generator.normal(size=2000)
    truth = quality[:, None] + generator.normal(size=(2000, 3))
    biased = ranking.order_preservation(-quality, truth, local_k=200, resamples=1)
    honest = ranking.order_preservation(
        -quality, truth, local_k=200, independent_run=0, resamples=1
    )
    assert biased.tau_local < honest.tau_local - 0.05


def test_bins_hold_architectures_of_equal_cost_together():
    flops = np.array([5, 5, 5, 5, 7, 8, 9, 9])
    scores = np.array([0.4, 0.3, 0.2, 0.1, 0.1, 0.2, 0.3, 0.4])
    truth = np.array([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0])
    found = ranking.order_preservation(scores, truth, flops=flops, bins=2, resamples=10)
    assert [(part.low, part.high, part.num_archs, part.tau) for part in found.tau_per_bin] == [
        (5, 5, 4, pytest.approx(1)),
        (7, 9, 4, pytest.approx(-1)),
    ]
    alone = ranking.order_preservation(scores, truth, flops=np.full(8, 5), resamples=10)
    assert [part.num_archs for part in alone.tau_per_bin] == [8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truth": np.ones((3, 2))}, r"shapes \(4,\) and \(3, 2\)"),
        ({"truth": np.array([1.0, np.inf, 1.0, 1.0])}, r"\[inf\] in row 1"),
        ({"truth": np.ones(4), "independent_run": 0}, "independent_run is 0"),
        ({"independent_run": 2}, "independent_run is 2, expected one of 2 runs"),
        ({"local_k": 1}, "local_k, bins, top_k are 1, 5"),
        ({"top_k": (0,)}, "expected at least 2"),
        ({"flops": np.ones(3)}, "flops has shape"),
        ({"scores": np.array([1.0, np.nan, np.nan, np.nan])}, "share 1 rows"),
    ],
)
def test_unusable_arguments_are_named(options, message):
    arguments = {"scores": np.arange(4), "truth": np.arange(8.0).reshape(4, 2), **options}
    with pytest.raises(ValueError, match=message):
        ranking.order_preservation(**arguments)


def test_a_table_is_ranked_against_the_truth_of_its_own_architectures():
    truth = ranking.Truth(
        archs=("000", "001", "010", "011"),
        accuracy=np.array([[70.0], [80.0], [90.0], [60.0]]),
        flops=np.array([1, 2, 3, 4]),
    )
    table = ranking.ScoreTable(
        archs=("010", "001", "000"), error=np.array([0.1, 0.1, 0.3]), loss=np.array([0.2, 0.1, 0.3])
    )
    found = ranking.rank_table(table, truth, top_k=(1, 2))
    assert found.num_archs == 3
    assert found.top_mean == {1: 80.0, 2: 85.0}
    assert found.regret == 10.0
    assert ranking.rank_table(table, truth, score_by="loss").tau_global == pytest.approx(1 / 3)
    assert len(found.tau_per_bin) > 0
    with pytest.raises(ValueError, match="score_by is 'latency'"):
        ranking.rank_table(table, truth, score_by="latency")
    stranger = ranking.ScoreTable(archs=("222", "000"), error=np.array([0.1, 0.2]))
    with pytest.raises(ArchError, match="arch '222' has no true accuracy"):
        ranking.rank_table(stranger, truth)
    with pytest.raises(ValueError, match="score_by is 'loss'"):
        ranking.rank_table(stranger, truth, score_by="loss")


def test_figures_print_as_a_table_and_survive_json():
    generator = np.random.default_rng(0)
    scores, truth = generator.normal(size=30), generator.normal(90, 1, size=(30, 3))
    found = ranking.order_preservation(
        scores, truth, flops=np.arange(30) * 1e6, local_k=10, independent_run=1, resamples=20
    )
    text = ranking.format_table(found)
    assert f"{found.tau_global:.3f}" in text
    assert "tau, best 10 by run 1" in text
    assert "95% bootstrap" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    values = json.loads(json.dumps(found.to_dict()))
    assert values["top_mean"]["10"] == found.top_mean[10]
    assert values["tau_global_interval"] == list(found.tau_global_interval)
