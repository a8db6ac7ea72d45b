"""Every kernel launch that the static checks look at: named shapes in, recorded launches out.

A file lists launches by a function `catalogue(network, dtype)` that yields `Case`s, and its name
stands in `LISTED`. A case calls a kernel file's own launcher, so what is checked is what runs:
`record` lets it allocate on the device "meta", where nothing is stored, and notes each launch
with the signature, the constants and the alignments that Triton would compile it for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastshift.kernels.cards import Card
from fastshift.kernels.described import Layer

__all__ = [
    "LISTED",
    "Case",
    "Inputs",
    "Launch",
    "Level",
    "Network",
    "Recording",
    "cases",
    "record",
    "recorded",
]

# Files beside this one that have a `catalogue`, in the order of the table.
LISTED: tuple[str, ...] = ("small_cases", "layer_cases")

# Constants that choose what a kernel does; others are sizes.
FLAGS = ("LANES", "DEPTHWISE", "MOVES", "SPLITS", "CONTINUES", "ENTERS", "VARIANTS", "ADDS")
FLAGS += ("STARTS", "PASSES", "SMOOTHED")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Types and alignments do not depend on the architecture.
_BACKEND = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Level:
    """One level of a trie at a named place of a supernet.

    Attributes:
        name: such as `block 5`.
        rows: of the level above, `[R, N, H, W, C]`.
        parent, choice: of each node.
        layer: what its choices compute; `shapes` are those of their parameters.
    """

    name: str
    rows: tuple[int, int, int, int, int]
    parent: tuple[int, ...]
    choice: tuple[int, ...]
    layer: Layer


@dataclass(frozen=True)
class Network:
    """A supernet's shapes, with a population's, as far as kernels meet them.

    Attributes:
        name: such as `shufflenet_v2 224`.
        num_images: in a batch.
        image_size: side of an image, in pixels.
        in_channels: of an image.
        num_classes: outputs.
        num_candidates: distinct candidates of a step.
        parameters: shape of each parameter, and its pair of (block, choice): -1 of stem and head.
        levels: one of each distinct shape.
    """

    name: str
    num_images: int
    image_size: int
    in_channels: int
    num_classes: int
    num_candidates: int
    parameters: tuple[tuple[tuple[int, ...], int], ...]
    levels: tuple[Level, ...] = ()


class Inputs:
    """Makes a case's tensors: shapes alone on "meta", seeded values elsewhere.

    Args:
        device: `meta`, `cpu` (under Triton's interpreter) or `cuda`.
        seed: of the values.
    """

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal values."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Return integers from `low`, below `high`."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, generator=self._generator).to(self.device, dtype)

    def given(self, values: Any, dtype: torch.dtype) -> Tensor:
        """Return these values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as Triton would compile it.

    Attributes:
        kernel: the jitted function.
        grid: programs along each axis.
        signature: Triton's type of each argument, `constexpr` where it is a constant.
        constexprs: values of the constants by position, integers that are 1 and None among them.
        attrs: by position, what is known of addresses and integers: multiples of 16.
        options: `num_warps` and what else the launcher sets.
    """

    kernel: JITFunction
    grid: tuple[int, int, int]
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    @property
    def variant(self) -> str:
        """Which of a kernel's bodies are compiled: its name and the flags that choose."""
        named = ((name, self.constexprs.get((i,))) for i, name in enumerate(self.signature))
        flags = (f"{name}={int(value)}" for name, value in named if name in FLAGS)
        return " ".join((self.name, *flags))

    @property
    def key(self) -> str:
        """What two launches share that run the same machine code."""
        parts = (self.signature, self.constexprs, self.attrs, sorted(self.options.items()))
        return f"{self.name} {parts}"


@dataclass(frozen=True)
class Case:
    """A call of a launcher at a named shape, and what it cannot do without.

    Attributes:
        name: of the operator, such as `candidate_loss`.
        site: the named shape.
        dtype: `fp32`, `fp16` or `bf16`.
        prepare: makes the launcher's arguments, tensors on the device it is given.
        launcher: what is checked; it is called with them.
        flops: multiply-adds of the definition.
        read_bytes, written_bytes: of inputs and outputs, each touched once.
        launches: how many kernels may start, PyTorch's own included.
        made_bytes: of the tensors that the algorithm cannot do without: results, and rows that it
            reads more than once (`layer_cases` has the rule).
        least_made_bytes: of what would be left of them if all but results were computed again;
            None where that is all of them.
        scratch: bytes of a workspace that does not grow with the population, by the name of the
            type, `tf32` among them, and by the card.
        load_width, store_width: bytes of the widest accesses that the shape admits, at most 16.
        narrow: kernels whose accesses may be narrower, since they touch next to nothing.
        no_rows: kernels whose stores may be: they write no rows, but sums of these.
        dot: whether it is a matrix product, so that tensor cores are expected.
        by_card: whether a card's figures choose its launches: its launcher then takes a `card`.
    """

    name: str
    site: str
    dtype: str
    prepare: Callable[[str], tuple]
    launcher: Callable[..., Any]
    flops: int
    read_bytes: int
    written_bytes: int
    launches: int
    made_bytes: int
    least_made_bytes: int | None = None
    load_width: int = 16
    store_width: int = 16
    narrow: tuple[str, ...] = ()
    no_rows: tuple[str, ...] = ()
    dot: bool = False
    scratch: Callable[[str, Card | None], int] = lambda dtype, card: 0
    by_card: bool = False

    @property
    def title(self) -> str:
        """What names it in a record."""
        return f"{self.name} | {self.site} | {self.dtype}"


@dataclass
class Recording:
    """What a call started and made.

    Attributes:
        launches: of Triton kernels, in order.
        torch_launches: names of PyTorch's operators that start kernels of their own.
        allocated_bytes: of the tensors made, outputs included.
    """

    launches: list[Launch] = field(default_factory=list)
    torch_launches: list[str] = field(default_factory=list)
    allocated_bytes: int = 0


class _Allocations(TorchDispatchMode):
    def __init__(self, found: Recording) -> None:
        super().__init__()
        self._found = found
        self._seen: list[Tensor] = []  # kept, or a freed storage's number would come back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(t) for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        mutates = func._schema.is_mutable
        fresh = False
        for tensor in _tensors(out):
            if _storage(tensor) not in given:
                fresh = True
                self._found.allocated_bytes += tensor.untyped_storage().nbytes()
                self._seen.append(tensor)
        if mutates or (fresh and "empty" not in func._schema.name):
            self._found.torch_launches.append(func._schema.name)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


@contextmanager
def record() -> Iterator[Recording]:
    """Note the kernels that start inside, without starting Triton's, and the tensors made.

    PyTorch's operators do run: call it with tensors on "meta". Under Triton's interpreter launches
    are noted too, but cannot be compiled.
    """
    found = Recording()

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.launches.append(_launch(kernel, grid, args, kwargs))

    def note_interpreted(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
        note(_jitted(kernel), *args, **kwargs)

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(InterpretedFunction, "run", note_interpreted),
        _Allocations(found),
    ):
        yield found


@cache
def _jitted(kernel: InterpretedFunction) -> JITFunction:
    return JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])


def _launch(kernel: JITFunction, grid: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """Describe a launch by Triton's own rules, by which it specialises a kernel to arguments."""
    backend = make_backend(_BACKEND)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    _, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    if callable(grid):
        grid = grid(bound)
    sizes = (*(int(n) for n in grid), 1, 1)[:3]
    known = {path: found for path, found in attrs.items() if found}
    given = {name: value for name, value in options.items() if value is not None}
    return Launch(kernel, sizes, signature, constexprs, known, given)


def cases(network: Network, dtype: str) -> Iterator[Case]:
    """Yield every listed case at a network's shapes.

    Args:
        network: where the shapes come from.
        dtype: one of `DTYPES`.
    """
    for name in LISTED:
        yield from importlib.import_module(name).catalogue(network, dtype)


def recorded(case: Case, card: Card | None = None) -> Recording:
    """Record what a case starts and makes on a card, its preparation aside.

    Args:
        case: of the list.
        card: whose figures choose the launches, where they do; those of `cards.card_of` without.
    """
    with record():
        arguments = case.prepare("meta")
    chosen = {"card": card} if case.by_card else {}
    with record() as found:
        case.launcher(*arguments, **chosen)
    return found
