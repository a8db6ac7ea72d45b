"""Steps over static buffers of a supernet, made once and kept, and the choice whether they run.

On a CUDA device they are captured as graphs, and run wherever every part of a supernet has a
kernel; elsewhere, and for all other supernets, `fastshift.steps` calls the modules. The environment
variable `FASTSHIFT_STEPS`, `static` or `modules`, asks for one; a supernet that static buffers do
not serve takes the other, and who runs it learns why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fastshift.backends import backend, why_no_triton
from fastshift.device import fp32_precision
from fastshift.errors import ConfigError, UnsupportedError
from fastshift.layers import ConvUnit, OpModule
from fastshift.node_tables import NodeTables
from fastshift.operators import implementation, saved_floats
from fastshift.optim import PathSGD
from fastshift.population_pass import PopulationPass
from fastshift.row_buffers import InferRows, TrainRows
from fastshift.static_levels import StaticLevel
from fastshift.static_state import StaticState
from fastshift.static_update import StaticUpdate
from fastshift.supernet import ChainSupernet
from fastshift.tracing import has_global_hooks, is_changed
from fastshift.training_pass import TrainingPass
from fastshift.trie import Plan

__all__ = [
    "STEPS",
    "StaticSupernet",
    "StaticTrainer",
    "expect_updates",
    "static_supernet",
    "wanted_steps",
]

STEPS = ("static", "modules")
FEWEST_CANDIDATES = 32  # room that a state is made with at least

Batches = Iterable[tuple[Tensor, Tensor]]


def wanted_steps(device: torch.device) -> tuple[str, str]:
    """What is asked for on a device, `static` or `modules`, and why.

    Raises:
        ConfigError: `FASTSHIFT_STEPS` is neither, or `FASTSHIFT_BACKEND` asks for kernels that
            cannot run there.
    """
    asked = os.environ.get("FASTSHIFT_STEPS")
    if asked:
        if asked not in STEPS:
            raise ConfigError(f"FASTSHIFT_STEPS: {asked!r}; expected one of {', '.join(STEPS)}")
        return asked, f"FASTSHIFT_STEPS={asked}"
    if device.type == "cuda":
        lacking = why_no_triton(device)
        return ("modules", lacking) if lacking else ("static", "on a CUDA device")
    return "modules", "graphs need a CUDA device"


def expect_updates(supernet: ChainSupernet, trainer: object, images: int) -> None:
    """Have memory for a trainer's updates reserved with the first that the supernet's steps take.

    It would have to grow otherwise, and what was captured for scoring would be captured again.

    Args:
        supernet: to be trained.
        trainer: who will; as long as it lives.
        images: of its batches.
    """
    _TRAINERS.setdefault(supernet, WeakKeyDictionary())[trainer] = images


def static_supernet(
    supernet: ChainSupernet,
    plan: Plan,
    sample: Callable[[], Tensor],
    precision: str = "fp32",
) -> tuple[StaticSupernet | None, str]:
    """The static steps of a supernet where they are to run, and how its steps run.

    Args:
        supernet: with its weights where they are to stay.
        plan: of the candidates; its size and its cut are made room for.
        sample: gives a batch, `[N, C, H, W]`; asked only where static steps are wanted.
        precision: `fp32` or `bf16`.

    A supernet that was refused is looked at again each time: it may have been changed.

    Returns:
        The steps, or None; and `captured`, `static` (the same functions without graphs), or
        `modules: ` and the reason.

    Raises:
        ConfigError: `FASTSHIFT_STEPS` is unknown.
    """
    reference = next(supernet.parameters())
    device, dtype = reference.device, reference.dtype
    wanted, why = wanted_steps(device)
    if wanted == "modules":
        return None, f"modules: {why}"
    if find_spec("triton") is None:
        return None, "modules: triton is not installed"
    if device.type == "cpu" and backend() == "reference":
        return None, "modules: FASTSHIFT_BACKEND=reference"
    if has_global_hooks():
        return None, "modules: hooks of all modules, which no kernel calls"
    rows = torch.bfloat16 if precision == "bf16" else dtype
    image_size = tuple(sample().shape[1:])
    if len(image_size) != 3:
        return None, f"modules: rows of {1 + len(image_size)} dimensions; kernels take images"
    found, how = _STATICS.get(supernet), "captured" if device.type == "cuda" else "static"
    if found is not None and found.serves(supernet, image_size, plan, rows):
        return found, how
    subtrie_size, room = plan.subtrie_size, max(FEWEST_CANDIDATES, plan.num_leaves)
    if found is not None:  # two plans of which each is the larger in one way must both fit
        subtrie_size = max(subtrie_size, found.state.subtrie_size)
        room = max(room, found.state.candidates)
    room = 1 << (room - 1).bit_length()
    try:
        state = StaticState(supernet, image_size, subtrie_size, room, rows)
        if device.type == "cuda":
            _check_kernels(state.levels, rows, device)
    except UnsupportedError as error:
        _STATICS.pop(supernet, None)
        return None, f"modules: {error}"
    found = _STATICS[supernet] = StaticSupernet(supernet, state)
    return found, how


def _check_kernels(levels: list[StaticLevel], dtype: torch.dtype, device: torch.device) -> None:
    sample = torch.empty(0, dtype=dtype, device=device)
    for level in levels:
        found = implementation(level.layer, sample, level.parameters)
        if found != "triton":
            raise UnsupportedError(f"{level.name}: no Triton kernel for it, but {found}")


class _Passes:
    """The passes of a state for each size of batch, made anew where its memory had to grow.

    Args:
        state: of the supernet.
        room: bytes of rows that will be needed beside those of a pass asked for.
    """

    def __init__(self, state: StaticState, room: Callable[[], int] = lambda: 0) -> None:
        self._arena, self._room = state.arena, room
        self._found: dict[tuple, PopulationPass] = {}
        state.arena.users.add(self)

    def of(self, key: tuple, make: Callable[[], PopulationPass]) -> PopulationPass:
        """The pass of a key, made where it is not there."""
        if key not in self._found:
            made = make()
            self._arena.reserve(max(made.rows.num_bytes, self._room()))
            made.rows.bind(self._arena)
            self._found[key] = made
        return self._found[key]

    def clear(self) -> None:
        """Let all passes go, their graphs with them."""
        self._found.clear()


class StaticSupernet:
    """The steps of one supernet in one place.

    Args:
        supernet: described.
        state: its buffers.
    """

    def __init__(self, supernet: ChainSupernet, state: StaticState) -> None:
        self.state = state
        self._trainers = _TRAINERS.setdefault(supernet, WeakKeyDictionary())
        self._most_images = 0  # of a batch that is scored, as far as that is known
        self._passes = _Passes(state, self._room)
        # All but the supernet itself, whose key of a weak dictionary a reference would keep alive.
        self._parts = [module for module in supernet.modules() if module is not supernet]
        self._fingerprint = _fingerprint(supernet, self._parts)

    def _room(self) -> int:
        """Bytes of the rows of all passes that are known to come."""
        state, images = self.state, max(self._trainers.values(), default=0)
        room = InferRows(state.levels, self._most_images, state.dtype).num_bytes
        if images:
            saved = _saved_of(state, images)
            rows = TrainRows(state.levels, images, state.dtype, saved, state.wide)
            room = max(room, rows.num_bytes)
        return room

    def serves(
        self,
        supernet: ChainSupernet,
        image_size: tuple[int, int, int],
        plan: Plan,
        dtype: torch.dtype,
    ) -> bool:
        """Whether nothing that was captured has moved or changed, and a plan has room."""
        state = self.state
        channels, height, width = image_size
        return (
            state.image_size == (height, width, channels)
            and state.dtype is dtype
            and plan.num_leaves <= state.candidates
            and plan.subtrie_size <= state.subtrie_size
            and _fingerprint(supernet, self._parts) == self._fingerprint
        )

    def _scoring_pass(self, images: int) -> PopulationPass:
        return self._passes.of((images,), lambda: PopulationPass(self.state, images))

    def evaluate(
        self,
        plan: Plan,
        batches: Batches,
        calibration: Batches | None,
        policy: str,
        moments: Mapping[str, Tensor] | None,
    ) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Score every candidate of a plan.

        Args:
            plan: of the candidates.
            batches: scored, `(images, labels)`.
            calibration: for `recalibrate`.
            policy: one of `batch_norm.POLICIES`.
            moments: of each batch norm by name, for `running` and `ema`.

        Returns:
            Wrong answers and summed losses, nats, of each leaf, `[D]`; images scored, and images
            calibrated on.

        Raises:
            CaptureError: a step cannot be captured.
            DataError: a batch leaves a batch norm one value a channel.
            ValueError: no calibration batch where `recalibrate` needs one.
        """
        state, images, calibrated = self.state, 0, 0
        by_choice = policy in ("running", "ema")
        with _settled(state.device):
            for given in (batches, calibration):
                if isinstance(given, list | tuple):
                    found = (len(x) for x, _ in given)
                    self._most_images = max(self._most_images, *found, 0)
            tables = state.tables(plan, by_choice=by_choice)
            state.clear_scores()
            if policy == "recalibrate":
                for x, y in calibration:
                    found = self._scoring_pass(len(x))
                    found.prepare("calibrate")
                    found.load(x, y)
                    found.run("calibrate", tables, score=False)
                    state.count_batch()
                    calibrated += len(x)
                if calibrated == 0:
                    raise ValueError("calibration: no batches; recalibrate needs at least one")
                state.average()
            elif by_choice:
                state.keep(moments)
            kind = "calibrate" if policy == "batch" else "infer"
            for x, y in batches:
                found = self._scoring_pass(len(x))
                found.prepare(kind)
                found.load(x, y)
                found.run(kind, tables, score=True)
                images += len(x)
            leaves = plan.num_leaves
            wrong = state.wrong[:leaves].cpu().numpy().astype(float)
            return wrong, state.losses[:leaves].cpu().numpy(), images, calibrated


