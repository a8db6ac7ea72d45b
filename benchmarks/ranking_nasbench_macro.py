"""Does shifting order the best architectures better? CIFAR-10, NAS-Bench-Macro's true accuracies.

Pre-trains a supernet over all 6,561 strings, searches with `none`, `uniform` and `accumulate` at
equal budget, without a limit and under 60M multiply-adds, and compares the scores of the 3,969
distinct networks, under the weights that each search by loss ends with, to their true accuracies
(three stand-alone trainings each). Each search is made twice, ordered by error and by loss, for the
network that it finds. Every figure stands beside what FLOPs alone gives.

    python benchmarks/ranking_nasbench_macro.py --data npz:c10.npz \\
        --truth nas_bench_macro.json --work runs/ranking --record benchmarks/records/NAME.json

The work directory holds finished parts; a run that was stopped goes on from there. `--workers`
parts run side by side, with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from recording import machine

from fastshift import data as sources
from fastshift.checkpoint import load_supernet, save_supernet
from fastshift.evaluator import Evaluator
from fastshift.pretrain import PretrainOptions, pretrain
from fastshift.ranking import Truth, order_preservation
from fastshift.search import SearchOptions, search
from fastshift.space import SearchSpace
from fastshift.spaces.nasbench_macro import canonical, distinct, nasbench_macro
from fastshift.supernet import Supernet

LIMITS = {"unlimited": None, "60M": "60M"}
MODES = ("none", "uniform", "accumulate")
SCORES = ("loss", "error")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="data spec of CIFAR-10, such as npz:FILE")
    parser.add_argument("--truth", required=True, help="NAS-Bench-Macro's JSON")
    parser.add_argument("--work", required=True, type=Path, help="directory of finished parts")
    parser.add_argument("--record", type=Path, help="JSON to write; a table is always printed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=float, default=0.25, help="of the supernet's channels")
    parser.add_argument("--image-size", type=int, default=24)
    parser.add_argument("--validation", type=int, default=1024, help="scored images")
    parser.add_argument("--calibration", type=int, default=192, help="calibration images")
    parser.add_argument("--pretrain-steps", type=int, default=6000)
    parser.add_argument("--pretrain-batch-size", type=int, default=128)
    parser.add_argument("--pretrain-lr", type=float, default=0.06)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--population", type=int, default=24)
    parser.add_argument("--parents", type=int, default=8)
    parser.add_argument("--shift-steps", type=int, default=5)
    parser.add_argument("--shift-batch-size", type=int, default=96)
    parser.add_argument("--shift-lr", type=float, default=5e-4)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


# One part, in a process of its own.


def load_data(args: argparse.Namespace, seed: int):
    return sources.load(
        args.data,
        seed=seed,
        image_size=args.image_size,
        validation_size=args.validation,
        validation_batch_size=128,
        calibration_batches=max(1, args.calibration // 96),
        calibration_batch_size=min(96, args.calibration),
    )


def make_space(args: argparse.Namespace) -> SearchSpace:
    """The searched space; the published network's multiply-adds are its cost `published`."""
    space = nasbench_macro(image_size=args.image_size, width=args.width)
    full = nasbench_macro()
    space.add_cost("published", full.flops_table, full.fixed_flops)
    return space


def make_supernet(args: argparse.Namespace, seed: int) -> Supernet:
    torch.manual_seed(seed)
    return Supernet(make_space(args)).to(memory_format=torch.channels_last)


def part_pretrain(args: argparse.Namespace, seed: int) -> dict:
    folder = args.work / f"seed{seed}" / "supernet"
    supernet = make_supernet(args, seed)
    options = PretrainOptions(
        steps=args.pretrain_steps,
        batch_size=args.pretrain_batch_size,
        lr=args.pretrain_lr,
        schedule="cosine",
    )
    result = pretrain(
        supernet,
        load_data(args, seed),
        options=options,
        seed=seed,
        out=folder,
        resume=True,
        quiet=False,
    )
    meta = {"fingerprint": supernet.space.fingerprint(), "version": supernet.version}
    save_supernet(folder, supernet.tensors(), meta)
    return {"loss": result.loss, "steps": result.steps}


def pretrained(args: argparse.Namespace, seed: int) -> Supernet:
    supernet = make_supernet(args, seed)
    tensors, meta = load_supernet(
        args.work / f"seed{seed}" / "supernet", fingerprint=supernet.space.fingerprint()
    )
    supernet.load_tensors(tensors, meta["version"])
    return supernet


