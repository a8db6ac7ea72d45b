"""Supernets in and out of files: the weights with the space they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastshift import checkpoint
from fastshift.errors import CheckpointError, SpaceError
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet, Supernet

__all__ = ["is_described", "load_supernet", "restored", "save_supernet"]


def save_supernet(
    supernet: ChainSupernet, directory: str | Path, facts: dict[str, Any] | None = None
) -> Path:
    """Write a supernet's weights and its space to `directory/supernet.safetensors`.

    Args:
        supernet: to save; of a supernet of modules only the tables of its space are kept, not the
            modules.
        directory: made where it is missing.
        facts: JSON-able values to keep beside the space.

    Returns:
        The file.

    Raises:
        CheckpointError: the file cannot be written; an older one is untouched.
    """
    meta = {
        "space": supernet.space.to_dict(),
        "name": supernet.space.name,
        "fingerprint": supernet.space.fingerprint(),
        "version": supernet.version,
    }
    return checkpoint.save_supernet(directory, supernet.tensors(), {**meta, **(facts or {})})


def load_supernet(
    path: str | Path,
    *,
    image_size: int | None = None,
    into: ChainSupernet | None = None,
) -> tuple[ChainSupernet, dict[str, Any]]:
    """Build the supernet that a file describes, with its weights.

    Nothing but numbers is read: no file can run code.

    Args:
        path: a directory with `supernet.safetensors`, or such a file.
        image_size: count costs for images of this size; the saved one by default.
        into: of modules, which no file describes: the same supernet, built anew, to be filled.

    Returns:
        The supernet, on the CPU where it was built here, and what was saved with it.

    Raises:
        CheckpointError: the file is missing, damaged, holds values that are not finite, is no
            supernet of a described space, or not one of the space of `into`.
    """
    tensors, meta = checkpoint.load_supernet(path)
    return restored(path, tensors, meta, image_size=image_size, into=into), meta


def is_described(meta: Mapping[str, Any]) -> bool:
    """Whether a saved supernet's space is described, so that the file alone suffices."""
    return isinstance(meta.get("space"), dict) and "stem" in meta["space"]


def restored(
    path: str | Path,
    tensors: dict[str, Tensor],
    meta: Mapping[str, Any],
    *,
    image_size: int | None = None,
    into: ChainSupernet | None = None,
) -> ChainSupernet:
    """Make a supernet of what `checkpoint.load_supernet` read; arguments as of `load_supernet`."""
    if into is not None:
        _check_space(path, meta, into, any_size=image_size is not None)
        into.load_tensors(tensors, int(meta["version"]))
        return into
    if not is_described(meta):
        raise CheckpointError(
            f"{path}: a supernet of modules without a description; build its ChainSupernet in "
            "Python and load the file into it"
        )
    description = meta["space"]
    if image_size is not None:
        description = {**description, "image_size": image_size}
    try:
        supernet = Supernet(SearchSpace.from_dict(description))
        version = int(meta["version"])
    except (SpaceError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its space cannot be built: {error}") from error
    supernet.load_tensors(tensors, version)
    return supernet


def _check_space(
    path: str | Path, meta: Mapping[str, Any], supernet: ChainSupernet, *, any_size: bool
) -> None:
    """Refuse weights of another space; with `any_size`, but for what the images' size decides."""
    if meta.get("fingerprint") == supernet.space.fingerprint():
        return
    saved, own = meta.get("space") or {}, supernet.space.to_dict()
    free = ("image_size", "flops") if any_size else ()
    differing = [key for key in own if key not in free and saved.get(key) != own[key]]
    if differing or not any_size:
        raise CheckpointError(
            f"{path}: a supernet of another space, {meta.get('name')!r}; expected one of "
            f"{supernet.space.name!r}, from which it differs in {', '.join(differing) or 'format'}"
        )
