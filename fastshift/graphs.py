"""Captured steps: a function over static buffers, recorded once as a CUDA graph and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastshift.errors import CaptureError

__all__ = ["CapturedStep", "shared_pool"]


def shared_pool(device: torch.device) -> tuple[int, int] | None:
    """Memory for several captured steps, which take turns in it; None where there are no graphs.

    What one step leaves there the next may overwrite: only buffers from elsewhere last.
    """
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class CapturedStep:
    """A function over static buffers.

    On a CUDA device it is run once on a side stream, for what a first call compiles, copies and
    allocates, then recorded as a CUDA graph; from there on a call is a replay, one launch.
    Elsewhere the same calls run the function on the same buffers, and `is_captured` stays false.

    The function must be safe to run once on what its buffers hold at the capture. It must read all
    that varies from its buffers: a number that Python gives it is recorded as it is.

    Args:
        function: called with `buffers`; its results, tensors at fixed places once it is captured,
            are overwritten by the next replay, and by that of any step of its pool.
        buffers: its inputs, all on one device; they stay where they are.
        device: of a function without inputs.
        pool: what `shared_pool` gave; None for memory of its own.

    Attributes:
        result: what the last call gave.
        replays: calls made.

    Raises:
        ValueError: buffers on two devices, or neither buffers nor a device.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *buffers: Tensor,
        device: torch.device | str | None = None,
        pool: tuple[int, int] | None = None,
    ) -> None:
        devices = {buffer.device for buffer in buffers}
        if device is not None:
            devices.add(torch.device(device))
        if len(devices) != 1:
            found = ", ".join(sorted(map(str, devices))) or "none"
            raise ValueError(f"buffers: on devices {found}; expected one")
        self.function = function
        self.buffers = buffers
        self.device = devices.pop()
        self.pool = pool
        self.result: Any = None
        self.replays = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_captured(self) -> bool:
        """Whether a call is a replay of a graph."""
        return self._graph is not None

    def __call__(self, *values: Tensor) -> Any:
        """Copy values into the buffers, and replay.

        Args:
            values: one for each buffer, of its shape, of any type and device.

        Returns:
            What the function returned.

        Raises:
            CaptureError: the function cannot be captured.
            ValueError: another number of values, or another shape.
        """
        if len(values) != len(self.buffers):
            raise ValueError(f"values: {len(values)}; expected {len(self.buffers)}")
        for index, (buffer, value) in enumerate(zip(self.buffers, values, strict=True)):
            if buffer.shape != value.shape:
                raise ValueError(
                    f"value {index}: shape {tuple(value.shape)}; expected {tuple(buffer.shape)}, "
                    "which was captured"
                )
            buffer.copy_(value, non_blocking=True)
        self.capture()
        return self.replay()

    def capture(self) -> CapturedStep:
        """Record the function, where there are graphs and none is recorded yet.

        Raises:
            CaptureError: there is no such device, or the function cannot be captured.
        """
        if self._graph is not None or self.device.type != "cuda":
            return self
        if not torch.cuda.is_available():
            raise CaptureError(f"capture on {self.device}: this torch finds no usable GPU")
        with torch.cuda.device(self.device):
            stream = _side_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(*self.buffers)
            torch.cuda.synchronize()
            self._graph = self._record(stream)
        return self

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: a reader's thread may call what a capture forbids.
        with torch.cuda.stream(stream), _without_collection():
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                self.result = self.function(*self.buffers)
            except Exception as error:
                # Ending a broken capture raises again; what broke it is the reason to give.
                try:
                    graph.capture_end()
                except RuntimeError as end:
                    error.__context__ = end
                raise CaptureError(
                    f"{_name(self.function)}: cannot be captured: {error}"
                ) from error
            try:
                graph.capture_end()
            except RuntimeError as error:
                raise CaptureError(
                    f"{_name(self.function)}: cannot be captured: {error}"
                ) from error
        return graph

    def replay(self) -> Any:
        """Run on what the buffers hold.

        Returns:
            What the function returned.

        Raises:
            CaptureError: on a CUDA device, `capture` was not called.
        """
        if self._graph is not None:
            self._graph.replay()
        elif self.device.type == "cuda":
            raise CaptureError(f"{_name(self.function)}: replayed before it was captured")
        else:
            self.result = self.function(*self.buffers)
        self.replays += 1
        return self.result


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps memory of its own for each that it has seen."""
    return torch.cuda.Stream(device)


def _name(function: Callable[..., Any]) -> str:
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
