"""The CPU speed record: made, shown, and written into the READMEs, one command each.

    python benchmarks/speed.py record [--threads N] [--only PATTERN | --subset] [--out FILE]
    python benchmarks/speed.py table [--out FILE]
    python benchmarks/speed.py readme [--out FILE]

`record` runs the benchmarks of a speed-up, file by file, and keeps each figure's row; with a
pattern (a regular expression on pytest's ids) it makes just those rows again. Rows of an equality
check that failed are dropped, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speed_tables import details, short, summary

HERE = Path(__file__).parent
RECORD = HERE / "records" / "cpu_speed.json"
FILES = ("blocks", "threads", "evaluator", "shift", "generation", "generic", "fresh")
# What shows how a second thread is used, at a fifth of the time.
SUBSET = (
    r"blocks\.py::test_inference\[.*fp32\]"
    r"|threads\.py"
    r"|evaluator\.py::test_generation\[(nasbench_macro-32|shufflenet_v2-64)-generation10-fp32\]"
    r"|test_accumulate\[.*-10-fp32\]|test_pretraining_step\[.*fp32\]"
)
READMES = {HERE.parent / "README.md": summary, HERE / "README.md": details}
# Of another machine, which multiplies bfloat16: its record, and where it is told of.
AMX_RECORD = HERE / "records" / "cpu_speed_amx.json"
AMX_READMES = {HERE.parent / "README.md": short, HERE / "README.md": summary}
BEGIN, END = "<!-- {}: begin, made by benchmarks/speed.py -->", "<!-- {}: end -->"


def reduce_rows(benchmarks: Iterable[dict[str, Any]], run: int) -> list[dict[str, Any]]:
    """The rows of a record from pytest-benchmark's own; what notes no item is left out.

    Args:
        benchmarks: of pytest-benchmark's JSON.
        run: the position of the run in the record.
    """
    rows = []
    for found in benchmarks:
        extra = found["extra_info"]
        if "item" not in extra:
            continue
        # A first evaluation and a memory bring their own figure; the times are their process's.
        times = {key: float(f"{found['stats'][key]:.4g}") for key in ("min", "median", "stddev")}
        file = Path(found["fullname"].split("::")[0]).stem.removeprefix("bench_")
        rows.append(
            {
                "name": f"{file}::{found['name']}",
                "run": run,
                **extra,
                "times": {**times, "rounds": found["stats"]["rounds"]},
            }
        )
    return rows


def merge(record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same name and threads."""
    kept = {(row["name"], row["threads"]): row for row in record["rows"]}
    kept.update({(row["name"], row["threads"]): row for row in rows})
    record["rows"] = [kept[key] for key in sorted(kept)]


def drop(record: dict[str, Any], gone: Iterable[tuple[str, int]]) -> None:
    """Take rows out by name and threads."""
    gone = set(gone)
    record["rows"] = [row for row in record["rows"] if (row["name"], row["threads"]) not in gone]


def prune(record: dict[str, Any]) -> None:
    """Forget the runs that no row is of any more."""
    used = sorted({row["run"] for row in record["rows"]})
    record["runs"] = [record["runs"][index] for index in used]
    for row in record["rows"]:
        row["run"] = used.index(row["run"])


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def here() -> dict[str, Any]:
    """The machine and the versions, as a record has them."""
    from recording import machine

    from fastshift.cpu import instruction_set

    found = machine()
    flags: set[str] = set()
    if os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text()
        flags = set(" ".join(re.findall(r"^flags\s*:(.*)$", text, re.MULTILINE)).split())
    return {
        "machine": {
            **{key: found[key] for key in ("device", "cores", "system")},
            "instruction_set": instruction_set(),
            "bf16_units": {name: name in flags for name in ("avx512_bf16", "amx_bf16")},
        },
        "versions": {key: found[key] for key in ("fastshift", "torch", "numpy", "python")},
    }


def pytest(*arguments: str, threads: int) -> subprocess.CompletedProcess:
    """Run pytest on the benchmarks with so many threads."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=HERE.parent,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )


def ids_of(file: str, pattern: str | None, threads: int) -> list[str]:
    """Pytest's ids of a file of benchmarks that a pattern is found in."""
    found = pytest("--collect-only", "-q", f"benchmarks/bench_{file}.py", threads=threads)
    if found.returncode:
        raise SystemExit(found.stdout)
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    return [line for line in ids if pattern is None or re.search(pattern, line)]


