"""What lies beyond 2^31 elements: the kernels' addresses there, and the sizes that are refused.

Memory of such a size is never written but where a test's few values lie, so it takes next to none.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from block_cases import seeded
from infer_cases import FORMS, InferCase, take
from interpreter_memory import watch
from kernel_cases import DEVICE, TrainingCase, buffer, layer_text, same_bits

from fastshift.kernels import images, layer, loss
from fastshift.kernels.plan import LayerPlan, plan_layer
from fastshift.kernels.plan_records import LINE
from fastshift.ops import identity, inverted_residual, shuffle_unit
from fastshift.population_layer import parse_layer

FAR = 2**31


@pytest.fixture(autouse=True)
def _a_wrong_address_fails_and_ends_nothing():
    """An access outside of a launch's tensors is noted, where it would end the process."""
    if DEVICE == "cuda":
        yield
        return
    with watch() as found:
        yield
    assert not found.violations, found.violations[:3]


def _empty(elements, dtype):
    """Memory of which only what is written is there."""
    try:
        return torch.empty(elements, dtype=dtype, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"{elements} elements of {dtype}: {error}")


def _spread(values, axis, distance):
    """The same values, `distance` elements apart along an axis."""
    strides = [*values.stride()]
    strides[axis] = distance
    reach = sum((size - 1) * step for size, step in zip(values.shape, strides, strict=True))
    assert reach > FAR
    spread = _empty(reach + 1, values.dtype).as_strided(values.shape, strides)
    return spread.copy_(values)


# The distance alone is beyond 32 bits, or only what it is multiplied to.
@pytest.mark.parametrize(
    ("axis", "distance"), [(0, FAR + 16), (0, FAR // 2 + 16), (1, FAR + 16), (1, FAR // 2 + 16)]
)
def test_logits_may_be_far_apart(axis, distance):
    logits = torch.randn(3, 3, 16, generator=seeded()).to(DEVICE, torch.float16)
    if distance > FAR:
        logits = logits.narrow(axis, 0, 2).contiguous()
    labels = torch.randint(16, logits.shape[1:2], generator=seeded(1)).to(DEVICE)
    slopes = torch.randn(len(logits), generator=seeded(2)).to(DEVICE)
    given = labels, buffer([len(logits)]), 0.1
    found, expected = (
        [*loss._loss_fwd_triton(x, *given), loss._loss_bwd_triton(slopes, x, *given)]
        for x in (_spread(logits, axis, distance), logits)
    )
    assert same_bits(found, expected)


@pytest.mark.parametrize("axis", range(4), ids="NCHW".__getitem__)
def test_pixels_may_be_far_apart(axis):
    shape = (2, 3, 4, 5)
    pixels = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8).to(DEVICE)
    corners = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32, device=DEVICE)
    flips, fill = (torch.tensor(x, dtype=torch.uint8) for x in ([1, 0], [7, 8, 9]))
    scale, shift = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    buffers = corners, *(x.to(DEVICE) for x in (flips, fill, scale, shift))
    far = _spread(pixels, axis, FAR // (shape[axis] - 1) + 64)
    found, expected = (images._images_triton(x, *buffers, 1, torch.float32) for x in (far, pixels))
    assert torch.equal(found, expected)


def _far_rows(rows):
    """Two rows, and memory with the second of them as the last one, beyond 2^31 elements."""
    count = FAR // rows[0].numel() + 2
    far = _empty(count * rows[0].numel(), rows.dtype).view(count, *rows.shape[1:])
    far[0], far[-1] = rows
    return far, count - 1


NODES = (2, [1, 0, 1], [0, 1, 1])  # rows above; parent and choice of each node
KINDS = [inverted_residual(8, 8, 1, 2, 3), shuffle_unit(8, 8, 1, 3)]


@pytest.mark.parametrize("form", ["stages", "parts"])
def test_inference_reads_rows_that_are_far_away(form, monkeypatch):
    take(FORMS[form], monkeypatch)
    case = InferCase(KINDS, (2, 8, 3, 2), NODES, dtype=torch.float16)
    far, last = _far_rows(case.rows)
    assert torch.equal(case.run(rows=far, parent=case.parent * last), case.run())


def test_training_reads_rows_that_are_far_away():
    case = TrainingCase("pair", (2, 8, 3, 2), NODES, dtype=torch.float16)
    plan = plan_layer(case.layer, *case.rows.shape[1:])
    far, last = _far_rows(case.rows)
    results = []
    for rows, parent in ((far, case.parent * last), (case.rows, case.parent)):
        given = rows, parent, case.choice, case.parameters
        y, *kept = layer.train(*given, plan, True)
        d_y = torch.randn(y.shape, generator=seeded(2)).to(y)
        _, gradients = layer.backward(d_y, *given, *kept, plan, False)
        results.append([y, kept[0], *gradients])
    assert same_bits(*results)


def test_training_keeps_hidden_rows_and_their_gradients_far_away(monkeypatch):
    case = TrainingCase("pair", (2, 8, 3, 2), (2, [1, 0], [0, 1]), dtype=torch.float16)
    sizes = case.layer, *case.rows.shape[1:]
    near, far = plan_layer(*sizes), LayerPlan(*sizes)
    own_rows = near.kept_elements, near.gradient_elements
    far.kept_elements, far.gradient_elements = (FAR + LINE + own for own in own_rows)

    def raw_rows(plan, nodes, elements, rows):
        # The last node's end where its own do, not behind room for more.
        assert nodes == 2
        own = own_rows[elements == plan.gradient_elements]
        return _empty((elements + own) // 2, torch.float32)

    given = case.rows, case.parent, case.choice, case.parameters
    results = []
    for plan in (near, far):
        if plan is far:
            monkeypatch.setattr(layer, "_raw_rows", raw_rows)
        y, statistics, raw = layer.train(*given, plan, True)
        d_y = torch.randn(y.shape, generator=seeded(2)).to(y)
        d_rows, gradients = layer.backward(d_y, *given, statistics, raw, plan, True)
        results.append([y, statistics, d_rows, *gradients])
    assert same_bits(*results)


@pytest.mark.parametrize("ops", [KINDS, [identity(8)]], ids=len)
def test_training_refuses_rows_of_more_positions_than_32_bits_count(ops):
    plan = partial(plan_layer, parse_layer(layer_text(ops)))
    with pytest.raises(
        ValueError, match=r"^rows: 1073741824 positions; expected under 1073741824$"
    ):
        plan(65536, 128, 128, 8)
    most = plan(1, 2**15 - 1, 2**15 + 1, 8)
    assert len(most.tables(torch.device("cpu"), kept=True)) == 2
