"""One thread an operator, set before torch is imported: results repeat, busy cores do not spin."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
