"""The verbs that make a run directory: pretrain, search, transfer, retrain."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastshift import checkpoint, report
from fastshift.build import (
    check_backend,
    check_ema,
    device_of,
    load_data,
    load_weights,
    memory_format,
    new_supernet,
    of_the_user,
    place,
    shape_of,
)
from fastshift.config import Config
from fastshift.durable import replace_file
from fastshift.errors import ConfigError, MissingExtraError
from fastshift.population import Evolution
from fastshift.pretrain import PretrainOptions, PretrainResult, pretrain
from fastshift.retrain import Retrained, RetrainOptions, retrain
from fastshift.run_directory import begin_run, open_run
from fastshift.sampler import FeasibleSampler
from fastshift.search import Search, SearchOptions
from fastshift.settings import ConstraintOptions
from fastshift.single_path import check_resets, fresh_path
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet
from fastshift.weights import save_supernet

__all__ = ["DONE", "INTERRUPTED", "RUNS", "chosen_arch"]

DONE, INTERRUPTED = 0, 3

Stop = Callable[[], bool]


def _interrupted(config: Config) -> int:
    print(
        "fastshift: interrupted; --resume with the same options goes on from "
        f"{config['out']}/checkpoint",
        file=sys.stderr,
    )
    return INTERRUPTED


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _note_finished(config: Config) -> None:
    if not config["quiet"]:
        out = config["out"]
        print(f"fastshift: {out}: finished before; remove it to start anew", file=sys.stderr)


def _note_unused(config: Config) -> None:
    """Say which options were changed from their defaults and decide nothing in this search."""
    reasons = {}
    if config["shift"] == "none":
        reasons["shift_"] = "with --shift none no weights move"
    if config["supernet"] is not None:
        reasons["pretrain_"] = "the weights come from --supernet"
    for prefix, reason in reasons.items():
        flags = [flag for name, flag in config.changed().items() if name.startswith(prefix)]
        if flags:
            text = f"fastshift: not used, since {reason}: {', '.join(flags)}"
            print(text, file=sys.stderr)


def _note_small_maps(space: SearchSpace) -> None:
    """Say where images are so small that the kernel size of a choice means nothing."""
    if space.pixel_blocks:
        print(
            f"fastshift: {space.name} with images of {space.image_size} px: "
            f"{len(space.pixel_blocks)} of its {space.num_blocks} blocks see maps of one pixel, "
            "where kernels of all sizes are one weight; --image-size takes a larger one",
            file=sys.stderr,
        )


def _pretrain(config: Config, stop: Stop) -> int:
    check_backend()
    config.require("out", "space", "data")
    goes_on = open_run(config)
    data = load_data(config)
    constraints = config.part(ConstraintOptions).given()
    options = config.part(PretrainOptions, constraints=constraints)
    supernet = place(config, new_supernet(config, shape_of(data), config["seed"]))
    FeasibleSampler(supernet.space, constraints)  # refuses what cannot be met before any trace
    _note_small_maps(supernet.space)
    if goes_on and (Path(config["out"]) / "supernet.safetensors").exists():
        _note_finished(config)
    begin_run(config, goes_on)
    result = _train(config, supernet, data, options, stop)
    if result.stopped:
        return _interrupted(config)
    path = save_supernet(supernet, config["out"], {"data": data.describe()})
    print(f"{path}: {result.steps} steps, training loss {result.loss:.4f}")
    return DONE


def _train(
    config: Config, supernet: ChainSupernet, data: Any, options: PretrainOptions, stop: Stop
) -> PretrainResult:
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
    check_backend()
    transfers = config.verb == "transfer"
    config.require("out", "data", *(["supernet"] if transfers else []))
    if not transfers and config["supernet"] is None:
        config.require("space")
    goes_on = open_run(config)
    if goes_on and _is_finished(config):
        _note_finished(config)
        return _show(config)
    data = load_data(config)
    options = config.part(SearchOptions, constraints=config.part(ConstraintOptions).given())
    checks = config.part(RetrainOptions)
    pretraining = None
    if transfers or config["supernet"] is not None:
        supernet = load_weights(config, data, fresh_head=transfers)
        if transfers:
            supernet.reset_head(data.num_classes, seed=config["seed"])
    else:
        pretraining = config.part(PretrainOptions)
        supernet = new_supernet(config, shape_of(data), config["seed"])
    common = {"seed": config["seed"], "precision": config["precision"], "fresh_head": transfers}
    with of_the_user():
        # Before any work and any trace: every option is tried on a supernet to throw away.
        tried = Search(copy.deepcopy(supernet), data, options, **common)
    if config["retrain_check"]:
        _check_others(config["retrain_check"], tried.evolution.feasible_count)
        check_resets(supernet)
    check_ema(options.batch_norm or options.default_batch_norm, supernet, moves=options.moves)
    place(config, supernet)
    _note_unused(config)
    _note_small_maps(supernet.space)
    begin_run(config, goes_on)
    if pretraining is not None:
        found = checkpoint.load(config["out"])
        is_searching = found is not None and "evolution" in found.state
        if not is_searching and _train(config, supernet, data, pretraining, stop).stopped:
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
        rows = _retrain_check(config, search, result.best.arch, checks, stop)
        if rows is None:
            return _interrupted(config)
        path = Path(config["out"]) / "result.json"
        _write_json(path, _read_json(path) | {"retrained": rows})
    return _show(config)


def _is_finished(config: Config) -> bool:
    path = Path(config["out"]) / "result.json"
    if not path.exists():
        return False
    content = _read_json(path)
    return not config["retrain_check"] or "retrained" in content or not content.get("best")


def _check_others(count: int, feasible: int | None) -> None:
    """Refuse to retrain more architectures beside the winner than there are."""
    if feasible is not None and count >= feasible:
        raise ConfigError(
            f"retrain_check: {count}; expected at most {feasible - 1}, the feasible architectures "
            "without the winner"
        )


def _retrain_check(
    config: Config, search: Search, winner: tuple[int, ...], options: RetrainOptions, stop: Stop
) -> list[dict[str, Any]] | None:
    """Retrain the winner and random feasible architectures; None where that was interrupted."""
    space, count = search.space, config["retrain_check"]
    drawn = Evolution(
        space,
        count + 1,
        1,
        mutation=0,
        crossover=0,
        constraints=search.options.constraints,
        seed=config["seed"] ^ 1 << 41,  # of its own: else it would draw the search's generation 0
    ).ask()
    others = [row for row in drawn if (row != winner).any()][:count]
    archs = np.array([winner, *others], np.uint8)
    rows = []
    for index, (arch, error) in enumerate(zip(archs, search.evaluator(archs), strict=True)):
        text = space.format(arch)
        if not config["quiet"]:
            print(f"retraining {text}, {index + 1} of {len(archs)}", file=sys.stderr, flush=True)
        trained = _train_alone(config, search.supernet, arch, search.data, options, stop)
        if trained.test_error is None:
            return None
        rows.append(
            {
                "arch": text,
                "kind": "random" if index else "winner",
                "error_supernet": float(error),
                "weights_version": search.supernet.version,
                "test_accuracy": 1.0 - trained.test_error,
                "epochs": options.epochs,
            }
        )
    return rows


def _train_alone(
    config: Config,
    supernet: ChainSupernet,
    arch: Any,
    data: Any,
    options: RetrainOptions,
    stop: Stop,
    **run: Any,
) -> Retrained:
    return retrain(
        supernet,
        arch,
        data,
        options=options,
        seed=config["seed"],
        device=device_of(config),
        precision=config["precision"],
        memory_format=memory_format(config),
        stop=stop,
        quiet=config["quiet"],
        **run,
    )


def _show(config: Config) -> int:
    """Print a finished search's tables, and write its page where matplotlib is installed."""
    report.summary(config["out"], plain=importlib.util.find_spec("rich") is None)
    if not config["report"]:
        return DONE
    try:
        print(f"report: {report.write_report(config['out'])}")
    except MissingExtraError as error:
        print(f"no report.html: {error}")
    return DONE


