"""A run directory -> what a report shows: checked results, score columns, a winner's layers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastshift import spaces
from fastshift.constraints import Constraint, parse_constraints
from fastshift.errors import ConfigError
from fastshift.ops import Op, Unit, chain_flops, chain_output_size, chain_params
from fastshift.space import ModuleSpace, SearchSpace

__all__ = ["TIMES", "Layer", "Run", "Scores", "choices_of", "load", "short_count", "short_time"]

TIMES = "\N{MULTIPLICATION SIGN}"

_FORMAT = 1
_NEEDED = ("best", "top", "pareto", "generations", "seconds", "budget", "data", "space", "shift")
_COLUMNS = ("error", "loss", "generation", "weights_version", "flops", "params")


@dataclass(frozen=True)
class Scores:
    """The lines of `scores.jsonl` as columns `[n]`: float64 error and loss, int64 the rest.

    Error and loss of a failed score, null in the file, are NaN.
    Scores that were taken again under the final weights, after the last generation, are left out.
    """

    archs: list[str]
    error: np.ndarray
    loss: np.ndarray
    generation: np.ndarray
    weights_version: np.ndarray
    flops: np.ndarray
    params: np.ndarray

    @property
    def num_failed(self) -> int:
        """Scores that are not finite."""
        return int((~np.isfinite(self.error)).sum())


@dataclass(frozen=True)
class Layer:
    """One step of a drawn network; None where the space is not described.

    Attributes:
        place: `stem`, the number of a choice block counted from 1, or `head`.
        name: the op's name.
        units: its convolutions in words.
        channels: of the output.
        size: height and width of the output.
        flops: multiply-adds an image.
        params: parameters.
        choice: the choice taken, in a choice block.
        is_identity: whether the op returns its input.
    """

    place: str
    name: str
    units: str = ""
    channels: int | None = None
    size: int | None = None
    flops: int | None = None
    params: int | None = None
    choice: int | None = None
    is_identity: bool = False


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: where it lies.
        result: `result.json`.
        config: `config.yaml`, and `config_text` its text; empty for a run started from Python.
        scores: `scores.jsonl`.
        space: the search space, or None where neither its description nor a known recipe is there.
    """

    directory: Path
    result: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    scores: Scores
    space: SearchSpace | None

    @property
    def metric(self) -> str:
        """What ranked the candidates: `error` or `loss`."""
        found = self.result["shift"].get("score_by") or self.config.get("score_by") or "error"
        return "loss" if found == "loss" else "error"

    @property
    def num_candidates(self) -> list[int]:
        """Candidates of each generation; scores of parents taken again are not among them."""
        return [_candidates(entry) for entry in self.result["generations"]]

    @property
    def versions(self) -> list[int]:
        """The versions of the weights that scores were measured under, ascending."""
        return sorted(set(self.scores.weights_version.tolist()))

    def flops_limits(self) -> tuple[Constraint, ...]:
        """Return the run's constraint on multiply-adds, if there was one."""
        limits = self.result["shift"].get("constraints") or self.config
        limit = limits.get("flops")
        if limit is None or self.space is None:
            return ()
        limit = tuple(limit) if isinstance(limit, list) else limit
        return parse_constraints(self.space, {"flops": limit})

    def op_names(self) -> list[list[str]]:
        """Return the names of the candidate ops of each choice block, `[L][O]`."""
        if self.space is not None:
            return [list(block) for block in self.space.labels]
        return [[str(name) for name in block] for block in self.result["space"]["blocks"]]

    def layers(self, arch: str) -> list[Layer]:
        """Return an architecture's layers, stem and head included where they are described."""
        choices = choices_of(arch)
        space = self.space
        if space is None or not space.blocks:
            named = zip(choices, self.op_names(), strict=True)
            layers = []
            for index, (choice, names) in enumerate(named):
                costs = {}
                if space is not None:
                    tables = {"flops": space.flops_table, "params": space.params_table}
                    costs = {key: int(table[index, choice]) for key, table in tables.items()}
                layers.append(Layer(str(index + 1), names[choice], choice=choice, **costs))
            return layers
        size = chain_output_size(space.stem, space.image_size)
        first = Layer(
            "stem",
            "stem",
            _words(space.stem),
            space.stem[-1].out_channels if space.stem else space.in_channels,
            size,
            chain_flops(space.stem, space.image_size),
            chain_params(space.stem, space.affine),
        )
        layers = [first]
        for index, (choice, block) in enumerate(zip(choices, space.blocks, strict=True)):
            op = block[choice]
            out_size = op.output_size(size)
            costs = (op.flops(size), op.params(space.affine))
            place = str(index + 1)
            layers.append(
                Layer(
                    place, op.name, _op_words(op), op.out_channels, out_size, *costs, choice,
                    op.is_identity,
                )
            )  # fmt: skip
            size = out_size
        head = space.head
        words = _words(head.units)
        ending = f"global average pool · {_unbroken(f'linear to {head.num_classes}')}"
        costs = (head.flops(size), head.params(space.affine))
        words = f"{words} · {ending}" if words else ending
        return [*layers, Layer("head", "head", words, head.num_features, 1, *costs)]


