"""What tests and benchmarks share: tiny data, tiny supernets, and what it means to be equal.

Equal means: float64 to 1e-10; fp32 with an error against float64 at most twice that of the
one-at-a-time computation, by global norm; predictions equal up to images whose relative logit
margin is under 1e-4, of which there may be at most 0.1 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fastshift.ops import (
    Head,
    Unit,
    conv,
    identity,
    inverted_residual,
    projection,
    shuffle_unit,
    shuffle_xception,
)
from fastshift.space import SearchSpace
from fastshift.supernet import ChainSupernet, Supernet

__all__ = [
    "FLOAT64_TOLERANCE",
    "FLOORS",
    "SyntheticData",
    "assert_as_accurate",
    "assert_same_predictions",
    "assert_untouched",
    "chain_supernet",
    "changed_tensors",
    "global_error",
    "micro_supernet",
    "path_gradients",
    "random_archs",
    "randomise",
    "snapshot",
    "stop_at",
    "synthetic_data",
    "tiny_space",
    "tiny_supernet",
    "toy_supernet",
]

FLOAT64_TOLERANCE = 1e-10
# Of a relative error against float64, where twice that of PyTorch in the same type is smaller.
FLOORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FP32_FACTOR = 2.0
MARGIN = 1e-4
MOST_CLOSE = 1e-3

Batch = tuple[Tensor, Tensor]


# Data


class SyntheticTrain:
    """An endless stream of batches, each a pure function of (seed, stream, index, size).

    Attributes:
        spoil: called with (stream, index, images) before a batch leaves; it may put NaN in there.
        asked: (stream, index, size) of every batch given.
    """

    def __init__(self, patterns: Tensor, noise: float, seed: int) -> None:
        self.patterns, self.noise, self.seed = patterns, noise, seed
        self.spoil: Callable[[str, int, Tensor], None] | None = None
        self.asked: list[tuple[str, int, int]] = []

    def batch(self, index: int, size: int | None = None, stream: str = "train") -> Batch:
        """Return images `[N, C, H, W]` and labels `[N]`."""
        size = 16 if size is None else size
        self.asked.append((stream, index, size))
        key = [self.seed, *stream.encode(), index]
        generator = torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))
        images, labels = _draw(self.patterns, self.noise, size, generator)
        if self.spoil is not None:
            self.spoil(stream, index, images)
        return images, labels


@dataclass
class SyntheticData:
    """Images of `num_classes` fixed patterns under noise, with the attributes of `data.Data`."""

    train: SyntheticTrain
    validation: list[Batch]
    calibration: list[Batch]
    num_classes: int
    in_channels: int
    image_size: int
    test: None = None

    def describe(self) -> dict[str, Any]:
        """Return a digest that names the generator's settings."""
        return {"spec": "synthetic", "digest": f"synthetic-{self.train.seed}-{self.num_classes}"}


def _draw(patterns: Tensor, noise: float, size: int, generator: torch.Generator) -> Batch:
    labels = torch.randint(len(patterns), (size,), generator=generator)
    images = patterns[labels] + noise * torch.randn(size, *patterns.shape[1:], generator=generator)
    return images, labels


def synthetic_data(
    *,
    num_classes: int = 4,
    in_channels: int = 3,
    image_size: int = 8,
    validation: Sequence[int] = (24, 24),
    calibration: Sequence[int] = (16, 16, 9),
    noise: float = 1.0,
    seed: int = 0,
) -> SyntheticData:
    """Make a small classification task.

    Args:
        num_classes: patterns.
        in_channels: channels of an image.
        image_size: side of an image.
        validation: size of each scoring batch.
        calibration: size of each calibration batch.
        noise: standard deviation of the noise; the patterns have 1.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(num_classes, in_channels, image_size, image_size, generator=generator)
    return SyntheticData(
        train=SyntheticTrain(patterns, noise, seed),
        validation=[_draw(patterns, noise, size, generator) for size in validation],
        calibration=[_draw(patterns, noise, size, generator) for size in calibration],
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
    )


# Spaces and supernets


def tiny_space(
    num_classes: int = 4, *, dropout: float = 0.0, affine: bool = True, image_size: int = 8
) -> SearchSpace:
    """Make a space of 4 blocks with 4, 4, 2 and 3 choices and every kind of frame."""
    blocks = [
        [identity(8), inverted_residual(8, 8, 1, 2, 3), conv(8, 8, 3, 1), shuffle_unit(8, 8, 1, 3)],
        [
            projection(8, 16, 2),
            inverted_residual(8, 16, 2, 2, 3),
            shuffle_unit(8, 16, 2, 5),
            shuffle_xception(8, 16, 2),
        ],
        [identity(16), inverted_residual(16, 16, 1, 2, 5)],
        [conv(16, 16, 1, 1), shuffle_unit(16, 16, 1, 3), identity(16)],
    ]
    return SearchSpace(
        "tiny",
        stem=(Unit("dense", 3, 8, kernel=3),),
        blocks=blocks,
        head=Head(16, (Unit("pointwise", 16, 12),), num_classes, dropout=dropout),
        in_channels=3,
        image_size=image_size,
        affine=affine,
    )


def tiny_supernet(
    num_classes: int = 4, *, dropout: float = 0.0, affine: bool = True, seed: int = 0
) -> Supernet:
    """Make a supernet of `tiny_space` with random weights and statistics."""
    return randomise(Supernet(tiny_space(num_classes, dropout=dropout, affine=affine)), seed)


class Squeeze(nn.Module):
    """A squeeze-and-excitation block: an op that no description has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, 2, 1)
        self.up = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        gate = torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return x * gate


