"""Cross-entropy and wrong answers of every candidate of a step: logits `[D, N, K]` -> `[D]` each.

Fused: the log-softmax over classes, label smoothing, the picked label, the argmax and the sums over
images, for all candidates. With `p = softmax(x)`, smoothing `e` and label `y`,

    loss_d = sum_n (1 - e) (-log p_y) + e mean_k (-log p_k)
    d x_k  = d loss_d (p_k - [k = y] + e ([k = y] - 1 / K))

The forward pass reads the logits once and writes two numbers a candidate and tile of images; the
backward pass reads them once and writes their gradient once. PyTorch's ops do so candidate by
candidate, each op a launch and a pass.

Tiles of images are summed in two launches, each in a fixed order, so results repeat bit for bit;
where one tile holds all images there is one launch.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastshift.kernels.loss_kernels import loss_bwd_kernel, loss_fwd_kernel, loss_sum_kernel

__all__ = [
    "candidate_loss",
    "candidate_loss_backward_ref",
    "candidate_loss_ref",
]

_TILE = 2048  # logits in registers at a time: 16 a thread with 4 warps
_MAX_ROWS = 32
_MAX_TILES = 128  # of images, a candidate


def candidate_loss_ref(
    logits: Tensor, labels: Tensor, num_leaves: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Define `candidate_loss` in plain PyTorch; sums are of float32 or of the logits' float64."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(wide)
    num_classes = x.shape[-1]
    known = (labels >= 0) & (labels < num_classes)
    label = labels.clamp(0, num_classes - 1).expand(x.shape[:-1])
    log_p = x.log_softmax(dim=-1)
    loss = -log_p.gather(-1, label[..., None])[..., 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=-1)
    loss = torch.where(known, loss, torch.nan)
    wrong = (x.argmax(dim=-1) != label) | x.isnan().any(dim=-1) | ~known
    is_leaf = torch.arange(x.shape[0], device=x.device) < num_leaves
    losses = torch.where(is_leaf, loss.sum(dim=1), 0.0)
    return losses, torch.where(is_leaf, wrong.sum(dim=1), 0)


def candidate_loss_backward_ref(
    d_losses: Tensor, logits: Tensor, labels: Tensor, num_leaves: Tensor, label_smoothing: float
) -> Tensor:
    """Define the gradient of the losses to the logits: `[D, N, K]`, contiguous, of their type."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    num_classes = logits.shape[-1]
    classes = torch.arange(num_classes, device=logits.device)
    target = (labels[:, None] == classes).to(wide)
    target = target - label_smoothing * (target - 1 / num_classes)
    known = ((labels >= 0) & (labels < num_classes))[:, None]
    slope = torch.where(known, logits.to(wide).softmax(dim=-1) - target, torch.nan)
    is_leaf = (torch.arange(logits.shape[0], device=logits.device) < num_leaves)[:, None, None]
    d_logits = torch.where(is_leaf, slope * d_losses.to(wide)[:, None, None], 0.0)
    return d_logits.to(logits.dtype).contiguous()