def record(path: Path, threads: int, pattern: str | None) -> int:
    """Measure, and write a row for each figure as it comes; the exit status."""
    import torch
    from baselines import ceiling
    from recording import _git, is_dirty

    torch.set_num_threads(threads)
    kept = {**here(), "runs": [], "rows": []}
    if path.exists():
        old = json.loads(path.read_text())
        for key in ("machine", "versions"):
            if pattern is not None and old[key] != kept[key]:
                raise SystemExit(f"{path}: made on {old[key]}, this is {kept[key]}; another --out")
        if all(old[key] == kept[key] for key in ("machine", "versions")):
            kept = old
    run = {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": is_dirty(),
        "threads": threads,
        "ceiling_before": ceiling(),
        "load_before": round(os.getloadavg()[0], 2),
        "failed": [],
    }
    kept["runs"].append(run)
    begin = time.perf_counter()
    made: set[str] = set()
    for file in FILES:
        if threads == 1 and file == "threads":
            continue
        ids = ids_of(file, pattern, threads)
        if not ids:
            continue
        print(f"{file}: {len(ids)} figures", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "benchmarks.json"
            options = ("-q", "-rfE", "--tb=line", f"--benchmark-json={out}")
            found = pytest(*options, *ids, threads=threads)
            told = json.loads(out.read_text()) if out.exists() and out.stat().st_size else {}
        rows = reduce_rows(told.get("benchmarks", ()), len(kept["runs"]) - 1)
        names = {f"{file}::{name.split('::', 1)[1]}" for name in ids}
        fresh = {row["name"] for row in rows}
        run["failed"] += sorted(names - fresh)
        for earlier in kept["runs"][:-1]:
            if earlier["threads"] == threads:
                earlier["failed"] = [name for name in earlier["failed"] if name not in names]
        if names - fresh:
            print(found.stdout[-6000:], flush=True)
        drop(kept, ((name, threads) for name in names))
        merge(kept, rows)
        made |= fresh
        run["seconds"] = round(time.perf_counter() - begin)
        run["load_after"] = round(os.getloadavg()[0], 2)
        run["ceiling_after"] = ceiling()
        write(path, kept)
        print(f"  {len(rows)} rows, {run['seconds']} s so far", flush=True)
    if pattern is None:
        # A figure that no benchmark makes any more.
        stale = [row["name"] for row in kept["rows"] if row["name"] not in made]
        drop(kept, ((name, threads) for name in stale))
    failed = run["failed"]
    prune(kept)
    write(path, kept)
    for name in failed:
        print(f"no row: {name}", file=sys.stderr)
    return 1 if failed or not made else 0


def section(text: str, body: str, name: str = "speed") -> str:
    """A README with what stands between its two markers of a name replaced."""
    marks = BEGIN.format(name), END.format(name)
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise SystemExit(f"the README lacks {marks[0]!r} or {marks[1]!r}")
    return f"{before}{begin}\n\n{body.strip()}\n\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("record", "table", "readme"):
        part = verbs.add_parser(verb)
        part.add_argument("--out", type=Path, default=RECORD, help="the record")
        if verb == "record":
            part.add_argument("--threads", type=int, default=1)
            only = part.add_mutually_exclusive_group()
            only.add_argument("--only", metavar="PATTERN")
            only.add_argument(
                "--subset", action="store_const", const=SUBSET, dest="only", help="of a few rows"
            )
    args = parser.parse_args(arguments)
    if args.verb == "record":
        return record(args.out.resolve(), args.threads, args.only)
    if not args.out.exists():
        raise SystemExit(f"{args.out}: no record; `speed.py record` makes one")
    kept = json.loads(args.out.read_text())
    if args.verb == "table":
        print(f"{summary(kept)}\n{details(kept)}")
        return 0
    for path, make in READMES.items():
        path.write_text(section(path.read_text(), make(kept)))
    if args.out == RECORD and AMX_RECORD.exists():
        kept = json.loads(AMX_RECORD.read_text())
        for path, make in AMX_READMES.items():
            path.write_text(section(path.read_text(), make(kept), "amx"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
