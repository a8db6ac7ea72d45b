"""Scores and true accuracies in, order preservation out: Kendall's tau, top-k means, regret.

Scores (errors or losses) are better low, true accuracies better high; every figure is oriented so
that a perfect ranking reaches tau 1 and regret 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastshift.tables import ScoreTable, Truth, read_scores, write_scores

__all__ = [
    "FlopsBin",
    "OrderPreservation",
    "ScoreTable",
    "Truth",
    "best_first",
    "bootstrap",
    "format_table",
    "kendall_tau",
    "order_preservation",
    "rank_table",
    "read_scores",
    "write_scores",
]

Interval = tuple[float, float]


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two columns over the rows in which neither is NaN.

    Args:
        a: values, `[n]`.
        b: values, `[n]`.

    Returns:
        The correlation in [-1, 1]; NaN where one column is constant, so that no order exists.

    Raises:
        ValueError: the lengths differ, or fewer than two rows are left.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a and b have shapes {a.shape} and {b.shape}, expected two of [n]")
    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 2:
        raise ValueError(f"a and b share {known.sum()} rows without NaN, expected at least 2")
    a, b = a[known], b[known]
    if (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    # Here: scipy.stats takes a second to import, as long as all else but torch.
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def bootstrap(
    statistic: Callable[..., float],
    *columns: np.ndarray,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic under resampling of rows with replacement.

    Rows with a NaN in any column are left out of the resampling, and resamples in which the
    statistic is NaN out of the percentiles; equal seeds give equal intervals.

    Args:
        statistic: takes the columns, each `[n]`, and gives a number.
        columns: paired values, each `[n]`.
        resamples: how many resamples are drawn.
        confidence: the share of resamples that the interval holds, in (0, 1).
        seed: of the generator.

    Returns:
        The ends of the interval; both NaN where the statistic was NaN in every resample.

    Raises:
        ValueError: `resamples` or `confidence` is out of range, the lengths differ, or fewer than
            two rows are free of NaN.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a share in (0, 1)")
    if len({np.shape(column) for column in columns}) != 1 or np.ndim(columns[0]) != 1:
        shapes = [np.shape(column) for column in columns]
        raise ValueError(f"columns have shapes {shapes}, expected all [n]")
    rows = np.stack([np.asarray(column, dtype=np.float64) for column in columns])
    rows = rows[:, ~np.isnan(rows).any(axis=0)]
    num_rows = rows.shape[1]
    if num_rows < 2:
        raise ValueError(f"columns share {num_rows} rows without NaN, expected at least 2")
    generator = np.random.default_rng(seed)
    values = np.array(
        [statistic(*rows[:, generator.integers(num_rows, size=num_rows)]) for _ in range(resamples)]
    )
    values = values[~np.isnan(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def best_first(scores: np.ndarray, tie_break: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Rank rows from the best (lowest) score on.

    Args:
        scores: `[n]`, lower is better; NaN ranks last.
        tie_break: columns that decide among equal scores, the first one first, lower is better; the
            order of the search is loss, FLOPs, string. Rows equal in all stay in the given order.

    Returns:
        Row indices, `[n]`.
    """
    return np.lexsort([*reversed(tie_break), np.asarray(scores, dtype=np.float64)])


@dataclass(frozen=True)
class FlopsBin:
    """Order preservation among the architectures of similar cost."""

    low: float
    high: float
    num_archs: int
    tau: float


