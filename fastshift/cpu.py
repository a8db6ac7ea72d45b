"""Candidate ops by the compiled CPU kernels: one call a block, forward, backward and folded.

Rows are channels last and float32, or bfloat16 under autocast; weights and moments are float32,
and so is every sum. The arithmetic is `csrc/cpu/`; this module holds the memory and what autograd
needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastshift._native import cpu as _cpu
from fastshift.backends import backend
from fastshift.errors import ConfigError
from fastshift.layers import ConvUnit, HeadModule, OpModule, UnitChain
from fastshift.made_of import MadeOf, norm_of, weight_of

__all__ = [
    "CpuBlock",
    "CpuHead",
    "block_of",
    "instruction_set",
    "instruction_sets",
    "release_memory",
    "row_dtype",
]

Moments = tuple[Tensor, Tensor]


@cache
def instruction_sets() -> dict[str, str | None]:
    """Every instruction set, best first, and why it cannot run here; None for one that can."""
    return {name: reason or None for name, reason in _cpu.instruction_sets().items()}


def instruction_set() -> str:
    """The instruction set that runs: `FASTSHIFT_CPU_ISA`, or the best this machine has.

    Raises:
        ConfigError: the one asked for is unknown or cannot run here.
    """
    return _instruction_set(os.environ.get("FASTSHIFT_CPU_ISA", ""))


@cache
def _instruction_set(wanted: str) -> str:
    known = instruction_sets()
    able = [name for name, reason in known.items() if reason is None]
    if not wanted or wanted in able:
        return wanted or able[0]
    why = f" cannot run: {known[wanted]}" if wanted in known else ""
    raise ConfigError(
        f"FASTSHIFT_CPU_ISA: {wanted!r}{why}; expected one of {', '.join(able)}, which run here"
    )


_BLOCKS: WeakKeyDictionary[nn.Module, CpuBlock | CpuHead] = WeakKeyDictionary()


def block_of(op: nn.Module, x: Tensor) -> CpuBlock | CpuHead | None:
    """The compiled form of a module for rows such as `x`, or None where PyTorch's ops run it."""
    if (
        type(op) not in (OpModule, HeadModule, UnitChain)
        or x.device.type != "cpu"
        or row_dtype(x) is None
        or backend() != "cpu"
    ):
        return None
    found = _BLOCKS.get(op)
    if found is None or not found.made_of.is_still(op):
        made_of = MadeOf(op)
        if not made_of.is_built_in(op):
            return None
        try:
            found = (CpuHead if isinstance(op, HeadModule) else CpuBlock)(op, made_of)
        except ValueError as error:
            if not str(error).startswith("units: "):
                raise
            return None  # they do not follow each other: PyTorch says which
        _BLOCKS[op] = found
    return found if found.made_of.runs_as_written(op) else None


def row_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which the kernels would keep such rows: bfloat16 under autocast, or float32.

    None where they have no such type.
    """
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype if x.dtype is torch.float32 else None
    wanted = torch.get_autocast_dtype("cpu")
    known = x.dtype in (torch.float32, torch.bfloat16)
    return wanted if wanted is torch.bfloat16 and known else None


def _rows(x: Tensor) -> Tensor:
    """`x` in the kernels' type with its channels innermost in memory, itself where it is so."""
    return x.to(row_dtype(x) or x.dtype).contiguous(memory_format=torch.channels_last)


def release_memory() -> None:
    """Hand the memory that the kernels keep between calls back to the system."""
    _cpu.release_memory()


def _memory(floats: int) -> Tensor:
    """Uninitialised `[floats]`, of pages that were used before where there are any."""
    return torch.from_numpy(_cpu.buffer(floats))