class Residual(nn.Module):
    """`x + f(x)`, with a batch norm before the convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        return x + self.body(functional.relu(self.norm(x)))


class Zero(nn.Module):
    """The `none` op of cell spaces: nothing gets through, and no gradient comes back."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros of the input's shape."""
        return torch.zeros_like(x)


def chain_supernet(
    num_classes: int = 4, *, dropout: float = 0.0, seed: int = 0, blocks: Sequence | None = None
) -> ChainSupernet:
    """Make a supernet of arbitrary modules: 5 blocks with 1, 4, 3, 2 and 3 choices.

    Args:
        num_classes: outputs.
        dropout: before the classifier.
        seed: of the weights.
        blocks: other candidate ops, `[L][O]`, from 6 channels to 6 at half the image's resolution.
    """
    if blocks is None:
        blocks = [
            [Residual(6)],
            [
                nn.Identity(),
                nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True)),
                nn.MaxPool2d(3, stride=1, padding=1),
                Squeeze(6),
            ],
            [
                nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8, momentum=None, eps=1e-3)),
                nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
                nn.Sequential(
                    nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False, momentum=0.3)
                ),
            ],
            [nn.Identity(), Residual(8)],
            [
                nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)),
                nn.Conv2d(8, 6, 1),
                nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1, groups=2)),
            ],
        ]
    return randomise(
        ChainSupernet(
            nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            blocks,
            nn.Sequential(
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(6, num_classes),
            ),
            input_shape=(3, 8, 8),
        ),
        seed,
    )


def micro_supernet(num_classes: int = 4, *, dropout: float = 0.25, seed: int = 0) -> ChainSupernet:
    """Make the cheapest supernet that has all parts: 3 blocks of 3 choices, 27 architectures."""
    blocks = [
        [
            nn.Identity(),
            nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU()),
        ]
        for _ in range(3)
    ]
    stem = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, num_classes))
    space = _MICRO_SPACES.get(num_classes)  # measured once: it takes as long as a short search
    net = ChainSupernet(stem, blocks, head, input_shape=(3, 8, 8), name="micro", space=space)
    _MICRO_SPACES[num_classes] = net.space
    return randomise(net, seed)


_MICRO_SPACES: dict[int, SearchSpace] = {}


