"""Evolutionary search by ask and tell: architectures `[P, L]` out, their scores `[P]` in.

Errors and losses are minimised; NaN means failed. Numpy arrays come in and go out; the compiled
`fastshift._core` does the work, and `_population_ref` is the same in plain Python.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastshift._native import core as _core
from fastshift.errors import CheckpointError, ConstraintError
from fastshift.sampler import Constraints, FeasibleSampler, wanted
from fastshift.space import SearchSpace

__all__ = ["Evolution", "Scored"]

_PRODUCERS = {"mutants": "mutation", "children": "crossover"}


@dataclass(frozen=True)
class Scored:
    """An architecture with its score.

    Attributes:
        arch: choices, `[L]`.
        error: top-1 error in [0, 1].
        flops: multiply-adds per image.
        params: parameters.
        weights_version: optimiser steps the weights had seen when it was scored.
        generation: the generation that proposed it last.
        loss: mean loss; NaN where none was told.
    """

    arch: tuple[int, ...]
    error: float
    flops: int
    params: int
    weights_version: int
    generation: int
    loss: float = math.nan


class Evolution:
    """Proposes generations of architectures and keeps the best.

    Generation 0 is uniform over feasible architectures. A later one holds mutants of parents, then
    children of two parents, then uniform ones up to the size; no two are equal and none is in the
    seen-set. A producer gives up after 10 tries for each architecture it owes; what is missing is
    made up by the next, and `last_ask["reason"]` says so. Use an object from one thread at a time.

    Args:
        space: the search space.
        population: architectures in a generation.
        parents: the best of the kept architectures, from which mutants and children come.
        mutation: mutants in a generation; half the population by default.
        crossover: children in a generation; half the population by default.
        mutation_prob: of each gene, to be redrawn from all its choices.
        constraints: bounds on costs, as `parse_constraints` takes them.
        seed: of all random choices, at least 0.
        seen: `"run"` where scores stay valid: nothing is asked twice and the best of all are kept.
            `"generation"` where weights move: an architecture may come again in each generation,
            and a generation's scores are merged with those of the present parents only.
        keep: architectures kept with their scores.
        score_by: `"error"` orders by error, then loss; `"loss"` by loss, then error. Ties go to the
            lower FLOPs, then to the lower choices.

    Raises:
        ConstraintError: malformed, or no architecture meets all; names the cheapest and dearest.
        ValueError: a number out of its range.

    Attributes:
        last_ask: how many `mutants`, `children` and `random` the last ask made, in how many
            `tries`; `reason` is empty where nothing fell short.
    """

    _population_type = _core.Population
    _sampler = FeasibleSampler

    def __init__(
        self,
        space: SearchSpace,
        population: int = 50,
        parents: int = 10,
        *,
        mutation: int | None = None,
        crossover: int | None = None,
        mutation_prob: float = 0.1,
        constraints: Constraints = None,
        seed: int = 0,
        seen: str = "run",
        keep: int = 50,
        score_by: str = "error",
    ) -> None:
        sizes = {
            "population": population,
            "parents": parents,
            "mutation": population // 2 if mutation is None else mutation,
            "crossover": population // 2 if crossover is None else crossover,
            "keep": keep,
        }
        sizes = {name: operator.index(size) for name, size in sizes.items()}
        for name, least in (("population", 1), ("parents", 1), ("mutation", 0), ("crossover", 0)):
            if sizes[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {sizes[name]}")
        if sizes["keep"] < sizes["parents"]:
            raise ValueError(f"keep must be at least parents ({parents}), got {keep}")
        if sizes["mutation"] + sizes["crossover"] > population:
            raise ValueError(
                f"mutation + crossover must be at most population ({population}), "
                f"got {sizes['mutation']} + {sizes['crossover']}"
            )
        if not 0 <= mutation_prob <= 1:
            raise ValueError(f"mutation_prob must be in [0, 1], got {mutation_prob}")
        if seen not in ("run", "generation"):
            raise ValueError(f"seen must be 'run' or 'generation', got {seen!r}")
        if score_by not in ("error", "loss"):
            raise ValueError(f"score_by must be 'error' or 'loss', got {score_by!r}")
        self.space = space
        self.sampler = self._sampler(space, constraints, seed)
        self._settings = {
            **sizes,
            "mutation_prob": float(mutation_prob),
            "seed": operator.index(seed),
            "seen": seen,
            "score_by": score_by,
        }
        self._core = self._population_type(
            self.sampler.core,
            **sizes,
            mutation_prob=mutation_prob,
            seen_lasts=seen == "run",
            loss_first=score_by == "loss",
            seed=seed,
        )
        self.last_ask = {"mutants": 0, "children": 0, "random": 0, "tries": 0, "reason": ""}

    def ask(self) -> np.ndarray:
        """Propose the next generation, `[P, L]` uint8.

        Fewer rows than `population`, even none, come only where the seen-set leaves no more, or the
        random fill gave up; `last_ask["reason"]` says which.
        """
        archs = self._core.ask()
        report = self._core.last_ask
        size, quotas = self._settings["population"], {}
        reasons = []
        if report["parents"]:
            quotas = {name: self._settings[key] for name, key in _PRODUCERS.items()}
        elif self.generation > 0:
            reasons.append("no parents: no score so far is a number")
        reasons += [
            f"{report[name]} of {quota} {name} in {10 * quota} tries"
            for name, quota in quotas.items()
            if report[name] < quota
        ]
        if len(archs) < size:
            cause = "no feasible one is unseen" if report["is_exhausted"] else "random fill gave up"
            reasons.append(f"{len(archs)} of {size} architectures: {cause}")
        self.last_ask = {name: report[name] for name in ("mutants", "children", "random", "tries")}
        self.last_ask["reason"] = "; ".join(reasons)
        return archs

    def tell(
        self, archs: Any, errors: Any, losses: Any = None, *, weights_version: Any = 0
    ) -> None:
        """End a generation by its scores.

        A second score of an architecture replaces the first. NaN takes it out of the kept ones.

        Args:
            archs: choices, `[P, L]`, or anything `as_archs` takes.
            errors: top-1 errors, `[P]`; NaN where scoring failed.
            losses: mean losses, `[P]`.
            weights_version: optimiser steps the weights had seen, one number or `[P]`.

        Raises:
            ArchError: a row is not in the space.
            ConstraintError: a row breaks the constraints.
            ValueError: errors, losses or versions are not `[P]`, or losses are missing and decide.
        """
        archs = self.space.as_archs(archs)
        is_feasible = self.sampler.core.is_feasible(archs)
        if not is_feasible.all():
            row = int(is_feasible.argmin())
            raise ConstraintError(
                f"archs row {row}: {self.space.format(archs[row])} is not in "
                f"{wanted(self.sampler.constraints)}"
            )
        columns = self._columns(archs, errors, losses)
        versions = _versions(weights_version, len(archs))
        self._core.tell(archs, *columns, version=versions[0] if versions else 0)
        self._set_versions(archs, versions)

    def replace_scores(
        self, archs: Any, errors: Any, losses: Any = None, *, weights_version: Any = 0
    ) -> None:
        """Give kept architectures, such as the parents, new scores, without ending a generation.

        With `seen="generation"` kept architectures that are not among `archs` are dropped, since
        their scores belong to earlier weights.

        Args:
            archs: kept architectures, `[P, L]`, or anything `as_archs` takes.
            errors: top-1 errors, `[P]`; NaN where scoring failed.
            losses: mean losses, `[P]`.
            weights_version: optimiser steps the weights had seen, one number or `[P]`.

        Raises:
            ArchError: a row is not in the space.
            ValueError: a row is not kept, or as for `tell`.
        """
        archs = self.space.as_archs(archs)
        columns = self._columns(archs, errors, losses)
        versions = _versions(weights_version, len(archs))
        self._core.replace_scores(archs, *columns, version=versions[0] if versions else 0)
        self._set_versions(archs, versions)

    def _set_versions(self, archs: np.ndarray, versions: list[int]) -> None:
        """Give rows just told their own versions; the core takes one for all."""
        if len(set(versions)) < 2:
            return
        told = dict(zip(map(bytes, archs), versions, strict=True))  # of equal rows the last
        *counters, kept = self._core.state()
        rows, *columns, old, generations = kept
        new = [
            told.get(bytes(row), version) for row, version in zip(rows, old.tolist(), strict=True)
        ]
        self._core.set_state((*counters, (rows, *columns, np.array(new, np.int64), generations)))

    def _columns(self, archs: np.ndarray, errors: Any, losses: Any) -> list[np.ndarray]:
        if losses is None and self._settings["score_by"] == "loss":
            raise ValueError("losses are expected with score_by='loss', got None")
        columns = []
        for name, values in (("errors", errors), ("losses", losses)):
            if values is None:
                values = np.full(len(archs), np.nan)
            column = np.ascontiguousarray(values, dtype=np.float64)
            if column.shape != (len(archs),):
                raise ValueError(f"{name} must have shape ({len(archs)},), got {column.shape}")
            columns.append(column)
        return [*columns, self.space.flops(archs)]

    @property
    def generation(self) -> int:
        """Generations told so far; the number of the one that `ask` gives."""
        return self._core.generation

    @property
    def parents(self) -> np.ndarray:
        """The best kept architectures, best first, `[K, L]` uint8, K at most `parents`."""
        return self._core.kept[0][: self._settings["parents"]]

    @property
    def best(self) -> Scored | None:
        """The best kept architecture; None before a score that is a number."""
        return next(iter(self.top_k(1)), None)

    def top_k(self, k: int) -> list[Scored]:
        """Return the `k` best kept architectures, best first; fewer where fewer are kept.

        Raises:
            ValueError: `k` is above `keep`.
        """
        if not 0 <= k <= self._settings["keep"]:
            raise ValueError(f"k must be 0 to keep ({self._settings['keep']}), got {k}")
        archs, *columns = (column[:k] for column in self._core.kept)
        errors, losses, flops, versions, generations = (column.tolist() for column in columns)
        rows = map(tuple, archs.tolist())
        params = self.space.params(archs).tolist()
        return [
            Scored(*row)
            for row in zip(rows, errors, flops, params, versions, generations, losses, strict=True)
        ]

    @property
    def feasible_count(self) -> int | None:
        """The number of feasible architectures; None where draws are rejected."""
        return self.sampler.count

    @property
    def acceptance_rate(self) -> float:
        """The fraction of the random fill's draws that met all constraints."""
        proposals = self._core.proposals
        return self._core.accepted / proposals if proposals else self.sampler.acceptance_rate

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on exactly, as JSON-able values."""
        rng, generation, proposals, accepted, seen, kept = self._core.state()
        archs, errors, losses, _, versions, generations = kept
        return {
            "format": 1,
            "settings": self._described(),
            "rng": list(rng),
            "generation": generation,
            "proposals": proposals,
            "accepted": accepted,
            "seen": self.space.format_all(seen),
            "kept": {
                "archs": self.space.format_all(archs),
                "errors": errors.tolist(),
                "losses": losses.tolist(),
                "versions": versions.tolist(),
                "generations": generations.tolist(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CheckpointError: not a population's state, or one of other settings.
        """
        settings = self._described()
        try:
            if state["format"] != 1:
                raise ValueError(f"format must be 1, got {state['format']!r}")
            for name, value in state["settings"].items():
                if settings[name] != value:
                    raise CheckpointError(
                        f"population state was saved with {name}={value!r}, "
                        f"this search has {settings[name]!r}"
                    )
            kept = state["kept"]
            archs = self.space.as_archs(kept["archs"])
            columns = (
                archs,
                np.array(kept["errors"], np.float64),
                np.array(kept["losses"], np.float64),
                self.space.flops(archs),
                np.array(kept["versions"], np.int64),
                np.array(kept["generations"], np.int64),
            )
            seen = self.space.as_archs(state["seen"])
            counters = (state["generation"], state["proposals"], state["accepted"])
            self._core.set_state((state["rng"], *counters, seen, columns))
        except CheckpointError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"population state cannot be read: {error!r}") from error

    def _described(self) -> dict[str, Any]:
        bounds = [[bound.metric, bound.low, bound.high] for bound in self.sampler.constraints]
        return {
            **self._settings,
            "num_choices": self.space.num_choices.tolist(),
            "constraints": bounds,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {
            "space": self.space,
            "constraints": self.sampler.constraints,
            "settings": self._settings,
            "state": self.state_dict(),
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(saved["space"], constraints=saved["constraints"], **saved["settings"])
        self.load_state_dict(saved["state"])

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"Evolution({self.space.name!r}, generation={self.generation}, {settings})"


def _versions(given: Any, num: int) -> list[int]:
    """Return a version for each of `num` rows, from one number or `[num]`."""
    versions = np.asarray(given)
    if versions.dtype.kind not in "iu" or versions.shape not in ((), (num,)):
        raise ValueError(
            f"weights_version must be a whole number or have shape ({num},), got {given!r}"
        )
    return np.broadcast_to(versions, num).tolist()
