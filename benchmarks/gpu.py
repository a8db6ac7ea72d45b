"""The GPU's speed, within a budget of ten minutes: checked first, then timed beside two baselines.

    python benchmarks/gpu.py [--minutes M] [--only PATTERN] [--json FILE]
    python benchmarks/gpu.py --device cpu --tiny        a dry run of the same code

Nothing is timed before every kernel, an evaluation and an update agree with their references.
Without a CUDA device it names all that is not measured, and ends well.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__" and "--tiny" in sys.argv:
    # Before CUDA is looked for: a dry run is of a CPU, whatever there is.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined

import gpu_gate
import gpu_kernels
import gpu_networks
import gpu_search
from gpu_ceilings import measure
from gpu_items import GATE, PARTS, Bench, Item
from gpu_report import DRY_RUN, environment, not_measured, tables, write
from gpu_timing import Clock, OutOfTimeError
from interpreter_scalars import take_scalars
from triton.errors import TritonError

from fastshift.backends import is_interpreted, why_no_triton
from fastshift.errors import CaptureError

__all__ = ["items", "main"]

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
MINUTES = 10.0


def items(*, tiny: bool, pattern: str = "") -> list[Item]:
    """All that can be timed, part by part, as far as a pattern is found in its name."""
    parts = (gpu_networks, gpu_kernels, gpu_search)
    found = [item for part in parts for item in part.items(tiny=tiny)]
    order = list(PARTS)
    return sorted(
        (item for item in found if re.search(pattern, item.name)),
        key=lambda item: order.index(item.part),
    )


def _run(wanted: list[Item], bench: Bench) -> tuple[list[dict], list[str]]:
    """Time items: each part by its share's end, and then, as far as time is left, the rest.

    Returns:
        The rows, and a line for each item that turned out wrong.
    """
    rows: list[dict] = []
    wrong: list[str] = []
    pending = wanted
    for is_last in (False, True):
        later = []
        for item in pending:
            bench.clock.until(1.0 if is_last else PARTS[item.part])
            bench.left_out.pop(item.name, None)
            begin = time.perf_counter()
            try:
                bench.clock.need(0.0, "its start")
                found = [{"item": item.name, "part": item.part, **r} for r in item.measure(bench)]
            except OutOfTimeError as error:
                bench.leave(item.name, f"the time was up: {error}")
                later.append(item)
                continue
            except (CaptureError, torch.OutOfMemoryError) as error:
                bench.leave(item.name, f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            except AssertionError as error:
                wrong.append(f"{item.name}: {error}")
                continue
            except (RuntimeError, TritonError) as error:
                # After an illegal access nothing on the device can be trusted: no further figure.
                wrong.append(f"{item.name}: {type(error).__name__}: {error}")
                settled = {row["item"] for row in rows} | {item.name} | bench.left_out.keys()
                for other in {other.name for other in wanted} - settled:
                    bench.leave(other, f"{item.name} failed before it")
                return rows, wrong
            finally:
                with suppress(RuntimeError):  # the allocator's, after a capture that was broken off
                    _release(bench.device)
            rows += found
            seconds = time.perf_counter() - begin
            print(f"{item.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        pending = later
    return rows, wrong


def _release(device: torch.device) -> None:
    """Give back what an item held, graphs and their memory among it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _without_cuda(wanted: list[Item]) -> int:
    print("No CUDA device: nothing was timed.")
    print("\n".join(not_measured(wanted)))
    print("`python benchmarks/gpu.py --device cpu --tiny` runs the same code dry, without results.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where a result is wrong, and then without figures of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a dry run on a CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all (%(default)s)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="items whose name it finds")
    parser.add_argument("--json", type=Path, help="the record; beside the others if not given")
    options = parser.parse_args(argv)
    if (options.device == "cpu") != options.tiny:
        parser.error("--device cpu and --tiny: only together, a dry run")
    if options.tiny and not is_interpreted():
        parser.error("--tiny: this process has compiled kernels; expected one of its own")
    wanted = items(tiny=options.tiny, pattern=options.only)
    if not wanted:
        parser.error(f"--only: {options.only!r} is found in no name")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return _without_cuda(wanted)
    bench = Bench(device, Clock(60 * options.minutes), options.tiny)
    dry_run = DRY_RUN if options.tiny else None
    if dry_run:
        take_scalars()
        print(dry_run)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # the baselines' convolutions at their fastest
    try:
        if device.type == "cuda" and (lacking := why_no_triton(device)):
            raise gpu_gate.RedGateError(lacking)
        return _measure(bench, wanted, dry_run, options.json)
    except gpu_gate.RedGateError as error:
        print(f"REFUSED, nothing was timed: {error}")
        print("\n".join(not_measured(wanted)))
        return 1
    except OutOfTimeError as error:
        print(f"The time was up before anything could be compared with a ceiling: {error}")
        print("\n".join(not_measured(wanted)))
        return 1
    finally:
        torch.backends.cudnn.benchmark = before


def _measure(bench: Bench, wanted: list[Item], dry_run: str | None, path: Path | None) -> int:
    where = environment(bench.device)
    bench.clock.until(GATE)
    gate = gpu_gate.check(bench.device, bench.clock, tiny=bench.tiny)
    bench.clock.until(1.0)
    bench.ceilings = measure(bench.device, bench.clock, tiny=bench.tiny)
    bench.clock.share()
    rows, wrong = _run(wanted, bench)
    record = {
        "dry_run": dry_run,
        "environment": where,
        "clock": bench.stopwatch.kind,
        "seconds": round(bench.clock.spent, 1),
        "gate": gate,
        "ceilings": bench.ceilings,
        "rows": rows,
        "wrong": wrong,
        "left_out": bench.left_out,
    }
    print(tables(record))
    if path is None and not dry_run:
        name = re.sub(r"\W+", "_", where["device"]).lower()
        path = RECORDS / f"gpu_speed_{name}.json"
    if path is not None:
        write(path, record)
        print(f"\nrecord: {path}")
    for line in wrong:
        print(f"WRONG, so without a figure: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
