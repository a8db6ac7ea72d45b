"""A run's facts and charts -> one HTML page: style, tables, the op frequencies, the drawn network.

The page needs nothing from elsewhere: no script, no font, no link. It follows the reader's light or
dark setting and fits a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from fastshift._report_run import TIMES, Layer, Run, choices_of, short_count

__all__ = ["arch_chips", "card", "frequency_panels", "network", "page", "table"]

_STYLE = """
:root { color-scheme: light dark;
  --page: #f4f5f7; --surface: #ffffff; --ink: #1b1f27; --muted: #5b6472; --line: #dfe3e9;
  --accent: #2563c9; --warm: #c4480c;
  --g0: #c3d3ea; --g1: #9dbbe3; --g2: #759fd8; --g3: #4d82c9; --g4: #2a62ab; --g5: #0f3f82;
  --c0: #7b8697; --c1: #2f7fd1; --c2: #d9731f; --c3: #23946a; --c4: #a54fc0; --c5: #cc4257;
  --c6: #a98a0c; --c7: #128a9c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1217; --surface: #181c23; --ink: #e6e9ef; --muted: #9aa4b3; --line: #2c333e;
  --accent: #78a9f5; --warm: #ff9d5c;
  --g0: #435a7d; --g1: #4a6a99; --g2: #4f7cb8; --g3: #6a9bdb; --g4: #93bdf2; --g5: #cbe1ff;
  --c0: #98a3b5; --c1: #63a8f0; --c2: #f39a4f; --c3: #4cc497; --c4: #cf86e8; --c5: #f27b8c;
  --c6: #d9bb45; --c7: #4cc3d4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
header p { color: var(--muted); margin: 0; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 2px 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 10px; }
code, pre, .arch { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px; }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.card:has(.net) { align-self: start; }
.stack { display: grid; gap: 18px; min-width: 0; align-content: start; }
@media (max-width: 820px) { .grid { grid-template-columns: minmax(0, 1fr); }
  main { padding: 16px 10px 32px; } .card { padding: 14px 12px; } }
.caption { color: var(--muted); font-size: .87rem; margin: 10px 0 0; }
.card > svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.notice { border-left: 4px solid var(--warm); padding: 8px 14px; background: var(--surface);
  margin: 0 0 16px; border-radius: 0 8px 8px 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr));
  gap: 12px 20px; margin: 16px 0 22px; }
.figures div { border-top: 2px solid var(--line); padding-top: 6px; }
.figures dt { color: var(--muted); font-size: .82rem; }
.figures dd { margin: 0; font-size: 1.32rem; font-weight: 600; line-height: 1.3; }
.figures small { display: block; color: var(--muted); font-size: .82rem; font-weight: 400; }
.arch { white-space: nowrap; display: inline-flex; gap: 2px; vertical-align: middle; }
.arch i { font-style: normal; min-width: 1.45em; text-align: center; border-radius: 3px;
  padding: 0 .15em; background: color-mix(in srgb, var(--c) 24%, transparent);
  box-shadow: inset 0 -2px var(--c); }
h1 + .arch { font-size: 1.15rem; flex-wrap: wrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 500; vertical-align: bottom; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
td.words { white-space: nowrap; }
.pairs td { white-space: normal; overflow-wrap: anywhere; }
.pairs td:first-child { color: var(--muted); padding-right: 18px; white-space: nowrap;
  vertical-align: top; }
.panels { display: grid; gap: 14px 16px; margin-top: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 200px), 1fr)); }
.panels figure { margin: 0; }
.panels figcaption { font-size: .82rem; color: var(--muted); margin-bottom: 3px; }
.panels svg { display: block; width: 100%; height: auto; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .87rem; margin: 0; padding: 0;
  list-style: none; }
.ramp { display: inline-block; width: 90px; height: .8em; vertical-align: -.08em; margin: 0 6px;
  border: 1px solid var(--line); background: linear-gradient(90deg, transparent, var(--accent)); }
.net { list-style: none; margin: 0; padding: 0; }
.net li { display: grid; grid-template-columns: 58px minmax(0, 1fr) 84px; gap: 0 12px;
  align-items: center; position: relative; padding: 5px 0; }
.net li + li::before { content: ""; position: absolute; left: 92px; top: -5px; height: 10px;
  border-left: 2px solid var(--muted); }
.net .op { border: 1px solid var(--line); border-left: 5px solid var(--c); border-radius: 6px;
  padding: 5px 10px; background: color-mix(in srgb, var(--c) 9%, var(--surface)); }
