"""Additive costs of architectures: a table `[L, O]` over the choices, plus a fixed part.

The fixed part is the stem's and the head's. Whole-number costs stay exact integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from fastshift.archs import ChoiceBlocks
from fastshift.errors import SpaceError

__all__ = ["CostTables"]


class CostTables(ChoiceBlocks):
    """Choice blocks whose architectures have costs, `flops` and `params` at least.

    Args:
        name: what reports call the space.
        num_choices: candidate ops of each choice block, `[L]`.
        flops: multiply-adds of each choice, `[L, O]` or `[L][O_l]`, and of stem and head.
        params: parameters, likewise.

    Attributes:
        costs: metric -> (table `[L, O]`, zero past a block's choices; fixed part).

    Raises:
        SpaceError: no block or too many choices, or a table does not fit.
    """

    def __init__(
        self,
        name: str,
        num_choices: Sequence[int],
        *,
        flops: tuple[Any, int],
        params: tuple[Any, int],
    ) -> None:
        super().__init__(name, num_choices)
        self._is_choice = np.arange(self.num_choices.max()) < self.num_choices[:, None]
        self.costs: dict[str, tuple[np.ndarray, int | float]] = {}
        self._set_cost("flops", *flops)
        self._set_cost("params", *params)

    @property
    def flops_table(self) -> np.ndarray:
        """Multiply-adds of each choice, `[L, O]` int64; zero past a block's choices."""
        return self.costs["flops"][0]

    @property
    def params_table(self) -> np.ndarray:
        """Parameters of each choice, `[L, O]` int64; zero past a block's choices."""
        return self.costs["params"][0]

    @property
    def fixed_flops(self) -> int:
        """Multiply-adds of stem and head."""
        return self.costs["flops"][1]

    @property
    def fixed_params(self) -> int:
        """Parameters of stem and head."""
        return self.costs["params"][1]

    def _padded(self, name: str, table: Any) -> np.ndarray:
        """Return a table of `[L][O_l]` rows or `[L, O]` as `[L, O]` with zeros past the choices."""
        shape = self._is_choice.shape
        rows = [np.asarray(row) for row in table]
        if any(row.ndim != 1 for row in rows):
            raise SpaceError(f"{name}: expected one row of numbers a choice block, got {table!r}")
        if len(rows) != shape[0]:
            raise SpaceError(
                f"{name}: expected {shape[0]} rows, one a choice block, got {len(rows)}"
            )
        padded = np.zeros(shape, dtype=np.result_type(*rows))
        for index, row in enumerate(rows):
            choices = int(self.num_choices[index])
            if len(row) not in (choices, shape[1]):
                raise SpaceError(
                    f"{name}: row {index} has {len(row)} entries, expected {choices} choices"
                )
            padded[index, :choices] = row[:choices]
        return padded

    def _set_cost(self, name: str, table: Any, fixed: float) -> None:
        padded = self._padded(f"cost {name!r}", table)
        if padded.dtype.kind not in "iuf":
            raise SpaceError(f"cost {name!r}: the table must hold numbers, got {padded.dtype}")
        is_whole = padded.dtype.kind in "iu" and isinstance(fixed, Integral)
        if not np.isfinite(padded).all() or not math.isfinite(fixed):
            raise SpaceError(f"cost {name!r}: every entry must be finite")
        if padded.min() < 0 or fixed < 0:
            raise SpaceError(f"cost {name!r}: no entry may be negative")
        if is_whole and int(fixed) + sum(padded.max(axis=1).tolist()) >= 2**63:
            raise SpaceError(f"cost {name!r}: the dearest architecture does not fit in 64 bits")
        padded = padded.astype(np.int64 if is_whole else np.float64)
        padded.flags.writeable = False
        self.costs[name] = (padded, int(fixed) if is_whole else float(fixed))

    def add_cost(self, name: str, table: Any, fixed: float = 0) -> None:
        """Add a cost that is a sum over choice blocks, such as a measured latency.

        Args:
            name: the metric, as constraints name it; an earlier one of that name is replaced.
            table: cost of each choice, `[L, O]` or `[L][O_l]`, not negative; integers stay exact.
            fixed: cost of stem and head.

        Raises:
            SpaceError: wrong shape, a negative or non-finite entry, or the name of a built-in cost.
        """
        if name in ("flops", "params"):
            raise SpaceError(f"cost {name!r} follows from the description and cannot be replaced")
        self._set_cost(name, table, fixed)

    def _cost(self, name: str) -> tuple[np.ndarray, int | float]:
        if name not in self.costs:
            raise SpaceError(f"unknown cost {name!r}: expected one of {', '.join(self.costs)}")
        return self.costs[name]

    def cost(self, name: str, archs: Any) -> np.ndarray:
        """Return the cost of architectures.

        Args:
            name: the metric, a key of `costs`.
            archs: `[P, L]`, or anything `as_archs` takes.

        Returns:
            `[P]`, int64 for a whole-number cost, float64 otherwise.

        Raises:
            ArchError: a row is not in the space.
            SpaceError: the metric is unknown.
        """
        table, fixed = self._cost(name)
        archs = self.as_archs(archs)
        total = np.full(len(archs), fixed, dtype=table.dtype)
        for block in range(self.num_blocks):  # a [P, L] gather would need 8 bytes an entry
            total += table[block].take(archs[:, block])
        return total

    def flops(self, archs: Any) -> np.ndarray:
        """Return multiply-adds per image, `[P]` int64, of `archs` `[P, L]`."""
        return self.cost("flops", archs)

    def params(self, archs: Any) -> np.ndarray:
        """Return parameter counts, `[P]` int64, of `archs` `[P, L]`."""
        return self.cost("params", archs)

    def cheapest(self, metric: str) -> np.ndarray:
        """Return an architecture of least cost, `[L]` uint8."""
        table = self._cost(metric)[0].astype(np.float64)
        return np.where(self._is_choice, table, np.inf).argmin(axis=1).astype(np.uint8)

    def dearest(self, metric: str) -> np.ndarray:
        """Return an architecture of greatest cost, `[L]` uint8."""
        table = self._cost(metric)[0].astype(np.float64)
        return np.where(self._is_choice, table, -np.inf).argmax(axis=1).astype(np.uint8)

    def smallest(self, metric: str) -> int | float:
        """Return the least cost of any architecture."""
        return self.cost(metric, self.cheapest(metric))[0].item()

    def largest(self, metric: str) -> int | float:
        """Return the greatest cost of any architecture."""
        return self.cost(metric, self.dearest(metric))[0].item()
