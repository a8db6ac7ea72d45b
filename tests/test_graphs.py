from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from weakref import WeakSet

import pytest
import torch

from fastshift import graphs
from fastshift.errors import CaptureError
from fastshift.graphs import CAPTURES, CapturedStep, GraphPool, _side_stream, shared_pool

# Where there are no graphs


def test_on_a_cpu_a_replay_runs_the_function_and_says_that_it_is_no_graph():
    buffer, result = torch.tensor([1.0, 2.0]), torch.zeros(2)
    step = CapturedStep(lambda: result.copy_(buffer * 2), "cpu").capture()
    for value in (3.0, 5.0):
        buffer.fill_(value)
        step.replay()
        assert torch.equal(result, torch.full((2,), 2 * value))
    assert not step.is_captured
    assert shared_pool(torch.device("cpu")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error_and_not_a_fallback():
    with pytest.raises(CaptureError, match="no usable GPU"):
        CapturedStep(list, "cuda").capture()


# The order of a capture, on a device that only takes notes


class Notes:
    """What is called of `torch.cuda`, in its order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.graphs, self.seen, self.handles = WeakSet(), set(), 6
        self.refuses = False
        notes = self

        class Graph:
            """A graph that keeps its pool, as PyTorch's do, and refuses one that went."""

            def __init__(self):
                self.pool = ()
                notes.graphs.add(self)

            def capture_begin(self, pool=None, capture_error_mode="global"):
                notes.calls.append(f"begin {pool} {capture_error_mode}")
                if notes.refuses:
                    raise RuntimeError("a capture is under way")
                used = any(graph.pool == pool for graph in notes.graphs)
                if pool in notes.seen - {None} and not used:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                self.pool = pool
                notes.seen.add(pool)

            def capture_end(self):
                notes.calls.append("end")

            def replay(self):
                notes.calls.append("replay")

        class Stream:
            def __init__(self, device=None, priority=0):
                self.priority = priority

            def wait_stream(self, other):
                notes.calls.append("wait")

        self.CUDAGraph, self.Stream = Graph, Stream
        self.current_stream = Stream

    def graph_pool_handle(self) -> tuple[int, int]:
        self.handles += 1
        return 0, self.handles

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
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *given, **options: zeros(*given))
    monkeypatch.setattr(torch, "cuda", found)
    monkeypatch.setattr(graphs, "_clear_workspaces", lambda: found.calls.append("clear"))
    _side_stream.cache_clear()
    yield found
    _side_stream.cache_clear()


def test_a_step_is_warmed_up_aside_recorded_once_and_then_replayed(notes):
    pool = GraphPool(torch.device("cuda"))
    notes.calls.clear()
    captured = CAPTURES.count
    step = CapturedStep(lambda: notes.calls.append("function"), "cuda", pool)
    for _ in range(2):
        step.capture()
    step.replay()
    step.replay()
    assert notes.calls == [
        *("wait", "on side stream", "function", "back", "synchronize", "clear"),
        *("on side stream", "begin (0, 7) thread_local", "function", "end", "back", "clear"),
        *("replay", "replay"),
    ]
    assert step.is_captured
    assert CAPTURES.count == captured + 1


def test_captures_have_a_stream_that_copies_are_never_given(notes):
    assert _side_stream(torch.device("cuda")).priority != notes.Stream().priority


def test_a_pool_outlives_the_steps_that_used_it(notes):
    pool = shared_pool(torch.device("cuda"))
    for _ in range(2):
        step = CapturedStep(list, "cuda", pool).capture()
        assert len(notes.graphs) == 2
        del step
        assert len(notes.graphs) == 1


def test_a_step_keeps_its_pool(notes):
    pool = weakref.ref(shared_pool(torch.device("cuda")))
    assert pool() is None
    step = CapturedStep(list, "cuda", shared_pool(torch.device("cuda"))).capture()
    gc.collect()
    assert len(notes.graphs) == 2
    del step
    assert len(notes.graphs) == 0


def _failing_at_capture(error):
    runs = []

    def unsafe():
        runs.append(1)
        if len(runs) == 2:
            raise error

    return unsafe


def test_a_function_that_cannot_be_captured_says_why_and_ends_the_capture(notes):
    error = RuntimeError("operation not permitted when stream is capturing")
    step = CapturedStep(_failing_at_capture(error), "cuda")
    with pytest.raises(CaptureError, match=r"unsafe: cannot be captured: operation not permitted"):
        step.capture()
    assert "end" in notes.calls
    assert not step.is_captured
    with pytest.raises(CaptureError, match="before it was captured"):
        step.replay()


def test_memory_that_runs_out_in_a_capture_is_told_as_what_it_is(notes):
    step = CapturedStep(_failing_at_capture(torch.OutOfMemoryError("20 GiB")), "cuda")
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
        step.capture()
    assert "end" in notes.calls


def test_a_capture_that_cannot_begin_is_refused_as_one(notes):
    notes.refuses = True
    with pytest.raises(CaptureError, match="cannot be captured: a capture is under way"):
        CapturedStep(list, "cuda").capture()
