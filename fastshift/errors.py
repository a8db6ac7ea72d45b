"""The exceptions FastShift raises; all derive from `FastShiftError`."""

from __future__ import annotations

__all__ = [
    "ArchError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ConstraintError",
    "DataError",
    "FastShiftError",
    "MissingExtraError",
    "NonFiniteLossError",
    "SpaceError",
    "UnsupportedError",
    "missing_extra",
]


class FastShiftError(Exception):
    """Base of every exception the library raises on purpose."""


class SpaceError(FastShiftError, ValueError):
    """A search space, or a part of one, is inconsistent or unknown."""


class ArchError(FastShiftError, ValueError):
    """An architecture is not a member of the search space."""


class ConstraintError(FastShiftError, ValueError):
    """A constraint is malformed, or no architecture satisfies it."""


class DataError(FastShiftError, ValueError):
    """A data set is missing, malformed or unusable for a search."""


class CheckpointError(FastShiftError, ValueError):
    """A checkpoint is damaged, of another kind, or cannot be written."""


class ConfigError(FastShiftError, ValueError):
    """An option is unknown, has an unusable value, or contradicts another."""


class NonFiniteLossError(FastShiftError, RuntimeError):
    """Several training losses in a row were not finite."""


class CaptureError(FastShiftError, RuntimeError):
    """A step cannot be captured as a CUDA graph, or not replayed."""


class UnsupportedError(FastShiftError, RuntimeError):
    """A part of a supernet has no kernel that static buffers could use; the text says which."""


class MissingExtraError(FastShiftError, ImportError):
    """An optional package is needed and not installed."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """Build the error for an optional package that is not installed.

    Args:
        package: the package's import name.
        extra: the extra of FastShift that installs it.

    Returns:
        The exception, to be raised by the caller.
    """
    return MissingExtraError(
        f"{package!r} is needed here and not installed; it comes with the extra {extra!r}: in the "
        f"checkout, pip install --no-build-isolation -e '.[{extra}]'"
    )