def part_search(args: argparse.Namespace, seed: int, mode: str, limit: str, by: str) -> dict:
    folder = args.work / f"seed{seed}" / f"{mode}-{limit}-{by}"
    supernet, data = pretrained(args, seed), load_data(args, seed)
    options = SearchOptions(
        shift=mode,
        generations=args.generations,
        population=args.population,
        parents=args.parents,
        shift_steps=args.shift_steps,
        shift_batch_size=args.shift_batch_size,
        shift_lr=args.shift_lr,
        score_by=by,
        constraints={} if LIMITS[limit] is None else {"published": LIMITS[limit]},
    )
    result = search(
        supernet,
        data,
        options.constraints,
        shift=mode,
        options=options,
        seed=seed,
        out=folder,
        resume=True,
        quiet=False,
    )
    found = {
        "best": supernet.space.format(result.best.arch),
        "top": [supernet.space.format(s.arch) for s in result.top],
        "budget": result.budget,
        "search_seconds": result.seconds,
        "sharing": [g["sharing"] for g in result.generations],
    }
    if by == "loss" and mode != "none":
        found |= score(args, supernet, data, limit, folder)
    return found


def part_scores(args: argparse.Namespace, seed: int) -> dict:
    folder = args.work / f"seed{seed}"
    return score(args, pretrained(args, seed), load_data(args, seed), "unlimited", folder)


def score(args: argparse.Namespace, supernet: Supernet, data, limit: str, folder: Path) -> dict:
    """Score every distinct network the limit admits under the supernet's weights."""
    archs = distinct(supernet.space)
    if LIMITS[limit] is not None:
        archs = archs[supernet.space.cost("published", archs) <= 60e6]
    begin = time.perf_counter()
    scores = Evaluator(supernet, data.validation, calibration=data.calibration).evaluate(archs)
    np.savez(folder / "scores.npz", archs=archs, errors=scores.errors, losses=scores.losses)
    return {
        "scored": len(archs),
        "weights_version": scores.weights_version,
        "score_seconds": time.perf_counter() - begin,
        "sharing_all": scores.sharing,
    }


PARTS = {"pretrain": part_pretrain, "scores": part_scores, "search": part_search}


