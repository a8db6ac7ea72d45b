"""Progress shows as much as the place it writes to can take."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from fastshift.progress import Progress, Scalars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


def test_lines_elsewhere_than_on_a_terminal_name_every_figure() -> None:
    stream = io.StringIO()
    with Progress(4, what="search", stream=stream, interval=0.0) as progress:
        progress.advance(2, archs=50, images=100_000, best_error=0.0812, sharing=3.21, loss=1.5)
        progress.advance(2, archs=50, images=100_000, best_error=None, note="ok")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("search 2/4  ")
    assert re.search(r"[\d,.e+]+ arch/s  [\d,.e+]+ img/s", first)
    assert "best error 8.12 %  sharing 3.2x  loss 1.5" in first
    assert second.startswith("search 4/4  ")
    assert "best" not in second
    assert second.endswith("note ok")


def test_lines_come_at_most_once_an_interval_and_the_last_figures_always() -> None:
    stream = io.StringIO()
    with Progress(1000, what="pretrain", stream=stream, interval=60.0) as progress:
        for step in range(1000):
            progress.advance(1, loss=float(step))
    assert stream.getvalue() == "pretrain 1000/1000  loss 999\n"


def test_rates_are_amounts_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fastshift.progress.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    with Progress(None, what="score", stream=stream, interval=1.0) as progress:
        for _ in range(3):
            now[0] += 2.0
            progress.advance(1, archs=5, images=3000)
    assert stream.getvalue().splitlines() == [
        f"score {done}  2.5 arch/s  1,500 img/s" for done in (1, 2, 3)
    ]


def test_nothing_is_shown_when_quiet(terminal: Terminal) -> None:
    for stream in (io.StringIO(), terminal):
        with Progress(1, what="search", quiet=True, stream=stream, interval=0.0) as progress:
            progress.advance(1, loss=1.0)
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_figures(terminal: Terminal) -> None:
    pytest.importorskip("rich")
    with Progress(10, what="pretrain", stream=terminal) as progress:
        progress.advance(10, loss=0.25, best_error=0.5)
    shown = terminal.getvalue()
    assert "pretrain" in shown
    assert "━" in shown
    assert "10/10" in shown
    assert "loss 0.25  best error 50.00 %" in shown


def test_a_terminal_without_rich_gets_the_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with Progress(2, what="search", stream=terminal) as progress:
        progress.advance(2, sharing=2.0)
    assert terminal.getvalue() == "search 2/2  sharing 2.0x\n"


def test_an_error_in_the_stage_passes_through_and_the_bar_ends(terminal: Terminal) -> None:
    progress = Progress(2, what="search", stream=terminal)

    def fail() -> None:
        with progress:
            progress.advance(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert progress.done == 1


def test_scalars_can_be_read_back_by_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Scalars(tmp_path) as scalars:
        assert list(tmp_path.iterdir()) == []
        scalars.write(1, {"search/best_error": 0.5, "search/sharing": 2.0})
        scalars.write(2, {"search/best_error": 0.25, "search/sharing": 4.0})
        assert scalars.is_active
    (events,) = tmp_path.iterdir()
    assert events.name.startswith("events.")
    found = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(item.step, item.value) for item in found.Scalars("search/best_error")] == [
        (1, 0.5),
        (2, 0.25),
    ]


def test_scalars_without_tensorboard_or_directory_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for directory in (tmp_path, None):
        with Scalars(directory) as scalars:
            scalars.write(1, {"loss": 1.0})
            assert not scalars.is_active
    assert list(tmp_path.iterdir()) == []


def test_a_line_says_what_is_left_of_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastshift.progress.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    with Progress(100, what="search", done=40, stream=stream, interval=1.0) as progress:
        for seconds, done in ((2.0, 1), (10.0, 4), (10.0, 5), (300.0, 20), (1.0, 29)):
            now[0] += seconds
            progress.advance(done)
    assert stream.getvalue().splitlines() == [
        "search 41/100",
        "search 45/100  about 2 min left of search",
        "search 50/100  about 110 s left of search",
        "search 70/100  about 5 min left of search",
        "search 99/100",
    ]


def test_a_rate_of_nothing_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastshift.progress.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    with Progress(None, what="search", stream=stream, interval=1.0) as progress:
        now[0] += 2.0
        progress.advance(1, archs=4)
        for step in range(30):
            now[0] += 2.0
            progress.advance(0, shift=f"{step}/30")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "search 1  2 arch/s"
    assert lines[-1] == "search 1  shift 29/30"