@dataclass(frozen=True)
class OrderPreservation:
    """How far scores order architectures as their true accuracies do.

    Attributes:
        num_archs: rows compared.
        num_failed: rows whose score is NaN: outside every tau, last in every ranking.
        tau_global: over all rows, against the mean of the runs.
        tau_global_interval: bootstrap over architectures.
        tau_local: within the truly best `local_k`; None where there are not more rows than that.
        tau_local_interval: bootstrap over these architectures, given the sub-space.
        local_k: size of the sub-space.
        independent_run: the run that chose the sub-space; the others, averaged, are its truth.
            None: the mean of all runs is both, which biases tau down.
        tau_per_bin: by FLOPs, cheapest first; empty where no FLOPs were given.
        top_mean: k -> mean true accuracy of the k best-scored.
        ideal_top_mean: k -> the same of the k truly best.
        regret: best true accuracy less that of the best-scored.
        confidence: of the intervals.
    """

    num_archs: int
    num_failed: int
    tau_global: float
    tau_global_interval: Interval
    tau_local: float | None
    tau_local_interval: Interval | None
    local_k: int
    independent_run: int | None
    tau_per_bin: tuple[FlopsBin, ...]
    top_mean: dict[int, float]
    ideal_top_mean: dict[int, float]
    regret: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-able values (the k of the top means as strings)."""
        values = asdict(self)
        for name in ("top_mean", "ideal_top_mean"):
            values[name] = {str(k): mean for k, mean in values[name].items()}
        return values


def order_preservation(
    scores: np.ndarray,
    truth: np.ndarray,
    *,
    flops: np.ndarray | None = None,
    tie_break: Sequence[np.ndarray] = (),
    top_k: Sequence[int] = (10, 50),
    local_k: int = 500,
    independent_run: int | None = None,
    bins: int = 5,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> OrderPreservation:
    """Compare scores with the true accuracies of the same architectures.

    Among the best architectures the truth itself is noisy: choose the sub-space by a run of its own
    (`independent_run`), and read top means and regret beside `tau_local`.

    Args:
        scores: errors or losses, `[n]`, lower is better; NaN marks a failed one.
        truth: accuracies in percent, `[n, runs]` or `[n]`, higher is better.
        flops: multiply-adds, `[n]`, for the tau per bin.
        tie_break: columns that decide among equal scores, as in `best_first`.
        top_k: sizes of the top means; those above n are left out.
        local_k: size of the sub-space of `tau_local`, at least 2.
        independent_run: index of the run that chooses the sub-space.
        bins: how many FLOPs bins of (nearly) equal count.
        resamples: bootstrap resamples of each interval.
        confidence: of the intervals.
        seed: of the bootstrap.

    Returns:
        The figures.

    Raises:
        ValueError: shapes do not match, the truth is not finite, fewer than two scores are known,
            or an option is out of range.
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    truth = truth[:, None] if truth.ndim == 1 else truth
    if scores.ndim != 1 or truth.ndim != 2 or len(truth) != len(scores):
        raise ValueError(
            f"scores and truth have shapes {scores.shape} and {truth.shape}, "
            "expected [n] and [n, runs] (or [n])"
        )
    if not np.isfinite(truth).all():
        row = int(np.argmin(np.isfinite(truth).all(axis=1)))
        raise ValueError(f"truth has {truth[row].tolist()} in row {row}, expected finite numbers")
    runs = truth.shape[1]
    if independent_run is not None and not (0 <= independent_run < runs and runs > 1):
        raise ValueError(
            f"independent_run is {independent_run}, expected one of {runs} runs, of at least 2"
        )
    if local_k < 2 or bins < 1 or min(top_k, default=1) < 1:
        raise ValueError(
            f"local_k, bins, top_k are {local_k}, {bins}, {tuple(top_k)}, "
            "expected at least 2, at least 1, all at least 1"
        )

    def tau_and_interval(rows: np.ndarray, accuracy: np.ndarray) -> tuple[float, Interval]:
        columns = -scores[rows], accuracy[rows]
        interval = bootstrap(
            kendall_tau, *columns, resamples=resamples, confidence=confidence, seed=seed
        )
        return kendall_tau(*columns), interval

    mean = truth.mean(axis=1)
    tau_global, tau_global_interval = tau_and_interval(np.arange(len(scores)), mean)
    tau_local, tau_local_interval = None, None
    if local_k < len(scores):
        chooser, judge = mean, mean
        if independent_run is not None:
            chooser = truth[:, independent_run]
            judge = np.delete(truth, independent_run, axis=1).mean(axis=1)
        rows = best_first(-chooser)[:local_k]
        tau_local, tau_local_interval = tau_and_interval(rows, judge)

    ranking, ideal = best_first(scores, tie_break), np.sort(mean)[::-1]
    sizes = [k for k in top_k if k <= len(scores)]
    return OrderPreservation(
        num_archs=len(scores),
        num_failed=int(np.isnan(scores).sum()),
        tau_global=tau_global,
        tau_global_interval=tau_global_interval,
        tau_local=tau_local,
        tau_local_interval=tau_local_interval,
        local_k=local_k,
        independent_run=independent_run,
        tau_per_bin=() if flops is None else _tau_per_bin(scores, mean, np.asarray(flops), bins),
        top_mean={k: float(mean[ranking[:k]].mean()) for k in sizes},
        ideal_top_mean={k: float(ideal[:k].mean()) for k in sizes},
        regret=float(ideal[0] - mean[ranking[0]]),
        confidence=confidence,
    )