def run_part(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    kind, seed, *rest = args.part
    begin = time.perf_counter()
    found = PARTS[kind](args, int(seed), *rest)
    found["seconds"] = time.perf_counter() - begin
    found["machine"] = machine()
    path = part_file(args, args.part)
    path.write_text(json.dumps(found))


def part_file(args: argparse.Namespace, part: list[str]) -> Path:
    return args.work / ("-".join(part) + ".json")


# The parts, side by side, and what they say.


def run_all(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    waiting = [["pretrain", str(seed)] for seed in args.seeds]
    for seed in map(str, args.seeds):
        waiting += [["scores", seed]]
        waiting += [
            ["search", seed, mode, limit, by]
            for by in SCORES
            for limit in LIMITS
            for mode in MODES[::-1]
        ]
    waiting = [part for part in waiting if not part_file(args, part).exists()]
    running: list[tuple[list[str], subprocess.Popen]] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while waiting or running:
        ready = [
            part
            for part in waiting
            if part[0] == "pretrain" or part_file(args, ["pretrain", part[1]]).exists()
        ]
        while ready and len(running) < args.workers:
            part = ready.pop(0)
            waiting.remove(part)
            print("start", *part, flush=True)
            command = [sys.executable, *sys.argv, "--part", *part]
            running.append((part, subprocess.Popen(command, env=environment)))
        time.sleep(0.5)
        for part, process in list(running):
            if process.poll() is not None:
                running.remove((part, process))
                print("done" if process.returncode == 0 else "FAILED", *part, flush=True)
                if process.returncode:
                    for _, other in running:
                        other.terminate()
                    raise SystemExit(f"part {' '.join(part)} failed")


def figures(values, ties, truth: Truth, names: list[str]) -> dict:
    """Order preservation of one set of scores, and the truth of its best ones."""
    rows = truth.rows(names)
    accuracy = truth.accuracy[rows]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(rows))[: max(300, min(1000, len(rows)))]
    sample = order_preservation(values[chosen], accuracy[chosen], local_k=len(chosen))
    local = [
        order_preservation(
            values, accuracy, tie_break=ties, local_k=500, independent_run=run, resamples=200
        )
        for run in range(accuracy.shape[1])
    ]
    return {
        "networks": len(rows),
        "tau_random": sample.tau_global,
        "tau_random_interval": sample.tau_global_interval,
        "random_networks": len(chosen),
        "tau_all": local[0].tau_global,
        "tau_500": float(np.mean([found.tau_local for found in local])),
        "tau_500_by_run": [found.tau_local for found in local],
        "top10": local[0].top_mean[10],
        "top50": local[0].top_mean[50],
        "ideal_top10": local[0].ideal_top_mean[10],
        "ideal_top50": local[0].ideal_top_mean[50],
        "regret": local[0].regret,
    }


def summarise(args: argparse.Namespace) -> dict:
    truth = Truth.load(args.truth)
    full = nasbench_macro()
    space = make_space(args)
    rows = []
    for limit in LIMITS:
        archs = distinct(full)
        if LIMITS[limit] is not None:
            archs = archs[full.flops(archs) <= 60e6]
        flops = full.flops(archs).astype(float)
        names = full.format_all(archs)
        found = figures(-flops, [], truth, names)
        first = names[int(np.argmax(flops))]
        rows.append({"limit": limit, "mode": "flops", "by": "flops", "seed": None} | found)
        rows[-1]["found"] = first
        for seed in args.seeds:
            folder = args.work / f"seed{seed}"
            for mode in MODES:
                where = folder if mode == "none" else folder / f"{mode}-{limit}-loss"
                with np.load(where / "scores.npz") as saved:
                    table = {key: saved[key] for key in ("archs", "errors", "losses")}
                keep = np.isin(
                    space.format_all(table["archs"]), names
                )  # `none` scored all networks once
                table = {key: value[keep] for key, value in table.items()}
                strings = full.format_all(table["archs"])
                cost = full.flops(table["archs"]).astype(float)
                for by, other in (("errors", "losses"), ("losses", "errors")):
                    score_by = {"errors": "error", "losses": "loss"}[by]
                    key = ["search", str(seed), mode, limit, score_by]
                    part = json.loads(part_file(args, key).read_text())
                    ties = [table[other].astype(float), cost]
                    values = table[by].astype(float)
                    row = {"limit": limit, "mode": mode, "by": by, "seed": seed}
                    row |= figures(values, ties, truth, strings)
                    row["found"] = part["best"]
                    row["budget"] = part["budget"]
                    row["sharing"] = part["sharing"]
                    row["search_seconds"] = part["search_seconds"]
                    rows.append(row)
    # A supernet that orders all networks worse than their FLOPs do says nothing about shifting.
    bar = rows[0]["tau_all"]
    reached = {
        (row["seed"], row["by"]): row["tau_all"]
        for row in rows
        if row["mode"] == "none" and row["limit"] == "unlimited"
    }
    for row in rows:
        row["void"] = reached.get((row["seed"], row["by"]), bar) < bar
    best = truth.accuracy.mean(axis=1)
    for row in rows:
        name = full.format_all(canonical([row["found"]]))[0]
        row["found_accuracy"] = float(best[truth.rows([name])[0]])
    options = {
        k: v for k, v in vars(args).items() if k not in ("part", "record", "work", "data", "truth")
    }
    pretraining = [
        json.loads(part_file(args, ["pretrain", str(seed)]).read_text()) for seed in args.seeds
    ]
    parts = [json.loads(path.read_text()) for path in sorted(args.work.glob("*.json"))]
    machines = []
    for part in parts:
        if part["machine"] not in machines:
            machines.append(part["machine"])
    return {
        "options": options,
        "machines": machines,
        "seconds_of_all_parts": sum(part["seconds"] for part in parts),
        "pretraining": pretraining,
        "rows": rows,
    }


COLUMNS = ("tau_random", "tau_all", "tau_500", "top10", "top50", "regret", "found_accuracy")


def table(record: dict) -> str:
    """Means over seeds, with the spread, as Markdown."""
    head = ["limit", "search", "scored by", "void", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    groups: dict[tuple, list[dict]] = {}
    for row in record["rows"]:
        groups.setdefault((row["limit"], row["mode"], row["by"]), []).append(row)
    for key, rows in groups.items():
        cells = [*key, f"{sum(row['void'] for row in rows)} of {len(rows)}"]
        for column in COLUMNS:
            values = np.array([row[column] for row in rows])
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.part:
        run_part(args)
        return
    run_all(args)
    record = summarise(args)
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
