"""The operators' way to the Triton kernels: their precision, and the device they start on."""

from __future__ import annotations

import pytest
import torch

from fastshift import _operators_triton
from fastshift.ops import projection
from fastshift.population_layer import LayerOp, LayerUnit, describe_layer, describe_op, parse_layer

pytest.importorskip("triton", minversion="3.6")


def _layer():
    [unit] = projection(4, 4, 1).units
    unit = LayerUnit(False, unit.in_channels, unit.out_channels, 1, 1, True, 1e-5)
    return parse_layer(describe_layer([describe_op(LayerOp((unit,), 1, "plain"))]))


@pytest.mark.parametrize(("asked", "precision"), [("highest", "ieee"), ("high", "tf32")])
def test_scoring_and_training_multiply_in_the_precision_that_pytorch_is_asked_for(
    asked, precision, monkeypatch
):
    from fastshift.kernels import infer, layer

    found = []
    monkeypatch.setattr(infer, "infer", lambda *_, precision, out: found.append(precision))
    monkeypatch.setattr(layer, "train", lambda *given, into: found.append(given[6]))
    monkeypatch.setattr(
        layer, "backward", lambda *given, d_rows, sums: found.append(given[9]) or (None, [])
    )
    own, rows = _layer(), torch.zeros(1, 2, 2, 2, 4)
    node, given = torch.zeros(1, dtype=torch.int32), [torch.zeros(s) for s in _layer().shapes]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        _operators_triton.infer(rows, node, node, given, torch.zeros(1, 8), own)
        _operators_triton.train(rows, node, node, given, own, True)
        rest = torch.zeros(1, 20), torch.zeros(0), own, [True]
        _operators_triton.backward(rows, rows, node, node, given, *rest)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == [precision] * 3


def test_kernels_start_on_the_device_of_their_rows(monkeypatch):
    asked = []

    class Device:
        def __init__(self, device):
            asked.append(device)

        def __enter__(self):
            asked.append("in")

        def __exit__(self, *_):
            asked.append("out")

    monkeypatch.setattr(torch.cuda, "device", Device)
    with _operators_triton._current(torch.device("cpu")):
        assert asked == []
    with _operators_triton._current(torch.device("cuda", 1)):
        asked.append("launch")
    assert asked == [torch.device("cuda", 1), "in", "launch", "out"]
