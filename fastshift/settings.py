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
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed: {self.seed}; expected 0 to 2^63 - 1")


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
class QuietOptions:
    """What is said beside the answer.

    Attributes:
        quiet: show no progress; of these verbs none has any, so it changes nothing.
    """

    quiet: bool = False


@dataclass(frozen=True)
class PlaceOptions:
    """Where and how numbers are computed.

    Attributes:
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        precision: `fp32`, or `bf16` by autocast.
        layout: `nchw`, `channels_last`, or `auto`, which is channels last: on a CPU 1.1 to 2 times
            as fast for each of the ready-made spaces, shuffle units included.
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

    space: str | None = None
    space_options: str | None = None


@dataclass(frozen=True)
class SupernetOptions:
    """The weights to start from.

    Attributes:
        supernet: run directory of `pretrain`, `search` or `transfer`, or a file in its format.
    """

    supernet: str | None = None


@dataclass(frozen=True)
class DataOptions:
    """The images.

    Attributes:
        data: `digits`, `cifar10:DIR`, `cifar100:DIR`, `npz:FILE`, `folder:DIR` or `dali:DIR`.
    """

    data: str | None = None


@dataclass(frozen=True)
class ConstraintOptions:
    """What an architecture may cost: `330M`, `60%` of the largest, or a range `290M:330M`.

    Attributes:
        flops: multiply-adds of an image: `330M` at most, `60%` of the largest, or `290M:330M`.
        params: parameters, likewise.
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

    arch: str | None = None


@dataclass(frozen=True)
class EvaluateOptions:
    """What to score, and how.

    Attributes:
        archs: a file with an architecture a line or a CSV with a column `arch`, `-` for standard
            input, or `random:N` distinct feasible ones.
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
        truth: true accuracies: NAS-Bench-Macro's JSON, or CSV with `arch` and a column a run.
        score_by: `error` or `loss`.
        top_k: size of the sub-space of the best, for the local tau.
        independent_run: the truth's run, from 0, that chooses the sub-space; the others judge.
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
        name: one space, or `FILE.py:FUNCTION`, block by block; all by default.
        image_size: of the images; the published size by default.
        num_classes: likewise.
        in_channels: likewise.
    """

    name: str | None = field(default=None, metadata={"positional": True, "optional": True})
    image_size: int | None = None
    num_classes: int | None = None
    in_channels: int | None = None


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: {value!r}; expected one of {', '.join(known)}")
