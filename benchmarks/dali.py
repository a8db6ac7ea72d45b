"""Record the throughput of JPEG loaders: NVIDIA DALI on the CPU beside torchvision's DataLoader.

    OMP_NUM_THREADS=1 python benchmarks/dali.py --record

Two kinds of files: photographs, and images as small as CIFAR's; `--only small` takes one, and
leaves the other as it is in the record. Rounds of all loaders take turns, decoding, windows,
scaling, flips and normalising included, each once what was made ahead is used up; DALI's pixels are
compared with torchvision's first. `--record` writes `records/dali.json` and its section of
`README.md`; without it the tables are printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from jpeg_loaders import KINDS, PROVIDERS, Kind, batches, write
from recording import is_dirty, machine

HERE = Path(__file__).parent
RECORD, README = HERE / "records" / "dali.json", HERE / "README.md"
BEGIN, END = "<!-- dali: begin, made by benchmarks/dali.py -->", "<!-- dali: end -->"
# Batches before each turn that do not count: more than a loader makes ahead (two a process, DALI
# one), and long enough for the one before to come to rest.
AHEAD = 8
LABELS = {
    "dali-1": "DALI, 1 thread",
    "dali-2": "DALI, 2 threads",
    "torchvision-0": "torchvision, in the caller's process",
    "torchvision-2": "torchvision, 2 processes",
}
PAIRS = {"dali-1": "torchvision-0", "dali-2": "torchvision-2"}  # as many cores at work


def measure(kind: Kind, rounds: int, round_batches: int) -> dict[str, Any]:
    """Time every loader in turns.

    Args:
        kind: of the files.
        rounds: that count; one more goes before them.
        round_batches: batches of a loader in a round.

    Returns:
        The record of this kind.
    """
    load_before = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write(folder, kind)
        given = {name: stack.enter_context(batches(name, folder, kind)) for name in PROVIDERS}
        for _ in range(1 + rounds):
            for name, source in given.items():
                for _ in range(AHEAD):
                    next(source)
                begin = time.perf_counter()
                for _ in range(round_batches):
                    next(source)
                seconds[name].append(time.perf_counter() - begin)
    images = kind.batch_size * round_batches
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": _machine(),
        "dirty": is_dirty(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "files": kind.num_images,
        "sides": [min(kind.lowest), max(kind.highest)],
        "image_size": kind.image_size,
        "batch_size": kind.batch_size,
        "images_a_round": images,
        "rows": [_row(name, images, times[1:]) for name, times in seconds.items()],
        "ratios": {
            name: median(b / a for a, b in zip(seconds[name][1:], seconds[other][1:], strict=True))
            for name, other in PAIRS.items()
        },
    }


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = machine()
    found |= {name: importlib.metadata.version(name) for name in ("torchvision", "pillow")}
    # The record itself is no change: `dirty` says whether there is another.
    return found | {"commit": (found["commit"] or "none").removesuffix("-dirty")}


def _row(name: str, images: int, times: list[float]) -> dict[str, Any]:
    rates = [images / seconds for seconds in times]
    spread = quantiles(rates, n=5, method="inclusive") if len(rates) > 1 else rates * 4
    return {
        "name": name,
        "images_per_second": round(median(rates)),
        "percentile_20": round(spread[0]),
        "percentile_80": round(spread[-1]),
        "rounds": len(rates),
        "seconds": [round(seconds, 4) for seconds in times],
    }


def section(records: dict[str, dict[str, Any]]) -> str:
    """The record of each kind that was measured, and which was not, as Markdown."""
    found = ["## JPEG files: DALI on the CPU"]
    for name, kind in KINDS.items():
        if name in records:
            found.append(part(records[name]))
        else:
            found.append(f"### To {kind.image_size} pixels: not measured")
    return "\n\n".join(found)


def part(record: dict[str, Any]) -> str:
    """The record of one kind of files as Markdown."""
    made = record["machine"]
    dirty = ", with changes that are not committed" if record["dirty"] else ""
    rows = {row["name"]: row for row in record["rows"]}
    lowest, highest = record["sides"]
    sides = f"{lowest} to {highest} pixels" if lowest < highest else f"{lowest} pixels"
    lines = [
        f"### To {record['image_size']} pixels, {record['date']}",
        "",
        f"{made['device']}, {made['cores']} cores, {made['system']}; DALI {made['dali']}, "
        f"torchvision {made['torchvision']}, Pillow {made['pillow']}, torch {made['torch']}, "
        f"Python {made['python']}; commit {made['commit']}{dirty}; load "
        f"{record['load_before']:.1f} before and {record['load_after']:.1f} after.",
        "",
        f"Images a second, {record['files']:,} files of {sides} a side in the cache, to "
        f"batches of {record['batch_size']} at {record['image_size']} pixels: decoded, a random "
        "window scaled, flipped, normalised. Rounds in turns; DALI's pixels were compared with "
        "torchvision's before. A ratio is the median over the rounds, beside the loader that keeps "
        "as many cores at work.",
        "",
        "| loader | median | 20th to 80th percentile | rounds | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, label in LABELS.items():
        row, ratio = rows[name], record["ratios"].get(name)
        beside = "" if ratio is None else f"{ratio:.2f} over {LABELS[PAIRS[name]]}"
        spread = f"{row['percentile_20']:,} to {row['percentile_80']:,}"
        rate = f"{row['images_per_second']:,}"
        lines.append(f"| {label} | {rate} | {spread} | {row['rounds']} | {beside} |")
    return "\n".join(lines)


def in_readme(text: str, body: str) -> str:
    """A README with what stands between its two markers replaced."""
    between = re.compile(f"({re.escape(BEGIN)}).*({re.escape(END)})", re.DOTALL)
    if not between.search(text):
        raise SystemExit(f"the README lacks {BEGIN!r} or {END!r}")
    return between.sub(lambda found: f"{found[1]}\n\n{body}\n\n{found[2]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-batches", type=int, help="(default: the kind's)")
    parser.add_argument("--only", choices=KINDS, help="this kind of files")
    parser.add_argument("--record", action="store_true", help="write record and README")
    args = parser.parse_args(arguments)
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in [args.only] if args.only else KINDS:
        kind = KINDS[name]
        records[name] = measure(kind, args.rounds, args.round_batches or kind.round_batches)
        print(part(records[name]))
    if args.record:
        RECORD.write_text(json.dumps(records, indent=1) + "\n")
        README.write_text(in_readme(README.read_text(), section(records)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
