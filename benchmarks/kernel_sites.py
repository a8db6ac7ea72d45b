"""The named shapes of the static checks: three spaces' levels, heads, images and parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastshift.kernels.catalogue import DTYPES, Level, Network
from fastshift.ops import Op, Unit
from fastshift.population_layer import LayerOp, LayerUnit, describe_layer, describe_op, parse_layer
from fastshift.space import SearchSpace
from fastshift.spaces import build
from fastshift.supernet import Supernet

__all__ = ["SITES", "SMALL", "Site", "layer_text", "network"]

_EPS = 1e-5  # of torch's batch norm


@dataclass(frozen=True)
class Site:
    """A space at a size, with a step's batch and population.

    Attributes:
        space: its name in `fastshift.spaces`.
        rows: of a level's parents at a time, of `num_nodes` nodes.
        level: the one that stands for all others where not all are wanted.
        targets: types and architectures, where not all are wanted.
    """

    space: str
    image_size: int
    num_classes: int
    num_images: int
    num_candidates: int
    rows: int
    num_nodes: int
    level: str
    targets: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The space and the size of its images."""
        return f"{self.space} {self.image_size}"


# Batches of 150 and generations of 50, as the released code of Supernet Shifting has them.
_EVERYWHERE = (80, 90, 100)
_ONE = {"bf16": (90,)}
_ALL = dict.fromkeys(DTYPES, _EVERYWHERE)
SITES = (
    Site("shufflenet_v2", 224, 1000, 150, 50, 8, 16, "block 5", _ONE),
    Site("shufflenet_v2", 64, 200, 150, 50, 8, 16, "block 10", _ONE),
    Site("nasbench_macro", 32, 10, 150, 50, 8, 16, "block 4", _ALL),
    Site("digits", 8, 10, 150, 50, 8, 16, "block 3", _ONE),
)
# What the interpreter counts bytes at: it takes some milliseconds a program, a backward pass more.
SMALL = Site("digits", 8, 10, 4, 3, 2, 4, "block 3", _ONE)


def layer_text(ops: tuple[Op, ...], affine: bool) -> str:
    """Return a block's candidate ops as the population layer's operators take them."""

    def unit_of(unit: Unit) -> LayerUnit:
        is_depthwise = unit.kind == "depthwise"
        sizes = (unit.in_channels, unit.out_channels, unit.kernel, unit.stride)
        return LayerUnit(is_depthwise, *sizes, unit.activation == "relu", _EPS, affine, affine)

    def op_of(op: Op) -> LayerOp | None:
        if op.is_identity:
            return None
        units = (*op.units, *op.frame.shortcut)
        return LayerOp(tuple(map(unit_of, units)), len(op.units), op.frame.kind)

    return describe_layer(describe_op(op_of(op)) for op in ops)


def network(site: Site, *, whole: bool = True) -> Network:
    """Return a site's shapes, with one level of each that differs, or the site's alone."""
    space = build(site.space, image_size=site.image_size, num_classes=site.num_classes)
    with torch.device("meta"):
        supernet = Supernet(space)
    first = [0]
    for count in space.num_choices.tolist():
        first.append(first[-1] + count)
    parameters = []
    for name, parameter in supernet.named_parameters():
        part, *rest = name.split(".")
        pair = first[int(rest[0])] + int(rest[1]) if part == "blocks" else -1
        parameters.append((tuple(parameter.shape), pair))
    return Network(
        site.name,
        site.num_images,
        site.image_size,
        space.in_channels,
        site.num_classes,
        site.num_candidates,
        tuple(parameters),
        tuple(level for level in _levels(site, space) if whole or level.name == site.level),
    )


def _levels(site: Site, space: SearchSpace) -> list[Level]:
    size = site.image_size
    for unit in space.stem:
        size = unit.output_size(size)
    levels, seen = [], set()
    for index, ops in enumerate(space.blocks):
        rows = (site.rows, site.num_images, size, size, ops[0].in_channels)
        text = layer_text(ops, space.affine)
        size = ops[0].output_size(size)
        if (rows, text) in seen:
            continue
        seen.add((rows, text))
        parent = tuple(node * site.rows // site.num_nodes for node in range(site.num_nodes))
        choice = tuple(node % len(ops) for node in range(site.num_nodes))
        levels.append(Level(f"block {index + 1}", rows, parent, choice, parse_layer(text)))
    return levels
