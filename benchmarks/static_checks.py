"""What the static record must hold, and what counts as worse than the committed one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from fastshift.kernels.cards import CARDS
from fastshift.kernels.infer_bands import CACHE_SHARE

__all__ = ["REGISTER_TOLERANCE", "known", "regressions", "shortfalls"]

REGISTER_TOLERANCE = 8  # of a thread: the step in which the compiler's choices jump about
SHARED_TOLERANCE = 1024  # bytes of a program
WIDE_TOLERANCE = 0.1  # of the share of loads that are as wide as the shape admits
Record = dict[str, Any]

# Of a case, by its shape and the listing alone; a figure that differs has another meaning.
_DEFINED = ("budget", "made_bytes", "least_made_bytes", "multiply_adds", "load_width")
_DEFINED += ("store_width", "narrow", "no_rows", "dot", "intensity", "floor_us")


def shortfalls(record: Record) -> list[str]:
    """Return a line for each target that a record misses.

    Targets: a program fits its card; no spills; loads and stores as wide as the shape admits, up to
    128 bits; tensor cores in every matrix product of fp16, bf16 and TF32; launches within the
    budget; no more memory made than the algorithm needs, a hundredth of what is moved and a page
    for partial results, and a scratch of at most `CACHE_SHARE` of its card's cache; no value of 16
    bits loaded alone by a layer whose rows begin at a multiple of 128.

    Args:
        record: of `gpu_static`.
    """
    return [line for name in record["cases"] for line in _shortfalls(record, name)]


def known(lines: Iterable[str], baseline: Record) -> tuple[list[str], list[str]]:
    """Part lines of `shortfalls` into those that a baseline has not, and those that it has.

    Args:
        lines: of a newer record; what they count may differ, `regressions` looks at that.
        baseline: an older record.
    """
    old = {_plain(line) for line in shortfalls(baseline)}
    lines = list(lines)
    parts = ([x for x in lines if (_plain(x) in old) is is_old] for is_old in (False, True))
    new, kept = parts
    return new, kept


def _plain(line: str) -> str:
    """A line without counts and without what names one machine code of a kernel."""
    where, _, what = line.rpartition(": ")
    return re.sub(r" [0-9a-f]{8}\b", "", where) + re.sub(r"\d+", "", what)


def _shortfalls(record: Record, name: str) -> Iterator[str]:
    case = record["cases"][name]
    started = len(case["launches"]) + len(case["torch_launches"])
    if started > case["budget"]:
        names = [*case["launches"], *case["torch_launches"]]
        yield f"{name}: {started} launches, the budget is {case['budget']}: {', '.join(names)}"
    spare = 4096 + (case["read_bytes"] + case["written_bytes"]) // 100
    most = CACHE_SHARE * min(CARDS[capability].cache for capability in case["cards"])
    if case["scratch_bytes"] > most:
        yield f"{name}: a scratch of {case['scratch_bytes']} bytes, at most {most:.0f} fit a cache"
    if case["allocated_bytes"] > case["made_bytes"] + case["scratch_bytes"] + spare:
        made = f"{case['allocated_bytes']} bytes made"
        yield f"{name}: {made}, needed are {case['made_bytes']}"
    if case["dot"] and not any(
        code["products"] for key in case["launches"] for code in record["kernels"][key].values()
    ):
        yield f"{name}: no kernel of it has a matrix product"
    narrow_type = name.endswith(("fp16", "bf16", "tf32"))
    for key in dict.fromkeys(case["launches"]):
        for capability, code in record["kernels"][key].items():
            where = f"{name}: {key} for sm_{capability}"
            if code["spills"] or code["stack_bytes"]:
                yield f"{where}: {code['spills']} spills, {code['stack_bytes']} bytes of stack"
            if not code["occupancy"]:
                taken = f"{code['registers']} registers, {code['shared_bytes']} bytes shared"
                yield f"{where}: no program of {code['warps']} warps fits: {taken}"
            if code["products"] and narrow_type and not code["tensor"]:
                yield f"{where}: a matrix product without tensor cores"
            if key.split()[0] in case["narrow"]:
                continue
            alone = code["loads"].get("1", 0) + code["loads"].get("2", 0)
            if alone and case["dot"] and case["load_width"] == 16:
                yield f"{where}: {alone} loads of at most 16 bits"
            only_sums = key.split()[0] in case["no_rows"]
            for kind in ("load",) if only_sums else ("load", "store"):
                wanted, widest = case[f"{kind}_width"], code[f"{kind}_bytes"]
                if widest < wanted:
                    yield f"{where}: widest {kind} {widest} bytes, expected {wanted}"


def regressions(
    record: Record, baseline: Record, *, partial: bool = False, more: bool = False
) -> list[str]:
    """Return a line for each thing that got worse than the baseline.

    Registers, occupancy, shared memory, shares of wide loads and counts of tensor-core instructions
    are compared where both were compiled by the same version of Triton. What a case needs and what
    its bounds are follows from its definition: any change of these is one.

    Args:
        record: of `gpu_static`.
        baseline: an older one.
        partial: whether cases of the baseline may be missing from the record.
        more: whether the record may have cases that the baseline has not.
    """
    lines = []
    for part in ("cases", "counted"):
        if not more:
            new = record[part].keys() - baseline[part]
            lines += [f"{name}: not in the record" for name in new]
        if not partial:
            gone = baseline[part].keys() - record[part]
            lines += [f"{name}: in the record, but no longer listed" for name in gone]
    lines += [
        f"sm_{c}: in the record, but no longer among the cards"
        for c in baseline["cards"].keys() - record["cards"]
    ]
    same_compiler = record["versions"]["triton"] == baseline["versions"]["triton"]
    for name in record["cases"].keys() & baseline["cases"]:
        lines += _worse_case(record, baseline, name, same_compiler)
    for name in record["counted"].keys() & baseline["counted"]:
        new, old = record["counted"][name], baseline["counted"][name]
        lines += [
            f"{name}: {field} {new[field]} under the interpreter, {old[field]} in the record"
            for field in ("loaded_bytes", "stored_bytes")
            if new[field] > old[field]
        ]
    return sorted(lines)


def _worse_case(record: Record, baseline: Record, name: str, same_compiler: bool) -> Iterator[str]:
    new, old = record["cases"][name], baseline["cases"][name]
    counts = [len(case["launches"]) + len(case["torch_launches"]) for case in (new, old)]
    if counts[0] > counts[1]:
        yield f"{name}: {counts[0]} launches, {counts[1]} in the record"
    for field in ("allocated_bytes", "read_bytes", "written_bytes"):
        if new[field] > old[field]:
            yield f"{name}: {field} {new[field]}, {old[field]} in the record"
    for field in _DEFINED:
        if new[field] != old[field]:
            yield f"{name}: {field} {new[field]}, {old[field]} in the record: another definition"
    gone = [c for c in old["cards"] if c not in new["cards"]]
    if gone:
        yield f"{name}: not for {', '.join(f'sm_{c}' for c in gone)}, which the record has"
    kernels = [dict.fromkeys(key.split()[0] for key in case["launches"]) for case in (new, old)]
    if list(kernels[0]) != list(kernels[1]):  # nothing to compare one by one
        yield f"{name}: it runs {', '.join(kernels[0])}; in the record {', '.join(kernels[1])}"
        return
    for key, old_key in zip(new["launches"], old["launches"], strict=False):
        codes, before = record["kernels"][key], baseline["kernels"][old_key]
        for capability in before:
            where = f"{name}: {key} for sm_{capability}"
            if capability in codes:
                only_sums = key.split()[0] in new["no_rows"]
                yield from _worse_code(where, codes[capability], before[capability], only_sums)
                if same_compiler:
                    width = new["load_width"]
                    yield from _worse_choices(where, codes[capability], before[capability], width)
            elif int(capability) in new["cards"]:
                yield f"{where}: no machine code, which the record has"


def _worse_code(where: str, code: Record, before: Record, only_sums: bool) -> Iterator[str]:
    """What no version of a compiler may do."""
    if code["spills"] > before["spills"] and not before["spills"]:
        yield f"{where}: {code['spills']} spills, 0 in the record"
    for kind in ("load_bytes",) if only_sums else ("load_bytes", "store_bytes"):
        if code[kind] < before[kind]:
            yield f"{where}: {kind} {code[kind]}, {before[kind]} in the record"
    if before["tensor"] and not code["tensor"]:
        yield f"{where}: no tensor cores; {before['tensor']} in the record"


def _worse_choices(where: str, code: Record, before: Record, load_width: int) -> Iterator[str]:
    """What the same compiler does not do to the same kernel."""
    if code["spills"] > before["spills"] > 0:
        yield f"{where}: {code['spills']} spills, {before['spills']} in the record"
    if code["registers"] > before["registers"] + REGISTER_TOLERANCE:
        yield f"{where}: {code['registers']} registers, {before['registers']} in the record"
    if code["occupancy"] < before["occupancy"]:
        now, then = code["occupancy"], before["occupancy"]
        yield f"{where}: an occupancy of {now:.0%}, {then:.0%} in the record"
    if code["shared_bytes"] > before["shared_bytes"] + SHARED_TOLERANCE:
        now, then = code["shared_bytes"], before["shared_bytes"]
        yield f"{where}: {now} bytes of shared memory, {then} in the record"
    now, then = (_wide_share(found["loads"], load_width) for found in (code, before))
    if now < (1 - WIDE_TOLERANCE) * then:
        wide = f"of its loads have {load_width} bytes or more"
        yield f"{where}: {now:.1%} {wide}, {then:.1%} in the record"
    for kind, count in before["tensor"].items() if code["tensor"] else ():
        if 2 * code["tensor"].get(kind, 0) <= count:
            yield f"{where}: {code['tensor'].get(kind, 0)} {kind}, {count} in the record"


def _wide_share(loads: dict[str, int], width: int) -> float:
    """Of load instructions, the share of those of at least so many bytes a thread."""
    return sum(n for size, n in loads.items() if int(size) >= width) / max(sum(loads.values()), 1)
