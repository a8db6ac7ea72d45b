"""A run directory -> `report.html`, and the same facts as tables on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, TextIO

from fastshift import _report_figures as figures
from fastshift import _report_page as pages
from fastshift._report_run import TIMES, Run, load, short_count, short_time
from fastshift.errors import missing_extra

__all__ = ["summary", "write_report"]

_MODES = {
    "accumulate": "Supernet Shifting, accumulated over each generation",
    "immediate": "Supernet Shifting, before each score",
    "uniform": "the uniform control (the same budget on random paths)",
    "none": "no shifting (SPOS)",
}

_SUPERSCRIPTS = str.maketrans(
    "0123456789", "\u2070\xb9\xb2\xb3\u2074\u2075\u2076\u2077\u2078\u2079"
)

_BUDGET = {
    "scored": "scores taken, parents' and final ones included",
    "train_images": "training images",
    "path_image_pairs": "training (path, image) pairs",
    "updates": "optimiser steps",
    "skipped_updates": "optimiser steps skipped (loss not finite)",
    "validation_images": "images scored",
    "calibration_images": "images for batch-norm statistics",
}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run directory.

    The page is one file that needs nothing from elsewhere, and the same run gives the same bytes.

    Args:
        run_dir: holds `result.json`, `scores.jsonl` and, where there is one, `config.yaml`.

    Returns:
        The page's path.

    Raises:
        ConfigError: a file of the run is missing or malformed.
        MissingExtraError: matplotlib is not installed.
    """
    run = load(run_dir)
    path = run.directory / "report.html"
    draft = path.with_name(".report.html.tmp")
    draft.write_text(_document(run), encoding="utf-8")
    os.replace(draft, path)
    return path


def summary(
    run_dir: str | os.PathLike[str], *, plain: bool = False, stream: TextIO | None = None
) -> None:
    """Print a run's outcome as tables.

    Args:
        run_dir: holds `result.json`, `scores.jsonl` and, where there is one, `config.yaml`.
        plain: print text in columns, without rich.
        stream: where to print; standard output by default.

    Raises:
        ConfigError: a file of the run is missing or malformed.
        MissingExtraError: rich is not installed and `plain` is false.
    """
    run = load(run_dir)
    stream = sys.stdout if stream is None else stream
    sections = [("Best architectures", _TOP_HEADER, _top_rows(run))]
    if run.result.get("retrained"):
        sections.append(("Retrained from scratch", _RETRAINED_HEADER, _retrained_rows(run)))
    sections.append(("Budget of the search", ("", ""), _budget_rows(run)))
    if plain:
        _print_plain(sections, stream)
    else:
        _print_rich(sections, stream)
    if run.result.get("stopped"):
        print(f"stopped early: {run.result['stopped']}", file=stream)


_TOP_HEADER = ("arch", "error", "loss", "FLOPs", "params", "generation", "weights")
_RETRAINED_HEADER = ("arch", "origin", "supernet's error", "retrained: test error")


def _top_rows(run: Run) -> list[tuple[str, ...]]:
    return [
        (
            scored["arch"],
            f"{100 * scored['error']:.2f} %",
            f"{scored['loss']:.4f}",
            short_count(scored["flops"]),
            short_count(scored["params"]),
            str(scored["generation"]),
            f"{scored['weights_version']:,}",
        )
        for scored in run.result["top"] or [run.result["best"]]
    ]


def _retrained_rows(run: Run) -> list[tuple[str, ...]]:
    return [
        (
            entry["arch"],
            entry["kind"],
            f"{100 * entry['error_supernet']:.2f} %",
            f"{100 * (1 - entry['test_accuracy']):.2f} %",
        )
        for entry in run.result["retrained"]
    ]


def _budget_rows(run: Run) -> list[tuple[str, str]]:
    result = run.result
    rows = [
        ("wall time of the search", short_time(result["seconds"])),
        ("candidates", f"{sum(run.num_candidates):,}"),
    ]
    if result.get("archs_per_second"):
        rows.append(("architectures per second", f"{result['archs_per_second']:.3g}"))
    rows.extend(
        (words, f"{result['budget'][name]:,}")
        for name, words in _BUDGET.items()
        if name in result["budget"]
    )
    return rows


def _print_plain(
    sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]], stream: TextIO
) -> None:
    for title, header, rows in sections:
        print(f"\n{title}", file=stream)
        lines = [header, *rows] if any(header) else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [
                text.rjust(width) if text[:1].isdigit() and column else text.ljust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            print("  ".join(cells).rstrip(), file=stream)


def _print_rich(
    sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]], stream: TextIO
) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise missing_extra("rich", extra="cli") from error
    console = Console(file=stream)
    for title, header, rows in sections:
        table = Table(
            title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
            show_header=any(header), pad_edge=False,
        )  # fmt: skip
        for column, name in enumerate(header):
            is_number = all(row[column][:1].isdigit() for row in rows) and column > 0
            style = {"justify": "right"} if is_number else {"overflow": "fold"}
            table.add_column(name, no_wrap=column == 0, **style)
        for index, row in enumerate(rows):
            is_first = index == 0 and any(header)
            table.add_row(*row, style="bold" if is_first else None)
        console.print(table)


