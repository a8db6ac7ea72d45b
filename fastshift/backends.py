"""What computes a population layer: the reference, the CPU's kernels or Triton's."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from fastshift.errors import ConfigError

__all__ = ["BACKENDS", "backend", "backends", "cuda_backend", "is_interpreted"]

BACKENDS = ("reference", "cpu", "triton")


def backends() -> dict[str, str | None]:
    """What may compute a population layer, and why it cannot run here; None for what can."""
    return {name: _reason(name) for name in BACKENDS}


def _reason(name: str) -> str | None:
    if name != "triton":
        return None
    if not _has_triton():
        return "triton is not installed"
    if not is_interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1, for tests without one, is not set"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


def backend() -> str:
    """What computes population layers of rows on a CPU: `FASTSHIFT_BACKEND`, or `cpu`.

    Raises:
        ConfigError: the one asked for is unknown or cannot run here.
    """
    name = _asked("cpu")
    reason = _reason(name)
    if reason is not None:
        raise ConfigError(f"FASTSHIFT_BACKEND: {name!r} cannot run: {reason}")
    return name


def cuda_backend() -> str:
    """Likewise on a CUDA device: `triton`, or `reference`.

    Raises:
        ConfigError: the one asked for is unknown.
    """
    return "triton" if _asked("triton") == "triton" and _has_triton() else "reference"


def _asked(default: str) -> str:
    name = os.environ.get("FASTSHIFT_BACKEND") or default
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ConfigError(f"FASTSHIFT_BACKEND: {name!r}; expected one of {known}")
    return name
