"""A run that is killed and resumed ends as the run that was never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

# Forks a child for each command, so that libraries are imported once. A child ends itself by
# SIGKILL at its `kill`-th file operation in the run directory, or else says how many it made. The
# zygote itself computes nothing, so that a child may start threads.
ZYGOTE = """
import json, os, signal, sys
import torch, torch._dynamo  # which every optimiser imports
torch.set_num_threads(1)
import rich.console, rich.table, sklearn.datasets, torch.utils.tensorboard
import fastshift.cli

os.fsync = lambda file: None  # a killed process loses nothing that it wrote
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
count = 0

def watch(out, kill):
    def hook(event, args):
        global count
        if event in EVENTS and out in str(args[0]):
            count += 1
            if count == kill:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if task["count"]:
            watch(task["out"], task["kill"])
        torch.set_num_threads(task["threads"])
        code = fastshift.cli.main(task["argv"])
        if task["count"]:
            print(count)
        sys.stdout.flush()
        os._exit(code)
    print("pid", child, flush=True)
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# Small, since what is tested is the order of files and not what is in them.
TINY = """
from fastshift.ops import Head, Unit, conv, identity, inverted_residual, projection
from fastshift.space import SearchSpace

def tiny(image_size, num_classes, in_channels):
    stem = [Unit("dense", in_channels, 4, kernel=3)]
    blocks = [[identity(4), conv(4, 4, 3, 1), inverted_residual(4, 4, 1, 2, 3)]] * 2
    blocks += [[projection(4, 8, 2), conv(4, 8, 3, 2)], [identity(8), conv(8, 8, 3, 1)]]
    shape = {"in_channels": in_channels, "image_size": image_size}
    head = Head(8, (), num_classes, dropout=0.1)
    return SearchSpace("tiny", stem=stem, blocks=blocks, head=head, **shape)
"""

IMAGES = ["--data=digits", "--limit=100", "--validation-size=50", "--calibration-batches=1"]
IMAGES += ["--calibration-batch-size=32", "--quiet", "--checkpoint-seconds=0"]
SEARCH = ["--generations=1", "--population=4", "--parents=2", "--shift-steps=2", "--top-k=2"]
SEARCH += ["--shift-batch-size=8", "--flops=80%", "--no-report"]
PRETRAIN = ["--pretrain-steps=3", "--pretrain-batch-size=8"]


