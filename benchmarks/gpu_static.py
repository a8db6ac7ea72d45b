"""What can be said of the GPU kernels without a GPU: a table, a record, and a check against it.

    python benchmarks/gpu_static.py [--only PATTERN] [--all] [--json FILE]   table and check
    python benchmarks/gpu_static.py --record                                 and a new record

Every listed kernel is compiled at named shapes of three spaces and its machine code is read: at
levels of each space in every type for all three architectures, at one of larger images for one,
and at further levels, stem and head too, where a kernel has a body that no other has; with
`--all`, everything everywhere. Launches that a card's figures choose are those of the card that
they are compiled for. No kernel runs on a GPU: there is no time in here. A floor is what the card's
published bandwidth and rates allow at best, a bound and not a time. The bytes that programs ask for
are counted by Triton's interpreter, at the small shape alone, of inference in either form.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from catalogue import DTYPES, Case, Launch, Recording, cases, recorded
from kernel_sites import SITES, SMALL, Site, network
from machine_code import compile_launch
from static_checks import known, regressions, shortfalls
from static_counts import counting_apart
from static_tables import tables

from fastshift.kernels.cards import CARDS

__all__ = ["collect", "examine", "floor_us", "key_of", "variants"]

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "gpu_static.json"
PROCESSES = 2  # that compile
# Of what no level has that stands for others; the cards after the first where one chooses launches.
ELSEWHERE = ("bf16", (90, 80, 100))


def key_of(launch: Launch) -> str:
    """Name a launch's machine code, whatever the source says: kernel, types and constants."""
    return f"{launch.name} {hashlib.sha256(launch.key.encode()).hexdigest()[:8]}"


def floor_us(case: Case, capability: int) -> float:
    """Return microseconds below which no card of the architecture can go: a bound, not a time."""
    card = CARDS[capability]
    rate = card.rates.get(case.dtype if case.dot else "vector", card.rates["vector"])
    moved = (case.read_bytes + case.written_bytes) / card.bandwidth
    return 1e6 * max(moved, case.flops / rate)


def collect(
    sites: Iterable[Site], pattern: str = "", *, whole: bool = False
) -> Iterator[tuple[Case, Recording, tuple[int, ...]]]:
    """Yield the listed cases that a pattern finds, their recordings and their architectures.

    A case whose launches a card chooses comes once for each card, whose architecture its name ends
    in. Of levels that stand for others, every variant of a kernel that some level has, by the
    figures of some card, is among them.

    Args:
        sites: where the shapes come from.
        pattern: a regular expression on `name | site | dtype`.
        whole: take every level of a site, in every type, for every architecture.
    """
    sites = tuple(sites)
    seen: set[str] = set()
    for site in sites:
        place = network(site, whole=whole)
        for dtype in DTYPES if whole else site.targets:
            capabilities = tuple(CARDS) if whole else site.targets[dtype]
            for found in _planned(_with_tf32(cases(place, dtype)), capabilities):
                if found[0].dtype == ELSEWHERE[0]:
                    seen |= variants(found[1])
                if re.search(pattern, found[0].title):
                    yield found
    for site in () if whole else sites:
        dtype, capabilities = ELSEWHERE
        for found in _planned(cases(network(site), dtype), capabilities, capabilities[:1]):
            if not variants(found[1]) <= seen:
                seen |= variants(found[1])
                if re.search(pattern, found[0].title):
                    yield found


def _planned(
    found: Iterable[Case], cards: tuple[int, ...], others: tuple[int, ...] | None = None
) -> Iterator[tuple[Case, Recording, tuple[int, ...]]]:
    """Record cases: for each of some cards where it chooses the launches, once for all elsewhere.

    Args:
        found: as they are listed.
        cards: by architecture.
        others: those of a case that no card chooses, where they are not the same.
    """
    for case in found:
        if not case.by_card:
            yield case, recorded(case), cards if others is None else others
            continue
        for capability in cards:
            own = replace(case, name=f"{case.name} sm_{capability}")
            yield own, recorded(case, CARDS[capability]), (capability,)


def _with_tf32(found: Iterable[Case]) -> Iterator[Case]:
    """Yield cases, and those of float32 products again in TF32."""
    for case in found:
        yield case
        if case.dtype == "fp32" and case.dot:
            yield replace(case, dtype="tf32", launcher=partial(case.launcher, precision="tf32"))


def variants(recording: Recording) -> set[str]:
    """Name the kernels' bodies that a call runs."""
    return {launch.variant for launch in recording.launches}


