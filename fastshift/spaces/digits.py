"""A small space for 8x8 grey images: 6 choice blocks of 4 candidate ops, 4,096 architectures."""

from __future__ import annotations

from fastshift.ops import Head, Op, Unit, identity, inverted_residual, projection, shuffle_unit
from fastshift.space import SearchSpace

__all__ = ["digits"]

STEM_CHANNELS = 8
STAGES = ((1, 8), (2, 16), (1, 32))  # stride of the first block, channels; two blocks each
HEAD_CHANNELS = 64


def digits(image_size: int = 8, num_classes: int = 10, in_channels: int = 1) -> SearchSpace:
    """Make a space sized for scikit-learn's digits on one core.

    Choices: 0 identity (a projection where the shape changes), 1 inverted residual with expansion 4
    and kernel 3, 2 with expansion 2 and kernel 5, 3 shuffle unit with kernel 3. The 5x5 op is the
    narrower one because its depthwise backward is the slowest part of a training step on a CPU.

    Args:
        image_size: height and width of an image.
        num_classes: outputs of the linear layer.
        in_channels: channels of an image.

    Raises:
        SpaceError: a value is out of range.
    """
    channels = STEM_CHANNELS
    stem = (Unit("dense", in_channels, channels, kernel=3),)
    blocks: list[tuple[Op, ...]] = []
    for first_stride, out_channels in STAGES:
        for stride in (first_stride, 1):
            is_same = stride == 1 and channels == out_channels
            blocks.append(
                (
                    identity(channels) if is_same else projection(channels, out_channels, stride),
                    inverted_residual(channels, out_channels, stride, expansion=4, kernel=3),
                    inverted_residual(channels, out_channels, stride, expansion=2, kernel=5),
                    shuffle_unit(channels, out_channels, stride, kernel=3),
                )
            )
            channels = out_channels
    last = Unit("pointwise", channels, HEAD_CHANNELS)
    return SearchSpace(
        "digits",
        stem=stem,
        blocks=blocks,
        head=Head(channels, (last,), num_classes),
        in_channels=in_channels,
        image_size=image_size,
        recipe={
            "name": "digits",
            "kwargs": {
                "image_size": image_size,
                "num_classes": num_classes,
                "in_channels": in_channels,
            },
        },
    )
