"""Search spaces: choice blocks of candidate ops between a stem and a head.

An architecture is a row of `uint8` choices `[L]`, a population `[P, L]`. Costs are sums over choice
blocks of a table `[L, O]` plus a fixed part (stem and head). `flops` counts the multiply-adds of
convolutions and the linear layer for one image; batch norm, activations, additions and pooling
count nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

import numpy as np

from fastshift.constraints import Constraint, parse_constraints
from fastshift.costs import CostTables
from fastshift.errors import SpaceError
from fastshift.ops import (
    Frame,
    Head,
    Op,
    Unit,
    chain_flops,
    chain_output_size,
    chain_params,
    check_positive,
    check_units,
    trace_channels,
)

__all__ = ["Constraint", "ModuleSpace", "SearchSpace", "parse_constraints"]


class SearchSpace(CostTables):
    """A chain of choice blocks between a stem and a head, described by units.

    Args:
        name: what reports call it.
        stem: units before the first choice block.
        blocks: the candidate ops of each choice block, `[L][O]`.
        head: what follows the last choice block.
        in_channels: channels of an image.
        image_size: height and width of an image.
        affine: whether batch norms have a trainable scale and shift.
        recipe: `{"name": ..., "kwargs": {...}}`, from which `spaces.build` makes the space again.

    Raises:
        SpaceError: channels, strides or counts do not fit together.

    Example:
        >>> from fastshift import ops
        >>> blocks = [[ops.identity(8), ops.conv(8, 8, 3, 1)]] * 3
        >>> stem, head = [ops.Unit("dense", 3, 8, 3)], ops.Head(8, (), 10)
        >>> space = SearchSpace(
        ...     "tiny", stem=stem, blocks=blocks, head=head, in_channels=3, image_size=8
        ... )
        >>> space.size, space.format(space.parse("010")), space.flops(["010"]).tolist()
        (8, '010', [50768])
    """

    def __init__(
        self,
        name: str,
        *,
        stem: Sequence[Unit],
        blocks: Sequence[Sequence[Op]],
        head: Head,
        in_channels: int,
        image_size: int,
        affine: bool = True,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        check_positive(f"space {name!r}", in_channels=in_channels, image_size=image_size)
        self.stem = check_units(f"space {name!r}: stem", stem)
        self.blocks = tuple(tuple(block) for block in blocks)
        self.head = head
        self.affine = affine
        self.recipe = recipe
        if not isinstance(head, Head):
            raise SpaceError(f"space {name!r}: head must be a Head, got {head!r}")
        channels, _ = trace_channels(self.stem, in_channels, f"space {name!r}: stem")
        size = chain_output_size(self.stem, image_size)
        fixed_flops = chain_flops(self.stem, image_size)
        flops: list[list[int]] = []
        for index, block in enumerate(self.blocks):
            owner = f"space {name!r}: choice block {index}"
            if not block:
                raise SpaceError(f"{owner} has no candidate op")
            for choice, op in enumerate(block):
                if not isinstance(op, Op):
                    raise SpaceError(f"{owner}: choice {choice} must be an Op, got {op!r}")
                shape = (channels, block[0].out_channels, block[0].stride)
                found = (op.in_channels, op.out_channels, op.stride)
                if found != shape:
                    raise SpaceError(
                        f"{owner}: choice {choice} ({op.name}) has (in_channels, out_channels, "
                        f"stride) {found}, expected {shape}"
                    )
            flops.append([op.flops(size) for op in block])
            channels, size = block[0].out_channels, block[0].output_size(size)
        if head.in_channels != channels:
            raise SpaceError(
                f"space {name!r}: head takes {head.in_channels} channels, {channels} reach it"
            )
        self._set_tables(
            name,
            in_channels=in_channels,
            image_size=image_size,
            num_classes=head.num_classes,
            labels=[[op.name for op in block] for block in self.blocks],
            identities=[[op.is_identity for op in block] for block in self.blocks],
            flops=(flops, fixed_flops + head.flops(size)),
            params=(
                [[op.params(affine) for op in block] for block in self.blocks],
                chain_params(self.stem, affine) + head.params(affine),
            ),
        )

    def _set_tables(
        self,
        name: str,
        *,
        in_channels: int | None,
        image_size: int | None,
        num_classes: int | None,
        labels: Sequence[Sequence[str]],
        identities: Sequence[Sequence[bool]],
        flops: tuple[Any, int],
        params: tuple[Any, int],
    ) -> None:
        self.in_channels = in_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.labels = tuple(tuple(block) for block in labels)
        super().__init__(name, [len(block) for block in self.labels], flops=flops, params=params)
        self.identities = self._padded("identities", identities).astype(np.bool_)
        self.identities.flags.writeable = False

    @property
    def pixel_blocks(self) -> list[int]:
        """The choice blocks that take maps of one pixel, by number; none of a space of modules.

        Of a kernel only one weight falls into such a map, whatever its size, so choices that differ
        in that size alone are the same there.
        """
        found, size = [], self.image_size
        if self.blocks:
            size = chain_output_size(self.stem, size)
        for index, block in enumerate(self.blocks):
            if size == 1:
                found.append(index)
            size = block[0].output_size(size)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the description as JSON-able values, which `from_dict` reads."""
        description = {
            "format": 1,
            "name": self.name,
            "in_channels": self.in_channels,
            "image_size": self.image_size,
            "affine": self.affine,
            "stem": [asdict(unit) for unit in self.stem],
            "blocks": [[asdict(op) for op in block] for block in self.blocks],
            "head": asdict(self.head),
            "recipe": self.recipe,
        }
        return json.loads(json.dumps(description, default=int))

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> SearchSpace:
        """Make a space from what `to_dict` returned.

        Raises:
            SpaceError: the description is of another format, or incomplete.
        """
        if description.get("format") != 1:
            raise SpaceError(f"space format must be 1, got {description.get('format')!r}")
        try:
            return SearchSpace(
                description["name"],
                stem=[Unit(**unit) for unit in description["stem"]],
                blocks=[[_op_from_dict(op) for op in block] for block in description["blocks"]],
                head=Head(
                    **{
                        **description["head"],
                        "units": tuple(Unit(**unit) for unit in description["head"]["units"]),
                    }
                ),
                in_channels=description["in_channels"],
                image_size=description["image_size"],
                affine=description["affine"],
                recipe=description["recipe"],
            )
        except (KeyError, TypeError) as error:
            raise SpaceError(f"space description cannot be read: {error!r}") from error

    def fingerprint(self) -> str:
        """Return the SHA-256 of the description without the recipe."""
        return _digest({key: value for key, value in self.to_dict().items() if key != "recipe"})

    def trunk_fingerprint(self) -> str:
        """Return the SHA-256 of what a transfer keeps: not name, classes, dropout, image size."""
        description = self.to_dict()
        description["head"] = {key: description["head"][key] for key in ("in_channels", "units")}
        return _digest(
            {k: v for k, v in description.items() if k not in ("name", "image_size", "recipe")}
        )

    def describe(self) -> dict[str, Any]:
        """Return size, choices and cost range, JSON-able, as `fastshift spaces` lists them."""
        return {
            "name": self.name,
            "num_blocks": self.num_blocks,
            "num_choices": self.num_choices.tolist(),
            "size": self.size,
            "in_channels": self.in_channels,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "choices": [list(block) for block in self.labels],
            "costs": {
                metric: {"smallest": self.smallest(metric), "largest": self.largest(metric)}
                for metric in self.costs
            },
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, num_blocks={self.num_blocks}, size={self.size}, "
            f"in_channels={self.in_channels}, image_size={self.image_size}, "
            f"num_classes={self.num_classes})"
        )


