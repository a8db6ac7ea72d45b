"""Search spaces: choice blocks, architectures as rows of choices, cost tables and constraints.

An architecture is a row of `uint8` choices `[L]`, a population `[P, L]`. Costs are sums over choice
blocks of a table `[L, O]` plus a fixed part (stem and head). `flops` counts the multiply-adds of
convolutions and the linear layer for one image; batch norm, activations, additions and pooling
count nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

from fastshift.errors import ArchError, ConstraintError, SpaceError
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

MAX_CHOICES = 256  # an architecture is a row of uint8


class SearchSpace:
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
        self.name = name
        self.in_channels = in_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.labels = tuple(tuple(block) for block in labels)
        if not self.labels:
            raise SpaceError(f"space {name!r} has no choice blocks")
        self.num_choices = np.array([len(block) for block in self.labels], dtype=np.int32)
        if self.num_choices.max() > MAX_CHOICES:
            block = int(self.num_choices.argmax())
            raise SpaceError(
                f"space {name!r}: choice block {block} has {self.num_choices[block]} choices, "
                f"at most {MAX_CHOICES} are possible"
            )
        self.num_choices.flags.writeable = False
        self._counts: list[int] = self.num_choices.tolist()
        self._is_choice = np.arange(self.num_choices.max()) < self.num_choices[:, None]
        self.costs: dict[str, tuple[np.ndarray, int | float]] = {}
        self._set_cost("flops", *flops)
        self._set_cost("params", *params)
        self.identities = self._padded("identities", identities).astype(np.bool_)
        self.identities.flags.writeable = False

    @property
    def num_blocks(self) -> int:
        """Choice blocks, `L`."""
        return len(self.num_choices)

    @property
    def size(self) -> int:
        """The number of architectures."""
        return math.prod(self._counts)

    @property
    def flops_table(self) -> np.ndarray:
        """Multiply-adds of each choice, `[L, O]` int64; zero past a block's choices."""
        return self.costs["flops"][0]

    @property
    def params_table(self) -> np.ndarray:
        """Parameters of each choice, `[L, O]` int64; zero past a block's choices."""
        return self.costs["params"][0]

    @property
    def fixed_flops(self) -> int:
        """Multiply-adds of stem and head."""
        return self.costs["flops"][1]

    @property
    def fixed_params(self) -> int:
        """Parameters of stem and head."""
        return self.costs["params"][1]

    # Costs

    def _padded(self, name: str, table: Any) -> np.ndarray:
        """Return a table of `[L][O_l]` rows or `[L, O]` as `[L, O]` with zeros past the choices."""
        shape = self._is_choice.shape
        rows = [np.asarray(row) for row in table]
        if any(row.ndim != 1 for row in rows):
            raise SpaceError(f"{name}: expected one row of numbers a choice block, got {table!r}")
        if len(rows) != shape[0]:
            raise SpaceError(
                f"{name}: expected {shape[0]} rows, one a choice block, got {len(rows)}"
            )
        padded = np.zeros(shape, dtype=np.result_type(*rows))
        for index, row in enumerate(rows):
            choices = int(self.num_choices[index])
            if len(row) not in (choices, shape[1]):
                raise SpaceError(
                    f"{name}: row {index} has {len(row)} entries, expected {choices} choices"
                )
            padded[index, :choices] = row[:choices]
        return padded

    def _set_cost(self, name: str, table: Any, fixed: float) -> None:
        padded = self._padded(f"cost {name!r}", table)
        if padded.dtype.kind not in "iuf":
            raise SpaceError(f"cost {name!r}: the table must hold numbers, got {padded.dtype}")
        is_whole = padded.dtype.kind in "iu" and isinstance(fixed, Integral)
        if not np.isfinite(padded).all() or not math.isfinite(fixed):
            raise SpaceError(f"cost {name!r}: every entry must be finite")
        if padded.min() < 0 or fixed < 0:
            raise SpaceError(f"cost {name!r}: no entry may be negative")
        if is_whole and int(fixed) + sum(padded.max(axis=1).tolist()) >= 2**63:
            raise SpaceError(f"cost {name!r}: the dearest architecture does not fit in 64 bits")
        padded = padded.astype(np.int64 if is_whole else np.float64)
        padded.flags.writeable = False
        self.costs[name] = (padded, int(fixed) if is_whole else float(fixed))

    def add_cost(self, name: str, table: Any, fixed: float = 0) -> None:
        """Add a cost that is a sum over choice blocks, such as a measured latency.

        Args:
            name: the metric, as constraints name it; an earlier one of that name is replaced.
            table: cost of each choice, `[L, O]` or `[L][O_l]`, not negative; integers stay exact.
            fixed: cost of stem and head.

        Raises:
            SpaceError: wrong shape, a negative or non-finite entry, or the name of a built-in cost.
        """
        if name in ("flops", "params"):
            raise SpaceError(f"cost {name!r} follows from the description and cannot be replaced")
        self._set_cost(name, table, fixed)

    def _cost(self, name: str) -> tuple[np.ndarray, int | float]:
        if name not in self.costs:
            raise SpaceError(f"unknown cost {name!r}: expected one of {', '.join(self.costs)}")
        return self.costs[name]

    def cost(self, name: str, archs: Any) -> np.ndarray:
        """Return the cost of architectures.

        Args:
            name: the metric, a key of `costs`.
            archs: `[P, L]`, or anything `as_archs` takes.

        Returns:
            `[P]`, int64 for a whole-number cost, float64 otherwise.

        Raises:
            ArchError: a row is not in the space.
            SpaceError: the metric is unknown.
        """
        table, fixed = self._cost(name)
        archs = self.as_archs(archs)
        total = np.full(len(archs), fixed, dtype=table.dtype)
        for block in range(self.num_blocks):  # a [P, L] gather would need 8 bytes an entry
            total += table[block].take(archs[:, block])
        return total

    def flops(self, archs: Any) -> np.ndarray:
        """Return multiply-adds per image, `[P]` int64, of `archs` `[P, L]`."""
        return self.cost("flops", archs)

    def params(self, archs: Any) -> np.ndarray:
        """Return parameter counts, `[P]` int64, of `archs` `[P, L]`."""
        return self.cost("params", archs)

    def cheapest(self, metric: str) -> np.ndarray:
        """Return an architecture of least cost, `[L]` uint8."""
        table = self._cost(metric)[0].astype(np.float64)
        return np.where(self._is_choice, table, np.inf).argmin(axis=1).astype(np.uint8)

    def dearest(self, metric: str) -> np.ndarray:
        """Return an architecture of greatest cost, `[L]` uint8."""
        table = self._cost(metric)[0].astype(np.float64)
        return np.where(self._is_choice, table, -np.inf).argmax(axis=1).astype(np.uint8)

    def smallest(self, metric: str) -> int | float:
        """Return the least cost of any architecture."""
        return self.cost(metric, self.cheapest(metric))[0].item()

    def largest(self, metric: str) -> int | float:
        """Return the greatest cost of any architecture."""
        return self.cost(metric, self.dearest(metric))[0].item()

    # Architectures

    @property
    def _is_dotted(self) -> bool:
        return max(self._counts) > 10

    def parse(self, text: str) -> np.ndarray:
        """Return the architecture that a string names, `[L]` uint8.

        Args:
            text: one digit a choice block (`22212220`); numbers separated by dots in a space where
                some block has more than ten choices. Surrounding white space is ignored.

        Raises:
            ArchError: wrong length, not a number, or a choice out of range.
        """
        if not isinstance(text, str):
            raise ArchError(f"arch must be a string, got {text!r}")
        stripped = text.strip()
        parts = stripped.split(".") if self._is_dotted else list(stripped)
        for part in parts:
            if not (part.isascii() and part.isdigit()) or (part[0] == "0" and part != "0"):
                form = "numbers separated by dots" if self._is_dotted else "digits"
                raise ArchError(f"arch {text!r}: {part!r} is not a choice; expected {form}")
        if len(parts) != self.num_blocks:
            raise ArchError(f"arch {text!r}: {len(parts)} choices, expected {self.num_blocks}")
        choices = [int(part) for part in parts]
        for block, (choice, count) in enumerate(zip(choices, self._counts, strict=True)):
            if choice >= count:
                raise ArchError(
                    f"arch {text!r}: choice {choice} of block {block} is out of range; "
                    f"expected 0 to {count - 1}"
                )
        return np.array(choices, dtype=np.uint8)

    def format(self, arch: Any) -> str:
        """Return the string of one architecture, the inverse of `parse`."""
        texts = self.format_all(arch)
        if len(texts) != 1:
            raise ArchError(f"format takes one architecture, got {len(texts)}")
        return texts[0]

    def format_all(self, archs: Any) -> list[str]:
        """Return the strings of architectures, in order."""
        archs = self.as_archs(archs)
        if self._is_dotted:
            return [".".join(map(str, row)) for row in archs.tolist()]
        return (archs + np.uint8(ord("0"))).view(f"S{self.num_blocks}").ravel().astype(str).tolist()

    def as_archs(self, archs: Any) -> np.ndarray:
        """Check architectures and return them as a new C-contiguous array.

        Args:
            archs: an integer array `[P, L]` or `[L]`, a string, or a sequence of rows, each a
                string or a sequence of integers. One architecture becomes one row.

        Returns:
            `[P, L]` uint8.

        Raises:
            ArchError: wrong length, not integers, or a choice out of range; names row and value.
        """
        if isinstance(archs, str):
            return self.parse(archs)[None]
        if isinstance(archs, np.ndarray) and archs.dtype.kind in "UO":
            archs = archs.tolist()
        if not hasattr(archs, "__array__"):
            archs = self._stacked(archs)
        array = np.asarray(archs)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or array.shape[1] != self.num_blocks:
            raise ArchError(f"archs have shape {array.shape}, expected [P, {self.num_blocks}]")
        if array.dtype.kind not in "iu":
            raise ArchError(f"archs must be integers, got {array.dtype}{_first_fraction(array)}")
        is_bad = array >= self.num_choices
        if array.dtype.kind == "i":
            is_bad |= array < 0
        if is_bad.any():
            row, block = np.argwhere(is_bad)[0].tolist()
            raise ArchError(
                f"archs row {row}: choice {array[row, block]} of block {block} is out of range; "
                f"expected 0 to {self.num_choices[block] - 1}"
            )
        return np.array(array, dtype=np.uint8, order="C")

    def _stacked(self, archs: Any) -> np.ndarray:
        """Return a sequence of rows, or one row of integers, as an array of some dtype."""
        if not isinstance(archs, Iterable):
            raise ArchError(f"archs must be rows of choices, got {archs!r}")
        rows = list(archs)
        if rows and not any(isinstance(row, Iterable) for row in rows):
            rows = [rows]
        stacked = []
        for index, row in enumerate(rows):
            if isinstance(row, str):
                try:
                    stacked.append(self.parse(row))
                except ArchError as error:
                    raise ArchError(f"archs row {index}: {error}") from None
                continue
            try:
                values = np.asarray(row)
            except (TypeError, ValueError):
                raise ArchError(f"archs row {index}: {row!r} is not a row of choices") from None
            if values.shape != (self.num_blocks,):
                raise ArchError(
                    f"archs row {index}: shape {values.shape}, expected {self.num_blocks} choices"
                )
            if values.dtype.kind not in "iu":
                raise ArchError(f"archs row {index}: {row!r} are not integers")
            stacked.append(values)
        if not stacked:
            return np.empty((0, self.num_blocks), dtype=np.uint8)
        return np.stack(stacked)

    # Identity and description

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


