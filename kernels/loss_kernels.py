"""The kernels of the candidates' loss, `loss` has the formulas: forward, its sums, and backward."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["loss_bwd_kernel", "loss_fwd_kernel", "loss_sum_kernel"]


@triton.jit
def _row_logits(
    x_ptr, offs_n, offs_k, k, mask_n, stride_xn, stride_xk, K: tl.constexpr, VEC: tl.constexpr
):
    """Load `[ROWS, BLOCK_K]` logits as fp32: -inf where there is no class, 0 where no image."""
    classes = k + offs_k
    rows = offs_n.to(tl.int64)[:, None] * (tl.cast(stride_xn, tl.int64) * VEC)
    offs = rows + classes.to(tl.int64)[None, :] * stride_xk
    mask = mask_n[:, None] & (classes < K)[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=-float("inf")).to(tl.float32)
    return tl.where(mask_n[:, None], x, 0.0)


@triton.jit
def loss_fwd_kernel(
    x_ptr,
    label_ptr,
    num_leaves_ptr,
    loss_ptr,
    wrong_ptr,
    smoothing,
    num_images,
    tiles,
    stride_xd,
    stride_xn,
    stride_xk,
    SMOOTHED: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum losses and wrong answers of one candidate over every `tiles`-th tile of `ROWS` images."""
    tile = tl.program_id(0) % tiles
    candidate = tl.program_id(0) // tiles
    out = candidate.to(tl.int64) * tiles + tile
    if candidate >= tl.load(num_leaves_ptr):
        tl.store(loss_ptr + out, 0.0)
        tl.store(wrong_ptr + out, 0)
        return
    x_ptr += candidate.to(tl.int64) * (tl.cast(stride_xd, tl.int64) * VEC)
    offs_k = tl.arange(0, BLOCK_K)
    losses = tl.zeros((ROWS,), tl.float32)
    wrongs = tl.zeros((ROWS,), tl.int32)
    for first in range(tile * ROWS, num_images, tiles * ROWS):
        offs_n = first + tl.arange(0, ROWS)
        mask_n = offs_n < num_images
        label = tl.load(label_ptr + offs_n, mask=mask_n, other=0)
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        argmax = tl.zeros((ROWS,), tl.int32)
        total = tl.zeros((ROWS,), tl.float32)  # of exp(x - top)
        picked = tl.zeros((ROWS,), tl.float32)
        below = tl.zeros((ROWS,), tl.float32)  # sum of x - top
        nans = tl.zeros((ROWS,), tl.int32)
        for k in range(0, K, BLOCK_K):
            x = _row_logits(x_ptr, offs_n, offs_k, k, mask_n, stride_xn, stride_xk, K, VEC)
            classes = k + offs_k
            block_top = tl.max(x, axis=1)
            at_top = tl.where(x == block_top[:, None], classes[None, :], K)
            argmax = tl.where(block_top > top, tl.min(at_top, axis=1), argmax)
            # Before any number there is nothing to rescale, and -inf - -inf would be NaN.
            new_top = tl.maximum(top, block_top)
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            step = tl.where(top == -float("inf"), 0.0, top - shift)
            less = x - shift[:, None]
            total = total * tl.exp(step) + tl.sum(tl.exp(less), axis=1)
            top = new_top
            is_label = classes[None, :] == label[:, None]
            picked += tl.sum(tl.where(is_label, x, 0.0), axis=1)
            nans += tl.sum((x != x).to(tl.int32), axis=1)
            if SMOOTHED:
                own = tl.sum(tl.where((classes < K)[None, :], less, 0.0), axis=1)
                below = below + step * k + own
        log_total = tl.log(total)
        loss = log_total - (picked - top)
        if SMOOTHED:
            loss = (1 - smoothing) * loss + smoothing * (log_total - below / K)
        known = (label >= 0) & (label < K)
        # Maxima skip NaN, and beside an infinite largest logit no other has a meaning.
        is_nan = (nans > 0) | (tl.abs(top) == float("inf")) | (known == 0)
        loss = tl.where(is_nan, float("nan"), loss)
        losses += tl.where(mask_n, loss, 0.0)
        is_wrong = (argmax != label) | (nans > 0) | (known == 0)
        wrongs += (is_wrong & mask_n).to(tl.int32)
    tl.store(loss_ptr + out, tl.sum(losses, axis=0))
    tl.store(wrong_ptr + out, tl.sum(wrongs, axis=0))


@triton.jit
def loss_sum_kernel(loss_ptr, wrong_ptr, losses_ptr, wrongs_ptr, tiles, TILES: tl.constexpr):
    """Add up one candidate's tiles."""
    candidate = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, TILES)
    mask = offs < tiles
    loss = tl.load(loss_ptr + candidate * tiles + offs, mask=mask, other=0.0)
    wrong = tl.load(wrong_ptr + candidate * tiles + offs, mask=mask, other=0)
    tl.store(losses_ptr + candidate, tl.sum(loss, axis=0))
    tl.store(wrongs_ptr + candidate, tl.sum(wrong.to(tl.int64), axis=0))


@triton.jit
def loss_bwd_kernel(
    dloss_ptr,
    x_ptr,
    label_ptr,
    num_leaves_ptr,
    dx_ptr,
    smoothing,
    num_images,
    tiles,
    stride_xd,
    stride_xn,
    stride_xk,
    K: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the gradient of one candidate's logits for one of `tiles` tiles of `ROWS` images."""
    candidate = tl.program_id(0) // tiles
    offs_n = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    mask_n = offs_n < num_images
    offs_k = tl.arange(0, BLOCK_K)
    x_ptr += candidate.to(tl.int64) * (tl.cast(stride_xd, tl.int64) * VEC)
    row = (candidate.to(tl.int64) * num_images + offs_n) * K
    is_leaf = candidate < tl.load(num_leaves_ptr)
    mask_x = mask_n & is_leaf
    d_loss = tl.load(dloss_ptr + candidate).to(tl.float32)
    label = tl.load(label_ptr + offs_n, mask=mask_n, other=0)
    known = (label >= 0) & (label < K)
    d_loss = tl.where(known, d_loss, float("nan"))
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = _row_logits(x_ptr, offs_n, offs_k, k, mask_x, stride_xn, stride_xk, K, VEC)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        top = new_top
    for k in range(0, K, BLOCK_K):
        x = _row_logits(x_ptr, offs_n, offs_k, k, mask_x, stride_xn, stride_xk, K, VEC)
        classes = k + offs_k
        p = tl.exp(x - top[:, None]) / total[:, None]
        target = tl.where(classes[None, :] == label[:, None], 1.0, 0.0)
        slope = (p - target) + smoothing * (target - 1.0 / K)
        dx = tl.where(is_leaf, slope * d_loss[:, None], 0.0)
        mask = mask_n[:, None] & (classes < K)[None, :]
        offs = row[:, None] + classes[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
