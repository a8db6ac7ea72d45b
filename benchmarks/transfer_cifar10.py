"""Does a supernet carry over? Pre-trained on five CIFAR-10 classes, transferred to the other five.

Three supernets search the five new classes with the same options, seeds and images: one that was
pre-trained on the five old classes and got a fresh head (`transfer`), one with random weights that
gets exactly the same updates (`scratch`), and one that was first pre-trained on the new classes for
as many steps as the first was on the old (`pretrained`, the dearer reference).

    python benchmarks/transfer_cifar10.py --data npz:c10.npz --record benchmarks/records/NAME.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from recording import machine

from fastshift import data as sources
from fastshift.evaluator import Evaluator
from fastshift.pretrain import PretrainOptions, pretrain
from fastshift.search import SearchOptions, search
from fastshift.spaces.nasbench_macro import nasbench_macro
from fastshift.supernet import Supernet

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
ARMS = ("transfer", "scratch", "pretrained")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="data spec of CIFAR-10, such as npz:FILE")
    parser.add_argument("--record", type=Path, help="JSON to write; a table is always printed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--pretrain-batch-size", type=int, default=96)
    parser.add_argument("--pretrain-lr", type=float, default=0.05)
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--shift-steps", type=int, default=5)
    parser.add_argument("--shift-batch-size", type=int, default=96)
    parser.add_argument("--shift-lr", type=float, default=5e-4)
    parser.add_argument("--head-warmup-steps", type=int, default=200)
    parser.add_argument("--random-archs", type=int, default=50)
    return parser.parse_args()


def load(args: argparse.Namespace, classes: tuple[int, ...], seed: int):
    return sources.load(
        args.data,
        classes=classes,
        seed=seed,
        image_size=args.image_size,
        validation_size=1000,
        validation_batch_size=250,
        calibration_batches=4,
        calibration_batch_size=128,
    )


def supernet_for(args: argparse.Namespace, seed: int) -> Supernet:
    torch.manual_seed(seed)
    space = nasbench_macro(image_size=args.image_size, num_classes=5, width=args.width)
    return Supernet(space).to(memory_format=torch.channels_last)


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> dict:
    """One supernet on the new classes; returns errors in [0, 1]."""
    begin = time.perf_counter()
    data, supernet = load(args, NEW, seed), supernet_for(args, seed)
    if arm != "scratch":
        options = PretrainOptions(
            steps=args.pretrain_steps,
            batch_size=args.pretrain_batch_size,
            lr=args.pretrain_lr,
            schedule="cosine",
        )
        trained_on = load(args, OLD, seed) if arm == "transfer" else data
        pretrain(supernet, trained_on, options=options, seed=seed, quiet=False)
    supernet.reset_head(data.num_classes, seed=seed)
    options = SearchOptions(
        generations=args.generations,
        population=args.population,
        shift_steps=args.shift_steps,
        shift_batch_size=args.shift_batch_size,
        shift_lr=args.shift_lr,
        head_warmup_steps=args.head_warmup_steps,
        score_by="loss",
    )
    result = search(supernet, data, options=options, seed=seed, fresh_head=True, quiet=False)
    rng = np.random.default_rng(seed)
    shape = (args.random_archs, supernet.space.num_blocks)
    archs = rng.integers(0, supernet.space.num_choices, shape).astype(np.uint8)
    scored = Evaluator(supernet, data.validation, calibration=data.calibration)
    tested = Evaluator(supernet, data.test, calibration=data.calibration)
    return {
        "arm": arm,
        "seed": seed,
        "found": supernet.space.format(result.best.arch),
        "best_error": result.best.error,
        "best_test_error": float(tested([result.best.arch])[0]),
        "random_error": float(scored(archs).mean()),
        "first_generation_error": result.generations[0]["median_error"],
        "budget": result.budget,
        "seconds": time.perf_counter() - begin,
    }


COLUMNS = ("best_test_error", "best_error", "random_error", "first_generation_error")


def table(rows: list[dict]) -> str:
    """Means over seeds, with the spread, in percent, as Markdown."""
    lines = ["| supernet | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    for arm in ARMS:
        cells = [arm]
        for column in COLUMNS:
            values = 100 * np.array([row[column] for row in rows if row["arm"] == arm])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    rows = []
    for seed in args.seeds:
        for arm in ARMS:
            rows.append(run_arm(args, arm, seed))
            print(json.dumps(rows[-1]), flush=True)
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        options = {k: v for k, v in vars(args).items() if k not in ("record", "data")}
        record = {"options": options, "machine": machine(), "rows": rows}
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