def _first_fraction(array: np.ndarray) -> str:
    """Return ` (row r: v)` of the first entry of a float array that is no whole number."""
    if array.dtype.kind != "f":
        return ""
    rows = np.argwhere(array != np.floor(array))
    return f" (row {rows[0][0]}: {array[tuple(rows[0])]})" if len(rows) else ""


# Constraints


@dataclass(frozen=True)
class Constraint:
    """Bounds on a cost, both inclusive; None where there is none."""

    metric: str
    low: float | None = None
    high: float | None = None

    def admits(self, costs: np.ndarray) -> np.ndarray:
        """Return which costs lie within the bounds, boolean, of the shape of `costs`."""
        costs = np.asarray(costs)
        admitted = np.ones(costs.shape, dtype=np.bool_)
        if self.low is not None:
            admitted &= costs >= self.low
        if self.high is not None:
            admitted &= costs <= self.high
        return admitted


_SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_BOUND = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)([kMG%]?)")
_FORMS = (
    "330M, 60% (of the largest), a range 290M:330M, 290M: or :330M, a number, or a (low, high) pair"
)


def parse_constraints(
    space: SearchSpace, constraints: Mapping[str, Any] | Iterable[Constraint] | None
) -> tuple[Constraint, ...]:
    """Resolve constraints as users write them.

    Args:
        space: whose costs are meant.
        constraints: metric -> `"330M"`, `"60%"` (of the largest cost), `"290M:330M"`, `"290M:"`,
            `":330M"`, a number (an upper bound), or a `(low, high)` pair with None for no bound.
            Suffixes are k, M and G. A metric whose value is None is left out. Resolved constraints
            pass.

    Returns:
        One `Constraint` a metric, in the order given.

    Raises:
        ConstraintError: unknown metric, malformed or negative bound, low above high, or bounds
            outside what any architecture costs; the last names the cheapest and the dearest.
    """
    if constraints is None:
        return ()
    if isinstance(constraints, Mapping):
        resolved = tuple(
            _parse_constraint(space, metric, value)
            for metric, value in constraints.items()
            if value is not None
        )
    else:
        is_resolved = isinstance(constraints, Iterable) and not isinstance(constraints, str)
        resolved = tuple(constraints) if is_resolved else (constraints,)
        if not all(isinstance(constraint, Constraint) for constraint in resolved):
            raise ConstraintError(f"constraints must map metrics to bounds, got {constraints!r}")
    for constraint in resolved:
        _check_reachable(space, constraint)
    return resolved


