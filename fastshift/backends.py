"""What computes a population layer: the reference, the CPU's kernels or Triton's."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from fastshift.errors import ConfigError

__all__ = ["BACKENDS", "backend", "backends", "cuda_backend", "is_interpreted", "why_no_triton"]

OLDEST_TRITON = (3, 6)  # of those that the kernels were compiled with
# Of the devices: their tiles take 96 KiB of shared memory, and products of bfloat16 and TF32 run on
# tensor cores. For older ones no kernel was compiled and looked at.
OLDEST_CAPABILITY = (8, 0)
BACKENDS = ("reference", "cpu", "triton")


def backends() -> dict[str, str | None]:
    """What may compute a population layer, and why it cannot run here; None for what can."""
    return {name: _reason(name) for name in BACKENDS}


def _reason(name: str) -> str | None:
    if name != "triton":
        return None
    lacking = _lacking(None)
    if lacking:
        return lacking
    if not is_interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1, for tests without one, is not set"
    return None


@cache
def _lacks_triton() -> str | None:
    """Why the kernels cannot be compiled at all; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:  # a build of another name, with its own PyTorch
        return None
    if tuple(map(int, re.findall(r"[0-9]+", found)[:2])) < OLDEST_TRITON:
        return f"triton is {found}; expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    return None


def _lacking(device: torch.device | None) -> str | None:
    """Why the kernels cannot run on a CUDA device, the current one where none is given."""
    return _lacks_triton() or _lacks_capability(device)


def _lacks_capability(device: torch.device | None) -> str | None:
    if is_interpreted() or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST_CAPABILITY:
        return None
    shown, wanted = (".".join(map(str, version)) for version in (found, OLDEST_CAPABILITY))
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {shown}; expected {wanted} or newer"


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


def cuda_backend(device: torch.device | None = None) -> str:
    """Likewise on a CUDA device: `triton`, or `reference`.

    Args:
        device: as for `why_no_triton`.

    Raises:
        ConfigError: the one asked for is unknown, or is Triton's and cannot run there.
    """
    return "triton" if why_no_triton(device) is None else "reference"


def why_no_triton(device: torch.device | None = None) -> str | None:
    """Why Triton's kernels do not run on a CUDA device; None where they do.

    Args:
        device: the current one without.

    Raises:
        ConfigError: as for `cuda_backend`.
    """
    asked = _asked("triton")
    if asked != "triton":
        return f"FASTSHIFT_BACKEND={asked}"
    lacking = _lacking(device)
    if lacking and os.environ.get("FASTSHIFT_BACKEND"):
        raise ConfigError(f"FASTSHIFT_BACKEND: 'triton' cannot run: {lacking}")
    return lacking


def _asked(default: str) -> str:
    name = os.environ.get("FASTSHIFT_BACKEND") or default
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ConfigError(f"FASTSHIFT_BACKEND: {name!r}; expected one of {known}")
    return name
