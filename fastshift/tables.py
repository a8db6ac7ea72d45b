"""Tables of architectures in and out: scores as CSV, true accuracies as CSV or JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastshift.errors import ArchError, DataError

__all__ = ["ScoreTable", "Truth", "read_scores", "write_scores"]


@dataclass(frozen=True)
class Truth:
    """True accuracies of architectures, each trained alone one or more times.

    Attributes:
        archs: the architectures' strings.
        accuracy: percent, `[n, runs]` float64.
        flops: multiply-adds, `[n]` int64, or None where the file has none.
    """

    archs: tuple[str, ...]
    accuracy: np.ndarray
    flops: np.ndarray | None = None

    @classmethod
    def load(cls, path: str | Path) -> Truth:
        """Read a truth file.

        Args:
            path: `.json` as NAS-Bench-Macro has it, `{arch: {"test_acc": [...], "flops": ...}}` (or
                `mean_acc` alone); otherwise CSV with the column `arch`, perhaps `flops` and
                `params`, and one accuracy column for each run.

        Raises:
            DataError: the file is missing, malformed, or holds accuracies that are not finite.
        """
        path = Path(path)
        try:
            if path.suffix == ".json":
                table = json.loads(path.read_bytes(), object_pairs_hook=_distinct)
                runs = [row.get("test_acc") or [row["mean_acc"]] for row in table.values()]
                archs, costs = tuple(table), [row.get("flops") for row in table.values()]
            else:
                columns = _read_columns(path)
                archs, costs = tuple(columns.pop("arch")), columns.pop("flops", [None])
                columns.pop("params", None)
                runs = list(zip(*columns.values(), strict=True))
            accuracy = np.array(runs, dtype=np.float64)
            flops = None if None in costs else np.array(costs, dtype=np.int64)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
            raise DataError(f"truth {str(path)!r} cannot be used: {error}") from error
        if accuracy.ndim != 2 or accuracy.size == 0 or not np.isfinite(accuracy).all():
            raise DataError(
                f"truth {str(path)!r} has accuracies of shape {accuracy.shape}, expected one or "
                "more finite numbers for each architecture"
            )
        return cls(archs=archs, accuracy=accuracy, flops=flops)

    def rows(self, archs: Sequence[str]) -> np.ndarray:
        """Find architectures: indices, `[n]`; `ArchError` names one without a true accuracy."""
        places = {arch: row for row, arch in enumerate(self.archs)}
        for arch in archs:
            if arch not in places:
                raise ArchError(f"arch {arch!r} has no true accuracy; {len(places)} others have")
        return np.array([places[arch] for arch in archs], dtype=np.int64)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of architectures, as `fastshift evaluate` writes them; None is a column not known.

    Attributes:
        archs: the architectures' strings, distinct.
        error: top-1 error in [0, 1], `[n]` float64; NaN failed.
        loss: mean cross-entropy, `[n]` float64.
        flops: multiply-adds, `[n]` int64.
        params: `[n]` int64.
        weights_version: optimiser steps the weights had seen when they were scored, `[n]` int64.
    """

    archs: tuple[str, ...]
    error: np.ndarray
    loss: np.ndarray | None = None
    flops: np.ndarray | None = None
    params: np.ndarray | None = None
    weights_version: np.ndarray | None = None


_COLUMNS = {
    "error": np.float64,
    "loss": np.float64,
    "flops": np.int64,
    "params": np.int64,
    "weights_version": np.int64,
}


def read_scores(path: str | Path) -> ScoreTable:
    """Read a CSV of scores; `arch` and `error` are needed, unknown columns are an error.

    Raises:
        DataError: the file is missing or malformed, or an architecture stands in it twice.
    """
    try:
        text = _read_columns(Path(path))
        archs = tuple(text.pop("arch"))
        if not {"error"} <= text.keys() <= _COLUMNS.keys():
            raise ValueError(f"columns {[*text]} beside arch, expected error and of {[*_COLUMNS]}")
        columns = {name: np.array(text[name]).astype(_COLUMNS[name]) for name in text}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(f"scores {str(path)!r} cannot be used: {error}") from error
    return ScoreTable(archs=archs, **columns)


def write_scores(file: TextIO, table: ScoreTable) -> None:
    """Write scores as CSV with a header; floats come back exactly from `read_scores`."""
    columns = {name: getattr(table, name) for name in _COLUMNS}
    known = {name: values.tolist() for name, values in columns.items() if values is not None}
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["arch", *known])
    writer.writerows(zip(table.archs, *known.values(), strict=True))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict, refusing a key that stands in it twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} stands in it twice, expected once")
        result[key] = value
    return result


def _read_columns(path: Path) -> dict[str, list[str]]:
    """A CSV file's columns by name, with a distinct `arch` in every row."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file, strict=True))
    header, rows = (lines[0], lines[1:]) if lines else ([], [])
    if "arch" not in header or len(set(header)) != len(header):
        raise ValueError(f"header {header}, expected distinct names with 'arch' among them")
    if not rows:
        raise ValueError("no rows after the header, expected at least one")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{len(row)} fields in line {number}, expected {len(header)}")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    _distinct([(arch, None) for arch in columns["arch"]])
    return columns
