"""What must be right before anything is timed: the kernels, the operators, a whole evaluation.

The kernels' part runs a few of the suite's own tests, in a process of its own: there they compare
with the reference in float64, on a CUDA device where there is one. The rest compares one tiny
evaluation and one update with a CPU's in float64. Tolerances are the suite's.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gpu_ceilings import plain_fp32
from gpu_timing import Clock

from fastshift.backends import is_interpreted
from fastshift.evaluator import PRECISIONS, Evaluator
from fastshift.testing import (
    FLOORS,
    assert_as_accurate,
    random_archs,
    synthetic_data,
    tiny_supernet,
)
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

__all__ = [
    "KERNEL_TESTS",
    "PROVIDERS",
    "RedGateError",
    "arguments",
    "check",
    "steps_by",
    "tests_by_name",
]

ROOT = Path(__file__).parents[1]
# How a supernet's steps run: PyTorch's ops by its modules, or the kernels over static buffers, on
# a CUDA device captured as graphs. Name, what asks for it, and what must have run.
PROVIDERS = {
    "cuda": {"modules": ("modules", "modules: "), "graph": ("static", "captured")},
    "cpu": {"modules": ("modules", "modules: "), "static": ("static", "static")},
}

_LOSS = "loss::test_losses_counts_and_gradients_are_those_of_float64"
_STEP = "sgd::test_a_step_is_that_of_float64_for_gradients_of_every_type"
_IMAGES = "images::test_images_are_those_of_the_cpus_augmentation"
_NARROW_IMAGES = "images::test_narrow_images_are_the_rounded_ones"
_INFER = "infer::test_every_choice_is_as_accurate_as_the_reference"
_PLAIN = "infer::test_batch_norms_without_scale_and_shift"
_NARROW = "infer::test_narrow_rows_are_as_accurate_as_their_type"
_OPERATOR = "infer::test_the_operator_runs_the_kernel"
_TRAIN = "layer::test_training_and_every_gradient_are_as_accurate_as_the_references"
_DRAWS = "layer::test_each_gradient_of_a_narrow_type_is_as_accurate_over_draws"
_AFFINE = "layer::test_batch_norms_without_scale_and_shift"
# Of tests/test_kernels_*.py; the first of each kernel is enough for a dry run.
KERNEL_TESTS = {
    "candidate_loss and its gradient": (
        f"{_LOSS}[easy-torch.float32-0.1]",
        f"{_LOSS}[odd-torch.float32-0.0]",
        f"{_LOSS}[odd-torch.bfloat16-0.1]",
        f"{_LOSS}[easy-torch.float16-0.1]",
    ),
    "sgd_step": (
        f"{_STEP}[False-torch.float32]",
        f"{_STEP}[True-torch.bfloat16]",
        f"{_STEP}[False-torch.float16]",
    ),
    "augment_images": (
        f"{_IMAGES}[tiny-2-planar]",
        f"{_IMAGES}[odd-2-planar]",
        f"{_IMAGES}[easy-2-channels last]",
        f"{_NARROW_IMAGES}[odd-torch.bfloat16]",
    ),
    "layer_infer": (
        f"{_PLAIN}[parts]",
        f"{_INFER}[stages-s1-odd]",
        f"{_INFER}[stages-s2-odd]",
        f"{_INFER}[images-s1-odd]",
        f"{_INFER}[rows-s2-odd]",
        f"{_NARROW}[stages-s1-bf16]",
        f"{_NARROW}[parts-s1-bf16]",
        f"{_NARROW}[parts-s1-fp16]",
        f"{_OPERATOR}[fp32]",
        f"{_OPERATOR}[bf16]",
    ),
    "layer_train and layer_backward": (
        _AFFINE,
        f"{_TRAIN}[s1-odd-every_choice-fp32]",
        f"{_TRAIN}[s2-odd-padded-fp32]",
        f"{_TRAIN}[s1-tiny-padded-bf16]",
        f"{_TRAIN}[s2-tiny-last_two-fp16]",
        f"{_DRAWS}[pair-bf16]",
        f"{_DRAWS}[s2-bf16]",
        f"{_DRAWS}[kernels-bf16]",
        f"{_DRAWS}[pair-fp16]",
    ),
}


class RedGateError(Exception):
    """A result is wrong, or could not be had: nothing is to be timed."""


@contextmanager
def steps_by(provider: str, device: torch.device) -> Iterator[str]:
    """Have a supernet's steps run by a provider.

    Args:
        provider: of `PROVIDERS` for the device.
        device: of the supernet.

    Yields:
        How `Scores.computed` begins where it did run.
    """
    asked, ran = PROVIDERS[device.type][provider]
    before = os.environ.get("FASTSHIFT_STEPS")
    os.environ["FASTSHIFT_STEPS"] = asked
    try:
        yield ran
    finally:
        del os.environ["FASTSHIFT_STEPS"]
        if before is not None:
            os.environ["FASTSHIFT_STEPS"] = before


def check(device: torch.device, clock: Clock, *, tiny: bool) -> dict[str, str]:
    """Compare everything with its reference.

    Args:
        device: that is to be timed.
        clock: of the budget.
        tiny: the first test of each kernel alone.

    Returns:
        What was compared, and how it went.

    Raises:
        RedGateError: something is wrong, a test was skipped, or the time was up.
    """
    found = _kernels(KERNEL_TESTS, clock, tiny=tiny)
    for provider in PROVIDERS[device.type]:
        for precision in PRECISIONS:
            what = f"an evaluation and an update by {provider}, {precision}"
            found[what] = _whole(provider, device, precision)
    return found


def tests_by_name(tests: dict[str, Iterable[str]]) -> dict[str, tuple[str, bool]]:
    """Of tests by the names that pytest has for them: the kernel, and whether it is its first."""
    names = {}
    for kernel, own in tests.items():
        for position, test in enumerate(own):
            file, _, name = test.partition("::")
            names[f"tests/test_kernels_{file}.py::{name}"] = kernel, position == 0
    return names


def arguments(names: Iterable[str]) -> list[str]:
    """What pytest takes to run tests, from any folder; a name that is not there is an error."""
    # A warning that only a GPU's libraries give says nothing of a kernel.
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    return [*options, f"--rootdir={ROOT}", *(str(ROOT / name) for name in names)]


def _kernels(tests: dict[str, Iterable[str]], clock: Clock, *, tiny: bool) -> dict[str, str]:
    """Run tests of the suite, all named in one call."""
    names = tests_by_name(tests)
    left = [name for name, (_, is_first) in names.items() if tiny and not is_first]
    wanted = [name for name in names if name not in left]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *arguments(names)]
        command += [f"--junit-xml={report}", "-o", "junit_family=xunit1"]
        command += [f"--deselect={name}" for name in left]
        environment = {k: v for k, v in os.environ.items() if k != "FASTSHIFT_BACKEND"}
        try:
            # From elsewhere: in the root, Python would take its folders for the installed ones.
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(clock.left, 1),
            )
        except subprocess.TimeoutExpired as error:
            raise RedGateError(f"the kernels' tests took more than {error.timeout:.0f} s") from None
        if done.returncode:
            raise RedGateError(f"the kernels' tests:\n{done.stdout[-6000:]}{done.stderr[-1000:]}")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        passed = {f"{c.get('file')}::{c.get('name')}" for c in cases if not len(c)}
    if missed := [name for name in wanted if name not in passed]:
        raise RedGateError(f"the kernels' tests: did not run: {', '.join(missed)}")
    how = "in Triton's interpreter" if is_interpreted() else "on the GPU"
    return {
        kernel: f"{sum(names[name][0] == kernel for name in wanted)} tests passed {how}"
        for kernel in tests
    }


def _whole(provider: str, device: torch.device, precision: str) -> str:
    """Compare losses of a few candidates and the displacement of one update with a CPU's."""
    archs = random_archs(tiny_supernet().space, 6)
    floor = FLOORS[torch.float32 if precision == "fp32" else torch.bfloat16]
    with steps_by("modules", torch.device("cpu")):
        exact = _run(torch.device("cpu"), archs, torch.float64, "sequential", "fp32")
        plain = _run(torch.device("cpu"), archs, torch.float32, "sequential", precision)
    with steps_by(provider, device) as expected, plain_fp32():
        found = _run(device, archs, torch.float32, "shared", precision)
    for part in ("scores", "update"):
        if not found[f"{part} ran"].startswith(expected):
            raise RedGateError(f"{provider}: {part} ran as {found[f'{part} ran']!r}")
        try:
            assert_as_accurate(found[part], plain[part], exact[part], floor=floor)
        except AssertionError as error:
            raise RedGateError(f"{provider}, {precision}, {part}: {error}") from None
    return f"as accurate as a CPU's, run as `{expected.rstrip(': ')}`"


def _run(
    device: torch.device, archs: np.ndarray, dtype: torch.dtype, strategy: str, precision: str
) -> dict:
    """Losses of candidates, what an update of all moved, and how both ran."""
    net = tiny_supernet().to(device, dtype)
    data = synthetic_data(validation=(8, 8), calibration=(8, 6))
    batches = [(x.to(dtype), y) for x, y in data.validation]
    calibration = [(x.to(dtype), y) for x, y in data.calibration]
    evaluator = Evaluator(
        net, batches, calibration=calibration, strategy=strategy, precision=precision
    )
    scores = evaluator.evaluate(archs)
    before = copy.deepcopy(dict(net.named_parameters()))
    trainer = PathTrainer(net, lr=0.1, momentum=0.0, precision=precision)
    trainer.update(Plan(archs), *batches[0], position=0)
    moved = [p.detach() - before[name].detach() for name, p in net.named_parameters()]
    return {
        "scores": [scores.losses],
        "scores ran": scores.computed,
        "update": moved,
        "update ran": trainer.computed,
    }
