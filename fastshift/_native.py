"""The compiled parts, or a word on how to build them."""

from __future__ import annotations

try:
    from fastshift import _core as core
    from fastshift import _cpu as cpu
except ImportError as error:
    raise ImportError(
        "a compiled part is missing; build it with `pip install -e .` in the checkout"
    ) from error

__all__ = ["core", "cpu"]
