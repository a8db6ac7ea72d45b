"""Constraints on costs: as users write them -> bounds, checked against what a space can cost."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from fastshift.costs import CostTables
from fastshift.errors import ConstraintError

__all__ = ["Constraint", "parse_constraints"]


@dataclass(frozen=True)
class Constraint:
    """Bounds on a cost, both inclusive; None where there is none."""

    metric: str
    low: float | None = None
    high: float | None = None

    def admits(self, costs: np.ndarray) -> np.ndarray:
        """Return which costs lie within the bounds, boolean, of the shape of `costs`."""
        costs = np.asarray(costs)
        admitted = np.ones(costs.shape, dtype=np.bool_)
        if self.low is not None:
            admitted &= costs >= self.low
        if self.high is not None:
            admitted &= costs <= self.high
        return admitted


_SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_BOUND = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)([kMG%]?)")
_FORMS = (
    "330M, 60% (of the largest), a range 290M:330M, 290M: or :330M, a number, or a (low, high) pair"
)


def parse_constraints(
    space: CostTables, constraints: Mapping[str, Any] | Iterable[Constraint] | None
) -> tuple[Constraint, ...]:
    """Resolve constraints as users write them.

    Args:
        space: whose costs are meant.
        constraints: metric -> `"330M"`, `"60%"` (of the largest cost), `"290M:330M"`, `"290M:"`,
            `":330M"`, a number (an upper bound), or a `(low, high)` pair with None for no bound.
            Suffixes are k, M and G. A metric whose value is None is left out. Resolved constraints
            pass.

    Returns:
        One `Constraint` a metric, in the order given.

    Raises:
        ConstraintError: unknown metric, malformed or negative bound, low above high, or bounds
            outside what any architecture costs; the last names the cheapest and the dearest.
    """
    if constraints is None:
        return ()
    if isinstance(constraints, Mapping):
        resolved = tuple(
            _parse_constraint(space, metric, value)
            for metric, value in constraints.items()
            if value is not None
        )
    else:
        is_resolved = isinstance(constraints, Iterable) and not isinstance(constraints, str)
        resolved = tuple(constraints) if is_resolved else (constraints,)
        if not all(isinstance(constraint, Constraint) for constraint in resolved):
            raise ConstraintError(f"constraints must map metrics to bounds, got {constraints!r}")
    for constraint in resolved:
        _check_reachable(space, constraint)
    return resolved


def _parse_constraint(space: CostTables, metric: str, value: Any) -> Constraint:
    if metric not in space.costs:
        known = ", ".join(space.costs)
        raise ConstraintError(f"unknown constraint {metric!r}: expected one of {known}")
    given = f"constraint {metric}={value!r}"
    if space.largest(metric) == 0:
        raise ConstraintError(
            f"{given}: no {metric} are known of {space.name}; a supernet of modules counts FLOPs "
            "where it is given an input_shape"
        )
    if isinstance(value, (tuple, list)):
        bounds = list(value)
    elif isinstance(value, str):
        bounds = [part.strip() or None for part in value.split(":")]
        if len(bounds) == 1:
            bounds = [None, value]
    else:
        bounds = [None, value]
    if len(bounds) != 2 or bounds == [None, None]:
        raise ConstraintError(f"{given}: expected {_FORMS}")
    low, high = (_parse_bound(space, metric, bound, given) for bound in bounds)
    if low is not None and high is not None and low > high:
        raise ConstraintError(f"{given}: the lower bound {low:g} is above the upper bound {high:g}")
    return Constraint(metric, low, high)


def _parse_bound(space: CostTables, metric: str, bound: Any, given: str) -> float | None:
    if bound is None:
        return None
    if isinstance(bound, str):
        match = _BOUND.fullmatch(bound.strip())
        if match is None:
            raise ConstraintError(f"{given}: cannot read {bound!r}; expected {_FORMS}")
        number = Decimal(match[1])
        if match[2] == "%":
            if number > 100:
                raise ConstraintError(f"{given}: {bound} of the largest; expected at most 100%")
            return float(number * Decimal(space.largest(metric)) / 100)
        resolved = float(number * _SCALES[match[2]])
    elif isinstance(bound, Real) and not isinstance(bound, bool):
        resolved = float(bound)
    else:
        raise ConstraintError(f"{given}: cannot read {bound!r}; expected {_FORMS}")
    if not math.isfinite(resolved) or resolved < 0:
        raise ConstraintError(f"{given}: a bound must be finite and not negative, got {bound!r}")
    return resolved


def _check_reachable(space: CostTables, constraint: Constraint) -> None:
    """Refuse bounds that lie wholly below or above what architectures cost."""
    metric, low, high = constraint.metric, constraint.low, constraint.high
    if metric not in space.costs:
        raise ConstraintError(
            f"unknown constraint {metric!r}: expected one of {', '.join(space.costs)}"
        )
    smallest, largest = space.smallest(metric), space.largest(metric)
    if (high is not None and high < smallest) or (low is not None and low > largest):
        bounds = (("at least", low), ("at most", high))
        wanted = " and ".join(f"{word} {x:.10g}" for word, x in bounds if x is not None)
        share = f" ({100 * smallest / largest:.3g}% of the dearest)" if largest else ""
        raise ConstraintError(
            f"no architecture of {space.name} has {metric} of {wanted}: the cheapest, "
            f"{space.format(space.cheapest(metric))}, has {smallest:.10g}{share}, the dearest, "
            f"{space.format(space.dearest(metric))}, has {largest:.10g}"
        )
