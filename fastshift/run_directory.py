"""The run directory that `--out` names: whether a run in it goes on, and how one begins."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from fastshift.build import device_of
from fastshift.config import Config
from fastshift.errors import ConfigError
from fastshift.versions import versions

__all__ = ["begin_run", "open_run"]

# What a run leaves in its directory from the start on.
_TRACES = ("config.yaml", "result.json", "retrained.json", "checkpoint/LATEST")


def open_run(config: Config) -> bool:
    """Whether the run directory holds a run to go on with.

    Nothing is written here, so an option that turns out unusable leaves no trace.

    Raises:
        ConfigError: the directory holds another run, or one that `--resume` does not claim.
    """
    out = Path(config["out"])
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {str(out)!r} is a file; expected a directory")
    traces = [name for name in _TRACES if (out / name).exists()]
    log = out / "scores.jsonl"
    if log.exists() and log.stat().st_size:
        traces.append(log.name)
    if not traces:
        return False
    if not config["resume"]:
        raise ConfigError(
            f"out: {str(out)!r} holds a run already ({traces[0]}); --resume goes on with it, or "
            "give another directory"
        )
    config.check_same(out)
    return True


def begin_run(config: Config, goes_on: bool) -> None:
    """Make a new run's directory with its configuration, or say what changed since an old one."""
    out, here = Path(config["out"]), versions(device_of(config))
    if not goes_on:
        out.mkdir(parents=True, exist_ok=True)
        config.save(out, here)
        return
    saved = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")).get("versions") or {}
    for name, value in here.items():
        if saved.get(name) != value:
            print(
                f"fastshift: {out} began with {name} {saved.get(name)}, here is {value}: "
                "the run goes on, but not bit for bit",
                file=sys.stderr,
            )
