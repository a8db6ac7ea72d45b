"""Figures of a running stage -> a bar on a terminal, lines elsewhere, TensorBoard scalars."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

__all__ = ["Progress", "Scalars"]

# Amounts done since the last call; shown as rates. Every other figure shows its latest value.
_COUNTED = {"archs": "arch/s", "images": "img/s"}
_LABELS = {"archs_per_second": "arch/s", "images_per_second": "img/s"}
_WINDOW_SECONDS = 20.0
_BAR_SECONDS = 0.25


class Progress:
    """Show how far a stage is: a bar on a terminal, a line now and then elsewhere.

    The bar needs rich (the extra `cli`); a terminal without it gets the lines. Calls of `advance`
    between two redraws only add numbers up, so it may be called in every step.

    Args:
        total: how many units of work there are; None where that is not known.
        what: the stage's name, such as `pretrain` or `generation 3`.
        quiet: show nothing at all.
        done: units done before, by the part of a run that this one goes on with.
        interval: least seconds between two lines.
        stream: where to write; standard error by default.

    Example:
        >>> with Progress(2, what="search", stream=sys.stdout, interval=0.0) as progress:
        ...     progress.advance(1, best_error=0.125, sharing=3.5)
        ...     progress.advance(1, best_error=0.1, sharing=3.25)
        search 1/2  best error 12.50 %  sharing 3.5x
        search 2/2  best error 10.00 %  sharing 3.2x
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        quiet: bool = False,
        *,
        done: int = 0,
        interval: float = 5.0,
        stream: TextIO | None = None,
    ) -> None:
        self.total = total
        self.what = what
        self.quiet = quiet
        self.done = done
        self._done_before = done
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._figures: dict[str, Any] = {}
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._marks: deque[tuple[float, dict[str, int]]] = deque()
        self._bar: Any = None
        self._begun = self._shown = time.perf_counter()
        self._is_stale = False

    def __enter__(self) -> Progress:
        self._begun = self._shown = time.perf_counter()
        self._marks.append((self._begun, dict(self._counts)))
        if not self.quiet and _is_terminal(self._stream):
            self._bar = _start_bar(self.what, self.total, self.done, self._stream)
            if self._bar is not None:
                self._interval = _BAR_SECONDS
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_stale:
            self._show(time.perf_counter())
        if self._bar is not None:
            self._bar.stop()

    def advance(self, n: int = 1, **figures: Any) -> None:
        """Count work as done and take the stage's latest figures.

        Args:
            n: units done since the last call.
            **figures: `archs` and `images` are amounts done since the last call and shown as rates
                over the last 20 seconds; names with `error` are fractions and shown in percent;
                `sharing` is a factor; None hides a figure; the rest is shown as it is.
        """
        self.done += n
        for name, value in figures.items():
            if name in self._counts:
                self._counts[name] += value
            self._figures[name] = value
        self._is_stale = True
        now = time.perf_counter()
        if not self.quiet and now - self._shown >= self._interval:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        self._is_stale = False
        if self.quiet:
            return
        text = "  ".join(self._texts(now))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, figures=text)
            return
        count = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        line = f"{self.what} {count}  {text}".rstrip() + self._left(now)
        print(line, file=self._stream, flush=True)

    def _left(self, now: float) -> str:
        """What is left of this stage at the pace so far, once that says anything."""
        own = self.done - self._done_before
        if self.total is None or own <= 0 or now - self._begun < 5.0:
            return ""
        seconds = (self.total - self.done) * (now - self._begun) / own
        if seconds < 10.0:
            return ""
        minutes = seconds / 60
        if minutes < 2:
            amount = f"{seconds:.0f} s"
        else:
            amount = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
        return f"  about {amount} left of {self.what}"

    def _texts(self, now: float) -> list[str]:
        start, counts = self._marks[0] if self._marks else (self._begun, dict(self._counts))
        self._marks.append((now, dict(self._counts)))
        while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW_SECONDS:
            self._marks.popleft()
        texts = []
        for name, value in self._figures.items():
            if value is None:
                continue
            if name in self._counts:
                rate = (self._counts[name] - counts[name]) / max(now - start, 1e-9)
                if rate > 0:  # else the stage does something else for now
                    texts.append(f"{_short(rate)} {_COUNTED[name]}")
            else:
                texts.append(_text(name, value))
        return texts


class Scalars:
    """Write scalars for TensorBoard into a run directory, where TensorBoard is installed.

    Without the extra `tensorboard`, or without a directory, nothing is written and `is_active` is
    false. The events file is made by the first `write`.

    Args:
        run_dir: the run directory, or None.
    """

    def __init__(self, run_dir: str | os.PathLike[str] | None) -> None:
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._writer: Any = None
        self.is_active = self._run_dir is not None

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of one step.

        Args:
            step: the horizontal axis.
            values: tag -> value, such as `{"search/best_error": 0.12}`.
        """
        if self.is_active and self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.is_active = False
            else:
                self._writer = SummaryWriter(str(self._run_dir), flush_secs=10)
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flush and close the events file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _start_bar(what: str, total: int | None, done: int, stream: TextIO) -> Any:
    """Return a started rich progress with one task, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column
    except ImportError:
        return None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
        console=Console(file=stream),
        refresh_per_second=4,
    )
    bar.add_task(what, total=total, completed=done, figures="")
    bar.start()
    return bar


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text(name: str, value: Any) -> str:
    label = _LABELS.get(name, name.replace("_", " "))
    if isinstance(value, str):
        return f"{label} {value}"
    if "error" in name:
        return f"{label} {100 * value:.2f} %"
    if name == "sharing":
        return f"{label} {value:.1f}x"
    if name in _LABELS:
        return f"{_short(value)} {label}"
    return f"{label} {value:.4g}" if isinstance(value, float) else f"{label} {value}"
