"""The NAS-Bench-Macro space: 8 choice blocks of 3 candidate ops, every accuracy known."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from fastshift.ops import (
    Head,
    Op,
    Unit,
    identity,
    inverted_residual,
    projection,
    scale_channels,
)
from fastshift.space import SearchSpace

__all__ = ["canonical", "distinct", "nasbench_macro"]

STEM_CHANNELS = 32
STAGES = ((2, 64), (3, 128), (3, 256))  # blocks, channels; the first block of each has stride 2
HEAD_CHANNELS = 1280


def nasbench_macro(
    image_size: int = 32, num_classes: int = 10, in_channels: int = 3, width: float = 1.0
) -> SearchSpace:
    """Make the space of the MCT-NAS benchmark (arXiv 2103.11922, appendix).

    Choices: 0 identity (a projection where the shape changes), 1 inverted residual with expansion 3
    and kernel 3, 2 with expansion 6 and kernel 5.

    Args:
        image_size: height and width of an image.
        num_classes: outputs of the linear layer.
        in_channels: channels of an image.
        width: scales every channel count, rounded to a multiple of 8; 1.0 is as published.

    Raises:
        SpaceError: a value is out of range.
    """
    channels = scale_channels(STEM_CHANNELS, width)
    stem = (Unit("dense", in_channels, channels, kernel=3),)
    blocks: list[tuple[Op, ...]] = []
    for num_blocks, out_channels in STAGES:
        out_channels = scale_channels(out_channels, width)
        for index in range(num_blocks):
            stride = 2 if index == 0 else 1
            skip = projection(channels, out_channels, 2) if index == 0 else identity(channels)
            small = inverted_residual(channels, out_channels, stride, expansion=3, kernel=3)
            large = inverted_residual(channels, out_channels, stride, expansion=6, kernel=5)
            blocks.append((skip, small, large))
            channels = out_channels
    last = Unit("pointwise", channels, scale_channels(HEAD_CHANNELS, width))
    return SearchSpace(
        "nasbench_macro",
        stem=stem,
        blocks=blocks,
        head=Head(channels, (last,), num_classes),
        in_channels=in_channels,
        image_size=image_size,
        recipe={
            "name": "nasbench_macro",
            "kwargs": {
                "image_size": image_size,
                "num_classes": num_classes,
                "in_channels": in_channels,
                "width": width,
            },
        },
    )


def canonical(archs: Any) -> np.ndarray:
    """Move the identities of each stage to its end, which changes no network.

    The first block of a stage stays, since its choice 0 is a projection.

    Args:
        archs: `[P, 8]`, or anything `SearchSpace.as_archs` takes.

    Returns:
        `[P, 8]` uint8; two rows are equal exactly where the networks are.

    Raises:
        ArchError: a row is not in the space.
    """
    archs = nasbench_macro().as_archs(archs)
    first = 0
    for num_blocks, _ in STAGES:
        inner = archs[:, first + 1 : first + num_blocks]
        order = np.argsort(inner == 0, axis=1, kind="stable")
        archs[:, first + 1 : first + num_blocks] = np.take_along_axis(inner, order, axis=1)
        first += num_blocks
    return archs


def distinct(space: SearchSpace) -> np.ndarray:
    """Return one string of every distinct network, the canonical one: `[3969, 8]` uint8, sorted."""
    return np.unique(canonical(list(product(*map(range, space.num_choices.tolist())))), axis=0)
