"""A dataclass of options -> its names, flags, help texts and readers.

Every option is a field of a dataclass, stands under its own name in YAML and as a flag of that name
with dashes; its help is the field's entry in the docstring. Values read alike in both places.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from fastshift.errors import ConfigError

__all__ = ["Option", "Section"]


@dataclass(frozen=True)
class Option:
    """One option: its name in YAML, and as a flag with dashes.

    Attributes:
        name: with the section's prefix.
        field: of the section's dataclass.
        hint: the field's type.
        default: where neither file nor command line gives it.
        help: one paragraph.
        metadata: `positional` marks an argument without a flag, `optional` one of those that may be
            left out, `bare` is the value of a flag that stands alone, `metavar` stands for the
            value in the help.
    """

    name: str
    field: str
    hint: Any
    default: Any
    help: str
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
        kinds = get_args(self.hint) or (self.hint,)
        if "metavar" in self.metadata:
            return self.metadata["metavar"]
        if self.hint is Any:
            return "VALUE"
        if _takes_list(kinds):
            return "N,N,..."
        return "|".join(_METAVARS[kind] for kind in _METAVARS if kind in kinds)

    def read(self, value: Any) -> Any:
        """Turn what a user wrote into the option's value; `ConfigError` where it cannot be."""
        kinds = get_args(self.hint) or (self.hint,)
        if self.hint is Any:
            return None if _is_none(value) else value
        if type(None) in kinds and _is_none(value):
            return None
        for kind in (bool, int, float, str):
            if kind not in kinds:
                continue
            try:
                return _READERS[kind](value)
            except ValueError:
                continue
        if _takes_list(kinds):
            return self._read_list(value)
        names = [_WORDS[kind] for kind in (bool, int, float, str) if kind in kinds]
        raise ConfigError(f"{self.name}: {value!r}; expected {' or '.join(names)}")

    def _read_list(self, value: Any) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(_read_int(part) for part in parts)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self.name}: {value!r}; expected whole numbers separated by commas"
            ) from None


def _takes_list(kinds: tuple[Any, ...]) -> bool:
    return any(get_args(kind) for kind in kinds)


def _is_none(value: Any) -> bool:
    return value is None or (
        isinstance(value, str) and value.strip().lower() in ("none", "null", "~", "")
    )


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def _read_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError
    return int(value)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


_READERS: dict[type, Callable[[Any], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
}
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}
_WORDS = {bool: "yes or no", int: "a whole number", float: "a finite number", str: "text"}


@dataclass(frozen=True)
class Section:
    """The options of one dataclass, as one verb has them.

    Attributes:
        kind: the dataclass.
        title: in the help.
        prefix: before each name.
        hidden: fields that are no options.
        changed: field -> default, where a verb's differs.
    """

    kind: type
    title: str
    prefix: str = ""
    hidden: tuple[str, ...] = ()
    changed: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> Iterator[Option]:
        """The section's options, in the order of the fields."""
        hints = get_type_hints(self.kind)
        texts = _attribute_texts(self.kind)
        for item in fields(self.kind):
            if item.name in self.hidden:
                continue
            default = item.default if item.default is not MISSING else item.default_factory()
            yield Option(
                self.prefix + item.name,
                item.name,
                hints[item.name],
                self.changed.get(item.name, default),
                texts.get(item.name, ""),
                item.metadata,
            )


def _attribute_texts(kind: type) -> dict[str, str]:
    """The entries of the `Attributes` sections of a class and its bases, by field."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")
        names: list[str] = []
        for line in section.splitlines():
            begin = re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)
            if begin:
                names = begin[1].split(", ")
                texts.update(dict.fromkeys(names, begin[2]))
            elif line.startswith("        "):
                texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
            else:
                break
    return {name: text.replace("`", "") for name, text in texts.items()}
