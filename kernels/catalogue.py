"""Every kernel launch that the static checks look at: named shapes in, recorded launches out.

A kernel file lists its launches by a function `catalogue(network, dtype)` that yields `Case`s, and
its name stands in `LISTED`. A case calls the file's own launcher, so what is checked is what runs:
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
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

__all__ = ["LISTED", "Case", "Inputs", "Launch", "Level", "Network", "Recording", "cases", "record"]

# Files of this package that have a `catalogue`, in the order of the table.
LISTED: tuple[str, ...] = ("loss", "sgd", "images")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.bool: "u1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ALIGNMENT = 16  # bytes, and the divisor of integers, that Triton specialises on
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Level:
    """One level of a trie at a named place of a supernet.

    Attributes:
        name: such as `block 5`.
        rows: of the level above, `[R, N, H, W, C]`.
        parent, choice: of each node.
        layer: the text of the population layer, as the operators take it.
    """

    name: str
    rows: tuple[int, int, int, int, int]
    parent: tuple[int, ...]
    choice: tuple[int, ...]
    layer: str


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
        constexprs: values of the constants, integers that are 1 and arguments that are None too.
        aligned: arguments known to be multiples of 16, addresses in bytes.
        options: `num_warps` and what else the launcher sets.
    """

    kernel: JITFunction
    grid: tuple[int, int, int]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    @property
    def key(self) -> tuple:
        """What two launches share that run the same machine code."""
        constants = tuple(sorted((n, str(v)) for n, v in self.constexprs.items()))
        options = tuple(sorted(self.options.items()))
        return self.name, tuple(self.signature.items()), constants, self.aligned, options

    @property
    def attrs(self) -> dict[tuple[int], list[list[Any]]]:
        """The alignments, as `ASTSource` takes them."""
        names = list(self.signature)
        return {(names.index(n),): [["tt.divisibility", _ALIGNMENT]] for n in self.aligned}


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
        load_width, store_width: bytes of the widest accesses that the shape admits, at most 16.
        narrow: kernels whose accesses may be narrower, since they touch next to nothing.
        dot: whether it is a matrix product, so that tensor cores are expected.
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
    load_width: int = 16
    store_width: int = 16
    narrow: tuple[str, ...] = ()
    dot: bool = False


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
        note(_jitted(kernel.fn), *args, **kwargs)

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(InterpretedFunction, "run", note_interpreted),
        _Allocations(found),
    ):
        yield found


@cache
def _jitted(function: Callable) -> JITFunction:
    return JITFunction(function)


def _launch(kernel: JITFunction, grid: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """Describe a launch by the rules by which Triton specialises a kernel to its arguments."""
    options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
    given = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    unknown = set(kwargs) - set(given) - set(_OPTIONS)
    if unknown:
        raise ValueError(f"{kernel.fn.__name__}: unknown arguments {sorted(unknown)}")
    bound = kernel.signature.bind(*args, **given)
    bound.apply_defaults()
    if callable(grid):
        grid = grid(bound.arguments)
    signature, constexprs, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, bound.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constexprs[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if parameter.do_not_specialize:
            continue
        if type(value) is int and value == 1:
            signature[name], constexprs[name] = "constexpr", 1
        elif not parameter.do_not_specialize_on_alignment and _is_aligned(value):
            aligned.append(name)
    sizes = (*(int(n) for n in grid), 1, 1)[:3]
    return Launch(kernel, sizes, signature, constexprs, tuple(aligned), options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _NAMES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"{value!r}: expected a tensor, a number or None")


def _is_aligned(value: Any) -> bool:
    if isinstance(value, Tensor):  # storages themselves are aligned to 256 bytes and more
        return value.storage_offset() * value.element_size() % _ALIGNMENT == 0
    return type(value) is int and value % _ALIGNMENT == 0


def cases(network: Network, dtype: str) -> Iterator[Case]:
    """Yield every listed case at a network's shapes.

    Args:
        network: where the shapes come from.
        dtype: one of `DTYPES`.
    """
    for name in LISTED:
        yield from importlib.import_module(f"fastshift.kernels.{name}").catalogue(network, dtype)
