"""Search a supernet, or carry it to new data: the functions around the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastshift.identity import with_overrides
from fastshift.result import SearchResult
from fastshift.search_loop import Search
from fastshift.search_options import SearchOptions
from fastshift.supernet import ChainSupernet

__all__ = ["Search", "SearchOptions", "SearchResult", "search", "transfer"]


@torch.inference_mode(False)
@torch.enable_grad()
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

    On a GPU each search captures the CUDA graphs of its updates, a second one on the same supernet
    too. Those that score it are kept, and captured again only for a larger population, batch or
    sub-trie, or where its parameters were replaced.

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


@torch.inference_mode(False)
@torch.enable_grad()
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
