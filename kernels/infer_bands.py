"""A layer's inference in one launch: bands of rows, and whether they beat a launch a stage.

A band is some images' rows of a node's row, all of each image or some of one. A program takes bands
one after the other, and goes through a node's jobs on each: what a stage writes for the next stays
in a scratch of the program's own, which every band overwrites, so that all programs' scratches stay
in the card's second-level cache whatever the population is. A band of some rows computes those
beside it that a convolution reads anew.

The estimate counts bytes at the published bandwidth of memory and multiply-adds at published rates,
padding and rows computed anew among them, and nothing else: it chooses, and is not a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from fastshift.kernels._launch import ceil_div
from fastshift.kernels.cards import Card
from fastshift.kernels.infer_chains import chain_of
from fastshift.kernels.infer_jobs import InferStep, Job
from fastshift.kernels.infer_plan import InferPlan
from fastshift.kernels.infer_tiles import REGISTERS, Blocks, block_sizes
from fastshift.kernels.plan_records import LINE

__all__ = ["BandPlan", "Machine", "choose_bands", "plan_bands", "seconds_by_steps"]

CACHE_SHARE = 0.5  # of the second-level cache that all scratches may have
_NODES = 8  # of a level that stands for all others where programs share its bands
_FEWEST_WARPS = 8  # of it that hide each other's waiting


@dataclass(frozen=True)
class Machine:
    """What a layer's inference runs on.

    Attributes:
        card: its published figures.
        multiprocessors: how many it has.
        item_size: bytes of a value of the rows.
        rate: of `card.rates`, that of the rows' products.
    """

    card: Card
    multiprocessors: int
    item_size: int
    rate: str

    @property
    def tensor_cores(self) -> bool:
        """Whether products run on them."""
        return self.rate != "vector"

    def blocks(self, step: InferStep, images: int, *, apart: bool = False) -> Blocks:
        """A step's tile, `apart` as for `block_sizes`."""
        given = self.item_size, self.tensor_cores, self.card.few_sums
        return block_sizes(step, images, *given, apart)

    def programs(self, blocks: Blocks) -> list[int]:
        """How many there may be: as registers and shared memory admit, or fewer, by halves."""
        registers = ceil_div(blocks.registers, 8) * 8 * 32 * blocks.warps
        most = min(REGISTERS // registers, self.card.shared // (blocks.shared + 1024))
        most = max(most, 1)
        least = min(ceil_div(_FEWEST_WARPS, blocks.warps), most)
        halves = [most >> power for power in range(most.bit_length()) if most >> power >= least]
        return [each * self.multiprocessors for each in halves]


@dataclass(frozen=True, eq=False)
class BandPlan:
    """One launch for all of a layer.

    Attributes:
        step: the jobs of each choice, with places in a scratch and sizes of a band.
        bands: of a node, at most.
        scratch: elements of a program's own.
        programs: how many there are, whatever the population.
        seconds: what the estimate says of a node of each choice, together.
    """

    step: InferStep
    blocks: Blocks
    bands: int
    scratch: int
    programs: int
    seconds: float


def choose_bands(plan: InferPlan, machine: Machine) -> BandPlan | None:
    """The plan of one launch where it is no worse than a launch a stage, else None.

    Args:
        plan: of a launch a stage.
        machine: what it is for.
    """
    found = plan_bands(plan, machine)
    if found is None or found.seconds > seconds_by_steps(plan, machine):
        return None
    return found


def plan_bands(
    plan: InferPlan, machine: Machine, parts: Sequence[bool] = (False, True)
) -> BandPlan | None:
    """Plan a layer's inference in one launch.

    Args:
        plan: of a launch a stage.
        machine: what it is for.
        parts: whether a depthwise convolution and its product may be one job, and whether two.

    Returns:
        None where nothing is hidden, or where one row of it does not fit a program's scratch.
    """
    if len(plan.steps) < 2:
        return None
    plans = []
    for has_parts in parts:
        chains = [chain_of(plan, choice, has_parts) for choice in range(len(plan.steps[0].jobs))]
        # A depthwise convolution has chunks as wide as in front of a product.
        products = [tuple(j for j in own if j.kind_name != "depthwise") for own in chains]
        step = InferStep(tuple(products if any(products) else chains))
        is_apart = len(step.all_jobs) < sum(map(len, chains))
        blocks = machine.blocks(step, plan.images, apart=is_apart)
        counts = machine.programs(blocks)
        plans += [_plan(plan, chains, blocks, machine, programs) for programs in counts]
    # Of equal ones the first: with the fewest jobs, and then the most programs.
    return min((one for one in plans if one), key=lambda one: one.seconds, default=None)


def _plan(
    plan: InferPlan,
    chains: Sequence[Sequence[Job]],
    blocks: Blocks,
    machine: Machine,
    programs: int,
) -> BandPlan | None:
    """The plan for a number of programs; None where one row does not fit their scratch."""
    most = int(CACHE_SHARE * machine.card.cache) // (programs * machine.item_size)
    choices, bands, scratch, moved, arithmetic = [], 1, 0, 0.0, 0.0
    for chain in chains:
        fitting = [band for band in _bands(plan.images, chain) if band.scratch <= most]
        if not fitting:
            return None
        best = min(
            fitting,
            key=lambda band: (_band_seconds(chain, band, blocks, machine, programs), band.count),
        )
        choices.append(_with_band(chain, best))
        bands, scratch = max(bands, best.count), max(scratch, best.scratch)
        moved += sum(_memory(job, plan.images, hidden=False) for job in chain)
        arithmetic += _band_arithmetic(chain, best, blocks, machine) * _waiting(best, programs)
    seconds = max(moved * machine.item_size / machine.card.bandwidth, arithmetic)
    return BandPlan(InferStep(tuple(choices)), blocks, bands, scratch, programs, seconds)


def seconds_by_steps(plan: InferPlan, machine: Machine) -> float:
    """What the estimate says of a node of each choice, together, by a launch a stage."""
    seconds = 0.0
    for step in plan.steps:
        blocks = machine.blocks(step, plan.images)
        moved = sum(_memory(job, plan.images, hidden=True) for job in step.all_jobs)
        arithmetic = sum(
            _arithmetic(job, plan.images * job["out_height"] * job["out_width"], blocks, machine)
            for job in step.all_jobs
        )
        seconds += max(moved * machine.item_size / machine.card.bandwidth, arithmetic)
    return seconds


@dataclass(frozen=True)
class _Band:
    """Images and rows at a time; how many there are of a node, and elements of their scratch."""

    images: int
    rows: int
    down: int
    count: int
    scratch: int


def _bands(images: int, chain: Sequence[Job]) -> Iterator[_Band]:
    """Those that a choice may have: rows of one image, or whole images."""
    height = next(job["out_height"] for job in chain if not job["to_hidden"])
    sizes = [(1, rows) for rows in range(1, height + 1)]
    sizes += [(1 << power, height) for power in range(1, images.bit_length())]
    for count, rows in sizes:
        down = ceil_div(height, rows)
        scratch = sum(_places(chain, count, rows).values())
        yield _Band(count, rows, down, ceil_div(images, count) * down, scratch)


def _places(chain: Sequence[Job], images: int, rows: int) -> dict[int, int]:
    """Elements of what each job of a chain, by its place there, leaves in the scratch."""
    found = {}
    for index, job in enumerate(chain):
        if job["to_hidden"]:
            own = min((rows - 1) * job["times"] + job["reach"], job["out_height"])
            size = images * own * job["out_width"] * job["target_row"]
            found[index] = ceil_div(size, LINE) * LINE
    return found


def _with_band(chain: Sequence[Job], band: _Band) -> tuple[Job, ...]:
    """A choice's jobs with their places in the scratch."""
    sizes = _places(chain, band.images, band.rows)
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    of_band = {
        "band_images": band.images,
        "band_rows": band.rows,
        "bands_down": band.down,
    }
    found = []
    for index, job in enumerate(chain):
        own = of_band | {"jobs_behind": len(chain) - 1 - index}
        if job["from_hidden"]:
            own["source_at"] = starts[job["source_at"]]
        if job["to_hidden"]:
            own["target_at"] = starts[index]
        found.append(replace(job, values=job.values | own))
    return tuple(found)


def _arithmetic(job: Job, positions: int, blocks: Blocks, machine: Machine) -> float:
    """Seconds of a whole card, tiles' padding included."""
    kind = job.kind_name
    if kind == "copy":
        return 0.0
    positions = ceil_div(positions, blocks.positions) * blocks.positions
    across = ceil_div(job["out_channels"], blocks.channels)
    products = taps = 0
    if kind != "depthwise":
        inner = job["in_channels"] * (job.taps if kind == "dense" else 1)
        products = positions * inner * across * blocks.channels
    if kind in ("pair", "depthwise"):
        taps = positions * job["in_channels"] * job.taps * (across if kind == "pair" else 1)
    return products / machine.card.rates[machine.rate] + taps / machine.card.rates["vector"]


def _band_arithmetic(chain: Sequence[Job], band: _Band, blocks: Blocks, machine: Machine) -> float:
    """Seconds of a whole card for a node, rows that bands compute anew among them."""
    per_image = 0.0
    for job in chain:
        for index in range(band.down):
            first = index * band.rows * job["times"] - job["before"]
            stop = first + (band.rows - 1) * job["times"] + job["reach"]
            rows = min(stop, job["out_height"]) - max(first, 0)
            positions = band.images * rows * job["out_width"]
            per_image += _arithmetic(job, positions, blocks, machine)
    return per_image * (band.count // band.down)


def _waiting(band: _Band, programs: int) -> float:
    """How many times as long a node takes because programs wait for the last."""
    bands = _NODES * band.count
    return ceil_div(bands, programs) * programs / bands


def _band_seconds(
    chain: Sequence[Job], band: _Band, blocks: Blocks, machine: Machine, programs: int
) -> float:
    """What a band's size is chosen by: nothing hides behind anything else."""
    images = band.images * band.count // band.down
    moved = sum(_memory(job, images, hidden=False) for job in chain) * machine.item_size
    arithmetic = _band_arithmetic(chain, band, blocks, machine)
    return (moved / machine.card.bandwidth + arithmetic) * _waiting(band, programs)


def _memory(job: Job, images: int, *, hidden: bool) -> int:
    """Elements that a job reads and writes of an image's rows, of hidden ones where they count."""
    read = written = 0
    if hidden or not job["from_hidden"]:
        channels = job["source_row"] if job["variant"] % 2 else job["in_channels"]
        read = images * job["height"] * job["width"] * channels
    if hidden or not job["to_hidden"]:
        written = images * job["out_height"] * job["out_width"] * job["out_channels"]
    return read + written * (2 if job["add"] else 1)
