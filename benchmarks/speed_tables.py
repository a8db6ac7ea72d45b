"""The speed record as Markdown: each figure beside what was asked of it, missed or met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FLOORS", "details", "short", "summary"]

Row = dict[str, Any]
# Figures that are no time of the benchmark's own.
UNTIMED = ("memory", "first evaluation")


@dataclass(frozen=True)
class Floor:
    """What is asked of a figure.

    Attributes:
        text: as the table shows it.
        field: of the row, that is compared.
        bound: the figure's least value, or its largest where `below`.
        aim: beyond the floor, as text.
        aim_field, aim_bound: likewise.
    """

    text: str
    field: str
    bound: float
    below: bool = False
    aim: str = ""
    aim_field: str = ""
    aim_bound: float = 0.0

    def met(self, row: Row) -> bool:
        """Whether a row meets it."""
        value = row[self.field]
        return value <= self.bound if self.below else value >= self.bound

    def near(self, row: Row) -> bool:
        """Whether some rounds of a row meet it and others do not."""
        if "ratio_extremes" not in row or self.field not in ("ratio", "ratio_over_sharing"):
            return False
        share = row[self.field] / row["ratio"]
        low, high = (share * x for x in row["ratio_extremes"])
        return low < self.bound <= high

    def aim_met(self, row: Row) -> bool:
        """Whether a row meets the aim beyond."""
        return row.get(self.aim_field, 0.0) >= self.aim_bound


def _share(percent: int) -> tuple[str, str, float]:
    return (f"{percent} % of ceiling", "share", percent / 100)


FLOORS: dict[tuple[str, str], Floor] = {
    ("block inference", "fp32"): Floor("2", "ratio", 2.0, False, *_share(60)),
    ("block inference", "bf16"): Floor("2.5", "ratio", 2.5, False, *_share(60)),
    ("evaluator", "fp32"): Floor("2 S", "ratio_over_sharing", 2.0, False, *_share(60)),
    ("evaluator", "bf16"): Floor("2.5 S", "ratio_over_sharing", 2.5, False, *_share(60)),
    ("accumulate", "fp32"): Floor("2 S", "ratio_over_sharing", 2.0, False, *_share(50)),
    ("accumulate", "bf16"): Floor("3 S", "ratio_over_sharing", 3.0, False, *_share(50)),
    ("pre-training step", "fp32"): Floor("2", "ratio", 2.0, False, *_share(50)),
    ("pre-training step", "bf16"): Floor("3", "ratio", 3.0, False, *_share(50)),
    ("generation", "fp32"): Floor("6", "ratio", 6.0, False, "30", "ratio", 30.0),
    ("generation", "bf16"): Floor("6", "ratio", 6.0, False, "30", "ratio", 30.0),
    ("first evaluation", "fp32"): Floor("under 1 s", "seconds", 1.0, True),
    ("first evaluation", "bf16"): Floor("under 1 s", "seconds", 1.0, True),
    ("modules' path", "fp32"): Floor("1", "ratio", 1.0),
    ("memory", "fp32"): Floor("at most +25 %", "ratio", 1.25, True),
    ("memory", "bf16"): Floor("at most +25 %", "ratio", 1.25, True),
}
# Figures of which nothing was asked.
OTHERS = (("beside the other pool", "fp32"),)
LEVERS = ("trie", "calibration sharing", "fusion", "precision")


def _with_shares(record: dict[str, Any]) -> list[Row]:
    """The rows, with GFLOP/s, their share of the matrix product's of the same rounds, and the share
    that their floor would take, where work is known."""
    rows = []
    for row in record["rows"]:
        row = dict(row)
        if "gflop" in row:
            row["gflops"] = row["gflop"] / row["times"]["median"]
        if "peak_gflop" in row:
            row["share"] = row["gflop"] / row["peak_gflop"]
            floor = FLOORS.get((row["item"], row["precision"]))
            if floor:
                row["asks"] = row["share"] * floor.bound / row[floor.field]
        rows.append(row)
    # Of one run alone: another's machine was in another mood.
    medians = {(row["name"], row["run"]): row["times"]["median"] for row in rows}
    for row in rows:
        own = medians.get((row["name"].replace("bf16", "fp32"), row["run"]))
        if row["precision"] == "bf16" and row["item"] not in UNTIMED and own:
            row["over_fp32"] = own / row["times"]["median"]
    return rows


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.1f}"


def _values(rows: Sequence[Row], field: str, show: Callable[[float], str] = _number) -> str:
    """Each value of up to three rows, or the range of more."""
    found = [row[field] for row in rows if field in row]
    if len(found) > 3:
        return f"{show(min(found))} to {show(max(found))}"
    return " / ".join(show(x) for x in found)


def _percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def _groups(rows: list[Row], item: str, precision: str) -> list[list[Row]]:
    """Rows of one figure, by threads, space and size; in order of generation."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if (row["item"], row["precision"]) == (item, precision):
            key = (row["threads"], row["space"], row["size"], row.get("what", ""))
            found.setdefault(key, []).append(row)
    return [
        sorted(found[key], key=lambda row: row.get("generation", row.get("block", 0)))
        for key in sorted(found)
    ]


