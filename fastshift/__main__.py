"""`python -m fastshift`: the same as the command `fastshift`."""

from __future__ import annotations

import sys

from fastshift.cli import main

if __name__ == "__main__":
    sys.exit(main())
