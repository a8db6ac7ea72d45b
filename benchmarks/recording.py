"""What a record says of the machine, the versions and the code it was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from fastshift.versions import versions

__all__ = ["machine"]


def machine() -> dict[str, str | int | None]:
    """Versions, processor, cores and commit; the commit ends in `-dirty` where the tree differs."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        **versions(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "commit": found.stdout.strip() or None,
    }
