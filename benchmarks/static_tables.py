"""The static record as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["tables"]


def tables(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of three tables: machine code, shapes, bytes under the interpreter.

    Args:
        record: of `gpu_static`.
    """
    yield f"Compiled with Triton {record['versions']['triton']}; nothing ran on a GPU."
    yield ""
    yield "Machine code (occupancy is the most that registers and shared memory admit):"
    yield from _aligned(_code_rows(record))
    yield ""
    cards = ", ".join(f"sm_{c} {name}" for c, name in record["cards"].items())
    yield f"Shapes; floors are BOUNDS from published rates ({cards}), no time was measured."
    yield "Needed is what the algorithm must make: results, raw rows that are read again, gradients"
    yield "of two hidden units at a time. A scratch does not grow with the population. Beyond least"
    yield "is what is made beside results, which alone were left if all else were computed again:"
    yield from _aligned(_case_rows(record))
    yield ""
    yield f"Bytes that programs ask for, counted at {record['counted_at']}, without caches:"
    yield from _aligned(_count_rows(record))


def _code_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    yield ["kernel", "used by", "sm", "regs", "spills", "shared", "occupancy", "ld/st", "tensor"]
    users: dict[str, list[str]] = {}
    for name, case in record["cases"].items():
        for key in dict.fromkeys(case["launches"]):
            users.setdefault(key, []).append(" ".join(name.split(" | ")[1:]))
    for key, codes in record["kernels"].items():
        first, *others = users.get(key, [""])
        used = first + (f" +{len(others)}" if others else "")
        for capability, code in codes.items():
            tensor = " ".join(f"{n}:{count}" for n, count in code["tensor"].items())
            yield [
                *(key, used, capability, str(code["registers"]), str(code["spills"])),
                *(str(code["shared_bytes"]), f"{code['occupancy']:.0%}"),
                f"{8 * code['load_bytes']}/{8 * code['store_bytes']}",
                tensor or ("none" if code["products"] else "-"),
            ]


def _case_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    floors = [f"floor sm_{c} us" for c in record["cards"]]
    made = ["made MB", "needed", "scratch", "beyond least"]
    yield ["case", "launches", "of", *made, "written MB", "moved MB", "FLOP/byte", *floors]
    for name, case in record["cases"].items():
        moved = case["read_bytes"] + case["written_bytes"]
        yield [
            name,
            str(len(case["launches"]) + len(case["torch_launches"])),
            str(case["budget"]),
            *(_megabytes(case[f"{name}_bytes"]) for name in ("allocated", "made", "scratch")),
            _megabytes(case["allocated_bytes"] - case["least_made_bytes"]),
            *(_megabytes(case["written_bytes"]), _megabytes(moved), f"{case['intensity']:g}"),
            *(f">= {floor:g}" for floor in case["floor_us"].values()),
        ]


def _count_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    yield ["case", "loaded", "must read", "stored", "must write", "over the least"]
    for name, count in record["counted"].items():
        asked = count["loaded_bytes"] + count["stored_bytes"]
        least = count["read_bytes"] + count["written_bytes"]
        fields = ("loaded_bytes", "read_bytes", "stored_bytes", "written_bytes")
        yield [name, *(str(count[field]) for field in fields), f"{asked / least:.2f}x"]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}"


def _aligned(rows: Iterable[list[str]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()
