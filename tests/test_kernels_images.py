"""The image kernel: the launcher against its definition, and that against the CPU's images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from block_cases import seeded
from catalogue import record
from kernel_cases import DEVICE

from fastshift.data.batches import Augmentation, Normalisation
from fastshift.kernels import images, loss

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")

IMAGE_SHAPES = {"easy": (3, 3, 8, 8), "odd": (2, 3, 21, 19), "tiny": (1, 1, 1, 1)}


def _images_case(shape, padding):
    """Images, draws, and what the CPU's augmentation and normalisation make of them."""
    num, channels = shape[:2]
    pixels = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)
    fill = tuple(range(100, 100 + channels))
    normalise = Normalisation((0.49, 0.48, 0.45)[:channels], (0.25, 0.24, 0.26)[:channels])
    augmentation = Augmentation(padding=padding, fill=fill, flip=True)
    expected = normalise(augmentation(pixels.clone(), np.random.default_rng(5)))
    rng = np.random.default_rng(5)
    corners = rng.integers(2 * padding + 1, size=(2, num)) if padding else np.zeros((2, num))
    flips = rng.random(num) < 0.5
    scale = torch.tensor([1 / (255 * std) for std in normalise.std])
    means = zip(normalise.mean, normalise.std, strict=True)
    shift = torch.tensor([-mean / std for mean, std in means])
    buffers = (
        torch.from_numpy(corners).to(torch.int32),
        torch.from_numpy(flips).to(torch.uint8),
        torch.tensor(fill, dtype=torch.uint8),
        scale,
        shift,
    )
    return pixels, buffers, expected


def _images_triton(pixels, buffers, padding, dtype=torch.float32):
    moved = (b.to(DEVICE) for b in (pixels, *buffers))
    return images._images_triton(*moved, padding, dtype)


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "channels last"])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_images_are_those_of_the_cpus_augmentation(shape, padding, planar):
    pixels, buffers, expected = _images_case(IMAGE_SHAPES[shape], padding)
    if not planar:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    reference = images.augment_images(pixels, *buffers, padding=padding)
    assert torch.equal(reference, expected)
    found = _images_triton(pixels, buffers, padding)
    # A fused multiply-add rounds once where the CPU rounds twice: at the size of its terms, 2.
    assert torch.allclose(found.cpu(), expected, rtol=0, atol=2.0**-22)
    for out in (reference, found):
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert out.stride() == images._images_fake(pixels, *buffers, padding, out.dtype).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_narrow_images_are_the_rounded_ones(shape, dtype):
    pixels, buffers, expected = _images_case(IMAGE_SHAPES[shape], 2)
    reference = images.augment_images(pixels, *buffers, padding=2, dtype=dtype)
    assert torch.equal(reference, expected.to(dtype))
    found = _images_triton(pixels, buffers, 2, dtype)
    # Triton's interpreter cuts bfloat16 off where a device rounds: a whole last place.
    assert torch.allclose(found.cpu().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_pixel_lands_where_the_formula_says():
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
    one, zero = torch.ones(1), torch.zeros(1)
    fill = torch.tensor([99], dtype=torch.uint8)
    for corner, flip, rows in (
        ((1, 1), 0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        ((1, 1), 1, [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]),
        ((0, 1), 0, [[99] * 4, [0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 0), 1, [[6, 5, 4, 99], [10, 9, 8, 99], [99] * 4]),
    ):
        corners = torch.tensor(corner, dtype=torch.int32).view(2, 1)
        buffers = corners, torch.tensor([flip], dtype=torch.uint8), fill, one, zero
        for found in (
            images.augment_images(pixels, *buffers, padding=1),
            _images_triton(pixels, buffers, 1).cpu(),
        ):
            assert found[0, 0].tolist() == rows


def test_a_launch_may_have_more_images_or_candidates_than_a_second_axis_has_programs():
    """Only along the first one there may be more than 65535."""
    many = 70_000
    pixels = torch.empty(many, 3, 8, 8, dtype=torch.uint8, device="meta")
    buffers = [torch.empty(*size, device="meta") for size in ((2, many), (many,), (3,), (3,), (3,))]
    logits, labels = torch.empty(many, 3, 5, device="meta"), torch.empty(3, device="meta")
    leaves, slopes = torch.empty(1, device="meta"), torch.empty(many, device="meta")
    with record() as found:
        images._images_triton(pixels, *buffers, 1, torch.float32)
        loss._loss_fwd_triton(logits, labels, leaves, 0.0)
        loss._loss_bwd_triton(slopes, logits, labels, leaves, 0.0)
    assert len(found.launches) == 3
    for launch in found.launches:
        assert launch.grid[0] >= many
        assert launch.grid[1:] == (1, 1)


def test_the_images_pass_opcheck():
    pixels, buffers, _ = _images_case((2, 3, 4, 4), 1)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.fastshift.augment_images, (pixels, *buffers, 1, dtype))


def test_the_images_refuse_what_does_not_fit():
    pixels, buffers, _ = _images_case((2, 3, 4, 4), 1)
    names = ("corners", "flips", "fill", "scale", "shift")
    given = {"images": pixels, "padding": 1, **dict(zip(names, buffers, strict=True))}
    for change, name in (
        ({"images": pixels.float()}, "images"),
        ({"images": pixels[0]}, "images"),
        ({"images": pixels[:0]}, "images"),
        ({"corners": buffers[0].T}, "corners"),
        ({"flips": buffers[1].bool()}, "flips"),
        ({"fill": buffers[2][:1]}, "fill"),
        ({"scale": buffers[3].double()}, "scale"),
        ({"shift": torch.ones(6)[::2]}, "shift"),
        ({"padding": -1}, "padding, dtype"),
        ({"dtype": torch.float64}, "padding, dtype"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            images.augment_images(**{**given, **change})