def load(run_dir: str | Path) -> Run:
    """Read and check a run directory.

    Args:
        run_dir: holds `result.json`, `scores.jsonl` and, unless started from Python, `config.yaml`.

    Raises:
        ConfigError: a file is missing or malformed.
    """
    directory = Path(run_dir)
    try:
        result = json.loads(_read(directory / "result.json"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{directory / 'result.json'} is not JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != _FORMAT:
        found = result.get("format") if isinstance(result, dict) else result
        raise ConfigError(f"{directory / 'result.json'}: format is {found!r}; expected {_FORMAT}")
    for name in _NEEDED:
        if name not in result:
            raise ConfigError(f"{directory / 'result.json'} has no {name!r}")
    if not result["best"]:
        raise ConfigError(
            f"{directory / 'result.json'} has no best architecture; expected a run that scored one"
        )
    has_config = (directory / "config.yaml").exists()
    config_text = _read(directory / "config.yaml") if has_config else ""
    try:
        config = yaml.safe_load(config_text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{directory / 'config.yaml'} is not YAML: {error}") from error
    scores = _read_scores(directory / "scores.jsonl")
    return Run(directory, result, config, config_text, scores, _space(result["space"]))


def choices_of(arch: str) -> list[int]:
    """Return an architecture string's choices."""
    return [int(choice) for choice in (arch.split(".") if "." in arch else arch)]


def short_count(value: float) -> str:
    """Return a count with four significant digits and k, M or G: `358.8M`."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            scaled = value / scale
            return f"{scaled:.{3 if scaled < 10 else 2 if scaled < 100 else 1}f}{suffix}"
    return f"{value:.4g}"


def short_time(seconds: float) -> str:
    """Return a duration in the largest two units that it has: `1 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _candidates(entry: dict[str, Any]) -> int:
    return entry.get("candidates", entry["scored"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); expected the directory of a finished run"
        ) from error


def _read_scores(path: Path) -> Scores:
    texts = _read(path).splitlines()
    found = [_score(text, f"{path}, line {number}") for number, text in enumerate(texts, start=1)]
    lines = [line for line in found if line is not None]
    columns = list(zip(*lines, strict=True)) if lines else [()] * (1 + len(_COLUMNS))
    as_float = [np.array(column, dtype=np.float64) for column in columns[1:3]]  # None to NaN
    as_int = [np.array(column, dtype=np.int64) for column in columns[3:]]
    return Scores(list(columns[0]), *as_float, *as_int)


def _score(text: str, place: str) -> tuple[Any, ...] | None:
    try:
        line = json.loads(text)
        return None if line.get("final") else (line["arch"], *(line[name] for name in _COLUMNS))
    except (json.JSONDecodeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{place} is not a score: {error!r}") from error


def _space(facts: dict[str, Any]) -> SearchSpace | None:
    """Make the space again from its description or a known recipe; never from a user's file."""
    description = facts.get("description")
    if description and "stem" in description:
        return SearchSpace.from_dict(description)
    if description:
        (flops_table, fixed_flops), (params_table, fixed_params) = (
            description["flops"],
            description["params"],
        )
        names = ("name", "in_channels", "image_size", "num_classes", "labels", "identities")
        return ModuleSpace(
            **{name: description[name] for name in names},
            num_choices=[len(block) for block in description["labels"]],
            flops_table=flops_table,
            params_table=params_table,
            fixed_flops=fixed_flops,
            fixed_params=fixed_params,
        )
    recipe = facts.get("recipe")
    if recipe and recipe.get("name") in spaces.names():
        space = spaces.build(recipe["name"], **recipe.get("kwargs", {}))
        # Another version of the library may make another space of the same recipe.
        return space if facts.get("fingerprint") in (None, space.fingerprint()) else None
    return None


def _words(units: Iterable[Unit]) -> str:
    """Describe a chain of units, kernel and output channels or stride of each."""
    words = []
    for unit in units:
        text = f"{unit.kernel}{TIMES}{unit.kernel}"
        text += " depthwise" if unit.kind == "depthwise" else f" → {unit.out_channels}"
        text += f", stride {unit.stride}" if unit.stride > 1 else ""
        words.append(_unbroken(text))
    return " · ".join(words)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _op_words(op: Op) -> str:
    if op.is_identity:
        return "passes its input on"
    words = _words(op.units)
    shortcut = _words(op.frame.shortcut)
    if op.frame.kind == "residual":
        return f"{words}, added to {shortcut or 'the input'}"
    if op.frame.kind == "shuffle":
        return f"{words}, beside {shortcut or 'the other half of the channels'}"
    return words