def _blocks(logits: Tensor) -> dict[str, int]:
    """Sizes of a tile, and the elements that every row's start is a multiple of."""
    _, num_images, num_classes = logits.shape
    block_k = min(triton.next_power_of_2(num_classes), _TILE)
    rows = min(_TILE // block_k, triton.next_power_of_2(num_images), _MAX_ROWS)
    vec = math.gcd(16 // logits.element_size(), num_classes, *logits.stride()[:2])
    return {"K": num_classes, "VEC": vec, "ROWS": rows, "BLOCK_K": block_k}


def _strides(logits: Tensor, vec: int) -> tuple[int, int, int]:
    """Strides as the kernels take them: those of rows in `vec` elements."""
    stride_xd, stride_xn, stride_xk = logits.stride()
    return stride_xd // vec, stride_xn // vec, stride_xk


def _loss_fwd_triton(
    logits: Tensor, labels: Tensor, num_leaves: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    candidates, num_images, _ = logits.shape
    blocks = _blocks(logits)
    tiles = min(triton.cdiv(num_images, blocks["ROWS"]), _MAX_TILES)
    losses = logits.new_empty(candidates, dtype=torch.float32)
    wrongs = logits.new_empty(candidates, dtype=torch.int64)
    single = tiles == 1
    loss = losses if single else logits.new_empty(candidates, tiles, dtype=torch.float32)
    wrong = wrongs if single else logits.new_empty(candidates, tiles, dtype=torch.int32)
    loss_fwd_kernel[(tiles * candidates,)](
        logits,
        labels,
        num_leaves,
        loss,
        wrong,
        label_smoothing,
        num_images,
        tiles,
        *_strides(logits, blocks["VEC"]),
        SMOOTHED=label_smoothing > 0,
        **blocks,
        num_warps=4,
    )
    if not single:
        loss_sum_kernel[(candidates,)](
            loss,
            wrong,
            losses,
            wrongs,
            tiles,
            TILES=triton.next_power_of_2(tiles),
            num_warps=1,
        )
    return losses, wrongs


def _loss_bwd_triton(
    d_losses: Tensor, logits: Tensor, labels: Tensor, num_leaves: Tensor, label_smoothing: float
) -> Tensor:
    candidates, num_images, _ = logits.shape
    blocks = _blocks(logits)
    d_logits = logits.new_empty(logits.shape)
    tiles = triton.cdiv(num_images, blocks["ROWS"])
    loss_bwd_kernel[(tiles * candidates,)](
        d_losses,
        logits,
        labels,
        num_leaves,
        d_logits,
        label_smoothing,
        num_images,
        tiles,
        *_strides(logits, blocks["VEC"]),
        **blocks,
        num_warps=4,
    )
    return d_logits


class _CandidateLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, num_leaves, label_smoothing):
        ctx.save_for_backward(logits, labels, num_leaves)
        ctx.label_smoothing = label_smoothing
        with torch._C._AutoDispatchBelowAutograd():
            losses, wrong = torch.ops.fastshift.candidate_loss(
                logits, labels, num_leaves, label_smoothing
            )
        ctx.mark_non_differentiable(wrong)
        return losses, wrong

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses, _):
        d_logits = torch.ops.fastshift.candidate_loss_backward(
            d_losses.contiguous(), *ctx.saved_tensors, ctx.label_smoothing
        )
        return d_logits, None, None, None


def _loss_autograd(logits, labels, num_leaves, label_smoothing):
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CandidateLoss.apply(logits, labels, num_leaves, label_smoothing)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastshift.candidate_loss(logits, labels, num_leaves, label_smoothing)


def _loss_fake(logits, labels, num_leaves, label_smoothing):
    wide = torch.promote_types(logits.dtype, torch.float32)
    candidates = logits.shape[0]
    return logits.new_empty(candidates, dtype=wide), logits.new_empty(candidates, dtype=torch.int64)


def _loss_backward_fake(d_losses, logits, labels, num_leaves, label_smoothing):
    return logits.new_empty(logits.shape)


_LIBRARY = torch.library.Library("fastshift", "FRAGMENT")
_ARGUMENTS = "Tensor logits, Tensor labels, Tensor num_leaves, float label_smoothing"
for _schema, _ref, _cuda, _fake in (
    (
        f"candidate_loss({_ARGUMENTS}) -> (Tensor, Tensor)",
        candidate_loss_ref,
        _loss_fwd_triton,
        _loss_fake,
    ),
    (
        f"candidate_loss_backward(Tensor d_losses, {_ARGUMENTS}) -> Tensor",
        candidate_loss_backward_ref,
        _loss_bwd_triton,
        _loss_backward_fake,
    ),
):
    _name = _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_name, _ref, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"fastshift::{_name}", _fake, lib=_LIBRARY)
_LIBRARY.impl("candidate_loss", _loss_autograd, "Autograd")


def candidate_loss(
    logits: Tensor,
    labels: Tensor,
    num_leaves: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute each candidate's summed cross-entropy and its number of wrong answers.

    Smoothing is that of `torch.nn.functional.cross_entropy`. The answer is the first of the largest
    logits, as `torch.argmax` gives it; an image with a NaN among its logits counts as wrong. A
    label outside of the classes gives a loss of NaN and a wrong answer: nothing waits for the
    device to say so. The losses are differentiable, once.

    Args:
        logits: `[D, N, K]`, float32, float16 or bfloat16 (float64 on a CPU alone); any strides.
        labels: `[N]` int64, contiguous.
        num_leaves: `[1]` int32 on the device: candidates from this one on are padding, whose
            logits are not read, with loss, count and gradient zero; None where there are none.
        label_smoothing: in [0, 1].

    Returns:
        Losses, nats summed over images, `[D]` float32 (float64 of float64), and wrong answers,
        `[D]` int64.

    Raises:
        ValueError: a shape, type or value is not as described.
    """
    if logits.dim() != 3 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits: {tuple(logits.shape)} of {logits.dtype}; expected [D, N, K] of floats, not "
            "empty"
        )
    if labels.shape != logits.shape[1:2] or labels.dtype is not torch.int64:
        raise ValueError(
            f"labels: {tuple(labels.shape)} of {labels.dtype}; "
            f"expected [{logits.shape[1]}] of torch.int64"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: {label_smoothing}; expected a value in [0, 1]")
    if logits.dtype is torch.float64 and logits.device.type != "cpu":
        raise ValueError(f"logits: float64 on {logits.device}; expected a narrower type there")
    if num_leaves is None:
        num_leaves = torch.full((1,), logits.shape[0], dtype=torch.int32, device=logits.device)
    elif num_leaves.shape != (1,) or num_leaves.dtype is not torch.int32:
        raise ValueError(
            f"num_leaves: {tuple(num_leaves.shape)} of {num_leaves.dtype}; "
            "expected [1] of torch.int32"
        )
    return torch.ops.fastshift.candidate_loss(
        logits, labels.contiguous(), num_leaves, float(label_smoothing)
    )
