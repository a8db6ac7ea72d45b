from __future__ import annotations

import os
import subprocess
import sys

import pytest

_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fastshift import checkpoint

root, trials = Path(sys.argv[1]), int(sys.argv[2])
os.fsync = lambda file: None  # a killed process loses nothing that it wrote
generator = random.Random(0)


def save(serial):
    tensors = {"a": torch.full((2_000,), float(serial)), "b": torch.full((3,), serial)}
    checkpoint.save(root, serial, tensors={"model": tensors}, state={"serial": serial})


start = time.monotonic()
for last in range(10):
    save(last)
cost_s = (time.monotonic() - start) / 10

interrupted = committed = 0
for trial in range(1000):
    ready, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begin, b"1")
        serial = last
        while True:
            serial += 1
            save(serial)
    os.read(ready, 1)
    time.sleep(generator.uniform(0.0, 3 * cost_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready), os.close(begin)
    interrupted += any(path.name.startswith(".tmp-") for path in (root / "checkpoint").iterdir())
    found = checkpoint.load(root)
    assert found is not None
    assert found.serial >= last, (found.serial, last)
    assert found.state == {"serial": found.serial}
    assert (found.tensors["model"]["a"] == found.serial).all()
    assert (found.tensors["model"]["b"] == found.serial).all()
    committed += found.serial - last
    last = found.serial
    if trial >= trials and interrupted >= 3 and committed >= 10:
        break
print(trial, interrupted, committed)
"""


@pytest.mark.parametrize("trials", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_never_costs_a_committed_checkpoint(trials, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, str(tmp_path), str(trials)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, interrupted, committed = map(int, done.stdout.split())
    assert interrupted >= 3, "the kills found no save to interrupt"
    assert committed >= 10, "the kills let no save end"
