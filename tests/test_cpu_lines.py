"""Inference of images too large for the cache: a few lines at a time, and no seam between them."""

from __future__ import annotations

import pytest
import torch
from block_cases import (
    OPS,
    SHUFFLES,
    assert_same_rows,
    autocast,
    infer,
    make_op,
    make_rows,
)

pytestmark = pytest.mark.usefixtures("poison")

# Hidden rows of such an image are 0.3 to 3 MB: two to nine parts in either type.
SHAPE = (1, 18, 111, 67)
MAKERS = [pytest.param(make, id=name) for name, make in {**OPS, **SHUFFLES}.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_a_large_image_is_as_accurate_as_pytorchs(make, dtype):
    module = make_op(make, SHAPE[1]).eval()
    x = make_rows(SHAPE).to(dtype)
    with autocast(dtype):
        found = infer(module, x)
        assert_same_rows(module, x, found, dtype)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("make", MAKERS)
def test_images_and_threads_change_no_bit_of_a_large_image(make, threads):
    module = make_op(make, SHAPE[1]).eval()
    x = make_rows((3, *SHAPE[1:]))
    each = [
        infer(module, x[i : i + 1].contiguous(memory_format=torch.channels_last)) for i in range(3)
    ]
    for number in (1, 2, 3):
        threads(number)
        assert torch.equal(infer(module, x), torch.cat(each))


@pytest.mark.parametrize(
    "shape", [(1, 18, 700, 7), (1, 18, 7, 700), (2, 18, 1, 3000), (1, 18, 3000, 1)]
)
@pytest.mark.parametrize("name", ["inverted_residual-e6-k5-s2", "shuffle-k7-s1", "xception-s2"])
def test_an_image_of_many_short_or_few_long_lines_is_as_accurate_as_pytorchs(name, shape):
    module = make_op({**OPS, **SHUFFLES}[name], shape[1]).eval()
    x = make_rows(shape)
    assert_same_rows(module, x, infer(module, x))
