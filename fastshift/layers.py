"""Population layers: the modules of a description, and how a level of the trie applies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastshift.errors import SpaceError
from fastshift.ops import Head, Op, Unit

__all__ = ["ConvUnit", "HeadModule", "OpModule", "UnitChain", "apply_level", "apply_module"]


class ConvUnit(nn.Conv2d):
    """A convolution without bias, then batch norm, then the activation of one `Unit`."""

    def __init__(self, unit: Unit, affine: bool = True) -> None:
        super().__init__(
            unit.in_channels,
            unit.out_channels,
            unit.kernel,
            stride=unit.stride,
            padding=unit.kernel // 2,
            groups=unit.in_channels if unit.kind == "depthwise" else 1,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(unit.out_channels, affine=affine) if unit.norm else None
        self.activation = unit.activation

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, C', H', W']`."""
        y = super().forward(x)
        if self.norm is not None:
            y = self.norm(y)
        return functional.relu_(y) if self.activation == "relu" else y


class UnitChain(nn.Module):
    """Units applied one after the other; its children are named by their position."""

    def __init__(self, units: Sequence[Unit], affine: bool = True) -> None:
        super().__init__()
        for index, unit in enumerate(units):
            self.add_module(str(index), ConvUnit(unit, affine))
        self.num_units = len(units)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the units in order to `[N, C, H, W]`."""
        for index in range(self.num_units):
            x = self._modules[str(index)](x)
        return x


class OpModule(UnitChain):
    """One candidate op: its units inside their frame (plain, residual or shuffle)."""

    def __init__(self, op: Op, affine: bool = True) -> None:
        super().__init__(op.units, affine)
        self.frame = op.frame.kind
        self.shortcut = UnitChain(op.frame.shortcut, affine) if op.frame.shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Map the block's input `[N, C, H, W]` to its output."""
        if self.frame == "shuffle":
            if self.shortcut is None:
                return torch.cat((x[:, ::2], super().forward(x[:, 1::2])), dim=1)
            return torch.cat((self.shortcut(x), super().forward(x)), dim=1)
        y = super().forward(x)
        if self.frame == "residual":
            y = y + (x if self.shortcut is None else self.shortcut(x))
        return y


class HeadModule(nn.Module):
    """The classifier: units, global average pool, dropout, linear layer."""

    def __init__(self, head: Head, affine: bool = True) -> None:
        super().__init__()
        self.features = UnitChain(head.units, affine)
        self.dropout = nn.Dropout(head.dropout)
        width = head.units[-1].out_channels if head.units else head.in_channels
        self.classifier = nn.Linear(width, head.num_classes, bias=head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last block's output `[N, C, H, W]` to logits `[N, num_classes]`."""
        return self.classifier(self.dropout(self.features(x).mean(dim=(2, 3))))


Call = Callable[[int, nn.Module, Tensor], Tensor]


def apply_module(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a module to a row that others may read too, refusing one that writes into it.

    Args:
        module: named in the error.
        x: the row, `[N, C, H, W]`.
        call: applies the module to the row.

    Raises:
        SpaceError: the module changed its input in place.
    """
    # An inference tensor counts no versions; torch itself refuses to change one outside that mode.
    version = None if x.is_inference() else x._version
    refused = SpaceError(
        f"{type(module).__name__} changes its input in place; "
        "a shared input must stay as it is (inplace=False in its first activation)"
    )
    try:
        y = call(x)
    except RuntimeError as error:
        # Autograd's own refusals, of a leaf of its graph and of one of several rows in one tensor.
        if "in-place operation" in str(error) or "modified inplace" in str(error):
            raise refused from error
        raise
    if version is not None and x._version != version:
        raise refused
    return y


def apply_level(
    ops: nn.ModuleList,
    identities: Sequence[bool],
    rows: Sequence[Tensor],
    parent: Sequence[int],
    choice: Sequence[int],
    call: Call,
) -> list[Tensor]:
    """Compute the nodes of one level of the trie, each from its parent's row, by its module.

    Any module will do; `fastshift.operators` computes a whole level of described ops in one call.
    An identity choice is its parent's row itself, not a copy.

    Args:
        ops: the block's candidate ops.
        identities: which choices are identities.
        rows: the rows of the level above, each `[N, C, H, W]`.
        parent: index into `rows` of each node.
        choice: candidate op of each node.
        call: `(node, module, row) -> row`, which decides on statistics.

    Returns:
        One row per node, `[N, C', H', W']` each.
    """
    out = []
    for node, (source, op) in enumerate(zip(parent, choice, strict=True)):
        x = rows[source]
        if identities[op]:
            out.append(x)
            continue
        module = ops[op]
        out.append(apply_module(module, x, lambda row, n=node, m=module: call(n, m, row)))
    return out
