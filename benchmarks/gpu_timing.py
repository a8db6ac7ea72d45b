"""Calls timed in turns, by CUDA events or by a CPU's clock, within a budget of time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

__all__ = ["Call", "Clock", "OutOfTimeError", "Several", "Stopwatch", "Times", "in_turns"]

SPAN = 2e-3  # seconds between two events at least, so that their own resolution is no matter
MOST_CALLS = 256  # between two events
ROUNDS, FEWEST_ROUNDS = 20, 5

Call = Callable[[int], object]


@dataclass(frozen=True)
class Several:
    """A call that does what several calls do, such as a graph of them.

    Attributes:
        call: does it.
        number: of calls that it stands for.
    """

    call: Callable[[], object]
    number: int

    def __call__(self, _: int) -> object:
        """Do it, whatever the number of the call."""
        return self.call()


class OutOfTimeError(Exception):
    """What is being timed does not fit into the time that is left."""


class Clock:
    """A budget of wall time, from now on.

    Args:
        seconds: of it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._begin = seconds, time.monotonic()
        self._deadline, self._shared_from = seconds, 0.0

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        """Seconds to the present deadline."""
        return self._deadline - self.spent

    def share(self) -> None:
        """Let shares be of what is left now."""
        self._shared_from = self.spent

    def until(self, share: float) -> None:
        """Set the present deadline, as a share of the budget or of what `share` found left."""
        self._deadline = self._shared_from + share * (self.seconds - self._shared_from)

    def need(self, seconds: float, what: str) -> None:
        """Refuse what takes longer than is left.

        Raises:
            OutOfTimeError: naming it.
        """
        if seconds >= self.left:
            raise OutOfTimeError(
                f"{what}: takes some {seconds:.1f} s, {max(self.left, 0):.1f} s left"
            )


class Stopwatch:
    """Seconds on a device: CUDA events on its stream, or a CPU's clock.

    Args:
        device: `cuda` or `cpu`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "CUDA events" if device.type == "cuda" else "CPU clock"

    def __call__(self, call: Callable[[], object]) -> float:
        """Time one call, waiting for the device before and after."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


@dataclass(frozen=True)
class Times:
    """Seconds a call took.

    Attributes:
        samples: of each round, a call's mean.
        calls: between two readings of the clock.
        first: of the first call, compilation included.
    """

    samples: tuple[float, ...]
    calls: int
    first: float

    def row(self, scale: float = 1.0) -> dict[str, float | int]:
        """Median and percentiles in milliseconds, four digits each.

        Args:
            scale: of all times; not 1 where a part was timed and stands for the whole.
        """
        found = {"median_ms": median(self.samples)}
        for percent in (20, 80):
            found[f"p{percent}_ms"] = float(np.percentile(self.samples, percent))
        rounded = {key: float(f"{1e3 * scale * value:.4g}") for key, value in found.items()}
        first = {"first_call_s": float(f"{self.first:.3g}")}
        return {**rounded, "rounds": len(self.samples), "calls_a_round": self.calls, **first}


def in_turns(
    calls: Mapping[str, Call | Several],
    stopwatch: Stopwatch,
    clock: Clock,
    *,
    rounds: int = ROUNDS,
    fewest: int = FEWEST_ROUNDS,
    seconds: float = math.inf,
) -> dict[str, Times]:
    """Time calls in turns, so that what changes on the machine meets them all.

    Args:
        calls: by name; each takes the number of the call, by which it picks its inputs.
        stopwatch: of the device.
        clock: of the budget.
        rounds: wanted, at least `fewest`, in between as many as fit into `seconds`.
        fewest: rounds that must fit.
        seconds: for all rounds together.

    Returns:
        Times by name.

    Raises:
        OutOfTimeError: the fewest rounds do not fit into what the clock has left.
    """
    first = {name: stopwatch(lambda c=call: c(0)) for name, call in calls.items()}
    once = {name: stopwatch(lambda c=call: c(1)) for name, call in calls.items()}
    clock.need(fewest * sum(once.values()), "the fewest rounds")
    number = {
        name: min(max(1, math.ceil(SPAN / max(seconds, 1e-9))), MOST_CALLS)
        for name, seconds in once.items()
    }
    counts = dict.fromkeys(calls, 0)

    def run(name: str) -> None:
        for _ in range(number[name]):
            calls[name](counts[name])
            counts[name] += 1

    # What is slow is warm by now.
    each = sum(
        once[name] if number[name] == 1 else stopwatch(lambda n=name: run(n)) for name in calls
    )
    fit = int(min(seconds, clock.left) / max(each, 1e-9))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    done = {n: number[n] * (c.number if isinstance(c, Several) else 1) for n, c in calls.items()}
    for turn in range(min(rounds, max(fewest, fit))):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(stopwatch(lambda n=name: run(n)) / done[name])
    return {name: Times(tuple(samples[name]), done[name], first[name]) for name in names}
