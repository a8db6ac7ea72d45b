"""What must be set before torch and Triton are imported: threads, and the kernels' interpreter.

One thread an operator: results repeat, busy cores do not spin. Without a CUDA device Triton's
kernels run in its interpreter, which is chosen when a kernel is defined.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _kernels_stay_inside_their_tensors(request):
    """Check every access of the kernels' own tests where `make sanitize-kernels` asks for it."""
    is_asked = os.environ.get("FASTSHIFT_WATCH") == "1"
    if not is_asked or not request.path.name.startswith("test_kernels"):
        yield
        return
    from interpreter_memory import watch

    with watch() as found:
        yield
    assert not found.violations, found.violations[:3]