.net .skip .op { border-style: dashed; border-left: 5px dashed var(--c); background: none; }
.net b { font-weight: 600; overflow-wrap: anywhere; }
.net .op > span, .net .share span { display: block; color: var(--muted); font-size: .79rem;
  line-height: 1.35; }
.net .place { color: var(--muted); font-weight: 400; font-size: .82rem; margin-right: 6px; }
.net svg { display: block; width: 58px; height: 50px; }
.net .share { font-size: .82rem; font-variant-numeric: tabular-nums; }
.bar { height: 7px; border-radius: 4px; background: var(--line); overflow: hidden;
  margin: 2px 0 3px; }
.bar i { display: block; height: 100%; background: var(--accent); }
details summary { cursor: pointer; font-weight: 600; }
pre { font-size: .8rem; overflow-x: auto; margin: 12px 0 0; }
@media (max-width: 520px) {
  .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .scroll .arch { font-size: .74rem; gap: 1px; }
  .scroll .arch i { min-width: 1.2em; padding: 0; }
  .net li { grid-template-columns: 46px minmax(0, 1fr); }
  .net li + li::before { left: 74px; }
  .net svg { width: 46px; height: 40px; }
  .net .share { grid-column: 2; display: flex; align-items: center; gap: 8px; }
  .net .bar { flex: 1; } }
footer { color: var(--muted); font-size: .82rem; margin-top: 22px; }
"""


def page(title: str, head: str, cards: Sequence[str], footer: str) -> str:
    """Return the whole document.

    Args:
        title: of the window, plain text.
        head: HTML above the cards.
        cards: HTML of the cards, in order.
        footer: plain text below.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header>{head}</header>\n<div class="grid">\n'
        + "\n".join(cards)
        + f"\n</div>\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def card(title: str, body: str, caption: str = "", *, is_wide: bool = False) -> str:
    """Return a titled card; `body` is HTML, title and caption are plain text."""
    words = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    kind = "card wide" if is_wide else "card"
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{body}{words}</section>'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table: numbers to the right, text as text, and strings that `arch_chips` made as is.

    Args:
        header: one text a column; none at all makes a list of pairs.
        rows: plain texts or `Html`.
    """

    def cell(value: Any) -> str:
        if isinstance(value, Html):
            return f"<td>{value}</td>"
        text = str(value)
        is_number = bool(header) and text[:1].isdigit()
        return f'<td class="{"number" if is_number else "words"}">{escape(text)}</td>'

    heads = "".join(
        f"<th{' class=number' if _is_number_column(rows, column) else ''}>{escape(name)}</th>"
        for column, name in enumerate(header)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    kind = "" if header else ' class="pairs"'
    head = f"<thead><tr>{heads}</tr></thead>" if header else ""
    return f'<div class="scroll"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


class Html(str):
    """Text that is markup already."""


def arch_chips(arch: str) -> Html:
    """Return an architecture's string with a colour for each choice."""
    chips = "".join(
        f'<i style="--c:var(--c{choice % 8})">{choice}</i>' for choice in choices_of(arch)
    )
    return Html(f'<span class="arch" title="{escape(arch)}">{chips}</span>')


def frequency_panels(run: Run) -> str:
    """Draw how often each choice stands in each generation: one panel a choice block.

    Rows are choices, columns generations, and the stronger the colour the more candidates of that
    generation have the choice. The chosen architecture's row is marked.
    """
    generations = run.result["generations"]
    winner = choices_of(run.result["best"]["arch"])
    names = run.op_names()
    panels = []
    for block, choice in enumerate(winner):
        history = [entry["op_frequency"][block] for entry in generations]  # [G, O]
        last = 100 * history[-1][choice]
        words = f"block {block + 1}: {100 * history[0][choice]:.0f} % to {last:.0f} %"
        panels.append(
            f"<figure><figcaption>{words}</figcaption>"
            f"{_panel(history, choice, names[block], words)}</figure>"
        )
    return f'{_choice_key(names)}<div class="panels">{"".join(panels)}</div>'


