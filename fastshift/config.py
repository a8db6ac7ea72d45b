"""Options: defaults, a YAML file and the command line in; one checked set of dataclasses out.

Every option is a field of a dataclass, stands under its own name in YAML, and is a flag of the same
name with dashes; its help is the field's entry in the docstring. Values are read alike in both places.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from fastshift import data
from fastshift.durable import replace_file
from fastshift.errors import ConfigError, FastShiftError
from fastshift.pretrain import PretrainOptions
from fastshift.retrain import RetrainOptions
from fastshift.search import SearchOptions

__all__ = ["VERBS", "Config", "Option", "Section", "read_file", "resolve"]

_UNSAVED = ("config", "resume", "quiet")
_MAY_DIFFER = (*_UNSAVED, "out", "checkpoint_seconds")
_FACTS = ("verb", "versions")  # stand in a saved file beside the options


@dataclass(frozen=True)
class RunOptions:
    """Where a run goes.

    Attributes:
        out: run directory.
        seed: of every random choice.
        config: YAML file with options; those of the command line win.
        resume: go on where the run in `--out` stopped; start it where there is none.
        quiet: show no progress.
        checkpoint_seconds: wall time between checkpoints within a stage.
    """

    out: str | None = None
    seed: int = 0
    config: str | None = None
    resume: bool = False
    quiet: bool = False
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed}; expected at least 0")


@dataclass(frozen=True)
class OutputOptions:
    """Where a result goes.

    Attributes:
        out: file to write.
        seed: of every random choice.
        config: YAML file with options; those of the command line win.
        quiet: show no progress.
    """

    out: str | None = None
    seed: int = 0
    config: str | None = None
    quiet: bool = False

    __post_init__ = RunOptions.__post_init__


@dataclass(frozen=True)
class PlaceOptions:
    """Where and how numbers are computed.

    Attributes:
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        precision: `fp32`, or `bf16` by autocast.
        layout: `nchw`, `channels_last`, or `auto`: channels last, but `nchw` for spaces in which more than half of
            the candidate ops are shuffle units, whose copies of single channels it slows.
    """

    device: str = "auto"
    precision: str = "fp32"
    layout: str = "auto"

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("fp32", "bf16"))
        _one_of("layout", self.layout, ("auto", "nchw", "channels_last"))


@dataclass(frozen=True)
class SpaceOptions:
    """The search space; image size, channels and classes come from the data.

    Attributes:
        space: a ready-made space's name, or `FILE.py:FUNCTION`.
        space_options: further arguments of the space, such as `width=0.5`, separated by commas.
    """

    space: str | None = None
    space_options: str | None = None


@dataclass(frozen=True)
class SupernetOptions:
    """The weights to start from.

    Attributes:
        supernet: directory (or its `supernet.safetensors`) of a `pretrain`, `search` or `transfer` run.
    """

    supernet: str | None = None


@dataclass(frozen=True)
class DataOptions:
    """The images.

    Attributes:
        data: `digits`, `cifar10:DIR`, `cifar100:DIR`, `npz:FILE` or `folder:DIR`.
    """

    data: str | None = None


@dataclass(frozen=True)
class ConstraintOptions:
    """What an architecture may cost: `330M`, `60%` of the largest, or a range `290M:330M`.

    Attributes:
        flops: multiply-adds of an image.
        params: parameters.
    """

    flops: Any = None
    params: Any = None

    def given(self) -> dict[str, Any]:
        """The constraints that are there, by metric."""
        pairs = {"flops": self.flops, "params": self.params}
        return {name: value for name, value in pairs.items() if value is not None}


@dataclass(frozen=True)
class CheckOptions:
    """The winner against chance, after a search.

    Attributes:
        retrain_check: random feasible architectures retrained from scratch beside the winner; 0 for no check.
    """

    retrain_check: int = 0

    def __post_init__(self) -> None:
        if self.retrain_check < 0:
            raise ConfigError(f"retrain_check: {self.retrain_check}; expected at least 0")


@dataclass(frozen=True)
class ArchOptions:
    """One architecture.

    Attributes:
        arch: its string of choices, or `best`: the winner of the run that `--supernet` names.
    """

    arch: str | None = None


@dataclass(frozen=True)
class EvaluateOptions:
    """What to score, and how.

    Attributes:
        archs: a file with one architecture a line or a CSV with a column `arch`, `-` for standard input, or `random:N`.
        batch_norm: `recalibrate`, `batch`, `running` or `ema`.
        strategy: `shared` or `sequential`.
        subtrie_size: candidates computed side by side; bounds memory.
    """

    archs: str | None = None
    batch_norm: str = "recalibrate"
    strategy: str = "shared"
    subtrie_size: int = 8

    def __post_init__(self) -> None:
        if self.subtrie_size < 1:
            raise ConfigError(f"subtrie_size: {self.subtrie_size}; expected at least 1")


@dataclass(frozen=True)
class RankOptions:
    """Order preservation.

    Attributes:
        scores: CSV that `fastshift evaluate` wrote.
        truth: true accuracies: NAS-Bench-Macro's JSON, or CSV with `arch` and a column for each run.
        score_by: `error` or `loss`.
        top_k: size of the sub-space of the best, for the local tau.
        independent_run: the truth's run (from 0) that alone chooses the sub-space; the others judge.
    """

    scores: str | None = field(default=None, metadata={"positional": True})
    truth: str | None = None
    score_by: str = "error"
    top_k: int = 500
    independent_run: int | None = field(default=None, metadata={"bare": "0"})

    def __post_init__(self) -> None:
        _one_of("score_by", self.score_by, ("error", "loss"))


@dataclass(frozen=True)
class ExportOptions:
    """The file.

    Attributes:
        format: `torch`, `safetensors` or `onnx`.
        batch_norm: statistics of inherited weights: `recalibrate`, `running` or `ema`.
    """

    format: str = "torch"
    batch_norm: str = "recalibrate"

    def __post_init__(self) -> None:
        _one_of("format", self.format, ("torch", "safetensors", "onnx"))
        _one_of("batch_norm", self.batch_norm, ("recalibrate", "running", "ema"))


@dataclass(frozen=True)
class ReportOptions:
    """The run.

    Attributes:
        run: run directory of a finished search.
    """

    run: str | None = field(default=None, metadata={"positional": True})


@dataclass(frozen=True)
class ListOptions:
    """What to list.

    Attributes:
        name: one space, block by block; all by default.
        image_size: of the images; the published size by default.
        num_classes: likewise.
        in_channels: likewise.
    """

    name: str | None = field(default=None, metadata={"positional": True})
    image_size: int | None = None
    num_classes: int | None = None
    in_channels: int | None = None


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: {value!r}; expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Option:
    """One option: its name in YAML, and as a flag with dashes.

    Attributes:
        name: with the section's prefix.
        field: of the section's dataclass.
        hint: the field's type.
        default: where neither file nor command line gives it.
        help: one paragraph.
        metadata: `positional` marks an argument without a flag, `bare` is the value of a flag without one.
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

    def read(self, value: Any) -> Any:
        """Turn what a user wrote into the option's value; `ConfigError` where that is impossible."""
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
_WORDS = {bool: "yes or no", int: "a whole number", float: "a finite number", str: "text"}