class StaticTrainer:
    """Updates of one optimiser over static buffers.

    Args:
        static: of the supernet.
        supernet: itself.
        optimizer: of its parameters.
        clip_norm, label_smoothing: as for `trainer.PathTrainer`.
        ema: the moving averages that move, by name; None for the batch norms' own.

    Raises:
        UnsupportedError: a parameter belongs to no level, or has a hook.
    """

    def __init__(
        self,
        static: StaticSupernet,
        supernet: ChainSupernet,
        optimizer: PathSGD,
        clip_norm: float | None,
        label_smoothing: float,
        ema: Mapping[str, Tensor] | None,
    ) -> None:
        self.static, self._dropout = static, supernet.head.dropout
        self.clip_norm, self.label_smoothing = clip_norm, label_smoothing
        self.update_of = StaticUpdate(
            static.state, supernet, optimizer, clip_norm=clip_norm, ema=ema
        )
        self._passes = _Passes(static.state)
        self._tables: tuple[Plan, NodeTables] | None = None

    def serves(
        self,
        static: StaticSupernet,
        clip_norm: float | None,
        label_smoothing: float,
        ema: Mapping[str, Tensor] | None,
    ) -> bool:
        """Whether nothing that was captured has moved or changed."""
        return (
            static is self.static
            and (clip_norm, label_smoothing) == (self.clip_norm, self.label_smoothing)
            and self.update_of.moves(ema)
            and not self.update_of.has_hooks()
        )

    def update(
        self,
        plan: Plan,
        images: Tensor,
        labels: Tensor,
        *,
        key: tuple[int, int],
        scale: float,
        moving: bool,
    ) -> tuple[float, bool]:
        """Make one update, unless its loss or its gradient is not finite.

        Args:
            plan: of the candidates.
            images: `[N, C, H, W]`.
            labels: `[N]` int64.
            key: (seed, step) of the head's random masks.
            scale: factor of every candidate's loss.
            moving: whether any parameter of the trunk needs a gradient.

        Returns:
            The loss summed over the plan's rows, nats, and whether the supernet moved.

        Raises:
            CaptureError: a step cannot be captured.
            DataError: a batch norm would meet one value a channel.
        """
        with _settled(self.static.state.device):
            dropout = self._dropout.p if self._dropout.training else 0.0
            found = self._training_pass(len(images), dropout)
            found.prepare()
            if self._tables is None or self._tables[0] is not plan:
                self._tables = plan, self.static.state.tables(plan)
            self.update_of.begin(plan, scale)
            found.load(images, labels)
            found.train(self._tables[1], key=key, moving=moving)
            return self.update_of.end()

    def _training_pass(self, images: int, dropout: float) -> TrainingPass:
        state = self.static.state

        def make() -> TrainingPass:
            return TrainingPass(
                state,
                self.update_of,
                images,
                saved=_saved_of(state, images),
                label_smoothing=self.label_smoothing,
                dropout=dropout,
            )

        return self._passes.of((images, dropout), make)