def _measured(item: str, rows: list[Row]) -> str:
    if item == "first evaluation":
        return _values(rows, "seconds", lambda x: f"{x:.2f} s")
    if item == "memory":
        return _values(rows, "ratio", lambda x: f"{100 * (x - 1):+.0f} %")
    text = _values(rows, "ratio")
    if item in ("evaluator", "accumulate"):
        text += f" = {_values(rows, 'ratio_over_sharing')} S"
    return text


def _summary_line(item: str, precision: str, rows: list[Row]) -> list[str]:
    floor = FLOORS.get((item, precision), Floor("", "ratio", 0.0))
    met = sum(map(floor.met, rows))
    verdict = "met" if met == len(rows) else f"**missed** ({met} of {len(rows)} met)"
    near = sum(map(floor.near, rows))
    verdict += f", {near} within its rounds' spread" if near else ""
    first = rows[0]
    aim = floor.aim
    if aim:
        known = [row for row in rows if floor.aim_field in row]
        met = sum(map(floor.aim_met, known))
        aim += f": {met} of {len(known)}" if met < len(known) else ": met"
        aim = aim if known else f"{floor.aim}: not measured"
    what = item + (f", {first['what']}" if "what" in first else "")
    return [
        what,
        f"{first['space']}, {first['size']} px",
        precision,
        str(first["threads"]),
        ", ".join(sorted({row["kernels"] for row in rows if "kernels" in row})),
        _measured(item, rows),
        _values(rows, "ratio_folded") if item not in ("generation",) else "",
        _values(rows, "over_fp32"),
        _values(rows, "share", _percent),
        floor.text,
        _values(rows, "asks", _percent),
        verdict if floor.text else "",
        aim,
    ]


def _threads(number: int) -> str:
    return "one thread" if number == 1 else f"{number} threads"


