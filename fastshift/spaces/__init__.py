"""Ready-made search spaces, by function and by name."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastshift.errors import FastShiftError, SpaceError
from fastshift.space import SearchSpace
from fastshift.spaces.digits import digits
from fastshift.spaces.nasbench_macro import nasbench_macro
from fastshift.spaces.shufflenet_v2 import shufflenet_v2

__all__ = ["build", "digits", "load", "make", "names", "nasbench_macro", "shufflenet_v2"]

_BUILDERS: dict[str, Callable[..., SearchSpace]] = {
    "digits": digits,
    "nasbench_macro": nasbench_macro,
    "shufflenet_v2": shufflenet_v2,
}


def names() -> tuple[str, ...]:
    """Return the names of the ready-made spaces, sorted."""
    return tuple(sorted(_BUILDERS))


def _call(name: str, builder: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    signature = inspect.signature(builder)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise SpaceError(
            f"space {name!r}: {error}; it takes {', '.join(signature.parameters)}"
        ) from None
    return builder(**kwargs)


def build(name: str, **kwargs: Any) -> SearchSpace:
    """Make a ready-made space.

    Args:
        name: one of `names()`.
        **kwargs: the space's own keywords, such as `image_size`, `num_classes`, `in_channels`.

    Raises:
        SpaceError: the name is unknown, or the space does not take a keyword or its value.
    """
    if name not in _BUILDERS:
        raise SpaceError(f"unknown space {name!r}: expected one of {', '.join(names())}")
    return _call(name, _BUILDERS[name], kwargs)


def load(spec: str, **kwargs: Any) -> SearchSpace:
    """Make a ready-made space, or one that a function in the user's file returns.

    Of a function that returns a supernet it is the supernet's space.

    Args:
        spec: one of `names()`, or `path/to/file.py:function`.
        **kwargs: handed to the function.

    Raises:
        SpaceError: as `make` does.
    """
    made = make(spec, **kwargs)
    return made if isinstance(made, SearchSpace) else made.space


def make(spec: str, **kwargs: Any) -> Any:
    """Make a ready-made space, or what a function in the user's file returns.

    A file is executed, so `spec` must come from the user and never from a checkpoint.

    Args:
        spec: one of `names()`, or `path/to/file.py:function`.
        **kwargs: handed to the function.

    Returns:
        A `SearchSpace`, or a supernet: an object with a space as its attribute `space`.

    Raises:
        SpaceError: unknown name, missing file or function, or what it returns is neither.
    """
    file, separator, function = str(spec).rpartition(":")
    if not separator or not file.endswith(".py"):
        if spec in _BUILDERS:
            return build(spec, **kwargs)
        raise SpaceError(
            f"unknown space {spec!r}: expected one of {', '.join(names())}, or FILE.py:FUNCTION"
        )
    path = Path(file)
    if not path.is_file():
        raise SpaceError(f"space {spec!r}: there is no file {file!r}")
    module_spec = importlib.util.spec_from_file_location(f"fastshift_space_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
        builder = getattr(module, function, None)
        if not callable(builder):
            raise SpaceError(f"space {spec!r}: {file} has no function {function!r}")
        made = _call(spec, builder, kwargs)
    except FastShiftError:
        raise
    except Exception as error:  # the user's own code: anything can come out of it
        raise SpaceError(f"space {spec!r}: {file} fails with {error!r}") from error
    if not isinstance(getattr(made, "space", made), SearchSpace):
        raise SpaceError(
            f"space {spec!r}: expected a SearchSpace or a ChainSupernet, got {type(made).__name__}"
        )
    return made
