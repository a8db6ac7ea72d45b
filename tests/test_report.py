"""A run directory becomes one page that needs nothing else, and tables on the terminal."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastshift import spaces
from fastshift._report_figures import (
    MAX_POINTS,
    effective_choices,
    pareto_front,
    score_against_flops,
    search_curve,
)
from fastshift._report_run import load, short_count, short_time
from fastshift.errors import ConfigError, MissingExtraError
from fastshift.report import summary, write_report
from fastshift.space import ModuleSpace

SPACE = spaces.digits()


def make_run(
    directory: Path,
    *,
    space: Any = SPACE,
    num_generations: int = 3,
    population: int = 6,
    moves: bool = True,
    flops: str | None = "80%",
    **changes: Any,
) -> Path:
    """Write a run of made-up scores; `changes` replace entries of `result.json`."""
    rng = np.random.default_rng(0)
    lines, generations = [], []
    for number in range(num_generations):
        archs = rng.integers(0, space.num_choices, (population, space.num_blocks)).astype(np.uint8)
        version = 100 + 20 * number * moves
        frequency = [
            (np.bincount(archs[:, block], minlength=count) / population).tolist()
            for block, count in enumerate(space.num_choices.tolist())
        ]
        errors = rng.uniform(0.1, 0.5, population).tolist()
        lines += [
            {
                "arch": arch,
                "error": error,
                "loss": 3 * error,
                "generation": number,
                "weights_version": version,
                "flops": int(space.flops([arch])[0]),
                "params": int(space.params([arch])[0]),
                "seconds": 0.5,
            }
            for arch, error in zip(space.format_all(archs), errors, strict=True)
        ]
        generations.append(
            {
                "generation": number,
                "scored": population,
                "best_error": min(errors),
                "best_loss": 3 * min(errors),
                "median_error": float(np.median(errors)),
                "weights_version": version,
                "op_frequency": frequency,
                "sharing": 1.5 + number,
                "seconds": 2.0,
            }
        )
    top = sorted(lines, key=lambda line: line["error"])[:4]
    names = ("arch", "error", "loss", "flops", "params", "weights_version", "generation")
    top = [{name: line[name] for name in names} for line in top]
    result = {
        "format": 1,
        "best": top[0],
        "top": top,
        "pareto": top[:2],
        "generations": generations,
        "seconds": 75.5,
        "archs_per_second": 2.5,
        "budget": {"train_images": 9000, "path_image_pairs": 54000, "updates": 60},
        "data": {"spec": "digits", "num_classes": 10, "class_names": ["<b>zero</b>", "one"]},
        "space": {
            "name": space.name,
            "num_blocks": space.num_blocks,
            "size": space.size,
            "recipe": space.recipe,
            "fingerprint": space.fingerprint(),
            "blocks": [list(block) for block in space.labels],
            "image_size": space.image_size,
        },
        "shift": {"mode": "accumulate" if moves else "none", "lr": 1e-4, "score_by": "error"},
        "stopped": None,
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.yaml").write_text(
        yaml.safe_dump({"space": space.name, "flops": flops, "versions": {"torch": "2.x"}})
    )
    return directory


def read_page(directory: Path) -> str:
    return write_report(directory).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Collects what a page is made of, and checks that its elements are closed in order."""

    void = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href", "src"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = make_run(tmp_path_factory.mktemp("report") / "run", retrained=RETRAINED)
    return read_page(directory)


RETRAINED = [
    {"arch": "000000", "kind": "winner", "error_supernet": 0.125, "test_accuracy": 0.9375},
    {"arch": "111111", "kind": "random", "error_supernet": 0.25, "test_accuracy": 0.875},
]


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    outline = Outline(page)
    assert outline.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    assert all(reference.startswith("#") for reference in outline.references)
    assert "http" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_has_every_section(page: str) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Search curve",
        "Pareto front",
        "Score against multiply-adds",
        "Concentration of the population",
        "Op frequencies",
        "Best architectures",
        "Retrained from scratch",
        "The chosen architecture, block by block",
        "Budget of the search",
        "Search",
        "Data",
        "Configuration",
    ]


def test_identifiers_are_unique_and_every_reference_has_its_target(page: str) -> None:
    outline = Outline(page)
    assert len(set(outline.ids)) == len(outline.ids)
    targets = outline.references + re.findall(r"url\(([^)]*)\)", page)
    assert {target[1:] for target in targets} <= set(outline.ids)


def test_charts_take_the_pages_colours_for_light_and_dark(page: str) -> None:
    body = page[page.index("</style>") :]
    assert not re.findall(r"#[0-9a-f]{6}\b", body)
    used = set(re.findall(r"var\(--([\w]+)\)", page)) - {"c"}
    style = page[: page.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark")
    assert used <= set(re.findall(r"--(\w+):", light))
    assert used <= set(re.findall(r"--(\w+):", dark))


def test_charts_are_well_formed_and_have_labelled_axes(page: str) -> None:
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(chart.replace("<svg", '<svg xmlns:xlink="x"', 1))
    for words in (
        "held-out top-1 error (%)",
        "multiply-adds per image (millions)",
        "weights' version (optimiser steps)",
        "sharing factor",
        "generation",
    ):
        assert f">{words}</text>" in page


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    once = read_page(make_run(tmp_path / "a"))
    again = read_page(make_run(tmp_path / "b"))
    assert once == again
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "config.yaml",
        "report.html",
        "result.json",
        "scores.jsonl",
    ]