def _panel(history: list[list[float]], winner: int, names: Sequence[str], words: str) -> str:
    left, width, row = 16, 220, 17
    step = (width - left - 9) / len(history)
    height = row * len(names) + 2
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">']
    for choice, name in enumerate(names):
        y = choice * row + 1
        weight = ' font-weight="700"' if choice == winner else ""
        parts.append(
            f"<g><title>{choice}: {escape(name)}</title>"
            f'<text y="{y + 12.5}" font-size="13" fill="var(--ink)"{weight}>{choice}</text>'
            f'<rect x="{left}" y="{y}" width="{step * len(history):.1f}" height="{row - 1.5}" '
            f'fill="var(--line)" fill-opacity=".45"/>'
        )
        parts.extend(
            f'<rect x="{left + step * index:.1f}" y="{y}" width="{max(step - 0.6, 0.4):.1f}" '
            f'height="{row - 1.5}" fill="var(--accent)" fill-opacity="{frequencies[choice]:.2f}"/>'
            for index, frequencies in enumerate(history)
            if frequencies[choice] >= 0.005
        )
        if choice == winner:
            parts.append(
                f'<path d="M {width - 1} {y + 1} v {row - 3.5} l -6 {-(row - 3.5) / 2} z" '
                f'fill="var(--warm)"/>'
            )
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def _choice_key(names: list[list[str]]) -> str:
    """List what each choice is; blocks may name it differently."""
    found: dict[int, list[str]] = {}
    for block in names:
        for choice, name in enumerate(block):
            known = found.setdefault(choice, [])
            if name not in known:
                known.append(name)
    items = "".join(
        f"<li><b>{choice}</b> {escape(' or '.join(known).replace('_', ' '))}</li>"
        for choice, known in sorted(found.items())
    )
    ramp = '<li>candidates: 0 %<span class="ramp"></span>100 %</li>'
    return f'<ul class="key">{items}{ramp}</ul>'


def network(layers: Sequence[Layer], num_pixels: int | None) -> str:
    """Draw a network from stem to head: map sizes to scale, ops, share of the multiply-adds.

    Args:
        layers: in order.
        num_pixels: height and width of the input image, to which the maps are drawn.
    """
    total = sum(layer.flops or 0 for layer in layers)
    widest = max((layer.channels or 0 for layer in layers[:-1]), default=0)
    rows = []
    for layer in layers:
        colour = "--muted" if layer.choice is None else f"--c{layer.choice % 8}"
        glyph, facts, share = "<span></span>", [], "<span></span>"
        if layer.channels is not None and layer.size is not None:
            glyph = _map_glyph(layer.channels, layer.size, widest, num_pixels or layer.size)
            facts.append(f"{layer.channels} channels, {layer.size} {TIMES} {layer.size}")
        if layer.flops is not None and total:
            percent = 100 * layer.flops / total
            share = (
                f'<div class="share">{percent:.1f} %'
                f'<div class="bar"><i style="width:{percent:.1f}%"></i></div>'
                f"<span>{short_count(layer.flops)}</span></div>"
            )
        if layer.params is not None:
            facts.append(f"{short_count(layer.params)} parameters")
        place = "" if layer.choice is None else f'<span class="place">{layer.place}</span>'
        texts = (layer.units, " · ".join(facts))
        lines = "".join(f"<span>{escape(text)}</span>" for text in texts if text)
        kind = ' class="skip"' if layer.is_identity else ""
        name = escape(layer.name.replace("_", " "))
        rows.append(
            f'<li{kind} style="--c:var({colour})">{glyph}'
            f'<div class="op"><b>{place}{name}</b>{lines}</div>{share}</li>'
        )
    return f'<ol class="net">{"".join(rows)}</ol>'


def _map_glyph(channels: int, size: int, widest: int, num_pixels: int) -> str:
    """Draw a feature map as a slab: its face by the square root of the side, depth by channels."""
    face = 6 + 26 * math.sqrt(size / num_pixels)
    depth = 3 + 19 * math.sqrt(min(1.0, channels / max(widest, 1)))
    dx, dy = depth * 0.86, depth * 0.5
    x, y = (58 - face - dx) / 2, (50 - face - dy) / 2 + dy
    front = f"M{x:.1f} {y:.1f}h{face:.1f}v{face:.1f}h{-face:.1f}z"
    top = f"M{x:.1f} {y:.1f}l{dx:.1f} {-dy:.1f}h{face:.1f}l{-dx:.1f} {dy:.1f}z"
    side = f"M{x + face:.1f} {y:.1f}l{dx:.1f} {-dy:.1f}v{face:.1f}l{-dx:.1f} {dy:.1f}z"
    faces = "".join(
        f'<path d="{path}" fill="var(--c)" fill-opacity="{opacity}" stroke="var(--c)"/>'
        for path, opacity in ((front, 0.34), (top, 0.16), (side, 0.5))
    )
    words = f"{channels} channels, {size} by {size}"
    return f'<svg viewBox="0 0 58 50" role="img" aria-label="{words}">{faces}</svg>'


def _is_number_column(rows: Sequence[Sequence[Any]], column: int) -> bool:
    cells = [row[column] for row in rows if not isinstance(row[column], Html)]
    return bool(cells) and all(str(value)[:1].isdigit() for value in cells)
