"""Uniform samples of the architectures that meet constraints: `[num, L]` out.

One constraint on a whole-number cost is met with no rejection: completions of every prefix are
counted by dynamic programming over the cost in bins of its common divisor, and the architecture of
a drawn rank is built. Real-valued costs, costs of too many bins and several constraints at once are
sampled from a superset: the most selective constraint, its costs rounded to bins so that no
feasible architecture is lost. Draws that break a constraint are then rejected, and their share is
reported. The work is done by `fastshift._core`; `_population_ref` is the same in plain Python.

Both ways are exactly uniform whatever the size of the counts. These are integers of as many 64-bit
words as they need (two from 32 blocks of four choices on), and a rank has as many random bits as
the count, drawn again where it is not below it: no probability is rounded. The one limit is the
generator's: a seed starts one of 2^64 sequences, and a rank of over 256 bits, longer than the
generator's state, cannot take every value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastshift._native import core as _core
from fastshift.constraints import Constraint, parse_constraints
from fastshift.errors import CheckpointError, ConstraintError
from fastshift.space import SearchSpace

__all__ = ["Constraints", "FeasibleSampler", "wanted"]

Constraints = Mapping[str, Any] | Iterable[Constraint] | None

_MAX_BINS = 1 << 20  # of one level of the counting table
# Of the whole table: 256 MiB. From 32 blocks on it is this that bounds the bins: they times the
# words of a count times the levels must fit, which leaves 508,400 bins to 32 blocks of four choices
# and 172,074 to 64.
_MAX_TABLE_WORDS = 1 << 25
_COARSE_BINS = 1 << 14  # for costs that are not whole numbers of few enough bins
_MAX_LISTED = 1 << 16  # architectures that are looked through one by one where no draw succeeds
_EXACT_FLOAT = 1 << 53  # integers below it are exact in float64
_STREAM = 0x5A3D_71C2_9E0F_B846  # parts a sampler's draws from those of an Evolution of its seed


class FeasibleSampler:
    """Draws architectures, each of those that meet the constraints with the same probability.

    Args:
        space: the search space.
        constraints: bounds on costs, as `parse_constraints` takes them.
        seed: of the draws, at least 0.

    Raises:
        ConstraintError: malformed; or no architecture meets all, where it names the cheapest and
            the dearest; or none was found in 100,000 draws, where one may exist.

    Example:
        >>> from fastshift import spaces
        >>> sampler = FeasibleSampler(spaces.build("nasbench_macro"), {"flops": "60M"}, seed=1)
        >>> sampler.count, sampler.sample(2).shape
        (4075, (2, 8))
    """

    _sampler_type = _core.Sampler

    def __init__(self, space: SearchSpace, constraints: Constraints = None, seed: int = 0) -> None:
        self.space = space
        self.constraints = parse_constraints(space, constraints)
        self.seed = seed
        binding = [bound for bound in self.constraints if not _is_void(space, bound)]
        bounds = [_as_floats(space, bound) for bound in binding]
        plans = [_bins(space, bound) for bound in binding]
        if not plans:
            plans = [(np.zeros(space.flops_table.shape, np.int32), 0, 0, True)]
        samplers = [
            self._sampler_type(
                space.num_choices, bins=bins, low_bin=low, high_bin=high, bounds=bounds
            )
            for bins, low, high, _ in plans
        ]
        for sampler, bound in zip(samplers, binding, strict=False):
            if sampler.count == 0:
                raise ConstraintError(_infeasible(space, [bound]))
        self.core = min(samplers, key=lambda sampler: sampler.count)
        self.is_exact = len(plans) == 1 and plans[0][3]
        self._rng = _core.seeded(_checked_seed(seed) ^ _STREAM)
        self._proposals, self._accepted = 0, 0
        if not self.is_exact:  # a first draw tells whether there is anything to be found
            archs, _, self._proposals = self.core.sample(1, rng=self._rng)
            self._accepted = len(archs)
            if not len(archs):
                raise ConstraintError(self._none_found(binding))

    def _none_found(self, binding: Sequence[Constraint]) -> str:
        """Say that there is no architecture where all were looked at, else that none was drawn."""
        if self.core.count <= _MAX_LISTED:
            listed = self.core.unrank(np.arange(self.core.count, dtype=np.uint64))
            if not self.core.is_feasible(listed).any():
                return _infeasible(self.space, binding)
        return (
            f"no architecture of {self.space.name} with {wanted(binding)} was found: none in "
            f"{self._proposals:,} draws, an acceptance below {1 / self._proposals:.0e}; one may "
            "exist, wider bounds would show it"
        )

    @property
    def count(self) -> int | None:
        """The number of feasible architectures; None where draws are rejected."""
        return self.core.count if self.is_exact else None

    @property
    def acceptance_rate(self) -> float:
        """The fraction of draws so far that met all constraints; 1 where none can be rejected."""
        return self._accepted / self._proposals if self._proposals else 1.0

    def sample(self, num: int) -> np.ndarray:
        """Draw architectures, `[num, L]` uint8, independently.

        Raises:
            ConstraintError: a draw was rejected 100,000 times.
        """
        archs, self._rng, proposals = self.core.sample(num, rng=self._rng)
        self._proposals += proposals
        self._accepted += len(archs)
        if len(archs) < num:
            raise ConstraintError(
                f"only {len(archs)} of {num} architectures with {wanted(self.constraints)} were "
                f"found in {proposals:,} draws; of all draws so far "
                f"{self.acceptance_rate:.2g} were accepted, expected one in 100,000 at least"
            )
        return archs

    def is_feasible(self, archs: Any) -> np.ndarray:
        """Return which rows of `archs` `[P, L]` meet the constraints, `[P]` bool."""
        return self.core.is_feasible(self.space.as_archs(archs))

    def state_dict(self) -> dict[str, Any]:
        """Return the generator and the counters as JSON-able values."""
        return {
            "format": 1,
            "rng": list(self._rng),
            "proposals": self._proposals,
            "accepted": self._accepted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CheckpointError: not a sampler's state.
        """
        try:
            rng = [int(word) for word in state["rng"]]
            counters = int(state["proposals"]), int(state["accepted"])
            if state["format"] != 1 or len(rng) != 4 or not any(rng):
                raise ValueError(f"format 1 and four words expected, got {state!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"sampler state cannot be read: {error!r}") from error
        self._rng, (self._proposals, self._accepted) = rng, counters

    def __repr__(self) -> str:
        return (
            f"FeasibleSampler({self.space.name!r}, {wanted(self.constraints) or 'no constraint'}, "
            f"count={self.count})"
        )


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be 0 to 2^64 - 1, got {seed}")
    return seed


def wanted(constraints: Iterable[Constraint]) -> str:
    """Return `metric in low:high` of each constraint."""
    return ", ".join(
        f"{bound.metric} in {'' if bound.low is None else f'{bound.low:.10g}'}:"
        f"{'' if bound.high is None else f'{bound.high:.10g}'}"
        for bound in constraints
    )


def _infeasible(space: SearchSpace, constraints: Sequence[Constraint]) -> str:
    extremes = "; ".join(
        f"of {metric} the cheapest, {space.format(space.cheapest(metric))}, has "
        f"{space.smallest(metric):.10g}, the dearest, {space.format(space.dearest(metric))}, has "
        f"{space.largest(metric):.10g}"
        for metric in dict.fromkeys(bound.metric for bound in constraints)
    )
    return f"no architecture of {space.name} has {wanted(constraints)}; {extremes}"


def _is_void(space: SearchSpace, bound: Constraint) -> bool:
    """Return whether every architecture meets a constraint."""
    is_low_met = bound.low is None or bound.low <= space.smallest(bound.metric)
    return is_low_met and (bound.high is None or bound.high >= space.largest(bound.metric))


def _as_floats(space: SearchSpace, bound: Constraint) -> tuple[np.ndarray, float, float, float]:
    """Return a constraint's costs `[L, O]`, fixed cost and bounds as float64."""
    table, fixed = space.costs[bound.metric]
    low = -math.inf if bound.low is None else float(bound.low)
    high = math.inf if bound.high is None else float(bound.high)
    return table.astype(np.float64), float(fixed), low, high


def _bins(space: SearchSpace, bound: Constraint) -> tuple[np.ndarray, int, int, bool]:
    """Put a constraint's costs above each block's cheapest choice into bins.

    Returns:
        The bins of each choice `[L, O]` int32; the bounds on their sum, which every feasible
        architecture meets; whether no other architecture does.
    """
    table, fixed = space.costs[bound.metric]
    is_choice = np.arange(table.shape[1]) < space.num_choices[:, None]
    least = np.where(is_choice, table, table.max()).min(axis=1)
    excess = np.where(is_choice, table - least[:, None], 0)
    limbs = 1 + sum((int(n) - 1).bit_length() for n in space.num_choices) // 64
    most = min(_MAX_BINS, _MAX_TABLE_WORDS // (limbs * (space.num_blocks + 1)))
    if table.dtype.kind == "i" and space.largest(bound.metric) < _EXACT_FLOAT:
        base = fixed + int(least.sum())
        step = int(np.gcd.reduce(excess, axis=None)) or 1
        low = 0 if bound.low is None else max(0, -((base - math.ceil(bound.low)) // step))
        high = total = int(excess.max(axis=1).sum()) // step
        if bound.high is not None:
            high = min(total, (math.floor(bound.high) - base) // step)
        if high < most:
            # A choice that is dearer than the bound by itself needs no more bins than that.
            return np.minimum(excess // step, max(high, 0) + 1).astype(np.int32), low, high, True
    excess = excess.astype(np.float64)
    span = float(excess.max(axis=1).sum())
    width = span / min(most, _COARSE_BINS)
    # Rounding down loses less than a bin a block; sums of L + 1 floats are off by their rounding.
    rounding = (space.num_blocks + 1) * float(space.largest(bound.metric)) * 2.0**-50
    slack = 2 + math.ceil(rounding / width)
    base = float(fixed) + float(least.sum())
    low, high = 0, 2 * min(most, _COARSE_BINS)
    if bound.low is not None:
        low = max(0, math.floor((bound.low - base) / width) - space.num_blocks - slack)
    if bound.high is not None:
        high = min(high, math.floor((bound.high - base) / width) + slack)
    return np.floor(excess / width).astype(np.int32), low, high, False