def _empty(
    images: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    size = images * height * width * channels
    if dtype is torch.bfloat16:
        memory = _memory((size + 1) // 2).view(torch.bfloat16)[:size]
    else:
        memory = _memory(size)
    return memory.view(images, height, width, channels).permute(0, 3, 1, 2)


class CpuBlock:
    """The compiled form of one candidate op."""

    def __init__(self, op: UnitChain, made_of: MadeOf | None = None) -> None:
        self.made_of = made_of or MadeOf(op)
        frame = op.frame if isinstance(op, OpModule) else "plain"
        shortcut = op.shortcut if isinstance(op, OpModule) else None
        units: list[ConvUnit] = [op._modules[str(i)] for i in range(op.num_units)]
        main = len(units)
        if shortcut is not None:
            units += [shortcut._modules[str(i)] for i in range(shortcut.num_units)]
        self.units = units
        self.main = main
        self.frame = frame
        splits = frame == "shuffle" and shortcut is None
        self.in_channels = units[0].in_channels * (2 if splits else 1)
        self.out_channels = units[main - 1].out_channels
        if frame == "shuffle":
            aside = units[0].in_channels if splits else units[-1].out_channels
            self.out_channels += aside
        self.core = _cpu.Block(
            [
                (
                    unit.groups > 1,
                    unit.in_channels,
                    unit.out_channels,
                    unit.kernel_size[0],
                    unit.stride[0],
                    unit.activation == "relu",
                )
                for unit in units
            ],
            main,
            frame,
            self.in_channels,
            self.out_channels,
        )

    @property
    def eps(self) -> list[float]:
        """Of each unit's batch norm."""
        return [norm_of(unit).eps for unit in self.units]

    def parameters(self) -> list[Tensor | None]:
        """Weight, scale and shift of each unit."""
        found = []
        for unit in self.units:
            own = norm_of(unit)._parameters
            found += (weight_of(unit), own["weight"], own["bias"])
        return found

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width that leave each unit."""
        found = []
        h, w = height, width
        for index, unit in enumerate(self.units):
            if index == self.main:
                h, w = height, width
            step = unit.stride[0]
            h, w = (h - 1) // step + 1, (w - 1) // step + 1
            found.append((h, w))
        return found

    def _check(self, x: Tensor) -> None:
        """Refuse rows that the kernels would read past the end of, or as numbers they are not."""
        if x.device.type != "cpu" or row_dtype(x) is None:
            place = f"{x.dtype} on {x.device}"
            raise ValueError(f"x: {place}; expected float32 on cpu, or bfloat16 under autocast")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: {tuple(x.shape)}; expected [N, {self.in_channels}, H, W]")

    def _fixed(self, moments: Sequence[Moments]) -> list[Tensor]:
        """Means and variances as the kernels read them."""
        if len(moments) != len(self.units):
            raise ValueError(f"moments: {len(moments)} pairs; expected {len(self.units)}")
        found = [moment for pair in moments for moment in pair]
        for index, moment in enumerate(found):
            width = (self.units[index // 2].out_channels,)
            if moment.shape != width or moment.device.type != "cpu":
                place = f"{tuple(moment.shape)} on {moment.device}"
                raise ValueError(f"moments: {place}; expected {width} on cpu")
        return [moment.float().contiguous() for moment in found]

    def train(self, x: Tensor) -> tuple[Tensor, list[Moments]]:
        """Apply the op with each batch norm normalising by this batch's own moments.

        Args:
            x: `[N, C, H, W]` float32, or bfloat16 under autocast.

        Returns:
            `[N, C', H', W']` in the kernels' type, and mean and unbiased variance, `[C]` each, of
            every batch norm.
        """
        self._check(x)
        rows, parameters = _rows(x), self.parameters()
        keep = torch.is_grad_enabled() and any(
            p is not None and p.requires_grad for p in (rows, *parameters)
        )
        y, statistics = _Train.apply(self, keep, rows, *parameters)
        widths = [5 * unit.out_channels for unit in self.units]
        return y, [tuple(s.view(5, -1)[:2]) for s in statistics.split(widths)]

    def infer(self, x: Tensor, moments: Sequence[Moments], pooled: bool = False) -> Tensor:
        """Apply the op with batch norms that normalise by given statistics.

        Args:
            x: `[N, C, H, W]` float32, or bfloat16 under autocast.
            moments: mean and variance, `[C]` each, of every batch norm.
            pooled: give the means over the positions, `[N, C']`.

        Returns:
            `[N, C', H', W']`, or `[N, C']` where pooled.
        """
        self._check(x)
        x = _rows(x)
        n, _, height, width = x.shape
        if pooled:
            y = torch.empty(n, self.out_channels, dtype=torch.float32, device="cpu")
        else:
            y = _empty(n, self.out_channels, *self.sizes(height, width)[self.main - 1], x.dtype)
        parameters = [_plain(p) for p in self.parameters()]
        fixed = self._fixed(moments)
        self.core.infer(
            instruction_set(),
            (n, height, width),
            x.data_ptr(),
            _pointers(parameters),
            self.eps,
            _pointers(fixed),
            y.data_ptr(),
            pooled,
            torch.get_num_threads(),
            x.dtype is torch.bfloat16,
        )
        return y


class CpuHead:
    """The compiled form of a classifier: its units fused, its linear layer PyTorch's."""

    def __init__(self, head: HeadModule, made_of: MadeOf) -> None:
        self.made_of = made_of
        self._head = ref(head)  # its classifier may be replaced
        self.block = CpuBlock(head.features, made_of)

    def _logits(self, features: Tensor) -> Tensor:
        head = self._head()
        return head.classifier(head.dropout(features))

    def train(self, x: Tensor) -> tuple[Tensor, list[Moments]]:
        """Logits `[N, num_classes]` and moments, as `CpuBlock.train`."""
        y, moments = self.block.train(x)
        return self._logits(y.mean(dim=(2, 3))), moments

    def infer(self, x: Tensor, moments: Sequence[Moments]) -> Tensor:
        """Logits `[N, num_classes]`, as `CpuBlock.infer`."""
        pooled = self.block.units[-1].groups == 1
        y = self.block.infer(x, moments, pooled)
        return self._logits(y if pooled else y.mean(dim=(2, 3)))


def _plain(parameter: Tensor | None) -> Tensor | None:
    """A parameter in its plain order: a dense kernel in channels-last memory is copied."""
    return None if parameter is None else parameter.contiguous()


def _pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block: CpuBlock, keep: bool, x: Tensor, *parameters: Tensor | None):
        parameters = tuple(_plain(p) for p in parameters)
        n, _, height, width = x.shape
        images = (n, height, width)
        bf16 = x.dtype is torch.bfloat16
        saved = _memory(block.core.saved_floats(images, bf16) if keep else 0)
        floats = block.core.statistics_floats()
        statistics = torch.empty(floats, dtype=torch.float32, device="cpu")
        y = _empty(n, block.out_channels, *block.sizes(height, width)[block.main - 1], x.dtype)
        block.core.forward(
            instruction_set(),
            images,
            x.data_ptr(),
            _pointers(parameters),
            block.eps,
            saved.data_ptr() if keep else 0,
            statistics.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
            bf16,
        )
        ctx.block = block
        ctx.save_for_backward(x, saved, statistics, *parameters)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, *_):
        block = ctx.block
        x, saved, statistics, *parameters = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        n, _, height, width = x.shape
        dx = _empty(*x.shape, x.dtype) if ctx.needs_input_grad[2] else None
        gradients = [None if p is None else torch.empty_like(p) for p in parameters]
        block.core.backward(
            instruction_set(),
            (n, height, width),
            x.data_ptr(),
            _pointers(parameters),
            block.eps,
            saved.data_ptr(),
            statistics.data_ptr(),
            dy.data_ptr(),
            0 if dx is None else dx.data_ptr(),
            _pointers(gradients),
            torch.get_num_threads(),
            x.dtype is torch.bfloat16,
        )
        return None, None, dx, *gradients
