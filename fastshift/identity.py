"""What makes a run this one: its options with fields changed, and whether another is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastshift.errors import CheckpointError, ConfigError

__all__ = ["check_identity", "difference", "holds_a_run", "with_overrides"]


def with_overrides(options: Any, overrides: Mapping[str, Any]) -> Any:
    """Copy an options record with some fields changed.

    Args:
        options: a dataclass.
        overrides: new values, by field.

    Raises:
        ConfigError: there is no such field, or a value is unusable.
    """
    known = set(options.__dataclass_fields__)
    for name in overrides:
        if name not in known:
            raise ConfigError(f"{name}: unknown option; expected one of {', '.join(sorted(known))}")
    return replace(options, **overrides)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the first entry in which two identities differ."""
    for key in new:
        if old.get(key) == new[key]:
            continue
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            return f"{key}: {difference(old[key], new[key])}"
        return f"{key} is {old.get(key)!r} there, {new[key]!r} here"
    return "it has entries this run has not"


def holds_a_run(directory: str | Path) -> CheckpointError:
    """Build the error for a directory whose run was not asked to go on."""
    return CheckpointError(
        f"{directory}: holds a run already; go on with resume, or give another directory"
    )


def check_identity(
    directory: str | Path, saved: Mapping[str, Any], own: Mapping[str, Any], *, resume: bool
) -> None:
    """Refuse to go on from a checkpoint without `resume`, or from that of another run.

    Args:
        directory: the run's.
        saved: the identity in the checkpoint.
        own: this run's, of JSON-able values.
        resume: whether going on was asked for.

    Raises:
        CheckpointError: it may not go on; says in what the two differ.
    """
    if not resume:
        raise holds_a_run(directory)
    if saved != own:
        raise CheckpointError(
            f"{directory}: its checkpoint belongs to another run ({difference(saved, own)}); "
            "give another directory"
        )
