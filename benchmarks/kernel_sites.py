"""The named shapes of the static checks: three spaces' levels, heads, images and parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from catalogue import DTYPES, Level, Network

from fastshift.spaces import build
from fastshift.static_levels import levels_of
from fastshift.supernet import Supernet

__all__ = ["SITES", "SMALL", "Site", "network"]


@dataclass(frozen=True)
class Site:
    """A space at a size, with a step's batch and population.

    Attributes:
        space: its name in `fastshift.spaces`.
        rows: of a block's parents at a time, of `num_nodes` nodes, where there are as many.
        levels: those that stand for all others where not all are wanted.
        targets: types and architectures, where not all are wanted.
    """

    space: str
    image_size: int
    num_classes: int
    num_images: int
    num_candidates: int
    rows: int
    num_nodes: int
    levels: tuple[str, ...]
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
    Site("shufflenet_v2", 224, 1000, 150, 50, 8, 16, ("block 5",), _ONE),
    Site("shufflenet_v2", 64, 200, 150, 50, 8, 16, ("block 10",), _ALL),
    Site("nasbench_macro", 32, 10, 150, 50, 8, 16, ("block 4", "block 7"), _ALL),
    Site("digits", 8, 10, 150, 50, 8, 16, ("block 3",), _ALL),
)
# What the interpreter counts bytes at: it takes some milliseconds a program, a backward pass more.
SMALL = Site("digits", 8, 10, 4, 3, 2, 4, ("block 3",), {"bf16": (90,), "fp32": (90,)})


def network(site: Site, *, whole: bool = True) -> Network:
    """Return a site's shapes, with each level that differs, stem and head too, or its few."""
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
        tuple(
            level
            for level in _levels(site, supernet, space.in_channels)
            if whole or level.name in site.levels
        ),
    )


def _levels(site: Site, supernet: Supernet, channels: int) -> list[Level]:
    """Stem, blocks and head's features, each once, at most as many nodes as a trie has there."""
    levels, seen, above = [], set(), 1
    for own in levels_of(supernet, (site.image_size, site.image_size, channels), site.num_nodes):
        nodes = own.capacity
        rows = (nodes if own.name.startswith("head") else min(above, site.rows), site.num_images)
        above = nodes
        if (rows, own.in_size, own.text) in seen:
            continue
        seen.add((rows, own.in_size, own.text))
        parent = tuple(node * rows[0] // nodes for node in range(nodes))
        choice = tuple(node % own.num_choices for node in range(nodes))
        levels.append(Level(_name(own.name), (*rows, *own.in_size), parent, choice, own.layer))
    return levels


def _name(part: str) -> str:
    """Of a part of the supernet, for people."""
    name, _, index = part.partition(".")
    return f"block {int(index) + 1}" if name == "blocks" else name
