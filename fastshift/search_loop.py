"""The loop of a search: ask, score, tell, shift."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastshift.checkpoint import Checkpoint
from fastshift.errors import NonFiniteLossError
from fastshift.evaluator import Evaluator, Scores
from fastshift.population import Evolution
from fastshift.progress import Progress, Scalars
from fastshift.result import SearchResult
from fastshift.search_files import SearchFiles
from fastshift.search_options import SearchOptions
from fastshift.search_record import SearchRecord
from fastshift.search_training import SearchTraining
from fastshift.shift import HeadWarmup, Shifter
from fastshift.supernet import ChainSupernet

__all__ = ["Search"]


class Search:
    """One search, which can stop and go on at any update.

    Args:
        supernet: pre-trained; it shifts in place.
        data: with `train`, `validation` and `calibration` batches.
        options: how to search.
        seed: of every random choice.
        precision: `fp32` or `bf16`.
        out: run directory, or None to write nothing.
        resume: go on from the directory's checkpoint, where it has one of a search.
        fresh_head: the head is new, as in a transfer.
        checkpoint_seconds: wall time between checkpoints inside a generation.

    Raises:
        CheckpointError: the directory holds another run, or a damaged checkpoint.
        ConstraintError: no architecture satisfies the constraints.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        supernet: ChainSupernet,
        data: Any,
        options: SearchOptions,
        *,
        seed: int = 0,
        precision: str = "fp32",
        out: str | Path | None = None,
        resume: bool = False,
        fresh_head: bool = False,
        checkpoint_seconds: float = 120.0,
    ) -> None:
        self.supernet, self.data, self.options, self.seed = supernet, data, options, seed
        self.space = supernet.space
        self.out = None if out is None else Path(out)
        self.checkpoint_seconds = checkpoint_seconds
        self.evolution = Evolution(
            self.space,
            options.population,
            options.num_parents,
            mutation=options.mutation,
            crossover=options.crossover,
            mutation_prob=options.mutation_prob,
            seen="generation" if options.moves else "run",
            keep=max(options.population, options.top_k),
            score_by=options.score_by,
            constraints=options.constraints,
            seed=seed,
        )
        self.evaluator = Evaluator(
            supernet,
            data.validation,
            calibration=data.calibration,
            batch_norm=options.policy,
            strategy=options.strategy,
            subtrie_size=options.subtrie_size,
            precision=precision,
        )
        self.fresh_head = fresh_head
        self.training = SearchTraining(
            supernet, data, options, fresh_head=fresh_head, seed=seed, precision=precision
        )
        self.shifter, self.warmup_steps = self.training.shifter, self.training.warmup_steps
        # What a checkpoint holds beside weights, momenta and the parts above.
        self.archs: np.ndarray | None = None
        self.told: list[list[Any]] = []  # of the generation under way: [errors, losses, version]
        self.position = 0
        self.files: SearchFiles | None = None
        if self.out is not None:
            self.files = SearchFiles(self.out, self._identity())
        self.record = SearchRecord(self.space, options.score_by, self._log)
        if self.files is not None:
            found = self.files.find(resume)
            if found is not None:
                self._load(found)
            self.files.begin(found, next(supernet.parameters()).device)

    @property
    def counts(self) -> dict[str, int]:
        """Architectures scored so far, and the (architecture, image) pairs of that."""
        return self.record.counts

    def _log(self, line: dict[str, Any]) -> None:
        if self.files is not None:
            self.files.append(line)

    # The loop.

    def run(self, stop: Callable[[], bool] = lambda: False, *, quiet: bool = True) -> SearchResult:
        """Search to the end, or until `stop` says so.

        Args:
            stop: asked between updates and between groups; true ends the call with a checkpoint.
            quiet: show no progress.

        Returns:
            The result; `stopped` is `interrupted` where `stop` ended it.

        Raises:
            NonFiniteLossError: three losses in a row were not finite; the state was saved.
        """
        if self.record.finished is not None:
            return self._finish()
        self.record.start()
        self._saved = time.perf_counter()
        total = (self.options.generations + 1) * self.options.population
        done = sum(record["candidates"] for record in self.record.generations)
        done += sum(len(errors) for errors, _, _ in self.told)
        with (
            Progress(total, what="search", quiet=quiet, done=done) as self.progress,
            Scalars(self.out) as self.scalars,
        ):
            try:
                for _ in self._steps():
                    if stop():
                        self._save()
                        return self._result("interrupted")
                    if time.perf_counter() - self._saved > self.checkpoint_seconds:
                        self._save()
            except NonFiniteLossError:
                self._save()
                raise
            finally:
                self.training.close()
                if self.shifter is not None:
                    self.shifter.freeze_trunk(False)
        self._score_finalists()
        self._save()
        return self._finish()

    def _finish(self) -> SearchResult:
        """The result of a search that has ended, written where it is not yet."""
        result = self._result(None)
        if self.files is not None:
            self.files.finish(result, self.supernet)
        return result

    def _steps(self) -> Iterator[None]:
        """Do the search, yielding wherever its state is whole."""
        while self.training.is_warming_up:
            loss = self.training.warmup.update()
            self._note_update(self.training.warmup)
            self.progress.advance(0, head_loss=loss)
            yield
        if self.training.warmup is not None:
            self.training.warmup.trainer.release()
        while len(self.record.generations) <= self.options.generations:
            if self.archs is None:
                self.archs = self.evolution.ask()
                if len(self.archs) == 0:
                    return
            if self.shifter is not None:
                frozen = len(self.record.generations) < self.options.frozen_trunk_generations
                self.shifter.freeze_trunk(frozen)
            yield from self._generation(self.archs)
            self._end_generation()
            yield

    def _generation(self, archs: np.ndarray) -> Iterator[None]:
        """Score one generation and shift on it, in the order its mode has."""
        options = self.options
        group = options.group_size(len(archs))
        groups = [archs[i : i + group] for i in range(0, len(archs), group)]
        per_group = options.shift_steps if options.moves else 0
        if not options.scores_after and not self.told:
            self._score(archs, rescore=options.rescores_parents)
        while True:
            # By what is done, not by what was just done: a run can stop between the two.
            if options.scores_after and len(self.told) < self.position // per_group:
                last = len(self.told) == len(groups) - 1
                self._score(groups[len(self.told)], rescore=last and options.rescores_parents)
            if self.position == per_group * len(groups):
                return
            # A skipped update that ends the run has used its mini-batch too.
            self.position += 1
            loss = self.shifter.update(groups[(self.position - 1) // per_group])
            self._note_update(self.shifter)
            of = per_group * len(groups)
            self.progress.advance(0, shift=f"{self.position}/{of}", loss=loss)
            yield

    def _note_update(self, part: Shifter | HeadWarmup) -> None:
        """Note how an update was computed, and where its batch was augmented."""
        self.record.note_computed("train", part.trainer.computed)
        augmented = getattr(self.data.train, "augmented", None)
        if augmented is not None:
            self.record.note_computed("augment", augmented)

    def _score(self, archs: np.ndarray, rescore: bool) -> None:
        """Score candidates, and with them the present parents, under one set of weights."""
        parents = self.evolution.parents if rescore else archs[:0]
        # A parent may have been bred again: it is scored, and counted, once.
        own = set(map(bytes, archs))
        others = [index for index, row in enumerate(parents) if bytes(row) not in own]
        rows = np.concatenate((archs, parents[others]))
        scores = self.evaluator.evaluate(rows)
        generation = self.evolution.generation
        self.record.add(rows, scores, generation=generation, candidates=len(archs))
        if len(parents):
            self.evolution.replace_scores(
                parents[others],
                scores.errors[len(archs) :],
                scores.losses[len(archs) :],
                weights_version=scores.weights_version,
            )
        own = slice(0, len(archs))
        self.told.append(
            [
                scores.errors[own].astype(float).tolist(),
                scores.losses[own].tolist(),
                scores.weights_version,
            ]
        )
        latest = self._primary(scores)
        kept = self.evolution.top_k(1)
        if kept and not self.options.moves:
            # Only fixed weights give scores that can be compared across generations.
            latest = np.fmin(latest, getattr(kept[0], self.options.score_by))
        best = float(latest)
        # Where weights move, each generation is scored under its own.
        whose = "generation_best" if self.options.moves else "best"
        self.progress.advance(
            len(archs),
            shift=None,
            archs=len(rows),
            images=(scores.images + scores.calibration_images) * len(rows),
            sharing=scores.sharing,
            **({f"{whose}_{self.options.score_by}": best} if math.isfinite(best) else {}),
        )

    def _primary(self, scores: Scores) -> float:
        """The best score of an evaluation, or NaN."""
        values = scores.errors if self.options.score_by == "error" else scores.losses
        return float(np.nanmin(values)) if np.isfinite(values).any() else math.nan

    def _end_generation(self) -> None:
        """Tell the population, and write the generation's record."""
        archs = self.archs
        errors = np.concatenate([np.array(errors, float) for errors, _, _ in self.told])
        losses = np.concatenate([np.array(losses, float) for _, losses, _ in self.told])
        versions = np.concatenate([np.full(len(errors), v) for errors, _, v in self.told])
        generation, ends = self.evolution.generation, (self.told[0][2], self.told[-1][2])
        self.evolution.tell(archs, errors, losses, weights_version=versions)
        ask = self.evolution.last_ask | {"acceptance_rate": self.evolution.acceptance_rate}
        record = self.record.end_generation(
            archs, errors, losses, generation=generation, versions=ends, ask=ask
        )
        self.scalars.write(
            generation,
            {
                f"search/{name}": record[name]
                for name in ("best_error", "best_loss", "median_error", "sharing")
                if record[name] is not None
            },
        )
        self.archs, self.told, self.position = None, [], 0
        self._save()

    def _score_finalists(self) -> None:
        """Score the last top-k and the Pareto front's candidates again under the final weights."""
        texts, history = self._kept(), self.record.history
        chosen = list(dict.fromkeys([*texts, *history.front()]))
        stale = [text for text in chosen if history.rows[text][3] != self.supernet.version]
        if stale:
            archs = self.space.as_archs(stale)
            scores = self.evaluator.evaluate(archs)
            self.record.add(archs, scores, generation=self.evolution.generation)
        self.record.finish(texts, chosen)

    def _kept(self) -> list[str]:
        """The strings of the best architectures the population keeps."""
        kept = [scored.arch for scored in self.evolution.top_k(self.options.top_k)]
        return self.space.format_all(kept) if kept else []

    def _result(self, stopped: str | None) -> SearchResult:
        return self.record.result(
            self._kept(),
            budget=self.training.budget(),
            data=getattr(self.data, "describe", dict)(),
            shift=self.options.describe(fresh_head=self.fresh_head),
            stopped=stopped,
        )

    # The state.

    def _identity(self) -> dict[str, Any]:
        costs = {name: [table.tolist(), fixed] for name, (table, fixed) in self.space.costs.items()}
        found = {
            "seed": self.seed,
            "space": self.space.fingerprint(),
            "costs": hashlib.sha256(json.dumps(costs, sort_keys=True).encode()).hexdigest(),
            "data": getattr(self.data, "describe", dict)(),
            "precision": self.evaluator.precision,
            "head_warmup_steps": self.warmup_steps,
            "options": asdict(self.options) | {"parents": self.options.num_parents},
        }
        return json.loads(json.dumps(found))

    def _save(self) -> None:
        self._saved = time.perf_counter()
        if self.files is None:
            return
        state = self.record.state() | self.training.state()
        state |= {
            "told": self.told,
            "position": self.position,
            "version": self.supernet.version,
            "evolution": self.evolution.state_dict(),
            "last_ask": dict(self.evolution.last_ask),
            "archs": None if self.archs is None else self.space.format_all(self.archs),
        }
        tensors = {"supernet": self.supernet.tensors(), "momenta": self.training.momenta()}
        self.files.save(tensors, state)

    def _load(self, found: Checkpoint) -> None:
        state = found.state
        self.supernet.load_tensors(found.tensors["supernet"], state["version"])
        self.record.load_state(state)
        self.told, self.position = state["told"], state["position"]
        self.evolution.load_state_dict(state["evolution"])
        self.evolution.last_ask = dict(state["last_ask"])
        self.archs = None if state["archs"] is None else self.space.as_archs(state["archs"])
        self.training.load_state(state, found.tensors["momenta"])
