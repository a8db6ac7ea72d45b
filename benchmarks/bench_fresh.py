"""Fresh processes: the first score after `import fastshift`, and the memory of a step.

Memory is compared at sub-tries of one path, where the shared step holds what one path needs and a
row of each level above: the peak of its resident set beside that of the sequential baseline, the
thriftier layout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from baselines import LAYOUTS, PRECISIONS
from recording import note

CASES = [("nasbench_macro", 32, 128), ("shufflenet_v2", 64, 128), ("shufflenet_v2", 224, 32)]
FIRST = [("nasbench_macro", 32, 64), ("shufflenet_v2", 64, 64), ("shufflenet_v2", 224, 8)]
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


def fresh(*arguments):
    """What `fresh.py` prints."""
    command = [sys.executable, Path(__file__).with_name("fresh.py"), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@each_precision
@pytest.mark.parametrize("case", FIRST, ids=lambda c: f"{c[0]}-{c[1]}")
def test_first_evaluation(benchmark, case, precision):
    name, size, images = case
    if not benchmark.enabled and (precision, size) != ("fp32", 32):
        pytest.skip("one process is enough where nothing is timed")
    found = []
    call = ("first", name, size, precision, images if benchmark.enabled else 4)
    rounds = 3 if benchmark.enabled else 1
    benchmark.pedantic(lambda: found.append(fresh(*call)), rounds=rounds)
    note(
        benchmark,
        "first evaluation",
        space=name,
        size=size,
        images=images,
        precision=precision,
        **{key: round(median(row[key] for row in found), 4) for key in found[0]},
        extremes=[round(pick(row["seconds"] for row in found), 4) for pick in (min, max)],
    )


@each_precision
@pytest.mark.parametrize("what", ["train", "score"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_memory(benchmark, case, what, precision):
    name, size, images = case
    if not benchmark.enabled:
        if (name, what, precision) != ("nasbench_macro", "train", "fp32"):
            pytest.skip("one step is enough where nothing is timed")
        images = 32
    call = ("memory", name, size, precision, images, what)
    found = []
    rounds = 3 if benchmark.enabled else 1
    benchmark.pedantic(lambda: found.append(fresh(*call, "shared")), rounds=rounds)
    plain = {kind: fresh(*call, kind) for kind in LAYOUTS}
    assert not any(row["hidden"] for row in (*found, *plain.values()))
    best = min(plain, key=lambda kind: plain[kind]["bytes"])
    sizes = sorted(row["bytes"] / 2**20 for row in found)
    note(
        benchmark,
        "memory",
        what=what,
        space=name,
        size=size,
        images=images,
        precision=precision,
        mebibytes=round(median(sizes), 1),
        extremes=[round(sizes[0], 1), round(sizes[-1], 1)],
        baseline=best,
        baseline_mebibytes={k: round(row["bytes"] / 2**20, 1) for k, row in plain.items()},
        ratio=round(median(sizes) / (plain[best]["bytes"] / 2**20), 3),
    )