class ModuleSpace(SearchSpace):
    """A space whose candidate ops are arbitrary modules: no description, its tables are given.

    Args:
        name: what reports call it.
        num_choices: candidate ops of each choice block, `[L]`.
        flops_table: multiply-adds of each choice, `[L, O]` or `[L][O_l]`.
        params_table: parameters of each choice, likewise.
        fixed_flops: multiply-adds of stem and head.
        fixed_params: parameters of stem and head.
        identities: which choices return their input, likewise.
        in_channels: channels of an image.
        image_size: height and width of an image.
        num_classes: outputs of the head.
        labels: names of the choices, `[L][O_l]`; their numbers by default.

    Raises:
        SpaceError: the tables do not fit together.
    """

    def __init__(
        self,
        name: str,
        *,
        num_choices: Sequence[int],
        flops_table: Any,
        params_table: Any,
        fixed_flops: int,
        fixed_params: int,
        identities: Any,
        in_channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        labels: Sequence[Sequence[str]] | None = None,
    ) -> None:
        for block, count in enumerate(num_choices):
            if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
                raise SpaceError(f"num_choices of block {block} must be positive, got {count!r}")
        if labels is None:
            labels = [[str(choice) for choice in range(count)] for count in num_choices]
        if [len(block) for block in labels] != list(num_choices):
            raise SpaceError(f"labels must name {list(num_choices)} choices, got {labels!r}")
        self.stem, self.blocks, self.head, self.affine, self.recipe = (), (), None, True, None
        self._set_tables(
            name,
            in_channels=in_channels,
            image_size=image_size,
            num_classes=num_classes,
            labels=labels,
            identities=identities,
            flops=(flops_table, fixed_flops),
            params=(params_table, fixed_params),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as JSON-able values."""
        return {
            "format": 1,
            "name": self.name,
            "in_channels": self.in_channels,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "labels": [list(block) for block in self.labels],
            "identities": self.identities.tolist(),
            "flops": [self.flops_table.tolist(), self.fixed_flops],
            "params": [self.params_table.tolist(), self.fixed_params],
            "recipe": None,
        }

    def trunk_fingerprint(self) -> str:
        """Return the SHA-256 of what can be compared without a description: the blocks' choices."""
        return _digest({"labels": self.labels, "params": self.params_table.tolist()})


def _op_from_dict(fields: Mapping[str, Any]) -> Op:
    frame = fields["frame"]
    return Op(
        **{
            **fields,
            "units": tuple(Unit(**unit) for unit in fields["units"]),
            "frame": Frame(frame["kind"], tuple(Unit(**unit) for unit in frame["shortcut"])),
        }
    )


def _digest(description: Any) -> str:
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
