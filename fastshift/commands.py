"""The verbs of the command line, each a function of its options that returns an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastshift import checkpoint, report, spaces
from fastshift import data as data_module
from fastshift.config import (
    ArchOptions,
    Config,
    ConstraintOptions,
    EvaluateOptions,
    PlaceOptions,
)
from fastshift.durable import replace_file
from fastshift.errors import (
    ArchError,
    ConfigError,
    FastShiftError,
    MissingExtraError,
    SpaceError,
)
from fastshift.evaluator import Evaluator
from fastshift.population import Evolution
from fastshift.pretrain import PretrainOptions, pretrain
from fastshift.retrain import RetrainOptions, retrain
from fastshift.search import Search, SearchOptions
from fastshift.space import SearchSpace
from fastshift.supernet import Supernet
from fastshift.versions import versions
from fastshift.weights import load_supernet, save_supernet

__all__ = ["DONE", "INTERRUPTED", "VERBS"]

DONE, INTERRUPTED = 0, 3

Stop = Callable[[], bool]


# What every verb with a network needs.


def _say(config: Config, text: str) -> None:
    """Print a line for people, unless they want quiet."""
    if not config["quiet"]:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _of_the_user() -> Iterator[None]:
    """Report a value out of range, which the library's constructors refuse, as the user's."""
    try:
        yield
    except FastShiftError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _device(config: Config) -> torch.device:
    name = config.part(PlaceOptions).device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ConfigError(f"device: {name!r}; this machine has {count} usable GPUs")
    return device


def _memory_format(config: Config, space: SearchSpace) -> torch.memory_format:
    layout = config["layout"]
    if layout == "auto":
        frames = [op.frame.kind for block in space.blocks for op in block]
        layout = "nchw" if 2 * frames.count("shuffle") > len(frames) else "channels_last"
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def _data(config: Config) -> Any:
    config.require("data")
    options = {
        name: config[name]
        for name in data_module.Options.__dataclass_fields__
        if name in config.values
    }
    return data_module.load(config["data"], **options)


def _space(config: Config, data: Any) -> SearchSpace:
    options = {}
    for part in (config["space_options"] or "").split(","):
        name, separator, value = part.partition("=")
        if separator:
            options[name.strip()] = _number(value.strip())
        elif part:
            raise ConfigError(f"space_options: {part!r}; expected NAME=VALUE")
    return spaces.load(
        config["space"],
        image_size=data.image_size,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        **options,
    )


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _supernet(config: Config, data: Any, *, fresh_head: bool = False) -> Supernet:
    """The supernet that `--supernet` names, checked against the data and `--space`."""
    path = config["supernet"]
    supernet, _ = load_supernet(path, image_size=data.image_size if fresh_head else None)
    space = supernet.space
    for name in ("in_channels", "image_size", "num_classes"):
        own, given = getattr(space, name), getattr(data, name)
        if own == given or (fresh_head and name == "num_classes"):
            continue
        hint = "; `fastshift transfer` gives it a fresh head" if name == "num_classes" else ""
        raise SpaceError(f"supernet {path!r}: its space has {name} {own}, the data have {given}{hint}")
    if config.values.get("space") is not None:
        asked = _space(config, data)
        same = asked.fingerprint() == space.fingerprint()
        if fresh_head:
            same = asked.trunk_fingerprint() == space.trunk_fingerprint()
        if not same:
            raise SpaceError(
                f"supernet {path!r}: of another space, {space.name!r}; expected {config['space']!r}"
            )
    return supernet


def _place(config: Config, supernet: Supernet) -> Supernet:
    return supernet.to(device=_device(config), memory_format=_memory_format(config, supernet.space))


def _fresh_supernet(space: SearchSpace, seed: int) -> Supernet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Supernet(space)


# Run directories.

_TRACES = ("config.yaml", "result.json", "retrained.json", "checkpoint/LATEST")


def _open_run(config: Config) -> bool:
    """Whether the run directory holds a run to go on with; refuse it where that cannot be.

    Nothing is written here: an option that turns out unusable leaves no trace.
    """
    out = Path(config["out"])
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {str(out)!r} is a file; expected a directory")
    traces = [name for name in _TRACES if (out / name).exists()]
    if (out / "scores.jsonl").exists() and (out / "scores.jsonl").stat().st_size:
        traces.append("scores.jsonl")
    if not traces:
        return False
    if not config["resume"]:
        raise ConfigError(
            f"out: {str(out)!r} holds a run already ({traces[0]}); --resume goes on with it, or give "
            "another directory"
        )
    config.check_same(out)
    return True


def _begin_run(config: Config, goes_on: bool) -> None:
    out = Path(config["out"])
    if not goes_on:
        out.mkdir(parents=True, exist_ok=True)
        config.save(out, versions(_device(config)))


def _interrupted(config: Config) -> int:
    print(
        f"fastshift: interrupted; state saved, go on with: fastshift {config.verb} --resume and the same options",
        file=sys.stderr,
    )
    return INTERRUPTED


def _pretrain(config: Config, stop: Stop) -> int:
    config.require("out", "space", "data")
    goes_on = _open_run(config)
    data = _data(config)
    options = config.part(PretrainOptions)
    supernet = _place(config, _fresh_supernet(_space(config, data), config["seed"]))
    _begin_run(config, goes_on)
    result = _run_pretrain(config, supernet, data, options, stop)
    if result.stopped:
        return _interrupted(config)
    path = save_supernet(supernet, config["out"])
    print(f"{result.steps} steps, training loss {result.loss:.4f}: {path}")
    return DONE


def _run_pretrain(
    config: Config, supernet: Supernet, data: Any, options: PretrainOptions, stop: Stop
) -> Any:
    with _of_the_user():
        return pretrain(
            supernet,
            data,
            options=options,
            seed=config["seed"],
            precision=config["precision"],
            out=config["out"],
            resume=config["resume"],
            checkpoint_seconds=config["checkpoint_seconds"],
            stop=stop,
            quiet=config["quiet"],
        )


def _search(config: Config, stop: Stop) -> int:
    transfers = config.verb == "transfer"
    config.require("out", "data", *(["supernet"] if transfers else []))
    if not transfers and config["supernet"] is None:
        config.require("space")
    goes_on = _open_run(config)
    if goes_on and _is_finished(config):
        return _show(config)
    data = _data(config)
    constraints = config.part(ConstraintOptions).given()
    options = config.part(SearchOptions, constraints=constraints)
    checks = config.part(RetrainOptions)
    if config["supernet"] is None:
        pretraining = config.part(PretrainOptions)
        supernet = _fresh_supernet(_space(config, data), config["seed"])
    else:
        pretraining = None
        supernet = _supernet(config, data, fresh_head=transfers)
    if transfers:
        supernet.reset_head(data.num_classes, seed=config["seed"])
    common = {"seed": config["seed"], "precision": config["precision"], "fresh_head": transfers}
    with _of_the_user():
        Search(_fresh_supernet(supernet.space, 0), data, options, **common)
    _place(config, supernet)
    _begin_run(config, goes_on)
    if pretraining is not None:
        found = checkpoint.load(config["out"])
        if found is None or "evolution" not in found.state:
            result = _run_pretrain(config, supernet, data, pretraining, stop)
            if result.stopped:
                return _interrupted(config)
    search = Search(
        supernet,
        data,
        options,
        out=config["out"],
        resume=True,
        checkpoint_seconds=config["checkpoint_seconds"],
        **common,
    )
    result = search.run(stop, quiet=config["quiet"])
    if result.stopped:
        return _interrupted(config)
    if config["retrain_check"] and result.best is not None:
        rows = _retrain_check(config, search, result, checks, stop)
        if rows is None:
            return _interrupted(config)
        path = Path(config["out"]) / "result.json"
        content = json.loads(path.read_text()) | {"retrained": rows}
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
    return _show(config)


def _is_finished(config: Config) -> bool:
    path = Path(config["out"]) / "result.json"
    if not path.exists():
        return False
    content = json.loads(path.read_text())
    return not config["retrain_check"] or "retrained" in content or not content["best"]


def _retrain_check(
    config: Config, search: Search, result: Any, options: RetrainOptions, stop: Stop
) -> list[dict[str, Any]] | None:
    """Retrain the winner and random feasible architectures; None where that was interrupted."""
    space, count = search.space, config["retrain_check"]
    winner = np.array(result.best.arch, np.uint8)
    drawn = Evolution(
        space,
        count + 1,
        1,
        mutation=0,
        crossover=0,
        constraints=search.options.constraints,
        seed=config["seed"],
    ).ask()
    others = [row for row in drawn if (row != winner).any()][:count]
    archs = np.stack([winner, *others])
    rows = []
    for index, (arch, error) in enumerate(zip(archs, search.evaluator(archs), strict=True)):
        text = space.format(arch)
        _say(config, f"retraining {text} from scratch, {index + 1} of {len(archs)}")
        trained = retrain(
            space,
            arch,
            search.data,
            options=options,
            seed=config["seed"],
            device=_device(config),
            precision=config["precision"],
            memory_format=_memory_format(config, space),
            stop=stop,
            quiet=config["quiet"],
        )
        if trained.test_error is None:
            return None
        rows.append(
            {
                "arch": text,
                "kind": "random" if index else "winner",
                "error_supernet": float(error),
                "test_accuracy": 1.0 - trained.test_error,
                "epochs": options.epochs,
            }
        )
    return rows


def _show(config: Config) -> int:
    """Print a finished run's tables and write its page."""
    report.summary(config["out"], plain=not _has_rich())
    try:
        print(f"report: {report.write_report(config['out'])}")
    except MissingExtraError as error:
        print(f"no report.html: {error}")
    return DONE


def _has_rich() -> bool:
    import importlib.util

    return importlib.util.find_spec("rich") is not None


def _evaluate(config: Config, stop: Stop) -> int:
    raise NotImplementedError


VERBS: dict[str, Callable[[Config, Stop], int]] = {
    "pretrain": _pretrain,
    "search": _search,
    "transfer": _search,
}
_ = (ArchError, ArchOptions, EvaluateOptions, Evaluator)
