"""Where a layer in training has its rows and gradients: what is still read stays."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton", minversion="3.6")

from block_cases import op_of
from kernel_cases import OPS, TrainingCase, layer_text

from fastshift.kernels.plan import plan_layer
from fastshift.operators import layer_train
from fastshift.population_layer import parse_layer

LETTERS = {"P": "pointwise", "D": "depthwise"}


def _random_ops(generator):
    """Choices of some chains, some with a shortcut of other units."""
    stride = generator.choice((1, 2))

    def chain(c_in, c_out):
        kinds = [generator.choice("PD") for _ in range(generator.choice((1, 2, 3, 6)))]
        if c_in != c_out and "P" not in kinds:
            kinds[-1] = "P"
        units, c = [], c_in
        strided = generator.randrange(len(kinds))
        for index, kind in enumerate(kinds):
            last = "P" not in kinds[index + 1 :]
            out = c if kind == "D" else c_out if last else 4 * generator.randint(1, 5)
            kernel = 1 if kind == "P" else generator.choice((3, 5))
            units.append((LETTERS[kind], c, out, kernel, stride if index == strided else 1))
            c = out
        return units

    c_out = 8 if stride == 1 else 16
    ops = []
    for _ in range(generator.randint(1, 4)):
        aside = chain(8, c_out) if stride == 2 or generator.random() < 0.5 else ()
        ops.append(op_of(chain(8, c_out), "residual", stride, aside))
    return ops


def _step_of(plan, placed):
    return next(i for i, at in enumerate(plan.placed) if placed in at)


def _alive(plan, chains, hidden):
    """Of one choice: place, size and the launches between which rows, or gradients, are needed."""
    for chain in chains:
        for index, placed in enumerate(chain):
            key = placed.choice, placed.chain, index
            size = plan._elements(placed)
            if hidden and index + 1 < len(chain):  # written with the next unit's, read with its own
                begin = len(plan.steps) - _step_of(plan, chain[index + 1])
                yield plan.gradients[key], size, begin, len(plan.steps) - _step_of(plan, placed)
            elif not hidden:  # the last is read by the frames, behind all steps
                then = len(plan.steps)
                if index + 1 < len(chain):
                    then = _step_of(plan, chain[index + 1])
                yield plan.passing[key], size, _step_of(plan, placed), then


@pytest.mark.parametrize("hidden", [False, True], ids=["rows", "gradients"])
def test_what_takes_turns_is_never_overwritten_while_it_is_read(hidden):
    generator, pairs = random.Random(0), 0
    for _ in range(200):
        layer = parse_layer(layer_text(_random_ops(generator)))
        plan = plan_layer(layer, generator.randint(1, 3), 4, generator.randint(3, 5), 8)
        room = plan.gradient_elements if hidden else plan.passing_elements
        for choice in range(plan.num_choices):
            own = [chain for chain in plan.chains if chain[0].choice == choice]
            found = list(_alive(plan, own, hidden))
            for index, (at, size, begin, end) in enumerate(found):
                assert 0 <= at <= at + size <= room
                for other, other_size, other_begin, other_end in found[:index]:
                    if begin <= other_end and other_begin <= end:
                        assert at + size <= other or other + other_size <= at
                        pairs += 1
    assert pairs > 500


@pytest.mark.parametrize("name", ["s2", "rare"])
def test_rows_that_are_not_kept_give_the_same(name, backend, like_a_device):
    backend("triton")
    case = TrainingCase(name, (2, 4, 3, 3))
    given = (case.rows, case.parent, case.choice, case.parameters, case.text)
    kept, passing = layer_train(*given, True), layer_train(*given, False)
    assert kept[0].equal(passing[0])
    assert kept[1].equal(passing[1])
    assert kept[2].numel() > passing[2].numel() == 0


def test_a_choice_has_no_more_room_than_it_needs():
    """Two rooms a chain, each as large as the rows that take turns in it."""
    plan = plan_layer(parse_layer(layer_text(OPS["s2"](8))), 2, 6, 6, 8)
    most = 0
    for choice in range(plan.num_choices):
        needed = 0
        for chain in (chain for chain in plan.chains if chain[0].choice == choice):
            sizes = [plan._elements(placed) for placed in chain[:-1]]
            needed += max(sizes[0::2], default=0) + max(sizes[1::2], default=0)
        most = max(most, needed)
    assert most == plan.gradient_elements <= plan.passing_elements < plan.kept_elements