def test_the_winner_is_drawn_with_shares_that_add_up(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    run = load(directory)
    best = run.result["best"]
    layers = run.layers(best["arch"])
    assert [layer.place for layer in layers] == ["stem", *"123456", "head"]
    assert sum(layer.flops for layer in layers) == best["flops"]
    assert sum(layer.params for layer in layers) == best["params"]
    drawn = re.search(r'<ol class="net">.*?</ol>', read_page(directory), flags=re.DOTALL)[0]
    assert drawn.count("<li") == len(layers)
    shares = [float(share) for share in re.findall(r'class="share">([\d.]+) %', drawn)]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    for layer in layers:
        assert layer.name.replace("_", " ") in drawn


def test_text_from_the_run_cannot_become_markup(page: str) -> None:
    assert "<b>zero" not in page
    assert "&lt;b&gt;zero&lt;/b&gt;" in page


def test_retrained_networks_stand_beside_the_supernets_opinion(page: str) -> None:
    row = re.search(r'title="000000".*?</tr>', page, flags=re.DOTALL)[0]
    assert re.findall(r">([\d.]+ %|winner)<", row) == ["winner", "12.50 %", "6.25 %"]


def test_weights_that_never_moved_are_said_to_be_the_same(tmp_path: Path) -> None:
    svg, caption = search_curve(load(make_run(tmp_path, moves=False)))
    assert "All scores were measured under the same weights (version 100)" in caption
    assert ">best so far</text>" in svg
    assert "weights' version (optimiser steps)" not in svg


def test_a_search_by_loss_is_drawn_in_nats(tmp_path: Path) -> None:
    run = load(make_run(tmp_path, shift={"mode": "every:5", "score_by": "loss"}))
    svg, caption = search_curve(run)
    assert ">held-out cross-entropy (nats)</text>" in svg
    assert caption.startswith("Held-out cross-entropy of each generation's candidates")


@pytest.mark.parametrize("value", [None, math.nan], ids=["null", "NaN"])
def test_scores_that_are_not_finite_are_counted_and_not_drawn(
    tmp_path: Path, value: float | None
) -> None:
    directory = make_run(tmp_path)
    lines = (directory / "scores.jsonl").read_text().splitlines()
    failed = [{**json.loads(line), "error": value, "loss": value} for line in lines[:2]]
    text = "\n".join([*map(json.dumps, failed), *lines[2:]])
    (directory / "scores.jsonl").write_text(text + "\n")
    svg, caption = score_against_flops(load(directory))
    assert "2 scores were not finite and are not drawn" in caption
    assert "nan" not in svg.lower()


def test_a_few_very_bad_scores_do_not_squeeze_the_others(tmp_path: Path) -> None:
    directory = make_run(tmp_path, population=40)
    lines = (directory / "scores.jsonl").read_text().splitlines()
    bad = {**json.loads(lines[0]), "error": 9.0}
    (directory / "scores.jsonl").write_text("\n".join([*lines[1:], json.dumps(bad)]))
    assert "1 worse scores lie above the frame" in pareto_front(load(directory))[1]


def test_many_scores_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    directory = make_run(tmp_path, num_generations=2)
    lines = (directory / "scores.jsonl").read_text().splitlines()
    copies = -(-(MAX_POINTS + 1) // len(lines))
    (directory / "scores.jsonl").write_text("\n".join(lines * copies))
    _, caption = score_against_flops(load(directory))
    assert caption.startswith(f"{MAX_POINTS:,} of {len(lines) * copies:,} scores")


def test_scores_taken_again_are_not_counted_as_candidates(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    lines = (directory / "scores.jsonl").read_text().splitlines()
    # A parent's new score in generation 0, and one under the final weights after the last one.
    again = {**json.loads(lines[0]), "error": 0.001}
    final = {**json.loads(lines[0]), "generation": 3, "error": 0.002, "final": True}
    lines = [*lines[:6], json.dumps(again), *lines[6:], json.dumps(final)]
    before = search_curve(load(directory))
    num_scores = len(load(directory).scores.archs)
    (directory / "scores.jsonl").write_text("\n".join(lines))
    run = load(directory)
    assert run.num_candidates == [6, 6, 6]
    assert search_curve(run) == before
    assert len(run.scores.archs) == num_scores + 1


def test_a_run_started_from_python_has_a_report_too(tmp_path: Path) -> None:
    directory = make_run(tmp_path, num_generations=1)
    (directory / "config.yaml").unlink()
    assert "The run was started from Python" in read_page(directory)


def test_a_run_that_stopped_early_says_why(tmp_path: Path) -> None:
    page = read_page(make_run(tmp_path, num_generations=1, moves=False, stopped="disk is full"))
    assert "Stopped early: disk is full" in page
    assert "no shifting (SPOS)" in page


def test_a_space_of_unknown_recipe_is_drawn_by_names(tmp_path: Path) -> None:
    facts = {
        "name": "mine",
        "size": 10**12,
        "recipe": {"name": "mine.py:make"},
        "blocks": [list(block) for block in SPACE.labels],
    }
    directory = make_run(tmp_path)
    result = json.loads((directory / "result.json").read_text())
    (directory / "result.json").write_text(json.dumps({**result, "space": facts}))
    page = read_page(directory)
    assert load(directory).space is None
    drawn = re.search(r'<ol class="net">.*?</ol>', page, flags=re.DOTALL)[0]
    assert drawn.count("<li") == SPACE.num_blocks
    assert "1.0 \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}" in page


def test_a_recipe_that_now_makes_another_space_is_not_believed(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    result = json.loads((directory / "result.json").read_text())
    result["space"]["fingerprint"] = "of an older version"
    (directory / "result.json").write_text(json.dumps(result))
    assert load(directory).space is None


def test_a_space_of_modules_is_drawn_from_its_tables(tmp_path: Path) -> None:
    space = ModuleSpace(
        "modules",
        num_choices=[12, 2],
        flops_table=[list(range(100, 112)), [5, 7]],
        params_table=[list(range(12)), [1, 2]],
        fixed_flops=10,
        fixed_params=3,
        identities=[[False] * 12, [False, False]],
    )
    directory = make_run(tmp_path, space=space, flops=None)
    result = json.loads((directory / "result.json").read_text())
    result["space"]["description"] = space.to_dict()
    (directory / "result.json").write_text(json.dumps(result))
    run = load(directory)
    arch = run.result["best"]["arch"]
    assert "." in arch
    layers = run.layers(arch)
    assert [layer.choice for layer in layers] == [int(choice) for choice in arch.split(".")]
    assert sum(layer.flops for layer in layers) + 10 == run.result["best"]["flops"]
    assert "modules on digits" in read_page(directory)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "result.json",
            None,
            r"result\.json cannot be read .*expected the directory of a finished",
        ),
        ("result.json", "{", r"result\.json is not JSON"),
        ("result.json", "[]", r"format is \[\]; expected 1"),
        ("result.json", '{"format": 2}', "format is 2; expected 1"),
        ("result.json", '{"format": 1}', r"has no 'best'"),
        ("scores.jsonl", '{"arch": "0"}\n', r"scores\.jsonl, line 1 is not a score"),
        ("scores.jsonl", "not json", r"scores\.jsonl, line 1 is not a score"),
        ("config.yaml", "a: [", r"config\.yaml is not YAML"),
        ("scores.jsonl", None, r"scores\.jsonl cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    directory = make_run(tmp_path)
    if text is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        write_report(directory)
    assert not (directory / "report.html").exists()


def test_a_run_without_a_best_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no best architecture"):
        write_report(make_run(tmp_path, best=None))


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*\.\[report\]"):
        write_report(directory)
    with pytest.raises(MissingExtraError, match=r"'rich'.*\.\[cli\]"):
        summary(directory)
    summary(directory, plain=True, stream=io.StringIO())


@pytest.mark.parametrize("plain", [False, True])
def test_the_summary_prints_every_table(
    tmp_path: Path, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    directory = make_run(tmp_path, retrained=RETRAINED, stopped="interrupted")
    stream = io.StringIO()
    summary(directory, plain=plain, stream=stream)
    text = stream.getvalue()
    best = load(directory).result["best"]
    for words in (
        "Best architectures",
        best["arch"],
        f"{100 * best['error']:.2f} %",
        "Retrained from scratch",
        "winner",
        "6.25 %",
        "Budget of the search",
        "75.5 s",
        "54,000",
        "stopped early: interrupted",
    ):
        assert words in text, words


def test_effective_choices_count_the_ops_in_use() -> None:
    assert effective_choices([0.25] * 4) == pytest.approx(4)
    assert effective_choices([0.5, 0.5, 0, 0]) == pytest.approx(2)
    assert effective_choices([0, 1, 0]) == pytest.approx(1)


def test_counts_and_times_are_short_and_keep_four_digits() -> None:
    counts = (0, 999, 1000, 54_500_000, 358_826_000, 2.5e9)
    assert [short_count(count) for count in counts] == [
        "0",
        "999",
        "1.000k",
        "54.50M",
        "358.8M",
        "2.500G",
    ]
    assert [short_time(seconds) for seconds in (1.24, 99.9, 100, 3599, 3661)] == [
        "1.2 s",
        "99.9 s",
        "1 min 40 s",
        "59 min 59 s",
        "1 h 01 min",
    ]
