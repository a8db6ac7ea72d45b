"""A whole generation, shift and scores, beside the loop of the method's released code.

Ours: 20 accumulated updates through the generation's trie, and its scores with statistics of their
own. The loop, for each candidate in turn: 20 steps of SGD on that candidate's mini-batches, then
its score; eager, fp32, channels first, autograd on while scoring, as released. Images are cached
for both: the loop's start of its data loaders is left out. There are fewer of them than published
(150 a step, 12,500 scored), and in scoring fewer by more, to end in minutes; at fewer still, what a
call costs would show in place of what an image costs. Ours is timed whole, once; of the loop three
candidates are, and scaled to 50 by their multiply-adds.
"""

from __future__ import annotations

from time import perf_counter

import generations
import numpy as np
import pytest
import torch
from baselines import PRECISIONS, scope
from recording import figures, kernels, note
from torch.nn import functional

from fastshift import spaces
from fastshift.batch_norm import start_ema
from fastshift.evaluator import Evaluator
from fastshift.supernet import Supernet
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

# Space, image size, images of a shift step, of a scored batch, of a calibration batch.
CASES = [("nasbench_macro", 32, 8, 166, 64), ("shufflenet_v2", 64, 6, 83, 32)]
LARGE = ("shufflenet_v2", 224, 4, 40, 16)  # of one figure: it takes minutes
CELLS = [
    (*case, generation, precision)
    for case in CASES
    for precision in PRECISIONS
    for generation in (generations.KEPT if precision == "fp32" else generations.KEPT[-1:])
]
CELLS.append((*LARGE, generations.KEPT[-1], "fp32"))
STEPS, SCORED_BATCHES = 20, 2
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


class Loop:
    """The released code's loop over candidates."""

    def __init__(self, supernet, steps, scored):
        self.net, self.steps, self.scored = supernet, steps, scored
        self.optimizer = torch.optim.SGD(
            supernet.parameters(), lr=1e-4, momentum=0.9, weight_decay=4e-5
        )

    def train(self, arch):
        self.net.train()
        for x, y in self.steps:
            loss = functional.cross_entropy(self.net(x, arch), y, label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    def score(self, arch):
        self.net.eval()
        wrong = images = 0
        for x, y in self.scored:
            logits = self.net(x, arch)
            functional.cross_entropy(logits, y)
            wrong += int((logits.argmax(dim=1) != y).sum())
            images += len(y)
        return wrong / images


def spread(flops, number):
    """Candidates at evenly spaced ranks of their multiply-adds."""
    order = np.argsort(flops, kind="stable")
    return order[(2 * np.arange(number) + 1) * len(order) // (2 * number)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c[0]}-{c[1]}-generation{c[5]}-{c[6]}")
def test_generation(benchmark, cell):
    name, size, step_images, score_images, calibration_images, generation, precision = cell
    if not benchmark.enabled and (generation != generations.KEPT[-1] or size == 224):
        pytest.skip("one generation is enough where nothing is timed")
    steps, timed = STEPS, 3
    archs = generations.load(name)[generation].astype(np.uint8)
    if not benchmark.enabled:
        archs, steps, timed = archs[:2], 2, 1
        step_images, score_images, calibration_images = 4, 8, 4
    torch.manual_seed(0)
    supernet = Supernet(spaces.build(name, image_size=size, num_classes=10))

    def batches(number, images):
        return [
            (torch.randn(images, 3, size, size), torch.arange(images) % 10) for _ in range(number)
        ]

    train, scored = batches(steps, step_images), batches(SCORED_BATCHES, score_images)
    calibration = batches(1, calibration_images)

    reference = Supernet(supernet.space)
    reference.load_state_dict(supernet.state_dict())
    supernet.to(memory_format=torch.channels_last)
    loop = Loop(reference, train, scored)
    chosen = spread(supernet.space.flops(archs), timed)
    with torch.no_grad():
        # The loss of the first update, which the loop's first step at each candidate has too.
        plain = Supernet(supernet.space).train()
        plain.load_state_dict(supernet.state_dict())
        for net in (plain, supernet):
            for module in net.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        x, y = train[0]
        smooth = {"label_smoothing": 0.1}
        wanted = np.mean([float(functional.cross_entropy(plain(x, a), y, **smooth)) for a in archs])
    loop.train(archs[chosen[0]])
    begin = perf_counter()
    for index in chosen:
        loop.train(archs[index])
        loop.score(archs[index])
    loop_seconds = perf_counter() - begin
    flops = supernet.space.flops(archs)
    loop_seconds *= float(flops.sum() / flops[chosen].sum())

    start_ema(supernet)
    plan = Plan(archs)
    trainer = PathTrainer(supernet, lr=1e-4, ema=True, precision=precision)
    evaluator = Evaluator(supernet, scored, calibration=calibration, precision=precision)
    first = trainer.update(plan, *train[0], position=0)
    np.testing.assert_allclose(first, wanted, rtol=TOLERANCE[precision])

    def ours():
        found = evaluator.evaluate(archs)
        for position, (x, y) in enumerate(train):
            trainer.update(plan, x, y, position=position)
        return found

    result = benchmark.pedantic(ours, rounds=1)
    assert np.isfinite(result.losses).all()
    if benchmark.stats is None:
        return
    with scope(precision):
        ran = kernels(supernet.stem, train[0][0])
    note(
        benchmark,
        "generation",
        space=name,
        size=size,
        generation=generation,
        precision=precision,
        kernels=ran,
        step_images=step_images,
        scored_images=SCORED_BATCHES * score_images,
        calibration_images=calibration_images,
        candidates_timed_of_the_loop=timed,
        archs_per_second=round(len(archs) / benchmark.stats.stats.median, 2),
        **figures(benchmark.stats.stats.data, {"released loop": [loop_seconds]}, result.sharing),
    )