def examine(
    found: Iterable[tuple[Case, Recording, tuple[int, ...]]],
    say: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Compile each launch once for each architecture and put the record together.

    Args:
        found: what `collect` yields.
        say: is told what is being compiled.

    Returns:
        `kernels`, by `key_of` and architecture, and `cases`.
    """
    kernels: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    _JOBS.clear()
    for case, recording, capabilities in found:
        for launch in recording.launches:
            codes = kernels.setdefault(key_of(launch), {})
            for capability in capabilities:
                if str(capability) not in codes:
                    codes[str(capability)] = None
                    _JOBS.append((launch, capability, case.title))
        rows[case.title] = _row(case, recording, capabilities)
    with get_context("fork").Pool(min(PROCESSES, max(len(_JOBS), 1))) as pool:
        done = pool.imap(_compile, range(len(_JOBS)))
        for (launch, capability, name), (row, seconds) in zip(_JOBS, done, strict=True):
            kernels[key_of(launch)][str(capability)] = row
            say(f"{key_of(launch)} for sm_{capability}, {name}: {seconds:.1f} s")
    return {"kernels": kernels, "cases": rows}


_JOBS: list[tuple[Launch, int, str]] = []  # of the forked processes: a launch cannot be sent there


def _compile(index: int) -> tuple[dict[str, Any], float]:
    launch, capability, _ = _JOBS[index]
    start = time.perf_counter()
    row = compile_launch(launch, capability).row()
    return row, time.perf_counter() - start


def _row(case: Case, recording: Recording, capabilities: tuple[int, ...]) -> dict[str, Any]:
    card = CARDS[capabilities[0]] if case.by_card else None
    compulsory = case.read_bytes + case.written_bytes
    least = case.made_bytes if case.least_made_bytes is None else case.least_made_bytes
    return {
        "cards": list(capabilities),
        "launches": [key_of(launch) for launch in recording.launches],
        "torch_launches": recording.torch_launches,
        "variants": sorted(variants(recording)),
        "budget": case.launches,
        "made_bytes": case.made_bytes,
        "least_made_bytes": least,
        "scratch_bytes": case.scratch(case.dtype, card),
        "allocated_bytes": recording.allocated_bytes,
        "read_bytes": case.read_bytes,
        "written_bytes": case.written_bytes,
        "multiply_adds": case.flops,
        "intensity": float(f"{2 * case.flops / compulsory:.3g}"),
        "floor_us": {str(c): float(f"{floor_us(case, c):.3g}") for c in CARDS},
        "load_width": case.load_width,
        "store_width": case.store_width,
        "narrow": list(case.narrow),
        "no_rows": list(case.no_rows),
        "dot": case.dot,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where something is worse than the record, or misses a target anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name it finds")
    parser.add_argument(
        "--all", action="store_true", help="every level, type and architecture: an hour or more"
    )
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    if options.record and (options.only or options.all):
        parser.error("--record: of the quick run, without --only and --all")
    start = time.perf_counter()
    with counting_apart(options.only, options.all) as counts:
        found = {
            "note": "compiled, not run: no figure here is a time; floors are bounds",
            "versions": {"triton": triton.__version__, "torch": torch.__version__},
            "cards": {str(c): card.name for c, card in CARDS.items()},
            **examine(
                collect(SITES, options.only, whole=options.all),
                lambda line: print(line, file=sys.stderr, flush=True),
            ),
            "counted_at": SMALL.name + f", {SMALL.num_images} images",
            "counted": counts(),
        }
    print("\n".join(tables(found)))
    seconds = time.perf_counter() - start
    print(f"\n{len(found['kernels'])} kernels of {len(found['cases'])} cases in {seconds:.0f} s")
    missed, failed = shortfalls(found), []
    if options.record:
        RECORD.write_text(_text(found))
    elif RECORD.exists():
        old = json.loads(RECORD.read_text())
        new, missed = known(missed, old)
        failed = new + regressions(found, old, partial=bool(options.only), more=options.all)
    else:
        failed = [f"{RECORD.relative_to(ROOT)}: not there; make it with --record"]
    if options.json:
        options.json.write_text(_text(found))
    for line in missed:
        print(f"MISSED, as in the record: {line}")
    for line in failed:
        print(f"FAILED {line}")
    return int(bool(failed))


def _text(found: dict[str, Any]) -> str:
    """Return JSON with a line for each kernel, case and count."""
    parts = []
    for name, value in found.items():
        if name in ("kernels", "cases", "counted"):
            lines = [f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()]
            parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
