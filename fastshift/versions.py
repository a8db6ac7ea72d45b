"""What computes: versions of the parts that decide a result's bits."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from fastshift.cpu import instruction_set
from fastshift.errors import ConfigError

__all__ = ["device_name", "versions"]


def versions(device: torch.device | str = "cpu") -> dict[str, str | int | None]:
    """Versions and device, as `config.yaml` records them; None where a package is missing."""
    return {
        "fastshift": _version("fastshift"),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "dali": _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120"),
        "python": platform.python_version(),
        "device": device_name(device),
        "instruction_set": _instruction_set(),
        "threads": torch.get_num_threads(),
    }


def _instruction_set() -> str | None:
    """Of the compiled kernels; None where `FASTSHIFT_CPU_ISA` asks for one that cannot run."""
    try:
        return instruction_set()
    except ConfigError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device | str) -> str:
    """A GPU's product name, or the processor's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
