"""A batch of uint8 images -> normalised, cropped, flipped and channels last, in one kernel.

Fused: padding, the random crop, the flip, the conversion, the normalisation and the change of
layout. Output pixel `(y, x)` of image `n` is

    scale_c pixel[n, c, y + top_n - padding, x' + left_n - padding] + shift_c

with `x' = W - 1 - x` where the image is flipped, and `fill_c` for pixels outside. One byte a value
is read and one value written. Draws are made elsewhere and stand in device buffers, so a captured
graph augments every batch anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["augment_images", "augment_images_ref"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the result
_BLOCK = 1024  # values a program: 8 a thread with 4 warps


def augment_images_ref(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    fill: Tensor,
    scale: Tensor,
    shift: Tensor,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """Define `augment_images` in plain PyTorch, for images `[N, C, H, W]` of any strides."""
    num, channels, height, width = images.shape
    padded = fill.view(1, -1, 1, 1).repeat(num, 1, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    y = torch.arange(height, device=images.device) + corners[0].long()[:, None]
    x = torch.arange(width, device=images.device).expand(num, -1)
    x = torch.where(flips.bool()[:, None], width - 1 - x, x) + corners[1].long()[:, None]
    image = torch.arange(num, device=images.device)
    channel = torch.arange(channels, device=images.device)
    pixels = padded[image[:, None, None, None], channel, y[:, :, None, None], x[:, None, :, None]]
    values = pixels.to(torch.float32) * scale + shift
    return values.to(dtype).permute(0, 3, 1, 2)


@triton.jit
def _images_kernel(
    x_ptr,
    corner_ptr,
    flip_ptr,
    fill_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    padding,
    num_images,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write `BLOCK` neighbouring values of one image."""
    # One axis: along the others there may be 65535 programs, and there may be more images.
    tiles = tl.cdiv(H * W * C, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    offs = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H * W * C
    channel = offs % C
    x = offs // C % W
    y = offs // (C * W)
    top = tl.load(corner_ptr + image)
    left = tl.load(corner_ptr + num_images + image)
    x = tl.where(tl.load(flip_ptr + image) != 0, W - 1 - x, x)
    y += top - padding
    x += left - padding
    inside = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    source = y.to(tl.int64) * stride_xh + x.to(tl.int64) * stride_xw
    source += image * stride_xn + channel.to(tl.int64) * stride_xc
    pixel = tl.load(x_ptr + source, mask=inside, other=0).to(tl.float32)
    scale = tl.zeros((BLOCK,), tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    # Chosen and not gathered: three loads a value would be more than the pixel's own.
    for c in tl.static_range(C):
        is_own = channel == c
        scale = tl.where(is_own, tl.load(scale_ptr + c), scale)
        shift = tl.where(is_own, tl.load(shift_ptr + c), shift)
        fill = tl.load(fill_ptr + c).to(tl.float32)
        pixel = tl.where(is_own & (inside == 0), fill, pixel)
    value = pixel * scale + shift
    out = image * (H * W * C) + offs
    tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), mask=mask)


def _block(values: int) -> tuple[int, int]:
    """Values of a program, and its warps, each of them with eight values a thread if it can."""
    block = min(_BLOCK, triton.next_power_of_2(values))
    return block, max(1, block // 256)


def _images_triton(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    fill: Tensor,
    scale: Tensor,
    shift: Tensor,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    num, channels, height, width = images.shape
    out = images.new_empty((num, height, width, channels), dtype=dtype)
    values = height * width * channels
    block, warps = _block(values)
    _images_kernel[(triton.cdiv(values, block) * num,)](
        images,
        corners,
        flips,
        fill,
        scale,
        shift,
        out,
        padding,
        num,
        *images.stride(),
        C=channels,
        H=height,
        W=width,
        BLOCK=block,
        num_warps=warps,
    )
    return out.permute(0, 3, 1, 2)


def _images_fake(images, corners, flips, fill, scale, shift, padding, dtype):
    num, channels, height, width = images.shape
    return images.new_empty((num, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


_LIBRARY = torch.library.Library("fastshift", "FRAGMENT")
_LIBRARY.define(
    "augment_images(Tensor images, Tensor corners, Tensor flips, Tensor fill, Tensor scale, "
    "Tensor shift, int padding, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("augment_images", augment_images_ref, "CPU")
_LIBRARY.impl("augment_images", _images_triton, "CUDA")
torch.library.register_fake("fastshift::augment_images", _images_fake, lib=_LIBRARY)


def augment_images(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    fill: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    padding: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crop, flip and normalise a batch of images; see the module's formula.

    Without augmentation, give corners and a padding of zero, and flips of zero. On a CPU a corner
    outside of what is described raises; on CUDA it crops further out into the fill.

    Args:
        images: `[N, C, H, W]` uint8 of any strides: planar as it is, `[N, H, W, C]` permuted.
        corners: top and left of each crop in the padded image, `[2, N]` int32, each from 0 to
            twice the padding.
        flips: whether each image is flipped, left to right, `[N]` uint8.
        fill: value of the padding, `[C]` uint8.
        scale, shift: of each channel, `[C]` float32.
        padding: pixels added on each side.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `[N, C, H, W]` of `dtype`, channels last.

    Raises:
        ValueError: a tensor or a value is not as described.
    """
    if images.dim() != 4 or images.dtype is not torch.uint8 or 0 in images.shape:
        raise ValueError(
            f"images: {tuple(images.shape)} of {images.dtype}; expected [N, C, H, W] of uint8, "
            "not empty"
        )
    num, channels, height, width = images.shape
    if height * width * channels >= 2**31 - _BLOCK:
        raise ValueError(f"images: {tuple(images.shape)}; expected below 2^31 values an image")
    for name, given, shape, expected in (
        ("corners", corners, (2, num), torch.int32),
        ("flips", flips, (num,), torch.uint8),
        ("fill", fill, (channels,), torch.uint8),
        ("scale", scale, (channels,), torch.float32),
        ("shift", shift, (channels,), torch.float32),
    ):
        if given.shape != shape or given.dtype is not expected or not given.is_contiguous():
            raise ValueError(
                f"{name}: {tuple(given.shape)} of {given.dtype}; expected {shape} of {expected}, "
                "contiguous"
            )
    if padding < 0 or dtype not in DTYPES:
        raise ValueError(
            f"padding, dtype: {padding}, {dtype}; expected at least 0, and one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    return torch.ops.fastshift.augment_images(
        images, corners, flips, fill, scale, shift, padding, dtype
    )
