"""What `gpu.py` says: the record, the table, and the names of what was not measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_ceilings import CEILINGS
from gpu_items import Item
from recording import machine

from fastshift.versions import versions

__all__ = ["DRY_RUN", "environment", "not_measured", "tables", "write"]

DRY_RUN = "DRY RUN: on a CPU, at tiny sizes; none of its figures is a result"
_UNITS = {"copy": ("GB/s", 1e-9)}
_RATE = ("TFLOP/s", 1e-12)
_HEAD = (
    "what",
    "run by",
    "median, ms",
    "20th, 80th",
    "first call, s",
    "times faster",
    "of ceiling",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, its power limit where `nvidia-smi` tells it, versions and commit."""
    found = machine() | versions(device)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"sm_{about.major}{about.minor}",
            "memory_bytes": about.total_memory,
            "l2_bytes": about.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "power_limit": _power_limit(device),
        }
    return found


def _power_limit(device: torch.device) -> str | None:
    """As nvidia-smi prints it; None where it cannot be asked."""
    index = torch.cuda.current_device() if device.index is None else device.index
    # The process may see other numbers than the tool does.
    which = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
    which = which if which.isdigit() else f"GPU-{which}"
    query = ["nvidia-smi", f"--id={which}", "--query-gpu=power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def not_measured(items: Iterable[Item]) -> list[str]:
    """A line for each figure that a GPU would give: ceilings, then items."""
    names = [f"ceilings | {name}" for name in CEILINGS]
    names += [item.name for item in items]
    return [f"not measured: {name}" for name in names]


def tables(record: Mapping[str, Any]) -> str:
    """The whole record for people: where, ceilings, figures, what was left out."""
    lines = [record["dry_run"], ""] if record["dry_run"] else []
    where = record["environment"]
    keys = ("device", "capability", "power_limit", "torch", "triton", "cuda", "cudnn", "python")
    lines.append(", ".join(f"{key} {where.get(key, 'not known')}" for key in keys if key in where))
    lines.append(f"commit {where['commit']}; timed by {record['clock']}; {record['seconds']:.0f} s")
    lines += ["", "Right before anything was timed:"]
    lines += [f"- {what}: {how}" for what, how in record["gate"].items()]
    lines += ["", "Ceilings, measured:"]
    for name, value in record["ceilings"].items():
        unit, scale = _UNITS.get(name, _RATE)
        lines.append(f"- {name}: {scale * value:.4g} {unit}")
    lines += ["", *_figures(record["rows"])]
    captured = [row for row in record["rows"] if row.get("captures")]
    if captured:
        lines += ["", "Of these times, what capturing CUDA graphs took:"]
        for row in captured:
            what = f"{row['captures']} graphs, {row['capture_s']:.3g} s"
            lines.append(f"- {row['item']}, {row['provider']}: {what}")
    cached = [row["item"] for row in record["rows"] if row.get("in_cache")]
    if cached:
        lines += ["", "Inputs that fit into the cache: " + "; ".join(dict.fromkeys(cached))]
    if record["left_out"]:
        lines += ["", "Left out:"]
        lines += [f"- {what}: {why}" for what, why in record["left_out"].items()]
    if record["dry_run"]:
        lines += ["", record["dry_run"]]
    return "\n".join(lines)


def _figures(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row, ours beside the fastest and the slowest baseline of its item."""
    cells = [_HEAD]
    for row in rows:
        same = [r for r in rows if r["item"] == row["item"]]
        cells.append(
            (
                row["item"],
                row["provider"] + (", baseline" if row["is_baseline"] else ""),
                f"{row['median_ms']:.4g}",
                f"{row['p20_ms']:.4g}, {row['p80_ms']:.4g}" if "p20_ms" in row else "once",
                f"{row['first_call_s']:.3g}" if "first_call_s" in row else "",
                _ratios(row, same),
                f"{100 * row['of_ceiling']:.3g} %" if "of_ceiling" in row else "",
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _ratios(row: Mapping[str, Any], same: list[dict[str, Any]]) -> str:
    """How many times as fast as each baseline, fastest first."""
    if row["is_baseline"]:
        return ""
    others = sorted(r["median_ms"] for r in same if r["is_baseline"])
    return " / ".join(f"{other / row['median_ms']:.3g}" for other in others)


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, a line for each row."""
    parts = []
    for name, value in record.items():
        if name == "rows":
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f'  "rows": [\n{rows}\n  ]')
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
