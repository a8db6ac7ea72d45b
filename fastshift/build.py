"""Options in, what they name out: device, data, space, supernet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fastshift import checkpoint, cpu, spaces
from fastshift import data as data_module
from fastshift.backends import backend
from fastshift.config import Config
from fastshift.device import parse_device, settle_on
from fastshift.errors import ConfigError, FastShiftError, SpaceError
from fastshift.settings import PlaceOptions
from fastshift.single_path import fresh_path
from fastshift.space import SearchSpace
from fastshift.static_supernet import wanted_steps
from fastshift.supernet import ChainSupernet, Supernet
from fastshift.weights import is_described, restored

__all__ = [
    "check_backend",
    "check_ema",
    "device_of",
    "fresh_supernet",
    "load_data",
    "load_space",
    "load_weights",
    "memory_format",
    "new_supernet",
    "of_the_user",
    "place",
    "saved_supernet",
    "shape_of",
]

_SHAPE = ("in_channels", "image_size", "num_classes")


@contextmanager
def of_the_user() -> Iterator[None]:
    """Report a value out of range, which the library's constructors refuse, as the user's."""
    try:
        yield
    except FastShiftError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_backend() -> None:
    """Refuse a `FASTSHIFT_BACKEND`, `FASTSHIFT_CPU_ISA` or `FASTSHIFT_STEPS` that cannot run.

    Raises:
        ConfigError: with the reason.
    """
    backend()
    cpu.instruction_set()
    wanted_steps(torch.device("cpu"))


def check_ema(policy: str, supernet: ChainSupernet, *, moves: bool = False) -> None:
    """Refuse `ema` statistics where no shift step made any, and none will."""
    if policy == "ema" and not supernet.ema and not moves:
        raise ConfigError(
            "batch_norm: 'ema'; expected another, since no shift step ever moved this supernet"
        )


def device_of(config: Config) -> torch.device:
    """The device that `--device` names; `ConfigError` where there is none."""
    name = config.part(PlaceOptions).device
    try:
        return parse_device(name)
    except ValueError as error:
        raise ConfigError(f"device: {name!r}; {error}") from error


def memory_format(config: Config) -> torch.memory_format:
    """The weights' memory format that `--layout` names."""
    return torch.contiguous_format if config["layout"] == "nchw" else torch.channels_last


def load_data(config: Config) -> Any:
    """The data set that `--data` and the options of images describe."""
    config.require("data")
    names = data_module.Options.__dataclass_fields__
    options = {name: config[name] for name in names if name in config.values}
    options.pop("batch_size", None)  # of a stage, which asks for its own
    options["device"] = str(device_of(config))
    return data_module.load(config["data"], **options)


def _space_options(config: Config) -> dict[str, int | float | str]:
    options = {}
    for part in (config["space_options"] or "").split(","):
        name, separator, value = part.partition("=")
        if separator:
            options[name.strip()] = _number(value.strip())
        elif part:
            raise ConfigError(f"space_options: {part!r}; expected NAME=VALUE")
    return options


def shape_of(data: Any) -> dict[str, int]:
    """What a space has to be made for: the data's images and classes."""
    return {name: getattr(data, name) for name in _SHAPE}


def load_space(config: Config, data: Any) -> SearchSpace:
    """The space that `--space` names, for the data's images and classes."""
    return spaces.load(config["space"], **{**shape_of(data), **_space_options(config)})


