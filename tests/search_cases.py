"""Searches that take a moment: their data, their options, and what is compared of two."""

from __future__ import annotations

import json

from fastshift.search import search
from fastshift.testing import micro_supernet, synthetic_data

MODES = ("accumulate", "immediate", "every:2", "uniform", "none")
SMALL = {
    "generations": 1,
    "population": 4,
    "parents": 2,
    "mutation": 2,
    "crossover": 1,
    "mutation_prob": 0.5,
    "shift_steps": 2,
    "shift_batch_size": 6,
    "shift_lr": 0.02,
    "top_k": 3,
    "subtrie_size": 3,
}


def small_data(**options):
    """A small classification task, of few batches."""
    return synthetic_data(**{"validation": (8,), "calibration": (6, 5)} | options)


def run_small(shift, out=None, *, net=None, data=None, start=search, **options):
    """Search with small numbers; gives the supernet, its data and the result."""
    net = micro_supernet() if net is None else net
    data = small_data() if data is None else data
    return net, data, start(net, data, shift=shift, out=out, seed=3, **{**SMALL, **options})


def lines_of(out):
    """The lines of scores.jsonl without their timings."""
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("seconds") >= 0
    return rows


def values_of(result):
    """A result as JSON values without its timings."""
    found = json.loads(json.dumps(result.to_dict()))
    for name in ("seconds", "archs_per_second"):
        assert found.pop(name) >= 0
    for record in found["generations"]:
        assert record.pop("seconds") >= 0
    return found