def _tau_per_bin(
    scores: np.ndarray, accuracy: np.ndarray, flops: np.ndarray, bins: int
) -> tuple[FlopsBin, ...]:
    """Tau within FLOPs bins; equal FLOPs share a bin, and a bin without an order has tau NaN."""
    if flops.shape != scores.shape:
        raise ValueError(f"flops has shape {flops.shape}, expected {scores.shape}")
    edges = np.unique(np.quantile(flops, np.linspace(0, 1, bins + 1)))
    places = np.clip(np.searchsorted(edges, flops, side="right") - 1, 0, max(len(edges) - 2, 0))
    result = []
    for place in np.unique(places):
        rows = places == place
        has_order = (rows & ~np.isnan(scores)).sum() >= 2
        tau = kendall_tau(-scores[rows], accuracy[rows]) if has_order else float("nan")
        low, high = float(flops[rows].min()), float(flops[rows].max())
        result.append(FlopsBin(low=low, high=high, num_archs=int(rows.sum()), tau=tau))
    return tuple(result)


def rank_table(
    table: ScoreTable,
    truth: Truth,
    *,
    score_by: str = "error",
    top_k: Sequence[int] = (10, 50),
    local_k: int = 500,
    independent_run: int | None = None,
    seed: int = 0,
) -> OrderPreservation:
    """Compare a table of scores with the truth: `order_preservation` of the same architectures.

    Equal scores are decided as in a search: by the other score, FLOPs, the string.

    Args:
        table: the scores.
        truth: has every architecture of the table, and perhaps more.
        score_by: `error` or `loss`.
        top_k: sizes of the top means.
        local_k: size of the sub-space of `tau_local`.
        independent_run: index of the truth's run that chooses the sub-space.
        seed: of the bootstrap.

    Returns:
        The figures.

    Raises:
        ArchError: an architecture of the table has no true accuracy.
        ValueError: `score_by` is not one of the two or not in the table; and as
            `order_preservation`.
    """
    if score_by not in ("error", "loss") or getattr(table, score_by) is None:
        raise ValueError(f"score_by is {score_by!r}, expected 'error' or 'loss', in the table")
    rows = truth.rows(table.archs)
    flops = table.flops
    if flops is None and truth.flops is not None:
        flops = truth.flops[rows]
    others = [table.loss if score_by == "error" else table.error, flops, np.array(table.archs)]
    return order_preservation(
        getattr(table, score_by),
        truth.accuracy[rows],
        flops=flops,
        tie_break=[column for column in others if column is not None],
        top_k=top_k,
        local_k=local_k,
        independent_run=independent_run,
        seed=seed,
    )


def format_table(result: OrderPreservation) -> str:
    """Lay the figures out as plain text, one a line."""

    def interval(bounds: Interval) -> str:
        return f"  [{bounds[0]:.3f}, {bounds[1]:.3f}]"

    lines = [
        ("architectures", f"{result.num_archs}, of which failed: {result.num_failed}"),
        ("tau", f"{result.tau_global:.3f}{interval(result.tau_global_interval)}"),
    ]
    chosen = "all runs" if result.independent_run is None else f"run {result.independent_run}"
    local = f"not more than {result.local_k} architectures"
    if result.tau_local is not None and result.tau_local_interval is not None:
        local = f"{result.tau_local:.3f}{interval(result.tau_local_interval)}"
    lines.append((f"tau, best {result.local_k} by {chosen}", local))
    unit, letter = (1e6, "M") if any(p.high >= 1e6 for p in result.tau_per_bin) else (1e3, "k")
    lines += [
        (
            f"tau, {part.low / unit:.1f}{letter} to {part.high / unit:.1f}{letter}",
            f"{'no order' if math.isnan(part.tau) else f'{part.tau:.3f}'}  ({part.num_archs})",
        )
        for part in result.tau_per_bin
    ]
    lines += [
        (f"true accuracy, first {k}", f"{mean:.2f}  (ideal {result.ideal_top_mean[k]:.2f})")
        for k, mean in result.top_mean.items()
    ]
    lines.append(("regret of the first", f"{result.regret:.2f}"))
    width = max(len(name) for name, _ in lines)
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return f"{table}\n[...]: {result.confidence:.0%} bootstrap over architectures"
