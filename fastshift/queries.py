"""The verbs that answer and leave no run: evaluate, rank, export, report, spaces, info."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastshift import backends, cpu, report, spaces
from fastshift.build import (
    check_backend,
    check_ema,
    device_of,
    load_data,
    load_weights,
    of_the_user,
    place,
    saved_supernet,
)
from fastshift.commands import DONE, chosen_arch
from fastshift.config import Config
from fastshift.data.uploaded import MOST_BYTES
from fastshift.durable import replace_file
from fastshift.errors import ArchError, ConfigError
from fastshift.evaluator import Evaluator, Scores
from fastshift.export import checked_path, export
from fastshift.population import Evolution
from fastshift.progress import Progress
from fastshift.ranking import Truth, format_table, rank_table
from fastshift.sampler import FeasibleSampler
from fastshift.settings import (
    ConstraintOptions,
    EvaluateOptions,
    ExportOptions,
    ListOptions,
    RankOptions,
)
from fastshift.space import SearchSpace
from fastshift.static_supernet import wanted_steps
from fastshift.tables import ScoreTable, read_scores, write_scores
from fastshift.versions import versions

__all__ = ["QUERIES"]

_CHUNK = 100  # architectures scored between two looks at the progress


def _evaluate(config: Config) -> int:
    check_backend()
    config.require("supernet", "data", "archs")
    options = config.part(EvaluateOptions)
    constraints = config.part(ConstraintOptions).given()
    target = _target(config)
    data = load_data(config)
    supernet = load_weights(config, data)
    space = supernet.space
    with of_the_user():
        archs = _archs(config["archs"], space, constraints, config["seed"])
        evaluator = Evaluator(
            place(config, supernet),
            data.validation,
            calibration=data.calibration,
            batch_norm=options.batch_norm,
            strategy=options.strategy,
            subtrie_size=options.subtrie_size,
            precision=config["precision"],
        )
        check_ema(options.batch_norm, supernet)
    scores = _scored(evaluator, archs, quiet=config["quiet"])
    text = io.StringIO()
    write_scores(text, scores)
    if target is None:
        sys.stdout.write(text.getvalue())
    else:
        replace_file(target, text.getvalue().encode())
    return DONE


def _target(config: Config) -> Path | None:
    """The file that `--out` names, refused before any work where it cannot be written."""
    if config["out"] is None:
        return None
    path = Path(config["out"])
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"out: {str(path)!r}; expected a file name in a directory that exists")
    return _unused(path)


def _unused(path: Path) -> Path:
    """The path itself, refused where something is there: perhaps the only copy of hours of work."""
    if path.is_file() or path.is_dir():  # a pipe or a terminal is written to
        raise ConfigError(f"out: {str(path)!r} is there already; remove it, or give another file")
    return path


def _archs(spec: str, space: SearchSpace, constraints: dict[str, Any], seed: int) -> np.ndarray:
    """The architectures that `--archs` names, distinct, `[P, L]`."""
    kind, _, count = spec.partition(":")
    if kind == "random":
        if not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"archs: {spec!r}; expected random:N with N of at least 1")
        # A stream of its own: a search of this seed shifts on its own first draws.
        options = {"constraints": constraints, "seed": seed ^ 1 << 42}
        most = FeasibleSampler(space, constraints).count
        if most is not None and int(count) > most:
            which = "satisfy the constraints" if constraints else f"{space.name} has"
            raise ConfigError(f"archs: {spec!r}; expected at most random:{most}, all that {which}")
        drawn = Evolution(space, int(count), 1, mutation=0, crossover=0, **options)
        archs = drawn.ask()
        if len(archs) < int(count):
            raise ConfigError(f"archs: {spec!r}; {drawn.last_ask['reason']}")
        return archs
    if constraints:
        raise ConfigError(f"archs: {spec!r}; constraints are for random:N")
    rows, places = [], {}
    for line, text in _arch_lines(spec):
        try:
            row = space.parse(text)
        except ArchError as error:
            raise ArchError(f"archs: {spec!r}, line {line}: {error}") from None
        if text in places:
            raise ArchError(
                f"archs: {spec!r}, line {line}: {text} stands in line {places[text]} already"
            )
        places[text] = line
        rows.append(row)
    if not rows:
        raise ConfigError(f"archs: {spec!r} holds none; expected one architecture a line")
    return np.stack(rows)


def _arch_lines(spec: str) -> list[tuple[int, str]]:
    """Line numbers and strings of a file, plain or CSV with a column `arch`."""
    try:
        if spec == "-":
            lines = sys.stdin.read().splitlines()
        else:
            lines = Path(spec).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"archs: {spec!r} cannot be read: {error.strerror}; expected a file with an "
            "architecture a line, - for standard input, or random:N"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"archs: {spec!r} is not text: {error}") from error
    header = next(csv.reader(lines[:1]), [])
    if "arch" in header:
        column = header.index("arch")
        rows = list(csv.reader(lines[1:]))
        return [(n, row[column]) for n, row in enumerate(rows, 2) if len(row) > column]
    stripped = [(n, line.partition("#")[0].strip()) for n, line in enumerate(lines, 1)]
    return [(n, text) for n, text in stripped if text]


def _scored(evaluator: Evaluator, archs: np.ndarray, *, quiet: bool) -> ScoreTable:
    """Score architectures a part at a time, neighbours in the trie together."""
    order = np.lexsort(archs.T[::-1])
    parts: list[Scores] = []
    with Progress(len(archs), what="evaluate", quiet=quiet) as progress:
        for start in range(0, len(archs), _CHUNK):
            scores = evaluator.evaluate(archs[order[start : start + _CHUNK]])
            parts.append(scores)
            count = len(scores.errors)
            images = (scores.images + scores.calibration_images) * count
            progress.advance(count, archs=count, images=images, sharing=scores.sharing)
    back = np.argsort(order)
    space = evaluator.supernet.space
    return ScoreTable(
        archs=tuple(space.format_all(archs)),
        error=np.concatenate([part.errors for part in parts])[back].astype(np.float64),
        loss=np.concatenate([part.losses for part in parts])[back],
        flops=space.flops(archs),
        params=space.params(archs),
        weights_version=np.full(len(archs), evaluator.supernet.version),
    )


def _rank(config: Config) -> int:
    config.require("scores", "truth")
    options = config.part(RankOptions)
    target = _target(config)
    table, truth = read_scores(config["scores"]), Truth.load(config["truth"])
    with of_the_user():
        result = rank_table(
            table,
            truth,
            score_by=options.score_by,
            local_k=options.top_k,
            independent_run=options.independent_run,
            seed=config["seed"],
        )
    print(format_table(result))
    if target is not None:
        replace_file(target, (json.dumps(result.to_dict(), indent=1) + "\n").encode())
    return DONE


def _export(config: Config) -> int:
    config.require("supernet", "out")
    device_of(config)
    options = config.part(ExportOptions)
    supernet, meta = saved_supernet(config)
    space = supernet.space
    if "arch" in meta:  # of one architecture, as `fastshift retrain` leaves it
        if config["arch"] not in (None, "best", meta["arch"]):
            raise ArchError(
                f"arch: {config['arch']!r}; expected {meta['arch']!r}, the one retrained there"
            )
        text = meta["arch"]
        target = _unused(checked_path(config["out"], options.format, text))
        net = supernet.subnet(np.zeros(space.num_blocks, np.uint8))
        facts = {name: meta.get(name) for name in ("class_names", "mean", "std")}
        facts |= {"weights": "retrained"}
    else:
        config.require("arch", "data")
        arch = chosen_arch(config, space)
        text = space.format(arch)
        target = _unused(checked_path(config["out"], options.format, text))
        data = load_data(config)
        supernet = place(config, load_weights(config, data))
        check_ema(options.batch_norm, supernet)
        net = supernet.subnet(
            arch,
            calibration=data.calibration if options.batch_norm == "recalibrate" else None,
            statistics="ema" if options.batch_norm == "ema" else "running",
        )
        facts = {
            "class_names": None if data.class_names is None else list(data.class_names),
            "mean": list(data.mean),
            "std": list(data.std),
            "weights": "inherited",
            "batch_norm": options.batch_norm,
            "weights_version": supernet.version,
        }
    written = export(
        net,
        text,
        target,
        format=options.format,
        input_shape=(space.in_channels, space.image_size, space.image_size),
        metadata={"space": space.name, "recipe": space.recipe, **facts},
    )
    agree = (
        f"logits within {written.parity:.1g} of the largest" if written.parity else "same logits"
    )
    print(f"{written.path}: {written.num_bytes:,} bytes, read back: {agree}")
    return DONE


def _report(config: Config) -> int:
    config.require("run")
    print(report.write_report(config["run"]))
    return DONE


def _spaces(config: Config) -> int:
    options = config.part(ListOptions)
    shape = {
        name: getattr(options, name)
        for name in ("image_size", "num_classes", "in_channels")
        if getattr(options, name) is not None
    }
    names = spaces.names() if options.name is None else (options.name,)
    for name in names:
        space = spaces.load(name, **shape)
        facts = space.describe()
        size = facts["image_size"]  # None: modules without an input_shape, FLOPs not counted
        images = "" if size is None else f"{facts['in_channels']}x{size}x{size} images, "
        print(
            f"{facts['name']}: {facts['num_blocks']} choice blocks, {facts['size']:,} "
            f"architectures, {images}{facts['num_classes']} classes"
        )
        for metric, costs in facts["costs"].items():
            if costs["largest"]:
                print(f"  {metric:6} {costs['smallest']:,} to {costs['largest']:,}")
        if options.name is not None:
            _print_blocks(space)
    return DONE


def _print_blocks(space: SearchSpace) -> None:
    for block, labels in enumerate(space.labels):
        print(f"  block {block + 1}")
        for choice, label in enumerate(labels):
            flops, params = space.flops_table[block, choice], space.params_table[block, choice]
            print(f"    {choice}: {label}, {flops:,} FLOPs, {params:,} parameters")


def _info(config: Config) -> int:
    for name, version in versions().items():
        if name != "device":
            print(f"{name:12} {version or 'not installed'}")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{'cpu':12} {versions()['device']}, {capability}, {platform.machine()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(
                f"{'gpu ' + str(index):12} {torch.cuda.get_device_name(index)}, sm_{major}{minor}"
            )
    else:
        print(f"{'gpu':12} none usable by this torch")
    print("\npopulation (sampling, mutation, crossover, the trie): compiled C++")
    _print_steps()
    _print_augmentation()
    _print_kernels()
    check_backend()
    return DONE


def _print_steps() -> None:
    """Print how a batch goes through a plan on each kind of device, and why."""
    print("calls of the kernels below, as a batch goes through a population:")
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            wanted, why = wanted_steps(torch.device(kind))
        except ConfigError:  # said last
            wanted, why = "nothing", "FASTSHIFT_STEPS or FASTSHIFT_BACKEND cannot run"
        graphs = "CUDA graphs over static buffers"
        static = graphs if kind == "cuda" else "static buffers, no graphs"
        how = {"static": static, "modules": "one after the other, from Python"}
        print(f"  {kind:14} {how.get(wanted, wanted)}: {why}")


def _print_augmentation() -> None:
    """Print where training batches are augmented on each kind of device, and why."""
    print("augmentation of training batches (a run's result says where it was):")
    print(f"  {'cpu':14} on the host; of dali:DIR by DALI")
    if not torch.cuda.is_available():
        return
    try:
        lacking = backends.why_no_triton()
    except ConfigError:  # said last
        lacking = "FASTSHIFT_BACKEND cannot run"
    most = f"{MOST_BYTES / 2**30:.0f} GiB"
    there = f"on the GPU, of images in memory up to {most}; of others on the host, a batch ahead"
    found = f"on the host, a batch ahead: {lacking}" if lacking else there
    print(f"  {'cuda':14} {found}; of dali:DIR by DALI")


def _print_kernels() -> None:
    """Print which implementation of each kernel runs, and why each other does not."""
    try:
        check_backend()
        backend = backends.backend()
        level = cpu.instruction_set() if backend == "cpu" else None
        runs = f"{backend}, {level}" if level else backend
        cuda = backends.cuda_backend()
    except ConfigError:  # said last
        backend, level, runs, cuda = None, None, "nothing", "nothing"
    print("kernels of candidate ops made of units (scoring, calibration, training):")
    for kernel in ("block forward", "block backward", "block infer"):
        print(f"  {kernel:14} {runs}")
    print(f"  {'others':14} PyTorch: ops that are modules, units without batch norm, classifiers")
    if torch.cuda.is_available():
        print(f"  {'on CUDA':14} {cuda}: the operators (fastshift.operators); modules otherwise")
    print("implementations of the kernels on a CPU; cpu is compiled C++, reference is PyTorch:")
    _print_choices(backends.backends(), backend, "FASTSHIFT_BACKEND")
    print("instruction sets that cpu was compiled for:")
    _print_choices(cpu.instruction_sets(), level, "FASTSHIFT_CPU_ISA")


def _print_choices(reasons: Mapping[str, str | None], runs: str | None, variable: str) -> None:
    for name, reason in reasons.items():
        if name == runs:
            print(f"  {name:12} runs")
        elif reason is None:
            print(f"  {name:12} not chosen: {variable}={name} would")
        else:
            print(f"  {name:12} does not run: {reason}")
    if os.environ.get(variable):
        print(f"  {variable}={os.environ[variable]}")


QUERIES: dict[str, Callable[[Config], int]] = {
    "evaluate": _evaluate,
    "rank": _rank,
    "export": _export,
    "report": _report,
    "spaces": _spaces,
    "info": _info,
}
