from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fastshift.errors import CaptureError
from fastshift.graphs import CapturedStep, _side_stream, shared_pool

# Where there are no graphs


def test_a_call_copies_into_the_buffers_and_runs_on_them():
    buffer = torch.zeros(3)
    step = CapturedStep(lambda x: x * 2, buffer)
    assert torch.equal(step(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([2.0, 4.0, 6.0]))
    assert torch.equal(buffer, torch.tensor([1.0, 2.0, 3.0]))
    buffer.fill_(5.0)
    assert torch.equal(step.replay(), torch.full((3,), 10.0))
    assert step.replays == 2


def test_on_a_cpu_a_step_says_that_it_is_no_graph():
    step = CapturedStep(torch.neg, torch.zeros(2)).capture()
    step.replay()
    assert not step.is_captured
    assert shared_pool(torch.device("cpu")) is None


def test_values_of_another_type_are_converted():
    step = CapturedStep(lambda x: x.clone(), torch.zeros(2))
    assert step(torch.tensor([1, 2])).dtype is torch.float32


def test_another_shape_than_the_captured_one_is_refused():
    step = CapturedStep(torch.neg, torch.zeros(3))
    with pytest.raises(ValueError, match=r"value 0: shape \(2,\); expected \(3,\)"):
        step(torch.zeros(2))
    with pytest.raises(ValueError, match="values: 2; expected 1"):
        step(torch.zeros(3), torch.zeros(3))


def test_buffers_on_two_devices_and_no_device_at_all_are_refused():
    with pytest.raises(ValueError, match="devices cpu, meta; expected one"):
        CapturedStep(torch.add, torch.zeros(1), torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="none; expected one"):
        CapturedStep(list)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error_and_not_a_fallback():
    with pytest.raises(CaptureError, match="no usable GPU"):
        CapturedStep(list, device="cuda").capture()


# The order of a capture, on a device that only takes notes


class Notes:
    """What is called of `torch.cuda`, in its order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        notes = self

        class Graph:
            def capture_begin(self, pool=None, capture_error_mode="global"):
                notes.calls.append(f"begin {pool} {capture_error_mode}")

            def capture_end(self):
                notes.calls.append("end")

            def replay(self):
                notes.calls.append("replay")

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                notes.calls.append("wait")

        self.CUDAGraph, self.Stream = Graph, Stream
        self.current_stream = Stream

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        self.calls.append("on side stream")
        yield
        self.calls.append("back")


@pytest.fixture
def notes(monkeypatch):
    found = Notes()
    monkeypatch.setattr(torch, "cuda", found)
    _side_stream.cache_clear()
    yield found
    _side_stream.cache_clear()


def test_a_step_is_warmed_up_aside_recorded_once_and_then_replayed(notes):
    step = CapturedStep(lambda: notes.calls.append("function"), device="cuda", pool=(0, 7))
    for _ in range(2):
        step.capture()
    step.replay()
    step.replay()
    assert notes.calls == [
        *("wait", "on side stream", "function", "back", "synchronize"),
        *("on side stream", "begin (0, 7) thread_local", "function", "end", "back"),
        *("replay", "replay"),
    ]
    assert step.is_captured


def test_a_function_that_cannot_be_captured_says_why_and_ends_the_capture(notes):
    runs = []

    def unsafe():
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    step = CapturedStep(unsafe, device="cuda")
    with pytest.raises(CaptureError, match=r"unsafe: cannot be captured: operation not permitted"):
        step.capture()
    assert "end" in notes.calls
    assert not step.is_captured
    with pytest.raises(CaptureError, match="before it was captured"):
        step.replay()