def chosen_arch(config: Config, space: SearchSpace) -> np.ndarray:
    """The architecture that `--arch` names, `[L]` uint8.

    Args:
        config: with `arch`, and `supernet` for `best`.
        space: the architecture's.

    Raises:
        ArchError: it is not in the space.
        ConfigError: `best` without the directory of a finished search.
    """
    config.require("arch")
    text = config["arch"]
    if text == "best":
        if config["supernet"] is None:
            raise ConfigError("arch: 'best'; expected --supernet RUN, the directory of a search")
        path = Path(config["supernet"])
        path = (path if path.is_dir() else path.parent) / "result.json"
        try:
            text = _read_json(path)["best"]["arch"]
        except ConfigError as error:
            raise ConfigError(f"arch: 'best'; {error}") from error
        except (KeyError, TypeError) as error:
            raise ConfigError(f"arch: 'best'; {path} names no best architecture") from error
    return space.parse(text)


def _retrain(config: Config, stop: Stop) -> int:
    check_backend()
    config.require("out", "data", "arch")
    if config["supernet"] is None:
        config.require("space")
    goes_on = open_run(config)
    path = Path(config["out"]) / "retrained.json"
    if goes_on and path.exists():
        _note_finished(config)
        return _show_retrained(_read_json(path))
    data = load_data(config)
    if config["supernet"] is None:
        supernet = new_supernet(config, shape_of(data), config["seed"])
    else:
        supernet = load_weights(config, data)
    space = supernet.space
    arch = chosen_arch(config, space)
    options = config.part(RetrainOptions)
    device_of(config)
    fresh_path(supernet, arch, config["seed"])  # tried before any trace
    _note_small_maps(space)
    begin_run(config, goes_on)
    trained = _train_alone(
        config,
        supernet,
        arch,
        data,
        options,
        stop,
        out=config["out"],
        resume=config["resume"],
        checkpoint_seconds=config["checkpoint_seconds"],
    )
    if trained.test_error is None:
        return _interrupted(config)
    facts = {
        "arch": space.format(arch),
        "class_names": None if data.class_names is None else list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    save_supernet(trained.path, config["out"], facts)
    content = {
        "format": 1,
        "arch": facts["arch"],
        "test_error": trained.test_error,
        "test_accuracy": 1.0 - trained.test_error,
        "loss": trained.loss,
        "epochs": options.epochs,
        "steps": trained.steps,
        "seconds": trained.seconds,
        "flops": int(space.flops(arch)[0]),
        "params": int(trained.path.space.fixed_params + trained.path.space.params_table.sum()),
        "data": data.describe(),
    }
    _write_json(path, content)
    return _show_retrained(content)


def _show_retrained(content: dict[str, Any]) -> int:
    print(
        f"{content['arch']}: test error {100 * content['test_error']:.2f} % after "
        f"{content['epochs']} epochs, {content['flops']:,} FLOPs, {content['params']:,} parameters"
    )
    return DONE


RUNS: dict[str, Callable[[Config, Stop], int]] = {
    "pretrain": _pretrain,
    "search": _search,
    "transfer": _search,
    "retrain": _retrain,
}
