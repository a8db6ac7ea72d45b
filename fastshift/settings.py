"""Options that belong to the command line alone: places, names and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastshift.errors import ConfigError

__all__ = [
    "ArchOptions",
    "ConstraintOptions",
    "DataOptions",
    "EndOptions",
    "EvaluateOptions",
    "ExportOptions",
    "ListOptions",
    "OutputOptions",
    "PlaceOptions",
    "QuietOptions",
    "RankOptions",
    "ReportOptions",
    "RunOptions",
    "SpaceOptions",
    "SupernetOptions",
]


def _shown_as(metavar: str) -> Any:
    """A field without a default value, and what stands for its value in the help."""
    return field(default=None, metadata={"metavar": metavar})


@dataclass(frozen=True)
class RunOptions:
    """Where a run goes.

    Attributes:
        out: run directory; made where it is missing.
        seed: what every random choice follows from.
        config: YAML file with options; those of the command line win.
        resume: go on where the run in `--out` stopped; start it where there is none.
        quiet: show no progress.
        checkpoint_seconds: seconds between checkpoints within a stage.
    """

    out: str | None = _shown_as("DIR")
    seed: int = 0
    config: str | None = _shown_as("FILE")
    resume: bool = False
    quiet: bool = False
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed: {self.seed}; expected 0 to 2^63 - 1")


@dataclass(frozen=True)
class OutputOptions:
    """Where a result goes.

    Attributes:
        out: file to write; one that is there already is refused.
        seed: what every random choice follows from.
        config: YAML file with options; those of the command line win.
        quiet: show no progress.
    """

    out: str | None = _shown_as("FILE")
    seed: int = 0
    config: str | None = _shown_as("FILE")
    quiet: bool = False

    __post_init__ = RunOptions.__post_init__


@dataclass(frozen=True)
class QuietOptions:
    """What is said beside the answer.

    Attributes:
        quiet: changes nothing: this verb shows no progress.
    """

    quiet: bool = False


@dataclass(frozen=True)
class PlaceOptions:
    """Where and how numbers are computed.

    Attributes:
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        precision: `fp32`, or `bf16` as in autocast.
        layout: order of the weights in memory: `nchw`, `channels_last`, or `auto`, which is
            channels last: on a CPU 1.1 to 2 times as fast for each of the ready-made spaces.
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
        space: a ready-made space's name, or `FILE.py:FUNCTION`, which returns a `SearchSpace` or a
            `ChainSupernet`; a saved supernet of modules needs the function that made it.
        space_options: further arguments of the space, such as `width=0.5`, separated by commas.
    """

    space: str | None = _shown_as("NAME")
    space_options: str | None = _shown_as("NAME=VALUE,...")


@dataclass(frozen=True)
class SupernetOptions:
    """The weights to start from.

    Attributes:
        supernet: run directory of `pretrain`, `search` or `transfer`, or a file in its format.
    """

    supernet: str | None = _shown_as("DIR")


@dataclass(frozen=True)
class DataOptions:
    """The images.

    Attributes:
        data: `digits`, `cifar10:DIR`, `cifar100:DIR`, `npz:FILE`, `folder:DIR` or `dali:DIR`.
    """

    data: str | None = _shown_as("SPEC")


@dataclass(frozen=True)
class ConstraintOptions:
    """What an architecture may cost: `330M`, `60%` of the largest, or a range `290M:330M`.

    Attributes:
        flops: multiply-adds of an image: `330M` at most, `60%` of the largest, or `290M:330M`.
        params: number of parameters: `2M`, `60%` or `1M:2M`, as for `--flops`.
    """

    flops: Any = None
    params: Any = None

    def given(self) -> dict[str, Any]:
        """The constraints that are there, by metric."""
        pairs = {"flops": self.flops, "params": self.params}
        return {name: value for name, value in pairs.items() if value is not None}


@dataclass(frozen=True)
class EndOptions:
    """What follows a search.

    Attributes:
        retrain_check: retrain the winner from scratch beside so many random feasible architectures;
            0 for no check.
        report: write `report.html`, where matplotlib is installed.
    """

    retrain_check: int = 0
    report: bool = True

    def __post_init__(self) -> None:
        if self.retrain_check < 0:
            raise ConfigError(f"retrain_check: {self.retrain_check}; expected at least 0")


@dataclass(frozen=True)
class ArchOptions:
    """One architecture.

    Attributes:
        arch: its string of choices, or `best`: the winner of the run that `--supernet` names.
    """

    arch: str | None = _shown_as("ARCH")


@dataclass(frozen=True)
class EvaluateOptions:
    """What to score, and how.

    Attributes:
        archs: a file with an architecture a line or a CSV with a column `arch`, `-` for standard
            input, or `random:N` distinct feasible ones.
        batch_norm: statistics that scores are taken with: `recalibrate`, `batch`, `running` or
            `ema`.
        strategy: `shared` computes what candidates have in common once, `sequential` scores one
            after the other.
        subtrie_size: candidates computed side by side; bounds memory.
    """

    archs: str | None = _shown_as("FILE|-|random:N")
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
        truth: true accuracies: NAS-Bench-Macro's JSON, or CSV with `arch` and a column a run.
        score_by: order architectures by `error` or by `loss`.
        top_k: how many of the truly best the local tau is of.
        independent_run: the truth's run, from 0, that chooses the sub-space; the others judge.
    """

    scores: str | None = field(default=None, metadata={"positional": True})
    truth: str | None = _shown_as("FILE")
    score_by: str = "error"
    top_k: int = 500
    independent_run: int | None = field(default=None, metadata={"bare": "0"})

    def __post_init__(self) -> None:
        _one_of("score_by", self.score_by, ("error", "loss"))
        if self.top_k < 2:
            raise ConfigError(f"top_k: {self.top_k}; expected at least 2")


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
        name: one space, or `FILE.py:FUNCTION`, block by block; all by default.
        image_size: side of the images, in pixels; the published size by default.
        num_classes: classes; the published number by default.
        in_channels: channels of an image, 1 or 3; the published number by default.
    """

    name: str | None = field(default=None, metadata={"positional": True, "optional": True})
    image_size: int | None = None
    num_classes: int | None = None
    in_channels: int | None = None


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: {value!r}; expected one of {', '.join(known)}")