def new_supernet(config: Config, shape: Mapping[str, int], seed: int) -> ChainSupernet:
    """The supernet that `--space` names, its weights drawn from this seed alone.

    Args:
        config: of a verb with these options.
        shape: `image_size`, `num_classes` and `in_channels`.
        seed: of the weights; a function that draws its own or loads some decides itself.

    Raises:
        SpaceError: it cannot be made, or a supernet of modules is not of this shape.
    """
    spec = config["space"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = spaces.make(spec, **{**shape, **_space_options(config)})
    if isinstance(made, SearchSpace):
        return fresh_supernet(made, seed)
    if not isinstance(made, ChainSupernet):
        raise SpaceError(f"space {spec!r}: expected a ChainSupernet, got {type(made).__name__}")
    if made.space.image_size is None:
        raise SpaceError(
            f"space {spec!r}: a ChainSupernet without input_shape; expected "
            "input_shape=(in_channels, image_size, image_size), by which FLOPs are counted"
        )
    for name, wanted in shape.items():
        if getattr(made.space, name) != wanted:
            raise SpaceError(
                f"space {spec!r}: a ChainSupernet with {name} {getattr(made.space, name)}; "
                f"expected {wanted}, as it was asked for"
            )
    return made


def _number(text: str) -> int | float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def fresh_supernet(space: SearchSpace, seed: int) -> Supernet:
    """A supernet whose weights are drawn from this seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Supernet(space)


def saved_supernet(
    config: Config, *, image_size: int | None = None
) -> tuple[ChainSupernet, dict[str, Any]]:
    """The supernet that `--supernet` names, and what was saved with it.

    One of modules is made by the function that `--space` names, which must be the one that made it
    before; a retrained one holds a single architecture of it.

    Args:
        config: of a verb with these options.
        image_size: count costs for images of this size; the saved one by default.

    Raises:
        CheckpointError: the file is unusable, or of another space than the function makes.
        ConfigError: it is of modules, and `--space` is missing.
    """
    path = config["supernet"]
    tensors, meta = checkpoint.load_supernet(path)
    into = None
    if not is_described(meta):
        if config["space"] is None:
            raise ConfigError(
                f"supernet {path!r}: of modules, which no file describes; expected --space "
                "FILE.py:FUNCTION with the function that made it"
            )
        shape = {name: meta["space"][name] for name in _SHAPE}
        if image_size is not None:
            shape["image_size"] = image_size
        into = new_supernet(config, shape, seed=0)
        if "arch" in meta:
            into = fresh_path(into, meta["arch"], seed=0)
    return restored(path, tensors, meta, image_size=image_size, into=into), meta


def load_weights(config: Config, data: Any, *, fresh_head: bool = False) -> ChainSupernet:
    """The supernet that `--supernet` names, checked against the data and `--space`.

    Args:
        config: of a verb with these options.
        data: to be used with it.
        fresh_head: classes and image size may differ, since only the trunk is kept.

    Raises:
        SpaceError: it is of another space, or does not fit the data.
    """
    path = config["supernet"]
    supernet, meta = saved_supernet(config, image_size=data.image_size if fresh_head else None)
    space = supernet.space
    _check_split(path, meta.get("data") or {}, data.describe())
    for name in _SHAPE:
        own, given = getattr(space, name), getattr(data, name)
        if own == given or (fresh_head and name == "num_classes"):
            continue
        hint = "; `fastshift transfer` gives it a fresh head" if name == "num_classes" else ""
        raise SpaceError(
            f"supernet {path!r}: its space has {name} {own}, the data have {given}{hint}"
        )
    if config["space"] is not None and space.blocks:  # of modules, it has been compared already
        asked = load_space(config, data)
        same = asked.fingerprint() == space.fingerprint()
        if fresh_head:
            same = asked.trunk_fingerprint() == space.trunk_fingerprint()
        if not same:
            raise SpaceError(
                f"supernet {path!r}: of another space, {space.name!r}; expected {config['space']!r}"
            )
    return supernet


def _check_split(path: str, trained_on: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse data of which the supernet may have been trained on what is held out here."""
    if trained_on.get("digest") != given["digest"]:
        return
    for name in ("split_seed", "train_images", "validation_images"):
        if trained_on.get(name) != given[name]:
            raise ConfigError(
                f"supernet {path!r}: trained on the same images, split with {name} "
                f"{trained_on.get(name)}; expected that here, got {given[name]}: give the same "
                "--limit, --classes, --validation-size and --split-seed"
            )


def place(config: Config, supernet: ChainSupernet) -> ChainSupernet:
    """Move a supernet to its device and, where `--layout` is an option, to its memory format.

    A GPU becomes the current one, where fp32 is fp32 and runs repeat (`device.settle_on`).
    """
    device = device_of(config)
    settle_on(device)
    supernet.to(device=device)
    if "layout" in config.values:
        supernet.memory_format = memory_format(config)
        supernet.to(memory_format=supernet.memory_format)
    return supernet
