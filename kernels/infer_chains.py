"""The jobs of a choice, one after the other, for a launch that does them all."""

from __future__ import annotations

from dataclasses import replace

from fastshift.kernels.infer_jobs import KINDS, Job
from fastshift.kernels.infer_plan import InferPlan

__all__ = ["chain_of"]


def chain_of(plan: InferPlan, choice: int, parts: bool) -> tuple[Job, ...]:
    """A choice's jobs; for where it reads in a hidden buffer, each has the job that wrote there.

    With `parts` a depthwise convolution and the product behind it are two jobs: each is computed
    once, where a tile of the product's channels would compute the convolution anew.
    """
    found: list[Job] = []
    places: dict[tuple[int, int], int] = {}
    for index, step in enumerate(plan.steps):
        for job in step.jobs[choice]:
            if job["from_hidden"]:
                source = places[(index - 1) % 2, job["source_at"]]
                job = replace(job, values=job.values | {"source_at": source})
            to_hidden, target_at = job["to_hidden"], job["target_at"]
            if parts and job.kind_name == "pair":
                found.append(_convolution_of(job))
                job = _product_of(job, len(found) - 1)
            if to_hidden:
                places[index % 2, target_at] = len(found)
            found.append(job)
    return tuple(found)


def _convolution_of(pair: Job) -> Job:
    """The depthwise convolution of a pair, its rows hidden."""
    own = {
        "variant": 2 * KINDS.index("depthwise") + pair["variant"] % 2,
        "out_channels": pair["in_channels"],
        "to_hidden": 1,
        "target_row": pair["in_channels"],
        "add": 0,
    }
    return replace(pair, values=pair.values | own)


def _product_of(pair: Job, source: int) -> Job:
    """The product of a pair, which reads what another job has hidden."""
    own = {
        "variant": 2 * KINDS.index("pointwise"),
        "from_hidden": 1,
        "source_at": source,
        "source_row": pair["in_channels"],
        "height": pair["out_height"],
        "width": pair["out_width"],
        "kernel": 1,
        "stride": 1,
    }
    return replace(pair, values=pair.values | own)
