"""What a search knows of its architectures while it runs, and what it hands over at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fastshift.pareto import pareto_front
from fastshift.population import Scored
from fastshift.space import SearchSpace

__all__ = ["History", "SearchResult"]

FORMAT = 1


@dataclass(frozen=True)
class SearchResult:
    """What a search found; `to_dict` is what `result.json` holds.

    Attributes:
        best: the first of `top`; None where every score was NaN.
        top: the best of the last generation and its parents, scored again under the final weights.
        pareto: score against FLOPs, all under the final weights, cheapest first.
        generations: a record of each.
        seconds: wall time, the parts of a resumed run added up.
        archs_per_second: architectures scored over that time.
        budget: images and updates spent.
        data: what the data set says of itself.
        space: what the search space says of itself.
        shift: how the supernet was shifted and architectures were scored.
        stopped: why the search ended early, or None.
        computed: every way in which batches were scored (`score`) and trained on (`train`):
            `captured` as CUDA graphs, `static`, `sequential`, or `modules: ` and why not as graphs;
            and where the latter were augmented (`augment`), where the data says it.
    """

    best: Scored | None
    top: list[Scored]
    pareto: list[Scored]
    generations: list[dict[str, Any]]
    seconds: float
    archs_per_second: float
    budget: dict[str, int]
    data: dict[str, Any]
    space: dict[str, Any]
    shift: dict[str, Any]
    stopped: str | None
    format_arch: Callable[[Any], str] = field(repr=False, compare=False)
    computed: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-able values, architectures as strings."""

        def row(scored: Scored) -> dict[str, Any]:
            return asdict(scored) | {"arch": self.format_arch(scored.arch)}

        found = {"format": FORMAT, "best": row(self.best) if self.best else None}
        found |= {"top": [row(s) for s in self.top], "pareto": [row(s) for s in self.pareto]}
        names = ("generations", "seconds", "archs_per_second", "budget", "data", "space", "shift")
        return found | {name: getattr(self, name) for name in (*names, "stopped", "computed")}


class History:
    """The latest score of every architecture a search has seen, by its string.

    Args:
        space: the architectures'.
        score_by: `error` or `loss` decides; the other breaks ties.

    Attributes:
        rows: string -> [error, loss, generation that proposed it last, weights' version].
    """

    def __init__(self, space: SearchSpace, score_by: str) -> None:
        self.space = space
        self.rows: dict[str, list[Any]] = {}
        self._column = 0 if score_by == "error" else 1

    def scored(self, text: str) -> Scored:
        """The latest score of an architecture."""
        error, loss, generation, version = self.rows[text]
        arch = self.space.parse(text)
        flops, params = int(self.space.flops(arch)[0]), int(self.space.params(arch)[0])
        return Scored(tuple(arch.tolist()), error, flops, params, version, generation, loss)

    def ranked(self, texts: Iterable[str]) -> list[Scored]:
        """The architectures whose scores are numbers, best first.

        The score decides, then the other one, the FLOPs and the string.
        """
        alive = (scored for scored in map(self.scored, texts) if math.isfinite(scored.loss))
        return sorted(alive, key=self._order)

    def _order(self, scored: Scored) -> tuple:
        pair = (scored.error, scored.loss)
        return (*(pair[::-1] if self._column else pair), scored.flops, scored.arch)

    def front(self, texts: Sequence[str] | None = None) -> list[str]:
        """Those of `texts`, or of all, that no other beats in score and FLOPs, cheapest first."""
        texts = list(self.rows) if texts is None else list(texts)
        values = np.array([self.rows[text][self._column] for text in texts], float)
        finite = np.flatnonzero(np.isfinite(values))
        if not len(finite):
            return []
        alive = [texts[index] for index in finite]
        flops = self.space.flops(alive)
        points = np.stack((values[finite], flops.astype(float)), axis=1)
        best = sorted(pareto_front(points).tolist(), key=lambda i: (flops[i], alive[i]))
        return [alive[i] for i in best]
