"""Supernets in and out of files: the weights with the space they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastshift import checkpoint
from fastshift.errors import CheckpointError, SpaceError
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet, Supernet

__all__ = ["load_supernet", "save_supernet"]


def save_supernet(
    supernet: ChainSupernet, directory: str | Path, facts: dict[str, Any] | None = None
) -> Path:
    """Write a supernet's weights and its space to `directory/supernet.safetensors`.

    Args:
        supernet: to save; of a `ChainSupernet`'s space only the tables are kept.
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
    path: str | Path, *, image_size: int | None = None
) -> tuple[Supernet, dict[str, Any]]:
    """Build the supernet that a file describes, with its weights.

    Nothing but numbers is read: no file can run code.

    Args:
        path: a directory with `supernet.safetensors`, or such a file.
        image_size: count costs for images of this size; the saved one by default.

    Returns:
        The supernet on the CPU, and what was saved with it.

    Raises:
        CheckpointError: the file is missing, damaged, holds values that are not finite, or is no
            supernet of a described space.
    """
    tensors, meta = checkpoint.load_supernet(path)
    description = meta.get("space")
    if not isinstance(description, dict) or "stem" not in description:
        raise CheckpointError(
            f"{path}: a supernet of modules without a description; build its ChainSupernet in "
            "Python and give it the tensors"
        )
    if image_size is not None:
        description = {**description, "image_size": image_size}
    try:
        supernet = Supernet(SearchSpace.from_dict(description))
        version = int(meta["version"])
    except (SpaceError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its space cannot be built: {error}") from error
    supernet.load_tensors(tensors, version)
    return supernet, meta
