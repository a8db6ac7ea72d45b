"""The search: ask, score, tell, shift; a transfer is the same with a fresh head."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastshift import checkpoint
from fastshift.durable import ScoreLog, replace_file, truncate_log
from fastshift.errors import ConfigError, NonFiniteLossError
from fastshift.evaluator import Evaluator, Scores
from fastshift.identity import check_identity, holds_a_run, with_overrides
from fastshift.population import Evolution
from fastshift.progress import Progress, Scalars
from fastshift.result import History, SearchResult
from fastshift.shift import HeadWarmup, Shifter, ShiftOptions
from fastshift.supernet import ChainSupernet
from fastshift.versions import versions
from fastshift.weights import save_supernet

__all__ = ["Search", "SearchOptions", "SearchResult", "search", "transfer"]


@dataclass(frozen=True)
class SearchOptions(ShiftOptions):
    """How to search; the fields of `ShiftOptions` too.

    Attributes:
        generations: generations after the random generation 0.
        population: architectures of a generation.
        parents: the best ones, from which mutants and children come.
        mutation, crossover: how many of each; None takes half the population.
        mutation_prob: of each gene.
        constraints: bounds by metric, as `space.parse_constraints` takes them.
        batch_norm: statistics policy of scores; None takes `ema` for `immediate` and `recalibrate`
            otherwise.
        strategy: `shared` or `sequential` scoring.
        score_by: `error` or `loss` decides; the other breaks ties.
        top_k: architectures scored again under the final weights.
        subtrie_size: candidates computed side by side; bounds memory.
    """

    generations: int = 20
    population: int = 50
    parents: int = 10
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
        for name, least in (("generations", 0), ("population", 1), ("parents", 1), ("top_k", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)}; expected at least {least}")
        if self.subtrie_size < 1:
            raise ConfigError(f"subtrie_size: {self.subtrie_size}; expected at least 1")


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
        common = {"constraints": options.constraints, "seed": seed}
        self.evolution = Evolution(
            self.space,
            options.population,
            options.parents,
            mutation=options.mutation,
            crossover=options.crossover,
            mutation_prob=options.mutation_prob,
            seen="generation" if options.moves else "run",
            keep=max(options.population, options.parents, options.top_k),
            score_by=options.score_by,
            **common,
        )
        self.batch_norm = options.batch_norm or options.default_batch_norm
        self.evaluator = Evaluator(
            supernet,
            data.validation,
            calibration=data.calibration,
            batch_norm=self.batch_norm,
            strategy=options.strategy,
            subtrie_size=options.subtrie_size,
            precision=precision,
        )
        self.shifter = self.warmup = None
        common["precision"] = precision
        if options.moves:
            self.shifter = Shifter(
                supernet,
                data,
                options,
                population=options.population,
                subtrie_size=options.subtrie_size,
                **common,
            )
        steps = options.head_warmup_steps
        if steps is None:
            steps = 200 if fresh_head and options.moves and options.shift != "immediate" else 0
        if fresh_head and not options.moves and not steps:
            raise ConfigError(
                "head_warmup_steps: 0; with shift 'none' nothing else would train the fresh head"
            )
        self.warmup_steps = steps
        if steps:
            self.warmup = HeadWarmup(supernet, data, options, **common)
        # What a checkpoint holds beside weights, momenta and the parts above.
        self.archs: np.ndarray | None = None
        self.told: list[list[Any]] = []  # of the generation under way: [errors, losses, version]
        self.position = 0
        self.history = History(self.space, options.score_by)
        self.generations: list[dict[str, Any]] = []
        self.counts = {"scored": 0, "validation_images": 0, "calibration_images": 0}
        self.seconds = 0.0
        self.generation_seconds = 0.0
        self.sharing: list[list[float]] = []
        self.serial = 0
        self.finished: dict[str, Any] | None = None
        self.log: ScoreLog | None = None
        if self.out is not None:
            self._open(resume)

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
        if self.finished is not None:
            return self._finish()
        self._clock = self._saved = time.perf_counter()
        total = (self.options.generations + 1) * self.options.population
        done = sum(record["candidates"] for record in self.generations)
        with (
            Progress(total, what="search", quiet=quiet) as self.progress,
            Scalars(self.out) as self.scalars,
        ):
            self.progress.advance(done)
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
                if self.shifter is not None:
                    self.shifter.freeze_trunk(False)
        self.finished = self._final()
        self._save()
        return self._finish()

    def _finish(self) -> SearchResult:
        """Write what a finished search leaves, `result.json` last, unless it is there."""
        result = self._result(None)
        if self.out is not None:
            path = self.out / "result.json"
            if not path.exists():
                save_supernet(self.supernet, self.out, {"data": result.data})
                replace_file(path, (json.dumps(result.to_dict(), indent=1) + "\n").encode())
            self.log.close()
        return result

    def _steps(self):
        """Do the search, yielding wherever its state is whole."""
        if self.warmup is not None:
            while self.warmup.position < self.warmup_steps:
                loss = self.warmup.update()
                self.progress.advance(0, head_loss=loss)
                yield
        while len(self.generations) <= self.options.generations:
            if self.archs is None:
                self.archs = self.evolution.ask()
                if len(self.archs) == 0:
                    return
            if self.shifter is not None:
                frozen = len(self.generations) < self.options.frozen_trunk_generations
                self.shifter.freeze_trunk(frozen)
            yield from self._generation(self.archs)
            self._end_generation()
            yield

    def _generation(self, archs: np.ndarray):
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
            self.progress.advance(0, loss=loss)
            yield

    def _score(self, archs: np.ndarray, rescore: bool) -> None:
        """Score candidates, and with them the present parents, under one set of weights."""
        parents = self.evolution.parents if rescore else archs[:0]
        # A parent may have been bred again: it is scored, and counted, once.
        own = set(map(bytes, archs))
        others = [index for index, row in enumerate(parents) if bytes(row) not in own]
        rows = np.concatenate((archs, parents[others]))
        scores = self.evaluator.evaluate(rows)
        self._record(rows, scores, candidates=len(archs))
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
        self.progress.advance(
            len(archs),
            archs=len(rows),
            images=(scores.images + scores.calibration_images) * len(rows),
            sharing=scores.sharing,
            **({f"best_{self.options.score_by}": best} if math.isfinite(best) else {}),
        )

    def _primary(self, scores: Scores) -> float:
        """The best score of an evaluation, or NaN."""
        values = scores.errors if self.options.score_by == "error" else scores.losses
        return float(np.nanmin(values)) if np.isfinite(values).any() else math.nan

    def _record(self, archs: np.ndarray, scores: Scores, *, candidates: int = 0) -> None:
        """Add an evaluation to the log, the history and the counts.

        The first `candidates` rows were proposed by the present generation, the others before; an
        evaluation of no candidates is the final one.
        """
        generation = self.evolution.generation
        each = scores.seconds / max(1, len(archs))
        flops, params = self.space.flops(archs).tolist(), self.space.params(archs).tolist()
        for i, text in enumerate(self.space.format_all(archs)):
            error, loss = float(scores.errors[i]), float(scores.losses[i])
            found = generation if i < candidates else self.history.rows[text][2]
            self.history.rows[text] = [error, loss, found, scores.weights_version]
            if self.log is not None:
                line = {"arch": text, "error": error, "loss": loss, "generation": generation}
                line |= {"weights_version": scores.weights_version, "flops": flops[i]}
                line |= {"params": params[i], "seconds": each}
                self.log.append(line | ({} if candidates else {"final": True}))
        self.sharing.append([scores.sharing, len(archs)])
        self.counts["scored"] += len(archs)
        self.counts["validation_images"] += scores.images * len(archs)
        self.counts["calibration_images"] += scores.calibration_images * len(archs)

    def _end_generation(self) -> None:
        """Tell the population, and write the generation's record."""
        archs = self.archs
        errors = np.concatenate([np.array(errors, float) for errors, _, _ in self.told])
        losses = np.concatenate([np.array(losses, float) for _, losses, _ in self.told])
        version = self.told[-1][2]
        generation = self.evolution.generation
        self.evolution.tell(archs, errors, losses, weights_version=version)
        most = int(self.space.num_choices.max())
        frequency = (archs[:, :, None] == np.arange(most)).mean(axis=0)
        scored = sum(count for _, count in self.sharing)
        now = time.perf_counter()
        self.generation_seconds += now - self._clock
        self.seconds += now - self._clock
        self._clock = now
        finite = np.isfinite(losses)
        record = {
            "generation": generation,
            "candidates": len(archs),
            "scored": scored,
            "best_error": float(errors[finite].min()) if finite.any() else None,
            "best_loss": float(losses[finite].min()) if finite.any() else None,
            "median_error": float(np.median(errors[finite])) if finite.any() else None,
            "failed": int((~finite).sum()),
            "first_weights_version": self.told[0][2],
            "weights_version": version,
            "op_frequency": [
                row[:count].tolist()
                for row, count in zip(frequency, self.space.num_choices.tolist(), strict=True)
            ],
            "sharing": sum(factor * count for factor, count in self.sharing) / max(1, scored),
            "ask": self.evolution.last_ask | {"acceptance_rate": self.evolution.acceptance_rate},
            "seconds": self.generation_seconds,
        }
        self.generations.append(record)
        self.scalars.write(
            generation,
            {
                f"search/{name}": record[name]
                for name in ("best_error", "best_loss", "median_error", "sharing")
                if record[name] is not None
            },
        )
        self.archs, self.told, self.position = None, [], 0
        self.sharing, self.generation_seconds = [], 0.0
        self._save()

    def _final(self) -> dict[str, Any]:
        """Score the last top-k and the Pareto front's candidates again under the final weights."""
        texts = self._kept()
        chosen = list(dict.fromkeys([*texts, *self.history.front()]))
        version = self.supernet.version
        stale = [text for text in chosen if self.history.rows[text][3] != version]
        if stale:
            archs = self.space.as_archs(stale)
            self._record(archs, self.evaluator.evaluate(archs))
        self.seconds += time.perf_counter() - self._clock
        top = [self.space.format(scored.arch) for scored in self.history.ranked(texts)]
        return {"top": top, "pareto": self.history.front(chosen)}

    def _kept(self) -> list[str]:
        """The strings of the best architectures the population keeps."""
        kept = [scored.arch for scored in self.evolution.top_k(self.options.top_k)]
        return self.space.format_all(kept) if kept else []

    def _result(self, stopped: str | None) -> SearchResult:
        options = self.options
        # The population knows one version for a whole generation; the history each score's.
        ended = self.finished or {"top": self._kept(), "pareto": []}
        top = self.history.ranked(ended["top"])
        pareto = [self.history.scored(text) for text in ended["pareto"]]
        parts = [part.trainer for part in (self.shifter, self.warmup) if part is not None]
        budget = {
            "updates": sum(trainer.updates for trainer in parts),
            "train_images": sum(trainer.images for trainer in parts),
            "path_image_pairs": sum(trainer.path_images for trainer in parts),
            "skipped_updates": sum(trainer.skipped for trainer in parts),
            **self.counts,
        }
        shift = {f.name: getattr(options, f.name) for f in fields(ShiftOptions)}
        shift |= {
            "mode": options.shift,
            "lr": options.lr_for(options.population) if options.moves else None,
            "steps": options.shift_steps if options.moves else 0,
            "batch_size": options.shift_batch_size if options.moves else 0,
            "score": "after" if options.scores_after else "before",
            "head_warmup_steps": self.warmup_steps,
            "batch_norm": self.batch_norm,
            "score_by": options.score_by,
            "strategy": options.strategy,
            "constraints": options.constraints,
            "population": options.population,
            "parents": options.parents,
        }
        describe = getattr(self.data, "describe", None)
        return SearchResult(
            best=top[0] if top else None,
            top=top,
            pareto=pareto,
            generations=self.generations,
            seconds=self.seconds,
            archs_per_second=self.counts["scored"] / self.seconds if self.seconds else 0.0,
            budget=budget,
            data=describe() if describe is not None else {},
            space=self.space.describe()
            | {"recipe": self.space.recipe, "fingerprint": self.space.fingerprint()}
            | {"blocks": [list(block) for block in self.space.labels]}
            | {"description": self.space.to_dict()},
            shift=shift,
            stopped=stopped,
            format_arch=self.space.format,
        )

    # The run directory.

    def _identity(self) -> dict[str, Any]:
        costs = {name: [table.tolist(), fixed] for name, (table, fixed) in self.space.costs.items()}
        found = {
            "seed": self.seed,
            "space": self.space.fingerprint(),
            "costs": hashlib.sha256(json.dumps(costs, sort_keys=True).encode()).hexdigest(),
            "data": getattr(self.data, "describe", dict)(),
            "precision": self.evaluator.precision,
            "head_warmup_steps": self.warmup_steps,
            "options": asdict(self.options),
        }
        return json.loads(json.dumps(found))

    def _open(self, resume: bool) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        found = checkpoint.load(self.out)
        path = self.out / "scores.jsonl"
        if found is not None:
            self.serial = found.serial
        if found is not None and "evolution" in found.state:
            check_identity(self.out, found.state["identity"], self._identity(), resume=resume)
            self._load(found)
            truncate_log(path, found.state["log_bytes"])
        elif path.exists():
            # Lines of a run that was killed before its first checkpoint, or somebody else's.
            if not resume and path.stat().st_size:
                raise holds_a_run(self.out)
            truncate_log(path, 0)
        self.log = ScoreLog(path)
        if not (self.out / "config.yaml").exists():
            found = self._identity() | {
                "versions": versions(next(self.supernet.parameters()).device)
            }
            replace_file(self.out / "config.yaml", yaml.safe_dump(found, sort_keys=False).encode())

    _PLAIN = (
        "told",
        "position",
        "generations",
        "counts",
        "sharing",
        "generation_seconds",
        "finished",
    )

    def _save(self) -> None:
        self._saved = now = time.perf_counter()
        if self.out is None:
            return
        active = self.shifter
        if self.warmup is not None and self.warmup.position < self.warmup_steps:
            active = self.warmup
        state = {name: getattr(self, name) for name in self._PLAIN}
        running = 0.0 if self.finished is not None else now - self._clock
        state |= {
            "seconds": self.seconds + running,
            "generation_seconds": self.generation_seconds + running,
            "identity": self._identity(),
            "history": self.history.rows,
            "version": self.supernet.version,
            "log_bytes": self.log.flush(),
            "evolution": self.evolution.state_dict(),
            "last_ask": dict(self.evolution.last_ask),
            "archs": None if self.archs is None else self.space.format_all(self.archs),
            "shifter": self.shifter.state() if self.shifter else None,
            "warmup": self.warmup.state() if self.warmup else None,
        }
        self.serial += 1
        momenta = active.trainer.optimizer.momenta() if active is not None else {}
        tensors = {"supernet": self.supernet.tensors(), "momenta": momenta}
        checkpoint.save(self.out, self.serial, tensors=tensors, state=state)

    def _load(self, found: checkpoint.Checkpoint) -> None:
        state = found.state
        self.supernet.load_tensors(found.tensors["supernet"], state["version"])
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.history.rows = state["history"]
        self.seconds = state["seconds"]
        self.evolution.load_state_dict(state["evolution"])
        self.evolution.last_ask = dict(state["last_ask"])
        self.archs = None if state["archs"] is None else self.space.as_archs(state["archs"])
        if self.shifter is not None:
            self.shifter.load_state(state["shifter"])
        active = self.shifter
        if self.warmup is not None:
            self.warmup.load_state(state["warmup"])
            if self.warmup.position < self.warmup_steps:
                active = self.warmup
        if active is not None:
            active.trainer.optimizer.load_momenta(found.tensors["momenta"])