@contextmanager
def _settled(device: torch.device):
    """Leave the caller's modes outside: a step holds for all callers, and its types are fixed.

    Autocast would hand a capture its own copies of weights, which end with it.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _saved_of(state: StaticState, images: int) -> list[int]:
    """Floats that a node of each level keeps for its backward pass."""
    one = torch.empty(1, dtype=state.dtype, device=state.device)
    node = torch.empty(1, dtype=torch.int32, device=state.device)
    return [
        saved_floats(level.layer, one.expand(1, images, *level.in_size), node, level.parameters)
        for level in state.levels
    ]


def _fingerprint(supernet: nn.Module, parts: Sequence[nn.Module]) -> list:
    """Who follows whom, where parameters lie, and what else is fixed in a captured step.

    It is taken before every update, for which describing the levels would take too long.
    """
    found: list = [fp32_precision()]
    for module in (supernet, *parts):
        facts = module.__dict__
        found += map(id, facts["_modules"].values())
        for parameter in facts["_parameters"].values():
            if parameter is not None:
                found += (id(parameter), parameter.data_ptr(), parameter.stride())
        if type(module) is ConvUnit:
            found += [facts[name] for name in _OF_CONVOLUTIONS]
        elif type(module) is nn.BatchNorm2d:
            found += [facts[name] for name in _OF_NORMS]
        elif type(module) is OpModule:
            found.append(module.frame)
        found.append(is_changed(module))
    return found


_OF_CONVOLUTIONS = ("kernel_size", "stride", "padding", "dilation", "groups", "activation")
_OF_CONVOLUTIONS += ("padding_mode",)
_OF_NORMS = ("eps", "momentum", "track_running_stats")
_TRAINERS: WeakKeyDictionary[nn.Module, WeakKeyDictionary[object, int]] = WeakKeyDictionary()
_STATICS: WeakKeyDictionary[nn.Module, StaticSupernet] = WeakKeyDictionary()
