"""One measurement in a process of its own; prints a JSON. Run by `bench_fresh.py`.

    python benchmarks/fresh.py first SPACE SIZE PRECISION IMAGES
    python benchmarks/fresh.py memory SPACE SIZE PRECISION IMAGES train|score shared|LAYOUT

`first` is the time from `import fastshift` done to the score of one architecture, a supernet built
and its statistics recalibrated on the way. `memory` is the peak of the resident set over the set
before: the same step on two images has been made by then, so that no library is still to be loaded.
The peak is this process's own; `ru_maxrss` would start from that of the process that started it.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from time import perf_counter

import fastshift as fs

READY = perf_counter()


def first(space, size, precision, images):
    import torch

    supernet = fs.Supernet(fs.spaces.build(space, image_size=size, num_classes=10))
    x, y = torch.randn(images, 3, size, size), torch.arange(images) % 10
    score = fs.Evaluator(supernet, [(x, y)], calibration=[(x, y)], precision=precision)
    arch = [1] * supernet.space.num_blocks
    before = perf_counter()
    score([arch])
    done = perf_counter()
    score([arch])
    again = perf_counter() - done
    return {"seconds": done - READY, "score_seconds": done - before, "again_seconds": again}


def resident(which):
    """Bytes of the resident set: `VmRSS` now, `VmHWM` at its peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(which)) * 1024


def memory(space, size, precision, images, what, how):
    import generations
    import numpy as np
    import torch
    from baselines import Variant, scope
    from bench_evaluator import one_at_a_time

    from fastshift.batch_norm import BatchNorms, MovingAverages
    from fastshift.steps import train_step
    from fastshift.trie import Plan

    torch.manual_seed(0)
    supernet = fs.Supernet(fs.spaces.build(space, image_size=size, num_classes=10))
    archs = generations.load(space)[10][:3].astype(np.uint8)
    shared = how == "shared"
    variant = Variant(precision, "eager", "nhwc" if shared else how)
    supernet.to(memory_format=torch.channels_last if shared else torch.contiguous_format)
    supernet = supernet if shared else variant.copy_of(supernet)
    x = variant.rows(torch.randn(images, 3, size, size))
    y = torch.arange(images) % 10

    def train(x, y):
        supernet.train()
        if shared:
            norms = BatchNorms(supernet)
            with scope(precision):
                averages = MovingAverages(norms)
                train_step(supernet, norms, Plan(archs, 1), x, y, averages, key=(0, 0))
            return
        with variant.scope():
            for arch in archs:
                torch.nn.functional.cross_entropy(supernet(x, arch).float(), y).backward()

    def score(x, y):
        batches = [(x, y)]
        if shared:
            options = {"calibration": batches, "subtrie_size": 1, "precision": precision}
            fs.Evaluator(supernet, batches, **options)(archs)
        else:
            one_at_a_time(variant, supernet, archs, batches, batches)

    step = {"train": train, "score": score}[what]
    step(x[:2].clone(), y[:2])
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts again from here
    before, high = resident("VmRSS"), resident("VmHWM")
    step(x, y)
    # A peak reached before the step would hide the step's own.
    return {"bytes": resident("VmHWM") - before, "hidden": resident("VmHWM") == high}


if __name__ == "__main__":
    kind, name, size, precision, images, *rest = sys.argv[1:]
    measure = {"first": first, "memory": memory}[kind]
    print(json.dumps(measure(name, int(size), precision, int(images), *rest)))
