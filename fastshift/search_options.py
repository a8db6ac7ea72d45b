"""The options of a search, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from fastshift.errors import ConfigError
from fastshift.shift import ShiftOptions

__all__ = ["SearchOptions"]


@dataclass(frozen=True)
class SearchOptions(ShiftOptions):
    """How to search; the fields of `ShiftOptions` too.

    Attributes:
        generations: generations after the random generation 0.
        population: architectures of a generation.
        parents: the best ones, from which mutants and children come, at most `population`; by
            default 10, or a whole population that is smaller.
        mutation: mutants of a generation; by default half the population.
        crossover: children of two parents in a generation; by default half the population.
        mutation_prob: probability that a mutant's choice in a block is drawn anew.
        constraints: bounds by metric, as `space.parse_constraints` takes them.
        batch_norm: statistics that scores are taken with: `recalibrate`, `batch`, `running` or
            `ema`; by default `ema` for `immediate` and `recalibrate` otherwise.
        strategy: `shared` computes what candidates have in common once, `sequential` scores one
            after the other.
        score_by: `error` or `loss` decides; the other breaks ties.
        top_k: architectures scored again under the final weights.
        subtrie_size: candidates computed side by side; bounds memory.
    """

    generations: int = 20
    population: int = 50
    parents: int | None = None
    mutation: int | None = None
    crossover: int | None = None
    mutation_prob: float = 0.1
    constraints: dict[str, Any] = field(default_factory=dict)
    batch_norm: str | None = None
    strategy: str = "shared"
    score_by: str = "error"
    top_k: int = 10
    subtrie_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"generations": 0, "population": 1, "parents": 1, "top_k": 1, "subtrie_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name}: {value}; expected at least {lowest}")
        if self.num_parents > self.population:
            raise ConfigError(
                f"parents: {self.parents}; expected at most population, {self.population}"
            )

    @property
    def num_parents(self) -> int:
        """The number of parents, the default resolved."""
        return min(10, self.population) if self.parents is None else self.parents

    @property
    def policy(self) -> str:
        """The statistics policy of scores, the default resolved."""
        return self.batch_norm or self.default_batch_norm

    def warmup_steps(self, fresh_head: bool) -> int:
        """Steps that train the head alone, the default resolved.

        Raises:
            ConfigError: nothing would ever train a fresh head.
        """
        steps = self.head_warmup_steps
        if steps is None:
            steps = 200 if fresh_head and self.moves and self.shift != "immediate" else 0
        if fresh_head and not self.moves and not steps:
            raise ConfigError(
                "head_warmup_steps: 0; with shift 'none' nothing else would train the fresh head"
            )
        return steps

    def describe(self, *, fresh_head: bool) -> dict[str, Any]:
        """How the supernet shifts and architectures are scored, defaults resolved, JSON-able."""
        shift = {f.name: getattr(self, f.name) for f in fields(ShiftOptions)}
        return shift | {
            "mode": self.shift,
            "lr": self.lr_for(self.population) if self.moves else None,
            "steps": self.shift_steps if self.moves else 0,
            "batch_size": self.shift_batch_size if self.moves else 0,
            "score": "after" if self.scores_after else "before",
            "head_warmup_steps": self.warmup_steps(fresh_head),
            "batch_norm": self.policy,
            "score_by": self.score_by,
            "strategy": self.strategy,
            "constraints": self.constraints,
            "population": self.population,
            "parents": self.num_parents,
        }