def _conditions(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['system']}; torch "
        f"{versions['torch']}, Python {versions['python']}. The compiled kernels run as "
        f"`{machine['instruction_set']}`."
    ]
    lacking = [name for name, there in machine["bf16_units"].items() if not there]
    if lacking:
        names = " and ".join({"avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX"}[n] for n in lacking)
        lines.append(f"{names}: not measured here, the machine has none.")
    compiled = dict.fromkeys(
        f"{row['item']} in {row['precision']} on {_threads(row['threads'])}"
        for row in record["rows"]
        if any(name.startswith("compiled") for name in row.get("baseline_seconds", {}))
    )
    where = f" but of {', '.join(compiled)}" if compiled else ""
    lines.append(f"`torch.compile` is not among the baselines{where}: not measured.")
    for run in record["runs"]:
        before, after = run["ceiling_before"], run["ceiling_after"]
        peaks = ", ".join(
            f"{label} {before[name]:.0f} and {after[name]:.0f} {unit}"
            for label, name, unit in (
                ("fp32 product", "fp32_gflops", "GFLOP/s"),
                ("bf16 product", "bf16_gflops", "GFLOP/s"),
                ("copy", "copy_gb", "GB/s"),
            )
        )
        dirty = ", with uncommitted changes" if run["dirty"] else ""
        lines.append(
            f"{run['date']}, commit {run['commit']}{dirty}, threads {run['threads']}; before and "
            f"after: {peaks}, load {run['load_before']} and {run['load_after']}."
        )
        if run["failed"]:
            lines.append(f"Failed, so without a row: {', '.join(run['failed'])}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _lever_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if not row["item"].endswith(" levers"):
            continue
        on = row["times"]["median"]
        cells = [
            f"{row['without'][lever]:.2f} ({row['without'][lever] / on:.2f})"
            if lever in row["without"]
            else ""
            for lever in LEVERS
        ]
        what = row["item"].removesuffix(" levers")
        place = f"{row['space']}, {row['size']} px"
        head = [what, place, row["precision"], str(row["threads"]), f"{row['sharing']:.2f}"]
        lines.append([*head, f"{on:.2f}", *cells])
    if not lines:
        return ""
    head = ["what", "space", "precision", "threads", "S", "all on, s"]
    return _table(head + [f"without {lever}" for lever in LEVERS], lines)


SHORT = {
    "block inference": "one block is computed {} times as fast as by the best of PyTorch without "
    "folded norms",
    "evaluator": "a generation of 50 is scored {} times as fast as one path at a time",
    "accumulate": "trained on {} times as fast",
    "pre-training step": "a single path is trained {} times as fast",
    "generation": "and a whole generation of search and updates is {} times as fast as the "
    "released code's loop",
}


# How the table is read.
READING = """\
- *Times the baseline*: how many times as fast as PyTorch, each beside its baselines in one run, in
  turns where the record says so. Rows may be of different runs, listed below. The baseline is the
  fastest of PyTorch channels first and last, one path at a time, cached data, no gradients in
  scoring, same precision (bf16: autocast, and for inference cast weights).
- Several values are the generations 0, 5 and 10 of a search, or the last of them. S is what the
  generation's trie shares: *1.9 S* is 1.9 times what sharing alone gives.
- An update takes a batch of 8 images, scores 16 to 24, both 4 to 6 at 224 px, unless the row says
  otherwise; a pre-training step 64 (32 at 224 px).
- *With folded norms*: the baseline may also fold batch norms into convolutions.
- *Over fp32*: how many times as fast bf16 is as our own fp32.
- *Share of ceiling*: of the rate of a matrix product of 1024 x 1024, in turns with the figure.
- *Floor*: what was asked beforehand; *share it needs*: of the ceiling, to meet it, given how near
  to the ceiling the baseline is.
- *Generation*: 20 updates and the scores of 50, against the released code's loop, three candidates
  of it timed and scaled to 50. *First evaluation*: seconds from the return of `import fastshift` to
  a score in a fresh process. *Memory*: the peak of a step at sub-tries of one path over the
  baseline's.
- *Modules' path*: a population of modules that no kernel knows. *Beside the other pool*: the time
  of a call right after its own threads worked over that right after the other's did: of a block's
  inference after PyTorch's ReLU of 64 MiB, or of that after ours. 1 is undisturbed, less is slower.
- *Within its rounds' spread*: some rounds meet the floor and others do not.
"""
UNMEASURED = (
    "Not measured either: of shufflenet_v2 at 224 px, updates and whole generations in generations "
    "0 and 5, scores there in bf16, and in bf16 an update, a pre-training step and a whole "
    "generation; with two threads bf16, generations 0 and 5, whole generations and levers."
)


def _ranges(rows: list[Row], precision: str) -> str:
    """Each item's ratios in a precision on one thread, in words."""
    parts = []
    for item, text in SHORT.items():
        found = [
            row["ratio"]
            for row in rows
            if (row["item"], row["precision"], row["threads"]) == (item, precision, 1)
        ]
        if found:
            spread = dict.fromkeys((_number(min(found)), _number(max(found))))
            parts.append(text.format(" to ".join(spread)))
    return ", ".join(parts)


def short(record: dict[str, Any]) -> str:
    """A paragraph on another machine's record: ranges in bf16 and fp32, and floors met."""
    rows, machine = _with_shares(record), record["machine"]
    asked = [
        (FLOORS[key], row) for row in rows if (key := (row["item"], row["precision"])) in FLOORS
    ]
    met = sum(floor.met(row) for floor, row in asked)
    told = "; ".join(
        f"in {precision} {ranges}"
        for precision in ("bf16", "fp32")
        if (ranges := _ranges(rows, precision))
    )
    return (
        f"On another machine, {machine['device']} with AMX, where the kernels run as "
        f"`{machine['instruction_set']}`, on one thread: {told}. What was asked is met there by "
        f"{met} of {len(asked)} figures; "
        "[the table](benchmarks/README.md)."
    )


def _in_short(rows: list[Row]) -> str:
    """One sentence of the ranges in fp32 on one thread, and how many rows meet what was asked."""
    parts = _ranges(rows, "fp32")
    asked = [
        (FLOORS[key], row) for row in rows if (key := (row["item"], row["precision"])) in FLOORS
    ]
    met = sum(floor.met(row) for floor, row in asked)
    sentence = f"In short, in fp32 on one thread: {parts}. " if parts else ""
    return (
        f"{sentence}What was asked beforehand (*floor*) is met by {met} of {len(asked)} "
        "figures.\n\n"
    )


def summary(record: dict[str, Any]) -> str:
    """The README's section: each figure beside its floor, the levers, and the conditions."""
    rows = _with_shares(record)
    lines, missing = [], []
    for item, precision in (*FLOORS, *OTHERS):
        groups = _groups(rows, item, precision)
        lines += [_summary_line(item, precision, group) for group in groups]
        if not groups:
            missing.append(f"{item} in {precision}")
    head = (
        "what",
        "space",
        "precision",
        "threads",
        "run by",
        "times the baseline",
        "with folded norms",
        "over fp32",
        "share of ceiling",
        "floor",
        "share it needs",
        "floor met",
        "aim",
    )
    text = _in_short(rows) + READING + "\n"
    text += _table(head, lines)
    if missing:
        text += f"\nNot measured: {', '.join(missing)}.\n"
    if not all(record["machine"]["bf16_units"].values()):  # of the first machine's record
        text += f"\n{UNMEASURED}\n"
    levers = _lever_table(rows)
    if levers:
        text += (
            "\nEach lever switched off alone, generation 10: seconds, and times the whole.\n\n"
            + levers
        )
    return text + "\n" + _conditions(record)


def details(record: dict[str, Any]) -> str:
    """Every row, with its spread and its baselines."""
    lines = []
    for row in _with_shares(record):
        times = row["times"]
        baselines = ", ".join(
            f"{name} {1e3 * t:.4g}" for name, t in row.get("baseline_seconds", {}).items()
        )
        for name, t in row.get("compile_seconds", {}).items():
            told = f"{t:.0f} s" if t >= 2 else "from its cache"
            baselines += f", {name}'s compilation {told}"
        if row["item"] == "memory":
            own = f"{row['mebibytes']} MiB"
            pairs = row["baseline_mebibytes"].items()
            baselines = ", ".join(f"{name} {size} MiB" for name, size in pairs)
        elif row["item"] == "first evaluation":
            own = f"{1e3 * row['seconds']:.4g}"
            baselines = f"the score itself {1e3 * row['score_seconds']:.4g}"
        else:
            own = f"{1e3 * times['median']:.4g}"
        if "extremes" in row:
            scale, unit = (1, " MiB") if row["item"] == "memory" else (1e3, "")
            spread = " to ".join(f"{scale * x:.4g}" for x in row["extremes"]) + unit
        elif times["rounds"] == 1:
            spread = "once"
        else:
            spread = f"{1e3 * times['min']:.4g}, {1e3 * times['stddev']:.2g}"
        lines.append(
            [
                f"`{row['name']}`",
                str(row["threads"]),
                own,
                spread,
                str(times["rounds"]),
                f"{row['gflops']:.0f}" if "gflops" in row else "",
                baselines,
                _number(row["ratio"]) if "ratio" in row else "",
                record["runs"][row["run"]]["commit"],
            ]
        )
    head = ("figure", "threads", "median, ms", "min, stddev, or from to", "rounds", "GFLOP/s")
    head += ("baselines, ms", "ratio", "commit")
    return (
        "## CPU speed, figure by figure\n\n"
        "Record: [`cpu_speed.json`](records/cpu_speed.json), made by `make speed`; the tables "
        "against the floors are in the README of the project. Times in milliseconds; each ratio is "
        "over the fastest baseline that is not folded, the median over the rounds where both took "
        "turns (`turns` in the record), else median against median. Equality is checked before a "
        "row is kept: blocks' inference to 1e-5 of float64 in fp32 and 3e-2 in bf16, a training "
        "block's rows to as much of PyTorch's in the same precision, losses to 1e-4 in scoring and "
        "1e-3 in training, in bf16 in the mean square at most twice as far from fp32's as "
        "PyTorch's bf16 are, or to 1e-2. Gradients are compared in the tests, not here.\n\n"
        f"{_conditions(record)}\n{_table(head, lines)}"
    )
