"""A space whose costs differ between all choices."""

from __future__ import annotations

from fastshift import ops
from fastshift.ops import Head, Unit
from fastshift.space import SearchSpace


def make_space(choices=(2, 3, 1, 4), *, num_classes=5, recipe=None, **changes):
    """Return a space of wide and narrow blocks, in which costs differ between all choices."""
    blocks = []
    for count in choices:
        candidates = [ops.identity(8), *(ops.conv(8, 8, kernel, 1) for kernel in range(1, 40, 2))]
        blocks.append(candidates[:count])
    arguments = {
        "stem": [Unit("dense", 3, 8, 3, 2)],
        "blocks": blocks,
        "head": Head(8, (), num_classes),
        "in_channels": 3,
        "image_size": 8,
        "recipe": recipe,
    }
    return SearchSpace("mixed", **(arguments | changes))
