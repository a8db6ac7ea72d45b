"""One thing to be timed, and what it is timed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_timing import Clock, Stopwatch

__all__ = ["GATE", "PARTS", "Bench", "Item", "Row"]

Row = dict[str, Any]

# Of the time that the gate and the ceilings leave, by when each part is to be done; what one does
# not need goes to the next.
PARTS = {"evaluator": 0.35, "shift step": 0.65, "kernels": 0.88, "search": 1.0}
GATE = 0.6  # of the whole time at most: a first run compiles every kernel


@dataclass
class Bench:
    """A device, its clock and what was found so far.

    Attributes:
        device: that is timed.
        clock: of the budget.
        tiny: a dry run, whose figures are no results.
        ceilings: as `gpu_ceilings.measure` gives them.
        left_out: what was not timed, and why.
    """

    device: torch.device
    clock: Clock
    tiny: bool
    ceilings: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def stopwatch(self) -> Stopwatch:
        """Of the device."""
        return Stopwatch(self.device)

    @property
    def rounds(self) -> dict[str, int]:
        """How many rounds a dry run makes; what `gpu_timing` has otherwise."""
        return {"rounds": 2, "fewest": 1} if self.tiny else {}

    @property
    def cache_bytes(self) -> int:
        """Of the device's last cache."""
        if self.device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def leave(self, what: str, why: str) -> None:
        """Note what is not timed."""
        self.left_out[what] = why


@dataclass(frozen=True)
class Item:
    """Something to be timed.

    Attributes:
        part: of `PARTS`.
        name: for people; unique.
        measure: yields a row for each provider and baseline.
    """

    part: str
    name: str
    measure: Callable[[Bench], Iterator[Row]]
