"""The bytes that the listed kernels' programs ask for, as Triton's interpreter counts them.

TRITON_INTERPRET=1 python benchmarks/static_counts.py [--only PATTERN] [--all]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryFile

from catalogue import DTYPES, Case, Network, cases
from interpreter_memory import watch
from kernel_sites import SMALL, network

from fastshift.kernels.cards import CARDS, Card

__all__ = ["FORMS", "counted_bytes", "counting_apart"]

# Cards for which inference takes one launch, however much it computes anew, and one a stage.
_SLOW, _FAST = (replace(CARDS[80], bandwidth=bandwidth) for bandwidth in (1e9, 1e18))
FORMS = {"in bands": _SLOW, "by stages": _FAST}


def counted_bytes(
    place: Network, dtypes: Iterable[str], pattern: str = ""
) -> dict[str, dict[str, int]]:
    """Run the cases at a small network's shapes under Triton's interpreter and count their bytes.

    A case whose launches a card chooses comes in each of `FORMS`, which its name ends in.

    Raises:
        RuntimeError: a kernel leaves its tensors, or the process is not the interpreter's.
    """
    counts = {}
    for dtype in dtypes:
        for case, chosen in _in_forms(cases(place, dtype)):
            if not re.search(pattern, case.title):
                continue
            arguments = case.prepare("cpu")
            with watch() as found:
                case.launcher(*arguments, **chosen)
            if not found.programs:
                raise RuntimeError(f"{case.title}: no program ran under the interpreter")
            if found.violations:
                raise RuntimeError(f"{case.title}: {found.violations[0]}")
            counts[case.title] = {
                "loaded_bytes": found.loaded_bytes,
                "stored_bytes": found.stored_bytes,
                "read_bytes": case.read_bytes,
                "written_bytes": case.written_bytes,
            }
    return counts


def _in_forms(found: Iterable[Case]) -> Iterator[tuple[Case, dict[str, Card]]]:
    """Yield cases with what their launchers take beside their arguments."""
    for case in found:
        if not case.by_card:
            yield case, {}
            continue
        for form, card in FORMS.items():
            yield replace(case, name=f"{case.name} {form}"), {"card": card}


@contextmanager
def counting_apart(pattern: str, whole: bool) -> Iterator[Callable[[], dict[str, dict[str, int]]]]:
    """`counted_bytes` in a process of its own: the interpreter is chosen at import.

    Yields:
        What waits for it and gives the counts.
    """
    command = [sys.executable, __file__, "--only", pattern, *["--all"] * whole]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with TemporaryFile("w+") as said, TemporaryFile("w+") as wrong:
        running = subprocess.Popen(command, env=environment, stdout=said, stderr=wrong)

        def counts() -> dict[str, dict[str, int]]:
            running.wait()
            for file in (said, wrong):
                file.seek(0)
            if running.returncode:
                raise RuntimeError(f"{' '.join(command)}: {wrong.read()}")
            return json.loads(said.read())

        try:
            yield counts
        finally:
            running.kill()
            running.wait()


def main() -> int:
    """Print the counts at the small network's shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name it finds")
    parser.add_argument("--all", action="store_true", help="every level and type")
    options = parser.parse_args()
    place = network(SMALL, whole=options.all)
    dtypes = DTYPES if options.all else SMALL.targets
    print(json.dumps(counted_bytes(place, dtypes, options.only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
