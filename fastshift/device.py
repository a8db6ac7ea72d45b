"""The one place for devices: which one a name means, how exactly a GPU computes, whose turn it is.

`auto` is a GPU where there is one; `FASTSHIFT_DEVICE` says another. On a GPU fp32 is fp32, unless
PyTorch is asked for TF32 (`torch.set_float32_matmul_precision`, or
`torch.backends.cuda.matmul.fp32_precision`), and runs repeat.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["TURN", "fp32_precision", "in_turn", "parse_device", "settle_on", "use_device"]

_P, _R = ParamSpec("_P"), TypeVar("_R")

# Of this process's threads, for what scores and trains: for a moment a supernet's modules are
# changed or the class of all modules is, its buffers are its own, and a capture is a whole GPU's.
TURN = threading.RLock()
# A child that was forked while another thread had its turn would wait for it for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TURN._at_fork_reinit)


def in_turn(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function wait until no other thread scores or trains."""

    @wraps(function)
    def call(*arguments: _P.args, **options: _P.kwargs) -> _R:
        with TURN:
            return function(*arguments, **options)

    return call


def parse_device(name: str | torch.device) -> torch.device:
    """The device that a name means, where it can be used.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: with what is expected instead, to be put behind the option's name; that of
            `FASTSHIFT_DEVICE`, where it was that, stands before.
    """
    asked = os.environ.get("FASTSHIFT_DEVICE") if str(name) == "auto" else None
    try:
        return _parsed(asked or str(name))
    except ValueError as error:
        raise ValueError(f"FASTSHIFT_DEVICE={asked}: {error}" if asked else str(error)) from None


def _parsed(text: str) -> torch.device:
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError("no usable GPU, expected auto or cpu")
        if (device.index or 0) >= count:
            raise ValueError(f"expected one of the {count} usable GPUs, or cpu")
    return device


def fp32_precision() -> str:
    """How PyTorch is asked to multiply float32 matrices on a GPU: exactly, `ieee`, or in `tf32`.

    By any of its ways: from 2.9 on the older one raises where the newer was used.
    """
    found = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if found is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if found == "tf32" else "ieee"


def settle_on(device: torch.device) -> None:
    """Compute on a device from here on: a GPU becomes the current one, and exact."""
    if device.type == "cuda":
        cudnn, precision = torch.backends.cudnn, fp32_precision()
        torch.cuda.set_device(device.index or 0)
        cudnn.allow_tf32 = precision == "tf32"
        for part in _cudnn_parts():
            part.fp32_precision = precision
        cudnn.deterministic, cudnn.benchmark = True, False


@contextmanager
def use_device(device: torch.device) -> Iterator[None]:
    """Compute on a device: a GPU is the current one, and exact, and afterwards all is as it was."""
    if device.type != "cuda":
        yield
        return
    before = _cudnn_settings()
    with torch.cuda.device(device):
        try:
            settle_on(device)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


def _cudnn_parts() -> list[Any]:
    """What has a precision of its own, from 2.9 on."""
    found = (getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn"))
    return [part for part in found if hasattr(part, "fp32_precision")]


def _cudnn_settings() -> list[tuple[Any, str, Any]]:
    """Owner, name and value of all that `settle_on` sets, in the order to put them back."""
    cudnn, names = torch.backends.cudnn, ("deterministic", "benchmark")
    found = [(cudnn, name, getattr(cudnn, name)) for name in names]
    # Where the parts were asked for one by one, the older name cannot be read.
    with suppress(RuntimeError):
        found.append((cudnn, "allow_tf32", cudnn.allow_tf32))
    return found + [(part, "fp32_precision", part.fp32_precision) for part in _cudnn_parts()]
