"""A run -> charts as inline SVG, drawn by matplotlib and coloured by the page.

Charts are drawn in stand-in colours, which are then replaced by the page's style variables; so one
drawing serves light and dark pages, and text keeps the page's font. The same run gives the same
bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fastshift._report_run import Run, short_count
from fastshift.errors import missing_extra

__all__ = ["concentration", "pareto_front", "score_against_flops", "search_curve"]

MAX_POINTS = 3000
NUM_SHADES = 6  # --g0 ... --g5 of the page, from the first generations to the last

# Stand-ins: colours that matplotlib writes in hex and that no chart uses otherwise.
_INK, _MUTED, _LINE = "#010203", "#020304", "#030405"
_ACCENT, _WARM, _SURFACE = "#040506", "#050607", "#060708"
_SHADES = [f"#0708{shade:02x}" for shade in range(NUM_SHADES)]
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _LINE: "line",
    _ACCENT: "accent",
    _WARM: "warm",
    _SURFACE: "surface",
    **{colour: f"g{shade}" for shade, colour in enumerate(_SHADES)},
}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastshift",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,
}


def search_curve(run: Run) -> tuple[str, str]:
    """Draw the score's quantiles per generation, with the weights' versions above.

    Returns:
        The SVG, and a caption.
    """
    generations, groups = _by_generation(run)
    if not groups:
        return "", "No score is finite, so there is no curve."
    quantiles = np.array([np.quantile(group, (0, 0.1, 0.25, 0.5, 0.75, 0.9)) for group in groups]).T
    best, low, lower, middle, upper, high = quantiles
    is_moving = len(run.versions) > 1

    def draw(axes: Any) -> None:
        marker = {"marker": "o", "markersize": 3.5}
        axes.fill_between(generations, low, high, color=_ACCENT, alpha=0.13, lw=0)
        axes.fill_between(generations, lower, upper, color=_ACCENT, alpha=0.24, lw=0)
        axes.plot(generations, middle, color=_ACCENT, label="median", **marker)
        axes.plot(generations, best, color=_WARM, label="best", **marker)
        if not is_moving:
            lowest = np.minimum.accumulate(best)
            axes.step(generations, lowest, color=_WARM, ls=":", where="post", label="best so far")
        axes.set_xlabel("generation")
        axes.set_ylabel(_metric_label(run))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.03)
        axes.legend(loc="upper right", ncols=3, handlelength=1.4, columnspacing=1.2)
        axes.set_ylim(top=float(high.max() + 0.16 * (high.max() - best.min() or 1)))
        if is_moving:
            _mark_versions(axes, run)

    caption = (
        f"{_metric_words(run)} of each generation's candidates, with weights inherited from the "
        "supernet. Bands: the middle half and the middle four fifths of the candidates. "
    )
    if is_moving:
        caption += (
            "The supernet was trained on between generations: the upper axis gives the weights' "
            "version (optimiser steps made), and only scores of the same version were measured "
            "under the same weights."
        )
    else:
        caption += (
            f"All scores were measured under the same weights (version {run.versions[0]:,}), so "
            "they can be compared across generations."
        )
    return _svg(draw, "curve", "Search curve", height=3.35 if is_moving else 3.1), caption


def pareto_front(run: Run) -> tuple[str, str]:
    """Draw the Pareto front over all scored candidates; returns the SVG and a caption."""
    front = sorted(run.result["pareto"], key=lambda scored: scored["flops"])
    best = run.result["best"]
    x, y, _ = _points(run)
    limits = run.flops_limits()

    def draw(axes: Any) -> None:
        axes.scatter(x / 1e6, y, s=7, color=_MUTED, alpha=0.4, lw=0, label="scored")
        fx = [scored["flops"] / 1e6 for scored in front]
        fy = [_value(run, scored) for scored in front]
        axes.step(fx, fy, color=_ACCENT, where="post", lw=1.4)
        axes.plot(fx, fy, "o", color=_ACCENT, ms=4.5, label="Pareto front")
        _mark_best(axes, run)
        for limit in limits:
            for value in (limit.low, limit.high):
                if value is not None:
                    axes.axvline(value / 1e6, color=_MUTED, lw=1, ls=(0, (4, 3)))
        _label_cost_axes(axes, run, y)
        _legend_above(axes, handletextpad=0.2, columnspacing=1.4)

    caption = (
        f"{len(front)} architectures that no scored architecture beats in both multiply-adds and "
        f"{run.metric}, {_front_words(front)}. The chosen one costs {short_count(best['flops'])} "
        "multiply-adds an image."
    )
    if limits:
        caption += " Dashed: the limit on multiply-adds."
    return _svg(draw, "pareto", "Pareto front"), caption + _beyond_words(y)


def score_against_flops(run: Run) -> tuple[str, str]:
    """Draw every score against multiply-adds, by generation; returns the SVG and a caption."""
    x, y, generation = _points(run)
    edges = _shade_edges(generation)

    def draw(axes: Any) -> None:
        for index, (start, stop) in enumerate(edges):
            chosen = (generation >= start) & (generation < stop)
            label = str(start) if stop == start + 1 else f"{start}-{stop - 1}"
            colour = _SHADES[_shade(index, len(edges))]
            axes.scatter(x[chosen] / 1e6, y[chosen], s=9, color=colour, lw=0, label=label)
        _mark_best(axes, run, label=None)
        _label_cost_axes(axes, run, y)
        _legend_above(
            axes, title="generation", handletextpad=0.0, columnspacing=0.6, markerscale=1.6
        )

    count = f"{len(x):,} of {len(run.scores.archs):,} scores" if _is_thinned(run) else "Every score"
    caption = (
        f"{count} against the multiply-adds of its architecture: the stronger the colour, the "
        "later the generation. Star: the chosen architecture"
    )
    if len(np.unique(x)) > 1 and len(np.unique(y)) > 1:
        # Here: scipy.stats takes as long to import as all else but torch, and only a page needs it.
        from scipy.stats import kendalltau

        tau = kendalltau(x, -y).statistic
        caption += (
            f". Kendall's tau between multiply-adds and merit is {tau:.2f}: "
            "1 would mean that the larger network always looks better"
        )
    if run.scores.num_failed:
        caption += f". {run.scores.num_failed} scores were not finite and are not drawn"
    return _svg(draw, "cost", "Score against multiply-adds"), f"{caption}.{_beyond_words(y)}"


def concentration(run: Run) -> tuple[str, str]:
    """Draw how many ops a generation really uses, and the sharing that follows from it.

    Returns:
        The SVG, and a caption.
    """
    generations = [entry["generation"] for entry in run.result["generations"]]
    effective = np.array(
        [
            [effective_choices(frequencies) for frequencies in entry["op_frequency"]]
            for entry in run.result["generations"]
        ]
    )  # [G, L]
    sharing = [entry.get("sharing") for entry in run.result["generations"]]
    has_sharing = all(value is not None for value in sharing)
    most = max(len(names) for names in run.op_names())

    def draw(axes: Any, lower: Any = None) -> None:
        axes.fill_between(
            generations, effective.min(1), effective.max(1), color=_ACCENT, alpha=0.16, lw=0
        )
        axes.plot(generations, effective.mean(1), "o-", color=_ACCENT, ms=3.5)
        axes.set_ylim(0.9, most + 0.1)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("effective choices\nper block")
        last = axes if lower is None else lower
        if lower is not None:
            lower.plot(generations, sharing, "o-", color=_WARM, ms=3.5)
            lower.set_ylim(bottom=1)
            lower.set_ylabel("sharing factor")
        last.set_xlabel("generation")
        last.xaxis.get_major_locator().set_params(integer=True)

    caption = (
        "Effective choices: the exponential of the entropy of a choice block's op frequencies, "
        f"mean over the blocks and their range; {most} means that all ops are equally frequent, "
        "1 that one op is left."
    )
    if has_sharing:
        caption += (
            " Sharing factor: block evaluations of the candidates one at a time over those of "
            "their prefix tree, in which a common prefix is computed once."
        )
    rows = 2 if has_sharing else 1
    height = 3.9 if has_sharing else 2.6
    return _svg(draw, "concentration", "Concentration", rows=rows, height=height), caption


def effective_choices(frequencies: list[float]) -> float:
    """Return the exponential of the entropy of frequencies that sum to one."""
    used = np.array([frequency for frequency in frequencies if frequency > 0])
    return float(np.exp(-(used * np.log(used)).sum()))


def _front_words(front: list[dict[str, Any]]) -> str:
    versions = {scored["weights_version"] for scored in front}
    if len(versions) == 1:
        return f"under the weights of version {versions.pop():,}"
    return "each under the weights of its own score"


def _value(run: Run, scored: dict[str, Any]) -> float:
    return scored["loss"] if run.metric == "loss" else 100 * scored["error"]


def _values(run: Run) -> np.ndarray:
    return run.scores.loss if run.metric == "loss" else 100 * run.scores.error


def _metric_words(run: Run) -> str:
    return "Held-out cross-entropy" if run.metric == "loss" else "Held-out top-1 error"


def _metric_label(run: Run) -> str:
    unit = "nats" if run.metric == "loss" else "%"
    return f"{_metric_words(run).lower()} ({unit})"


def _by_generation(run: Run) -> tuple[list[int], list[np.ndarray]]:
    """Return the generations with a finite score, and the finite scores of their candidates."""
    values, generation = _values(run), run.scores.generation
    numbers, groups = [], []
    for entry, count in zip(run.result["generations"], run.num_candidates, strict=True):
        # Within a generation the parents' new scores follow the candidates'.
        group = values[generation == entry["generation"]][:count]
        group = group[np.isfinite(group)]
        if len(group):
            numbers.append(entry["generation"])
            groups.append(group)
    return numbers, groups


def _is_thinned(run: Run) -> bool:
    return len(run.scores.archs) > MAX_POINTS


def _points(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return FLOPs, values and generations of the finite scores, evenly thinned where too many."""
    values = _values(run)
    kept = np.flatnonzero(np.isfinite(values))
    if len(kept) > MAX_POINTS:
        kept = kept[np.linspace(0, len(kept) - 1, MAX_POINTS).astype(int)]
    return run.scores.flops[kept], values[kept], run.scores.generation[kept]


