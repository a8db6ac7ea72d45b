"""Generations of real searches, for benchmarks of the evaluator and of the shift step.

    python benchmarks/generations.py --data npz:c10.npz

runs a short search of every space (a narrow supernet, `accumulate`) and keeps generations 0, 5 and
10 in `generations.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import fastshift as fs
from fastshift import spaces

FILE = Path(__file__).with_name("generations.json")
KEPT = (0, 5, 10)
# Images of a size that keeps the search short; the rows are choices, which know no size.
SPACES = {
    "nasbench_macro": {"image_size": 16, "width": 0.25},
    "shufflenet_v2": {"image_size": 16, "width": 0.5},
}


def load(space: str) -> dict[int, np.ndarray]:
    """Choices `[50, L]` of each kept generation."""
    rows = json.loads(FILE.read_text())[space]
    archs = {int(generation): found for generation, found in rows.items()}
    return {g: np.array([[int(c) for c in row] for row in found]) for g, found in archs.items()}


def make(space: str, source: str) -> dict[int, list[str]]:
    """Search, and keep what was asked for in each kept generation."""
    torch.manual_seed(0)
    options = SPACES[space]
    supernet = fs.Supernet(spaces.build(space, **options))
    data = fs.data.load(
        source,
        image_size=options["image_size"],
        validation_size=256,
        validation_batch_size=256,
        calibration_batches=1,
        calibration_batch_size=64,
        device="cpu",
    )
    fs.pretrain(supernet, data, steps=300, batch_size=64, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        fs.search(
            supernet,
            data,
            shift="accumulate",
            generations=10,
            population=50,
            parents=10,
            shift_steps=2,
            shift_batch_size=32,
            seed=0,
            out=folder,
            quiet=True,
        )
        lines = (Path(folder) / "scores.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {g: [row["arch"] for row in rows if row["generation"] == g][:50] for g in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    FILE.write_text(json.dumps({space: make(space, args.data) for space in SPACES}) + "\n")


if __name__ == "__main__":
    main()