def _parse_constraint(space: SearchSpace, metric: str, value: Any) -> Constraint:
    if metric not in space.costs:
        known = ", ".join(space.costs)
        raise ConstraintError(f"unknown constraint {metric!r}: expected one of {known}")
    given = f"constraint {metric}={value!r}"
    if space.largest(metric) == 0:
        raise ConstraintError(
            f"{given}: no {metric} are known of {space.name}; a supernet of modules counts FLOPs "
            "where it is given an input_shape"
        )
    if isinstance(value, (tuple, list)):
        bounds = list(value)
    elif isinstance(value, str):
        bounds = [part.strip() or None for part in value.split(":")]
        if len(bounds) == 1:
            bounds = [None, value]
    else:
        bounds = [None, value]
    if len(bounds) != 2 or bounds == [None, None]:
        raise ConstraintError(f"{given}: expected {_FORMS}")
    low, high = (_parse_bound(space, metric, bound, given) for bound in bounds)
    if low is not None and high is not None and low > high:
        raise ConstraintError(f"{given}: the lower bound {low:g} is above the upper bound {high:g}")
    return Constraint(metric, low, high)


def _parse_bound(space: SearchSpace, metric: str, bound: Any, given: str) -> float | None:
    if bound is None:
        return None
    if isinstance(bound, str):
        match = _BOUND.fullmatch(bound.strip())
        if match is None:
            raise ConstraintError(f"{given}: cannot read {bound!r}; expected {_FORMS}")
        number = Decimal(match[1])
        if match[2] == "%":
            if number > 100:
                raise ConstraintError(f"{given}: {bound} of the largest; expected at most 100%")
            return float(number * Decimal(space.largest(metric)) / 100)
        resolved = float(number * _SCALES[match[2]])
    elif isinstance(bound, Real) and not isinstance(bound, bool):
        resolved = float(bound)
    else:
        raise ConstraintError(f"{given}: cannot read {bound!r}; expected {_FORMS}")
    if not math.isfinite(resolved) or resolved < 0:
        raise ConstraintError(f"{given}: a bound must be finite and not negative, got {bound!r}")
    return resolved


def _check_reachable(space: SearchSpace, constraint: Constraint) -> None:
    """Refuse bounds that lie wholly below or above what architectures cost."""
    metric, low, high = constraint.metric, constraint.low, constraint.high
    if metric not in space.costs:
        raise ConstraintError(
            f"unknown constraint {metric!r}: expected one of {', '.join(space.costs)}"
        )
    smallest, largest = space.smallest(metric), space.largest(metric)
    if (high is not None and high < smallest) or (low is not None and low > largest):
        wanted = f"{'' if low is None else f'{low:.10g}'}:{'' if high is None else f'{high:.10g}'}"
        raise ConstraintError(
            f"no architecture of {space.name} has {metric} in {wanted}: the cheapest, "
            f"{space.format(space.cheapest(metric))}, has {smallest:.10g}, the dearest, "
            f"{space.format(space.dearest(metric))}, has {largest:.10g}"
        )
