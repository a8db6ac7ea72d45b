"""Captured steps: a function over static buffers, recorded once as a CUDA graph and replayed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from fastshift.errors import CaptureError

__all__ = ["CAPTURES", "CapturedStep", "Captures", "GraphPool", "shared_pool"]

Function = Callable[[], object]


@dataclass
class Captures:
    """What capturing has cost.

    Attributes:
        count: graphs recorded.
        seconds: of wall time, first runs aside of the graphs included.
    """

    count: int = 0
    seconds: float = 0.0


CAPTURES = Captures()  # of this process


class GraphPool:
    """Memory for several captured steps, which take turns in it.

    What one step leaves there the next may overwrite: only buffers from elsewhere last. PyTorch
    lets a pool go with the last graph that uses it and refuses its handle from then on, so the pool
    holds a graph of its own, and a step holds its pool.

    Args:
        device: a CUDA device.

    Attributes:
        handle: of the memory, for captures.

    Raises:
        CaptureError: there is no such device.
    """

    def __init__(self, device: torch.device) -> None:
        with _capturing(device) as stream:
            self.handle = torch.cuda.graph_pool_handle()
            # A graph of nothing would do, with a warning.
            self._byte = torch.zeros(1, dtype=torch.uint8, device=device)
            self._graph = _record(self._byte.zero_, stream, self.handle)


def shared_pool(device: torch.device) -> GraphPool | None:
    """A pool for steps on a device; None where there are no graphs."""
    return GraphPool(device) if device.type == "cuda" else None


class CapturedStep:
    """A function over static buffers.

    On a CUDA device it is run once on a side stream, for what a first call compiles, copies and
    allocates, then recorded as a CUDA graph; from there on a call is a replay, one launch.
    Elsewhere a call runs the function on the same buffers, and `is_captured` stays false.

    The function must be safe to run once on what its buffers hold at the capture. It must read all
    that varies from its buffers: a number that Python gives it is recorded as it is.

    Args:
        function: gives nothing back; what it computes it leaves in buffers.
        device: of its buffers.
        pool: for memory that lasts no longer than a call; None for memory of its own.
    """

    def __init__(
        self, function: Function, device: torch.device | str, pool: GraphPool | None = None
    ) -> None:
        self.function, self.device, self.pool = function, torch.device(device), pool
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_captured(self) -> bool:
        """Whether a call is a replay of a graph."""
        return self._graph is not None

    def capture(self) -> CapturedStep:
        """Record the function, where there are graphs and none is recorded yet.

        Raises:
            CaptureError: there is no such device, or the function cannot be captured.
            OutOfMemoryError: of PyTorch, as it was raised.
        """
        if self._graph is not None or self.device.type != "cuda":
            return self
        begin = time.perf_counter()
        with _capturing(self.device) as stream:
            with torch.cuda.stream(stream):
                self.function()
            torch.cuda.synchronize()
            # A product's workspace of the first run lasts until someone clears it. The graph is to
            # take one of its own, which no later graph then takes for its.
            _clear_workspaces()
            try:
                self._graph = _record(self.function, stream, self.pool and self.pool.handle)
            finally:
                _clear_workspaces()
        CAPTURES.count += 1
        CAPTURES.seconds += time.perf_counter() - begin
        return self

    def replay(self) -> None:
        """Run on what the buffers hold.

        Raises:
            CaptureError: on a CUDA device, `capture` was not called.
        """
        if self._graph is not None:
            self._graph.replay()
        elif self.device.type == "cuda":
            raise CaptureError(f"{_name(self.function)}: replayed before it was captured")
        else:
            self.function()


@contextmanager
def _capturing(device: torch.device):
    """The device made the current one, and the stream of its captures, which waits for others."""
    if not torch.cuda.is_available():
        raise CaptureError(f"capture on {device}: this torch finds no usable GPU")
    with torch.cuda.device(device):
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        yield stream


def _record(
    function: Function, stream: torch.cuda.Stream, pool: tuple[int, int] | None
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), _without_collection():
        try:
            # Of this thread alone: a reader's thread may call what a capture forbids.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            function()
        except Exception as error:
            # Ending a broken capture raises again; what broke it is the reason to give.
            try:
                graph.capture_end()
            except RuntimeError as end:
                error.__context__ = end
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _refused(function, error) from error
        try:
            graph.capture_end()
        except RuntimeError as error:
            raise _refused(function, error) from error
    return graph


def _clear_workspaces() -> None:
    """Have cuBLAS take new memory at its next products; PyTorch has no public name for it."""
    torch._C._cuda_clearCublasWorkspaces()


def _refused(function: Function, error: Exception) -> CaptureError:
    return CaptureError(f"{_name(function)}: cannot be captured: {error}")


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures, in which no other work may stand while one is recorded.

    PyTorch gives out 32 streams of each priority in turn, so copies may not be of the same.
    """
    return torch.cuda.Stream(device, priority=-1)


def _name(function: Function) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


@contextmanager
def _without_collection():
    """Keep the collector from freeing, in the middle of a capture, what a capture may not free."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
