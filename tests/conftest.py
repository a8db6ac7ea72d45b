"""Set before torch is imported: one thread an operator, so that results repeat and busy cores do not spin."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