class Mask(nn.Module):
    """Keep some pixels, always the same: what is dropped no later block can bring back."""

    def __init__(self, size: int, kept: int, generator: torch.Generator) -> None:
        super().__init__()
        mask = torch.zeros(size * size)
        mask[torch.randperm(size * size, generator=generator)[:kept]] = 1
        self.register_buffer("mask", mask.view(size, size))
        self.gain = nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, size, size]` to the same shape."""
        return x * self.mask * self.gain


def toy_supernet(best: Sequence[int], num_classes: int = 4, seed: int = 0) -> ChainSupernet:
    """Make a supernet whose best architecture is known.

    Choice `best[l]` of block `l` keeps all pixels, the other two keep two thirds and a third.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for choice in best:
        block: list[nn.Module] = [Mask(8, kept, generator) for kept in (42, 21)]
        block.insert(choice, Mask(8, 64, generator))
        blocks.append(block)
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    stem = nn.Conv2d(1, 1, 1, bias=False)
    for layer, value in ((head[1], 0.0), (stem, 1.0)):
        for parameter in layer.parameters():
            nn.init.constant_(parameter, value)
    return ChainSupernet(stem, blocks, head, input_shape=(1, 8, 8), name="toy")


@torch.no_grad()
def randomise(supernet: ChainSupernet, seed: int = 0) -> Any:
    """Draw weights, scales, shifts and running statistics, so that none has its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in supernet.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.normal_(0.0, (2.0 / fan) ** 0.5, generator=generator)
    for module in supernet.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=generator)
            if module.track_running_stats:
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.num_batches_tracked.fill_(7)
    return supernet


def random_archs(space: SearchSpace, num: int, seed: int = 0) -> np.ndarray:
    """Draw architectures, `[num, L]` uint8, repeats possible."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, space.num_choices, (num, space.num_blocks)).astype(np.uint8)


# What moved


def snapshot(supernet: ChainSupernet) -> dict[str, Any]:
    """Copy all that scoring must leave alone: tensors, gradients, modes and settings."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in supernet.tensors().items()},
        "addresses": {name: tensor.data_ptr() for name, tensor in supernet.tensors().items()},
        "grads": {
            name: None if p.grad is None else p.grad.clone()
            for name, p in supernet.named_parameters()
        },
        "requires": {name: p.requires_grad for name, p in supernet.named_parameters()},
        "modes": {name: module.training for name, module in supernet.named_modules()},
        "momenta": {
            name: (module.momentum, module.track_running_stats)
            for name, module in supernet.named_modules()
            if isinstance(module, _BatchNorm)
        },
        "version": supernet.version,
    }


def assert_untouched(supernet: ChainSupernet, before: Mapping[str, Any]) -> None:
    """Check that nothing of a snapshot changed, bit for bit, nor moved in memory."""
    after = snapshot(supernet)
    assert changed_tensors(before["tensors"], after["tensors"]) == set()
    for name, grad in before["grads"].items():
        found = after["grads"][name]
        assert (grad is None) == (found is None), f"gradient of {name}"
        assert grad is None or torch.equal(grad, found), f"gradient of {name}"
    for part in ("addresses", "requires", "modes", "momenta", "version"):
        assert after[part] == before[part], part


def changed_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that differ in any bit, or are in one mapping only."""
    same = {
        name
        for name in before.keys() & after.keys()
        if before[name].dtype == after[name].dtype
        and before[name].shape == after[name].shape
        and before[name].detach().cpu().numpy().tobytes()
        == after[name].detach().cpu().numpy().tobytes()
    }
    return set(before.keys() | after.keys()) - same


# What it means to be equal


def _float64(values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.from_numpy(np.asarray(values, np.float64))
    return values.detach().double().cpu()


def global_error(found: Iterable[Any], exact: Iterable[Any]) -> float:
    """Relative error of many tensors by global norm, in float64; None stands for zeros."""
    difference = total = 0.0
    for a, b in zip(found, exact, strict=True):
        if a is None and b is None:
            continue
        a, b = (0.0 if x is None else _float64(x) for x in (a, b))
        b = torch.zeros_like(a) if isinstance(b, float) else b
        difference += float(((a - b) ** 2).sum())
        total += float((b**2).sum())
    return (difference / total) ** 0.5 if total else difference**0.5


def assert_as_accurate(
    found: Sequence[Any], plain: Sequence[Any], exact: Sequence[Any], *, floor: float = 1e-7
) -> None:
    """Check that an fp32 result is at most twice as far from float64 as the one-at-a-time one.

    Args:
        found: the result, fp32.
        plain: the same, one at a time, fp32.
        exact: the same, one at a time, float64.
        floor: an error that is always fine: the rounding of fp32 itself.
    """
    error, bound = global_error(found, exact), global_error(plain, exact)
    assert error <= max(FP32_FACTOR * bound, floor), f"error {error:.3g}, one at a time {bound:.3g}"


def assert_same_predictions(found: Tensor, plain: Tensor) -> None:
    """Check that logits `[..., classes]` choose the same classes, close calls aside."""
    found, plain = found.double(), plain.double()
    differs = found.argmax(-1) != plain.argmax(-1)
    highest = plain.topk(2, dim=-1).values
    margin = (highest[..., 0] - highest[..., 1]) / plain.abs().amax(-1)
    assert not (differs & (margin > MARGIN)).any(), "a prediction differs that is not a close call"
    assert differs.double().mean() <= MOST_CLOSE, f"{int(differs.sum())} predictions differ"


def path_gradients(
    supernet: ChainSupernet,
    archs: np.ndarray,
    images: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> tuple[dict[str, Tensor | None], list[float]]:
    """Sum the gradients of plain forward passes, one path at a time, on a copy of the supernet.

    Returns:
        The gradient of each parameter by name, None where no path used it, and each row's loss.
    """
    net = copy.deepcopy(supernet).train()
    net.zero_grad(set_to_none=True)
    losses = []
    for arch in archs:
        logits = net(images, arch)
        loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        loss.backward()
        losses.append(float(loss.detach()))
    return {name: p.grad for name, p in net.named_parameters()}, losses


def stop_at(call: int) -> Callable[[], bool]:
    """Make a `stop` that says yes when it is asked for the `call`-th time, counted from 1."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == call

    return stop
