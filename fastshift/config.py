"""Options: defaults, a YAML file and the command line in; one checked set of dataclasses out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastshift import data
from fastshift.durable import replace_file
from fastshift.errors import ConfigError, FastShiftError
from fastshift.options import Option, Section
from fastshift.pretrain import PretrainOptions
from fastshift.retrain import RetrainOptions
from fastshift.search import SearchOptions
from fastshift.settings import (
    ArchOptions,
    ConstraintOptions,
    DataOptions,
    EndOptions,
    EvaluateOptions,
    ExportOptions,
    ListOptions,
    OutputOptions,
    PlaceOptions,
    QuietOptions,
    RankOptions,
    ReportOptions,
    RunOptions,
    SpaceOptions,
    SupernetOptions,
)

__all__ = ["VERBS", "Config", "read_file", "resolve"]

_UNSAVED = ("config", "resume", "quiet")
_MAY_DIFFER = (*_UNSAVED, "out", "checkpoint_seconds", "report")

_RUN = Section(RunOptions, "run")
_OUTPUT = Section(OutputOptions, "output")
_QUIET = Section(QuietOptions, "output")
_PLACE = Section(PlaceOptions, "computing")
_SPACE = Section(SpaceOptions, "space")
_SUPERNET = Section(SupernetOptions, "weights")
_DATA = Section(DataOptions, "data")
_IMAGES = Section(data.Options, "images", hidden=("batch_size", "seed", "device"))
_CONSTRAINTS = Section(ConstraintOptions, "constraints of the candidates")
_SEARCH = Section(SearchOptions, "search", hidden=("constraints",))
_END = (
    Section(EndOptions, "at the end"),
    Section(RetrainOptions, "retraining at the end", prefix="retrain_", changed={"epochs": 20}),
)

VERBS: dict[str, tuple[Section, ...]] = {
    "pretrain": (
        _RUN,
        _SPACE,
        _DATA,
        Section(PretrainOptions, "training", hidden=("constraints",)),
        Section(ConstraintOptions, "constraints of the sampled paths"),
        _PLACE,
        _IMAGES,
    ),
    "search": (
        _RUN,
        _SPACE,
        _DATA,
        _SUPERNET,
        _CONSTRAINTS,
        _SEARCH,
        Section(
            PretrainOptions,
            "pre-training without a given supernet: on the whole space, whatever the constraints",
            prefix="pretrain_",
            hidden=("constraints",),
        ),
        *_END,
        _PLACE,
        _IMAGES,
    ),
    "transfer": (
        _RUN,
        _SUPERNET,
        _SPACE,
        _DATA,
        _CONSTRAINTS,
        _SEARCH,
        *_END,
        _PLACE,
        _IMAGES,
    ),
    "evaluate": (
        _OUTPUT,
        _SUPERNET,
        _SPACE,
        _DATA,
        Section(EvaluateOptions, "scoring"),
        Section(ConstraintOptions, "constraints of random:N"),
        _PLACE,
        _IMAGES,
    ),
    "rank": (_OUTPUT, Section(RankOptions, "ranking")),
    "retrain": (
        _RUN,
        Section(ArchOptions, "architecture"),
        _SPACE,
        _SUPERNET,
        _DATA,
        Section(RetrainOptions, "training"),
        _PLACE,
        _IMAGES,
    ),
    "export": (
        _OUTPUT,
        _SUPERNET,
        _SPACE,
        Section(ArchOptions, "architecture"),
        _DATA,
        Section(ExportOptions, "export"),
        Section(PlaceOptions, "computing", hidden=("precision", "layout")),
        _IMAGES,
    ),
    "report": (Section(ReportOptions, "report"), _QUIET),
    "spaces": (Section(ListOptions, "spaces"), _QUIET),
    "info": (_QUIET,),
}


@dataclass(frozen=True)
class Config:
    """The resolved options of one verb.

    Attributes:
        verb: whose.
        values: every option, by name.
    """

    verb: str
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def part(self, kind: type, **more: Any) -> Any:
        """Make one section's dataclass.

        Args:
            kind: the dataclass.
            **more: fields that are no options.

        Raises:
            ConfigError: a value is out of its range.
        """
        section = next(section for section in VERBS[self.verb] if section.kind is kind)
        return self._make(section, **more)

    def _make(self, section: Section, **more: Any) -> Any:
        chosen = {option.field: self.values[option.name] for option in section.options()}
        try:
            return section.kind(**chosen, **more)
        except FastShiftError as error:
            raise ConfigError(f"{section.prefix}{error}") from error

    def check(self) -> None:
        """Make every section once, so that `ConfigError` comes before any work."""
        for section in VERBS[self.verb]:
            self._make(section)

    def _options(self) -> dict[str, Option]:
        return {option.name: option for section in VERBS[self.verb] for option in section.options()}

    def changed(self) -> dict[str, str]:
        """The flags of the options that have another value than their default, by name."""
        options = self._options().values()
        return {o.name: o.flag for o in options if self.values[o.name] != o.default}

    def require(self, *names: str) -> None:
        """Refuse a configuration in which one of these options is missing."""
        options = self._options()
        for name in names:
            if self.values[name] is None:
                option = options[name]
                flag = name.upper() if option.metadata.get("positional") else option.flag
                raise ConfigError(f"{flag} is missing; expected {option.help.partition(';')[0]}")

    def save(self, directory: str | Path, versions: Mapping[str, Any]) -> None:
        """Write `config.yaml`, which can be given as `--config` again.

        Args:
            directory: exists.
            versions: what computes; kept for the record.
        """
        content: dict[str, Any] = {"verb": self.verb}
        content |= {k: _plain(v) for k, v in self.values.items() if k not in _UNSAVED}
        content["versions"] = dict(versions)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
        replace_file(Path(directory) / "config.yaml", text.encode())

    def check_same(self, directory: str | Path) -> None:
        """Refuse to go on with a run of other options, naming the first that differs.

        Args:
            directory: with the run's `config.yaml`.

        Raises:
            ConfigError: an option differs, or the file cannot be read.
        """
        path = Path(directory) / "config.yaml"
        saved = resolve(self.verb, {}, read_file(path, self.verb))
        for name, value in self.values.items():
            if name not in _MAY_DIFFER and saved[name] != value:
                raise ConfigError(
                    f"{directory}: its run has {name}={_shown(saved[name])}, this one "
                    f"{_shown(value)}; give the same options, or another directory"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def read_file(path: str | Path, verb: str) -> dict[str, Any]:
    """Read the options of a YAML file, as text: the same rules read them as on the command line.

    Args:
        path: the file.
        verb: whose options may stand in it.

    Raises:
        ConfigError: the file is missing or malformed, an option is unknown or stands there twice,
            or it belongs to another verb.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {reason}") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected lines of `option: value`")
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{path}: {key!r} stands in it twice, expected once")
    if content.pop("verb", verb) != verb:
        raise ConfigError(f"{path}: options of another verb than {verb}")
    content.pop("versions", None)
    known = [option.name for section in VERBS[verb] for option in section.options()]
    for name in content:
        if name not in known or name == "config":
            near = ", ".join(difflib.get_close_matches(name, known, n=3) or known)
            raise ConfigError(f"{path}: unknown option {name!r}; expected one of {near}")
    return content


def resolve(verb: str, given: Mapping[str, Any], file: Mapping[str, Any]) -> Config:
    """Bring defaults, file and command line together.

    Args:
        verb: whose options.
        given: of the command line, by name; wins.
        file: of the YAML file.

    Raises:
        ConfigError: a value is of the wrong kind.
    """
    values = {}
    for section in VERBS[verb]:
        for option in section.options():
            value = option.default
            for source in (file, given):
                if option.name in source:
                    value = option.read(source[option.name])
            values[option.name] = value
    return Config(verb, values)
