"""Triton's interpreter under any NumPy: a scalar may bound a `range`, whatever its shape.

The interpreter holds scalars as arrays of one element. That of Triton 3.6 leaves their conversion
to NumPy, which has warned of it since 1.25 and refuses it since 2.5.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

__all__ = ["take_scalars"]


def take_scalars() -> None:
    """Mend the interpreter of this process; of no effect on kernels that are compiled."""
    patch = interpreter._patch_lang_tensor
    if patch.__module__ == __name__:
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