def search(
    supernet: ChainSupernet,
    data: Any,
    constraints: dict[str, Any] | None = None,
    *,
    shift: str | None = None,
    batch_norm: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    precision: str = "fp32",
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
    options: SearchOptions | None = None,
    fresh_head: bool = False,
    **overrides: Any,
) -> SearchResult:
    """Search a pre-trained supernet by evolution, shifting it on the way (arXiv 2403.11380).

    Args:
        supernet: pre-trained; it shifts in place, and is saved in `out`.
        data: with `train`, `validation` and `calibration` batches, as `fastshift.data.load` gives.
        constraints: bounds by metric: `{"flops": "330M"}`, `"60%"` of the largest, `"290M:330M"`.
        shift: `accumulate`, the default, `immediate`, `every:G`, `uniform` or `none`.
        batch_norm: statistics policy of the scores; None takes the mode's default.
        seed: of every random choice; equal seeds give equal searches.
        out: run directory for `scores.jsonl`, `result.json`, checkpoints and the shifted weights.
        resume: go on where the run in `out` stopped.
        precision: `fp32` or `bf16`.
        stop: asked between updates; true ends the search with its state saved.
        quiet: show no progress.
        options: everything else; single fields of `SearchOptions` can be given as keywords.
        fresh_head: the head is untrained, so `head_warmup_steps` defaults to 200.

    Returns:
        The best architectures, scored under the final weights.

    Raises:
        CheckpointError: `out` holds another run or a damaged checkpoint.
        ConfigError: an option is unknown or unusable.
        ConstraintError: a constraint is malformed, or no architecture satisfies it.
        NonFiniteLossError: three losses in a row were not finite; the state was saved.
    """
    if shift is not None:
        overrides["shift"] = shift
    if constraints is not None:
        overrides["constraints"] = dict(constraints)
    if batch_norm is not None:
        overrides["batch_norm"] = batch_norm
    options = with_overrides(options or SearchOptions(), overrides)
    return Search(
        supernet,
        data,
        options,
        seed=seed,
        precision=precision,
        out=out,
        resume=resume,
        fresh_head=fresh_head,
    ).run(stop, quiet=quiet)


def transfer(
    supernet: ChainSupernet, data: Any, *args: Any, seed: int = 0, **keywords: Any
) -> SearchResult:
    """Carry a pre-trained supernet to a new data set: a fresh head, then `search` on that data.

    Args:
        supernet: pre-trained elsewhere; its head is replaced, everything trains.
        data: of the new task; `data.num_classes` sizes the head.
        *args: as for `search`.
        seed: as for `search`; it draws the head too.
        **keywords: as for `search`.

    Returns:
        As `search`.

    Raises:
        As `search`.
    """
    supernet.reset_head(data.num_classes, seed=seed)
    return search(supernet, data, *args, seed=seed, fresh_head=True, **keywords)