@dataclass(frozen=True)
class Section:
    """The options of one dataclass, as one verb has them.

    Attributes:
        kind: the dataclass.
        title: in the help.
        prefix: before each name.
        renamed: field -> name, where they differ.
        hidden: fields that are no options.
        changed: field -> default, where a verb's differs.
    """

    kind: type
    title: str
    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
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
                self.prefix + self.renamed.get(item.name, item.name),
                item.name,
                hints[item.name],
                self.changed.get(item.name, default),
                texts.get(item.name) or texts.get(self.renamed.get(item.name, ""), ""),
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


_RUN = Section(RunOptions, "run")
_OUTPUT = Section(OutputOptions, "output")
_PLACE = Section(PlaceOptions, "computing")
_SPACE = Section(SpaceOptions, "space")
_SUPERNET = Section(SupernetOptions, "weights")
_DATA = Section(DataOptions, "data")
_IMAGES = Section(data.Options, "images", hidden=("batch_size", "seed"))
_CONSTRAINTS = Section(ConstraintOptions, "constraints")
_SEARCH = Section(
    SearchOptions, "search", renamed={"scoring": "batch_norm"}, hidden=("constraints",)
)
_CHECK = (
    Section(CheckOptions, "check"),
    Section(RetrainOptions, "check: retraining", prefix="retrain_", changed={"epochs": 20}),
)

VERBS: dict[str, tuple[Section, ...]] = {
    "pretrain": (_RUN, _SPACE, _DATA, Section(PretrainOptions, "training"), _PLACE, _IMAGES),
    "search": (
        _RUN,
        _SPACE,
        _DATA,
        _SUPERNET,
        _CONSTRAINTS,
        _SEARCH,
        Section(PretrainOptions, "pre-training, where no supernet is given", prefix="pretrain_"),
        *_CHECK,
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
        *_CHECK,
        _PLACE,
        _IMAGES,
    ),
    "evaluate": (
        _OUTPUT,
        _SUPERNET,
        _DATA,
        Section(EvaluateOptions, "scoring"),
        _CONSTRAINTS,
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
        Section(ArchOptions, "architecture"),
        _DATA,
        Section(ExportOptions, "export"),
        _IMAGES,
    ),
    "report": (Section(ReportOptions, "report"),),
    "spaces": (Section(ListOptions, "spaces"),),
    "info": (),
}


@dataclass(frozen=True)
class Config:
    """The resolved options of one verb.

    Attributes:
        verb: whose.
        values: every option, by name.
        given: names that file or command line gave.
    """

    verb: str
    values: dict[str, Any]
    given: frozenset[str] = frozenset()

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
        chosen = {option.field: self.values[option.name] for option in section.options()}
        try:
            return kind(**chosen, **more)
        except FastShiftError as error:
            raise ConfigError(f"{section.prefix}{error}") from error

    def require(self, *names: str) -> None:
        """Refuse a configuration in which one of these options is missing."""
        options = {option.name: option for section in VERBS[self.verb] for option in section.options()}
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
        ConfigError: the file is missing or malformed, an option is unknown or stands there twice, or it belongs to
            another verb.
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
            near = ", ".join(_similar(name, known)) or ", ".join(known)
            raise ConfigError(f"{path}: unknown option {name!r}; expected one of {near}")
    return content


def _similar(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=3)


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
    return Config(verb, values, frozenset(given) | frozenset(file))
