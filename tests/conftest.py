"""What must be set before torch and Triton are imported: threads, and the kernels' interpreter.

One thread an operator: results repeat, busy cores do not spin. Without a CUDA device Triton's
kernels run in its interpreter, which is chosen when a kernel is defined.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
