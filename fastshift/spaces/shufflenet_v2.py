"""The ShuffleNetV2 space of SPOS and Supernet Shifting: 20 choice blocks of 4 candidate ops."""

from __future__ import annotations

from fastshift.errors import SpaceError
from fastshift.ops import (
    Head,
    Op,
    Unit,
    check_positive,
    scale_channels,
    shuffle_unit,
    shuffle_xception,
)
from fastshift.space import SearchSpace

__all__ = ["shufflenet_v2"]

STEM_CHANNELS = 16
STAGES = ((4, 64), (4, 160), (8, 320), (4, 640))  # blocks, channels
HEAD_CHANNELS = 1024
MIN_DOWNSAMPLED_SIZE = 64  # below it the stem and two of the stages keep the resolution
SMALL_IMAGE_STRIDES = (1, 2, 2, 1)


def shufflenet_v2(
    image_size: int = 224, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0
) -> SearchSpace:
    """Make the space of arXiv 1904.00420 (section 4), also that of arXiv 2403.11380.

    Choices: 0, 1, 2 are shuffle units with kernel 3, 5, 7; 3 is the Xception-like op. From 64
    pixels on, the stem and the first block of every stage halve the map. Below, as published for
    CIFAR-10, only blocks 5 and 9 (counted from 1) do; the others keep it, whatever their channels.

    Args:
        image_size: height and width of an image.
        num_classes: outputs of the linear layer, which has no bias and stands behind dropout 0.1.
        in_channels: channels of an image.
        width: scales every channel count, rounded to a multiple of 8; 1.0 is as published.

    Raises:
        SpaceError: a value is out of range.
    """
    check_positive("shufflenet_v2", image_size=image_size)
    channels = scale_channels(STEM_CHANNELS, width)
    if channels == scale_channels(STAGES[0][1], width):
        raise SpaceError(f"width {width!r} leaves the first stage no more channels than the stem")
    is_small = image_size < MIN_DOWNSAMPLED_SIZE
    stem = (Unit("dense", in_channels, channels, kernel=3, stride=1 if is_small else 2),)
    blocks: list[tuple[Op, ...]] = []
    strides = SMALL_IMAGE_STRIDES if is_small else (2,) * len(STAGES)
    for (num_blocks, out_channels), first_stride in zip(STAGES, strides, strict=True):
        out_channels = scale_channels(out_channels, width)
        for index in range(num_blocks):
            stride = first_stride if index == 0 else 1
            units = [shuffle_unit(channels, out_channels, stride, kernel) for kernel in (3, 5, 7)]
            blocks.append((*units, shuffle_xception(channels, out_channels, stride)))
            channels = out_channels
    last = Unit("pointwise", channels, scale_channels(HEAD_CHANNELS, width))
    return SearchSpace(
        "shufflenet_v2",
        stem=stem,
        blocks=blocks,
        head=Head(channels, (last,), num_classes, dropout=0.1, bias=False),
        in_channels=in_channels,
        image_size=image_size,
        affine=False,
        recipe={
            "name": "shufflenet_v2",
            "kwargs": {
                "image_size": image_size,
                "num_classes": num_classes,
                "in_channels": in_channels,
                "width": width,
            },
        },
    )