def _document(run: Run) -> str:
    result = run.result
    best = result["best"]
    layers = run.layers(best["arch"])
    network_caption = (
        f"From the image to the logits. Slabs show each output: {_glyph_words(run)}. Bars: share "
        "of the network's multiply-adds. Dashed: identity, the block is left out."
    )
    tables = [
        pages.card("Budget of the search", pages.table((), _budget_rows(run))),
        pages.card("Search", pages.table((), _search_rows(run))),
        pages.card("Data", pages.table((), _pairs(result["data"]))),
        pages.card("Configuration", _configuration(run)),
    ]
    cards = [
        pages.card("Search curve", *figures.search_curve(run)),
        pages.card("Pareto front", *figures.pareto_front(run)),
        pages.card("Score against multiply-adds", *figures.score_against_flops(run)),
        pages.card("Concentration of the population", *figures.concentration(run)),
        pages.card(
            "Op frequencies", pages.frequency_panels(run), _frequency_words(run), is_wide=True
        ),
        pages.card("Best architectures", _top_table(run), _top_caption(run), is_wide=True),
        *_retrained_cards(run),
        pages.card(
            "The chosen architecture, block by block",
            pages.network(layers, result["space"].get("image_size")),
            network_caption,
        ),
        f'<div class="stack">{"".join(tables)}</div>',
    ]
    title = f"{result['space']['name']} on {_data_name(run)}"
    versions = run.config.get("versions") or {}
    footer = "Written by fastshift report"
    if versions:
        footer += " from a run of " + ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    return pages.page(f"{title}: FastShift", _head(run, title), cards, footer + ".")


def _head(run: Run, title: str) -> str:
    result, best = run.result, run.result["best"]
    mode = str(result["shift"].get("mode", ""))
    method = _MODES.get(mode, f"Supernet Shifting, {mode}")
    shares = {"flops": "", "params": ""}
    if run.space is not None:
        for name in shares:
            percent = 100 * best[name] / run.space.largest(name)
            shares[name] = f"{percent:.0f} % of the space's largest"
    facts = [
        ("held-out error", f"{100 * best['error']:.2f} %", f"cross-entropy {best['loss']:.4f}"),
        ("multiply-adds an image", short_count(best["flops"]), shares["flops"]),
        ("parameters", short_count(best["params"]), shares["params"]),
        (
            "its score is of generation",
            str(best["generation"]),
            f"scored under weights' version {best['weights_version']:,}",
        ),
        (
            "searched",
            f"{sum(run.num_candidates):,}",
            f"candidates, each time anew, in a space of {_size_words(result['space']['size'])}",
        ),
        ("wall time of the search", short_time(result["seconds"]), _rate_words(result)),
    ]
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in facts
    )
    notice = ""
    if result.get("stopped"):
        notice = f'<p class="notice">Stopped early: {escape(str(result["stopped"]))}</p>'
    return (
        f"{notice}<p>{escape(method)}</p><h1>{escape(title)}</h1>"
        f'{pages.arch_chips(best["arch"])}<dl class="figures">{tiles}</dl>'
    )


def _top_table(run: Run) -> str:
    rows = [(pages.arch_chips(row[0]), *row[1:]) for row in _top_rows(run)]
    return pages.table(_TOP_HEADER, rows)


def _frequency_words(run: Run) -> str:
    words = (
        "One panel a choice block; rows are its choices, columns the generations. The stronger "
        "the colour, the more candidates of that generation have the choice; the mark shows the "
        "chosen one, the figures its share in the first and the last generation. "
    )
    if len(run.versions) > 1:
        return words + (
            "Between generations the supernet is trained on, each choice in proportion to its "
            "colour where the candidates themselves are trained: this is how it shifts towards the "
            "architectures that are being compared."
        )
    return words + "The weights did not move: what concentrates is the population alone."


def _configuration(run: Run) -> str:
    if not run.config_text:
        return "<p>The run was started from Python and has no config.yaml.</p>"
    return f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"


def _search_rows(run: Run) -> list[tuple[str, str]]:
    """Return how the run searched, without the options that stand there under a shorter name."""
    facts = run.result["shift"]
    doubles = {name for name in facts if name.removeprefix("shift_") in facts.keys() - {name}}
    if "mode" in facts:
        doubles.add("shift")
    return _pairs({name: value for name, value in facts.items() if name not in doubles})


def _retrained_cards(run: Run) -> list[str]:
    if not run.result.get("retrained"):
        return []
    rows = [(pages.arch_chips(row[0]), *row[1:]) for row in _retrained_rows(run)]
    caption = (
        "What the supernet believed on held-out images, beside the test error of the same "
        "architecture trained by itself. The search never saw the test images."
    )
    body = pages.table(_RETRAINED_HEADER, rows)
    return [pages.card("Retrained from scratch", body, caption, is_wide=True)]


def _top_caption(run: Run) -> str:
    versions = {scored["weights_version"] for scored in run.result["top"]}
    words = "FLOPs are multiply-adds an image. Ranked by " + (
        "cross-entropy" if run.metric == "loss" else "held-out error"
    )
    if len(versions) == 1:
        return f"{words}, all scored under the same weights (version {versions.pop():,})."
    return f"{words}, each under the weights of the version given."


def _glyph_words(run: Run) -> str:
    if run.space is None or not run.space.blocks:
        return "not drawn, since the space does not describe its ops"
    return f"the face grows with height {TIMES} width, the depth with the channels"


def _data_name(run: Run) -> str:
    data = run.result["data"]
    return str(data.get("spec") or data.get("name") or "unnamed data")


def _size_words(size: int) -> str:
    if size < 10**9:
        return f"{size:,}"
    exponent = len(str(size)) - 1
    return f"{size / 10**exponent:.1f} {TIMES} 10{str(exponent).translate(_SUPERSCRIPTS)}"


def _rate_words(result: dict[str, Any]) -> str:
    rate = result.get("archs_per_second")
    return f"{rate:.3g} architectures a second" if rate else ""


def _pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _value_words(value)) for name, value in facts.items()]


def _value_words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value_words, value))
    return str(value)