class Zygote:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        (folder / "tiny.py").write_text(TINY)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=folder,
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(
        self, argv: list[str], *, out: Path, kill: int = 0, count: bool = False, threads: int = 1
    ) -> int:
        task = {"argv": argv, "out": str(out), "kill": kill, "count": count or kill > 0}
        task["threads"] = threads
        self.process.stdin.write(json.dumps({**task, "log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        return self.read("pid")

    def wait(self) -> int:
        return self.read("code")

    def read(self, what: str) -> int:
        """Read on to the line that says this; one that a failed test left is passed over."""
        for line in self.process.stdout:
            name, _, number = line.partition(" ")
            if name == what:
                return int(number)
        raise AssertionError(f"the zygote ended without a {what}")

    def signal(self, child: int, number: int) -> None:
        """Signal a child, which may have ended by itself."""
        assert child > 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    def run(self, argv: list[str], **options: Any) -> int:
        """Start a child, options as of `start`, and give its exit code."""
        self.start(argv, **options)
        return self.wait()

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    made = Zygote(tmp_path_factory.mktemp("zygote"))
    yield made
    with made.process:
        made.process.kill()


def outcome(out: Path) -> dict[str, object]:
    """All that a run leaves, timings aside."""
    result = json.loads((out / "result.json").read_text())
    for name in ("seconds", "archs_per_second"):
        del result[name]
    for generation in result["generations"]:
        del generation["seconds"]
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return {
        "result": result,
        "scores": lines,
        "weights": (out / "supernet.safetensors").read_bytes(),
    }


def search(out: Path, *more: str) -> list[str]:
    return ["search", "--space=tiny.py:tiny", *IMAGES, *PRETRAIN, *SEARCH, "--out", str(out), *more]


@pytest.fixture(scope="module")
def unbroken(zygote, tmp_path_factory):
    """The run that was never stopped, and how many file operations it made."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert zygote.run(search(out), out=out, count=True) == 0, zygote.said()
    return outcome(out), int(zygote.said().split()[-1])


def killed_and_resumed(zygote, argv: list[str], out: Path, kill: int, threads: int = 1) -> None:
    code = zygote.run(argv, out=out, kill=kill, threads=threads)
    assert code == -signal.SIGKILL, zygote.said()
    assert zygote.run([*argv, "--resume"], out=out, threads=threads) == 0, zygote.said()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.85, 0.999])
def test_a_search_killed_anywhere_and_resumed_ends_the_same(zygote, unbroken, tmp_path, share):
    expected, operations = unbroken
    out = tmp_path / "run"
    killed_and_resumed(zygote, search(out), out, max(1, int(share * operations)))
    assert outcome(out) == expected


def test_a_search_killed_again_and_again_by_the_clock_ends_the_same(zygote, unbroken, tmp_path):
    out = tmp_path / "run"
    latest = out / "checkpoint" / "LATEST"
    wait = random.Random(0)
    kills = 0
    for _ in range(8):
        child = zygote.start(search(out, "--resume"), out=out)
        seen = {latest.read_bytes() if latest.exists() else b""}
        deadline = time.monotonic() + 120
        while len(seen) < 2 and not (out / "result.json").exists():
            assert time.monotonic() < deadline, "no checkpoint in two minutes"
            seen.add(latest.read_bytes() if latest.exists() else b"")
            time.sleep(0.001)
        time.sleep(wait.uniform(0.0, 0.03))
        zygote.signal(child, signal.SIGKILL)
        code = zygote.wait()
        if (out / "result.json").exists():
            break
        assert code == -signal.SIGKILL, zygote.said()
        kills += 1
    assert kills >= 2
    assert zygote.run(search(out, "--resume"), out=out) == 0, zygote.said()
    assert outcome(out) == unbroken[0]


def test_sigterm_saves_the_state_and_leaves_with_three(zygote, unbroken, tmp_path):
    out = tmp_path / "run"
    for stage in ("pretrain", "search"):
        child = zygote.start(search(out, "--resume"), out=out)
        wait_until(lambda stage=stage: is_in(out, stage))
        zygote.signal(child, signal.SIGTERM)
        assert zygote.wait() == 3, zygote.said()
        assert "--resume" in zygote.said()
        assert not (out / "result.json").exists()
    assert zygote.run(search(out, "--resume"), out=out) == 0, zygote.said()
    assert outcome(out) == unbroken[0]


def is_in(out: Path, stage: str) -> bool:
    if stage == "pretrain":
        return (out / "checkpoint" / "LATEST").exists()
    log = out / "scores.jsonl"
    return log.exists() and log.stat().st_size > 0


def wait_until(holds, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.001)


def test_a_checkpoint_more_or_less_changes_nothing(zygote, unbroken, tmp_path):
    out = tmp_path / "run"
    argv = [*search(out), "--checkpoint-seconds", "1000"]
    assert zygote.run(argv, out=out) == 0, zygote.said()
    assert outcome(out) == unbroken[0]


def test_a_finished_run_prints_its_table_again_and_touches_nothing(zygote, tmp_path):
    out = tmp_path / "run"
    assert zygote.run(search(out), out=out) == 0, zygote.said()
    table = zygote.said()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    begin = time.monotonic()
    assert zygote.run(search(out, "--resume"), out=out) == 0
    assert time.monotonic() - begin < 10
    assert zygote.said() == table
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_pre_training_killed_and_resumed_ends_the_same(zygote, tmp_path):
    def argv(out: Path) -> list[str]:
        stage = ["--steps", "5", "--batch-size", "8", "--paths-per-step", "2"]
        return ["pretrain", "--space=tiny.py:tiny", *IMAGES, *stage, "--out", str(out)]

    whole = tmp_path / "whole"
    assert zygote.run(argv(whole), out=whole, count=True) == 0, zygote.said()
    operations = int(zygote.said().split()[-1])
    for share in (0.3, 0.97):
        out = tmp_path / str(share)
        killed_and_resumed(zygote, argv(out), out, int(share * operations))
        for name in ("supernet.safetensors",):
            assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("shift", ["uniform", "every:2", "immediate", "none"])
def test_every_mode_goes_on_the_same_after_a_kill(zygote, tmp_path, shift):
    mode = ["--shift", shift, "--retrain-check", "1", "--retrain-epochs", "1"]
    whole = tmp_path / "whole"
    assert zygote.run(search(whole, *mode), out=whole, count=True) == 0, zygote.said()
    operations = int(zygote.said().split()[-1])
    for share in (0.5, 0.7, 0.9):
        out = tmp_path / str(share)
        killed_and_resumed(zygote, search(out, *mode), out, int(share * operations))
        assert outcome(out) == outcome(whole), share


@pytest.mark.slow
def test_a_transfer_killed_in_the_head_warm_up_and_after_ends_the_same(zygote, tmp_path):
    source = tmp_path / "source"
    assert zygote.run(search(source), out=source) == 0, zygote.said()

    def argv(out: Path) -> list[str]:
        stage = ["--classes", "5,6,7", "--head-warmup-steps", "4", "--generations", "1"]
        stage += ["--frozen-trunk-generations", "1", "--supernet", str(source)]
        return ["transfer", *IMAGES, *SEARCH, *stage, "--out", str(out)]

    whole = tmp_path / "whole"
    assert zygote.run(argv(whole), out=whole, count=True) == 0, zygote.said()
    operations = int(zygote.said().split()[-1])
    for share in (0.2, 0.5, 0.8):
        out = tmp_path / str(share)
        killed_and_resumed(zygote, argv(out), out, int(share * operations))
        assert outcome(out) == outcome(whole), share


@pytest.mark.slow
def test_a_search_killed_at_every_tenth_file_operation_ends_the_same(zygote, unbroken, tmp_path):
    expected, operations = unbroken
    for kill in range(3, operations, 10):
        out = tmp_path / str(kill)
        killed_and_resumed(zygote, search(out), out, kill)
        assert outcome(out) == expected, f"killed at file operation {kill}"


@pytest.mark.slow
def test_a_search_of_two_threads_killed_and_resumed_ends_the_same(zygote, tmp_path):
    """Of batches large enough that operators split them between the threads."""

    def argv(out: Path) -> list[str]:
        large = ["--limit", "1200", "--validation-size", "300", "--calibration-batch-size", "256"]
        large += ["--pretrain-batch-size", "256", "--shift-batch-size", "256"]
        return [*search(out), "--space", "digits", *large]

    whole = tmp_path / "whole"
    assert zygote.run(argv(whole), out=whole, count=True, threads=2) == 0, zygote.said()
    operations = int(zygote.said().split()[-1])
    assert yaml.safe_load((whole / "config.yaml").read_text())["versions"]["threads"] == 2
    for share in (0.3, 0.6, 0.9):
        out = tmp_path / str(share)
        killed_and_resumed(zygote, argv(out), out, int(share * operations), threads=2)
        assert outcome(out) == outcome(whole), share