def _shade_edges(generation: np.ndarray) -> list[tuple[int, int]]:
    """Cut the generations into at most `NUM_SHADES` runs, equally long but for the last."""
    if not len(generation):
        return []
    first, stop = int(generation.min()), int(generation.max()) + 1
    length = -(-(stop - first) // NUM_SHADES)
    return [(start, min(start + length, stop)) for start in range(first, stop, length)]


def _shade(index: int, count: int) -> int:
    """Spread few runs over the whole scale of shades, the last always the strongest."""
    return NUM_SHADES - 1 if count == 1 else round(index * (NUM_SHADES - 1) / (count - 1))


def _mark_best(axes: Any, run: Run, label: str | None = "chosen") -> None:
    best = run.result["best"]
    position = ([best["flops"] / 1e6], [_value(run, best)])
    style = {"marker": "*", "s": 130, "color": _WARM, "edgecolor": _SURFACE, "lw": 0.8, "zorder": 5}
    axes.scatter(*position, label=label, **style)


def _legend_above(axes: Any, **style: Any) -> None:
    axes.figure.legend(loc="outside upper center", ncols=6, title_fontsize=10, **style)


def _frame_top(values: np.ndarray) -> float:
    """Return the upper end of a chart that a few very bad scores shall not squeeze."""
    if not len(values):
        return 1.0
    low, high = np.quantile(values, (0, 0.975))
    return float(min(values.max(), high + 0.5 * (high - low)))


def _beyond_words(values: np.ndarray) -> str:
    count = int((values > _frame_top(values)).sum())
    return f" {count} worse scores lie above the frame." if count else ""


def _label_cost_axes(axes: Any, run: Run, values: np.ndarray) -> None:
    top = _frame_top(values)
    if len(values) and top < values.max():
        low = float(values.min())
        axes.set_ylim(low - 0.06 * (top - low), top)
    axes.set_xlabel("multiply-adds per image (millions)")
    axes.set_ylabel(_metric_label(run))


def _mark_versions(axes: Any, run: Run) -> None:
    """Write the weights' version of some generations on an axis above."""
    entries = run.result["generations"]
    step = max(1, -(-len(entries) // 5))
    shown = entries[::step]
    above = axes.secondary_xaxis("top")
    above.set_xticks([entry["generation"] for entry in shown])
    above.set_xticklabels([f"{entry['weights_version']:,}" for entry in shown])
    above.set_xlabel("weights' version (optimiser steps)")
    above.spines["top"].set_visible(True)


def _svg(
    draw: Callable[..., None],
    name: str,
    title: str,
    *,
    rows: int = 1,
    height: float = 3.3,
) -> str:
    """Draw a chart and return it as an SVG element fit to stand in a page."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", extra="report") from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.75, height), dpi=72, layout="constrained")
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        draw(*panels)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), name, title)


def _for_page(text: str, name: str, title: str) -> str:
    """Turn a matplotlib file into an element: its own identifiers, the page's colours and font."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    view = re.search(r'viewBox="[^"]*"', text)[0]
    body = text[text.index(">") + 1 :]
    return f'<svg {view} role="img" aria-label="{title}">{body}'.strip()
