"""The compiled population core, or a word on how to build it."""

from __future__ import annotations

try:
    from fastshift import _core as core
except ImportError as error:
    raise ImportError(
        "the compiled population core is missing; build it with `pip install -e .` in the checkout"
    ) from error

__all__ = ["core"]
