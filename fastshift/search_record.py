"""What a search has done so far: every score, a record of each generation, what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fastshift.evaluator import Scores
from fastshift.result import History, SearchResult
from fastshift.space import SearchSpace

__all__ = ["SearchRecord"]

Line = dict[str, Any]


class SearchRecord:
    """Scores, generations and costs of a search, from its start on.

    Args:
        space: the search space.
        score_by: `error` or `loss` decides; the other breaks ties.
        log: takes each score's line of `scores.jsonl`.

    Attributes:
        history: the latest score of every architecture.
        generations: a record of each generation that ended.
        counts: architectures and (architecture, image) pairs scored.
        seconds: wall time up to the last generation's end.
        finished: the strings of the final `top` and `pareto`; None before the end.
        computed: every way in which batches were scored and trained on so far.
    """

    def __init__(self, space: SearchSpace, score_by: str, log: Callable[[Line], None]) -> None:
        self.space = space
        self.history = History(space, score_by)
        self.generations: list[dict[str, Any]] = []
        self.counts = {"scored": 0, "validation_images": 0, "calibration_images": 0}
        self.seconds = 0.0
        self.finished: dict[str, Any] | None = None
        self.computed: dict[str, list[str]] = {"score": [], "train": []}
        self._log = log
        # Of the generation under way.
        self._generation_seconds = 0.0
        self._sharing: list[list[float]] = []  # [factor, architectures] of each evaluation
        self.start()

    def start(self) -> None:
        """Start the clock, from a search's begin or after a stop."""
        self._since = time.perf_counter()

    def _lap(self) -> float:
        """Add the time since the last lap to the total, and return it."""
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        self.seconds += passed
        return passed

    def note_computed(self, work: str, how: str) -> None:
        """Note how a batch was computed.

        Args:
            work: `score`, `train` or `augment`.
            how: as `Scores.computed`, or as `TrainBatches.augmented`.
        """
        found = self.computed.setdefault(work, [])
        if how not in found:
            found.append(how)

    def add(
        self, archs: np.ndarray, scores: Scores, *, generation: int, candidates: int = 0
    ) -> None:
        """Add an evaluation.

        Args:
            archs: choices, `[P, L]`. The first `candidates` rows were proposed by the present
                generation, the others before.
            scores: theirs.
            generation: the present one.
            candidates: 0 for the final evaluation.
        """
        self.note_computed("score", scores.computed)
        each = scores.seconds / max(1, len(archs))
        flops, params = self.space.flops(archs).tolist(), self.space.params(archs).tolist()
        for i, text in enumerate(self.space.format_all(archs)):
            error, loss = float(scores.errors[i]), float(scores.losses[i])
            found = generation if i < candidates else self.history.rows[text][2]
            self.history.rows[text] = [error, loss, found, scores.weights_version]
            line = {"arch": text, "error": error, "loss": loss, "generation": generation}
            line |= {"weights_version": scores.weights_version, "flops": flops[i]}
            line |= {"params": params[i], "seconds": each}
            self._log(line | ({} if candidates else {"final": True}))
        self._sharing.append([scores.sharing, len(archs)])
        self.counts["scored"] += len(archs)
        self.counts["validation_images"] += scores.images * len(archs)
        self.counts["calibration_images"] += scores.calibration_images * len(archs)

    def end_generation(
        self,
        archs: np.ndarray,
        errors: np.ndarray,
        losses: np.ndarray,
        *,
        generation: int,
        versions: tuple[int, int],
        ask: dict[str, Any],
    ) -> dict[str, Any]:
        """Make and keep the record of a generation.

        Args:
            archs: its candidates, `[P, L]`.
            errors: theirs, `[P]`.
            losses: theirs, `[P]`; NaN failed.
            generation: its number.
            versions: of the weights that scored its first and its last candidate.
            ask: how the candidates were found.

        Returns:
            The record, JSON-able.
        """
        most = int(self.space.num_choices.max())
        frequency = (archs[:, :, None] == np.arange(most)).mean(axis=0)
        scored = sum(count for _, count in self._sharing)
        self._generation_seconds += self._lap()
        finite = np.isfinite(losses)
        record = {
            "generation": generation,
            "candidates": len(archs),
            "scored": scored,
            "best_error": float(errors[finite].min()) if finite.any() else None,
            "best_loss": float(losses[finite].min()) if finite.any() else None,
            "median_error": float(np.median(errors[finite])) if finite.any() else None,
            "failed": int((~finite).sum()),
            "first_weights_version": versions[0],
            "weights_version": versions[1],
            "op_frequency": [
                row[:count].tolist()
                for row, count in zip(frequency, self.space.num_choices.tolist(), strict=True)
            ],
            "sharing": sum(factor * count for factor, count in self._sharing) / max(1, scored),
            "ask": ask,
            "seconds": self._generation_seconds,
        }
        self.generations.append(record)
        self._sharing, self._generation_seconds = [], 0.0
        return record

    def finish(self, texts: list[str], chosen: list[str]) -> None:
        """Keep who is best under the final weights.

        Args:
            texts: strings of the last top-k.
            chosen: these and the candidates of the Pareto front, all scored under those weights.
        """
        self._lap()
        top = [self.space.format(scored.arch) for scored in self.history.ranked(texts)]
        self.finished = {"top": top, "pareto": self.history.front(chosen)}

    def result(
        self,
        kept: list[str],
        *,
        budget: dict[str, int],
        data: dict[str, Any],
        shift: dict[str, Any],
        stopped: str | None,
    ) -> SearchResult:
        """Hand over what was found.

        Args:
            kept: strings of the present top-k, for a search that has not finished.
            budget: updates and images of training.
            data: what the data set says of itself.
            shift: how the supernet was shifted and architectures were scored.
            stopped: why the search ended early, or None.
        """
        # The population knows one version for a whole generation; the history each score's.
        ended = self.finished or {"top": kept, "pareto": []}
        top = self.history.ranked(ended["top"])
        return SearchResult(
            best=top[0] if top else None,
            top=top,
            pareto=[self.history.scored(text) for text in ended["pareto"]],
            generations=self.generations,
            seconds=self.seconds,
            archs_per_second=self.counts["scored"] / self.seconds if self.seconds else 0.0,
            budget=budget | self.counts,
            data=data,
            space=self.space.describe()
            | {"recipe": self.space.recipe, "fingerprint": self.space.fingerprint()}
            | {"blocks": [list(block) for block in self.space.labels]}
            | {"description": self.space.to_dict()},
            shift=shift,
            stopped=stopped,
            format_arch=self.space.format,
            computed={work: list(found) for work, found in self.computed.items()},
        )

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint, the time since the last lap counted in."""
        running = 0.0 if self.finished is not None else time.perf_counter() - self._since
        return {
            "history": self.history.rows,
            "generations": self.generations,
            "counts": self.counts,
            "sharing": self._sharing,
            "seconds": self.seconds + running,
            "generation_seconds": self._generation_seconds + running,
            "finished": self.finished,
            "computed": self.computed,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.history.rows = state["history"]
        self.generations, self.counts = state["generations"], state["counts"]
        self._sharing, self.finished = state["sharing"], state["finished"]
        # Runs from before it was noted go on too.
        self.computed = state.get("computed", self.computed)
        self.seconds, self._generation_seconds = state["seconds"], state["generation_seconds"]
