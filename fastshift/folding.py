"""Batch norms folded into the convolutions before them, for as long as a module is called.

The module itself is what runs, with its convolution answering for both of a pair; each run checks
that the pair met as its trace said (`tracing`), so that no result changes silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Fold", "FoldCache", "NotAsTracedError", "apply_folded", "fold"]


class NotAsTracedError(Exception):
    """A module ran its convolutions and batch norms otherwise than its trace did."""


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what a pair does under given statistics.

    Args:
        conv, norm: the pair.
        mean, var: that the norm normalises by, `[C]` each.

    Returns:
        The weight, of the shape of the convolution's, and the bias, `[C]`.
    """
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    mean = mean if conv.bias is None else mean - conv.bias
    shift = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


class Fold:
    """A pair under given statistics: its convolution does the work of both.

    Args:
        conv, norm: the pair.
        mean, var: that the norm normalises by, `[C]` each.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
        self.conv, self.norm = conv, norm
        self.sources = _sources(conv, norm, mean, var)
        self.versions = _versions(self.sources)
        self.weight, self.bias = fold(conv, norm, mean, var)
        self._convolved: Tensor | None = None
        self._version: int | None = None
        self._is_done = False

    def holds(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> bool:
        """Whether this was made of just these values, as they are now."""
        sources = _sources(conv, norm, mean, var)
        return all(a is b for a, b in zip(sources, self.sources, strict=True)) and (
            self.versions is not None and self.versions == _versions(sources)
        )

    def start(self) -> None:
        """Let the pair's modules run folded."""
        self._convolved, self._is_done = None, False
        # Past nn.Module.__setattr__, as an instance's attribute in front of its class's.
        self.conv.__dict__["forward"] = self._convolve
        self.norm.__dict__["forward"] = self._normalise

    def stop(self) -> None:
        """Let the pair's modules run as themselves again."""
        self._convolved = None
        for module in (self.conv, self.norm):
            module.__dict__.pop("forward", None)

    @property
    def is_done(self) -> bool:
        """Whether the pair has run, once."""
        return self._is_done

    def _convolve(self, x: Tensor) -> Tensor:
        if self._convolved is not None or self._is_done:
            raise NotAsTracedError
        y = self.conv._conv_forward(x, self.weight, self.bias)
        self._convolved, self._version = y, _version(y)
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        if x is not self._convolved or _version(x) != self._version:
            raise NotAsTracedError
        self._convolved, self._is_done = None, True
        return x


def _sources(conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple:
    return conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, mean, var


def _version(tensor: Tensor) -> int | None:
    """Changes so far; an inference tensor does not count them."""
    return None if tensor.is_inference() else tensor._version


def _versions(sources: tuple) -> tuple | None:
    versions = tuple(_version(s) if isinstance(s, Tensor) else s for s in sources if s is not None)
    return None if None in versions else versions


class FoldCache:
    """Folds that are made once for all batches, up to a number of bytes.

    A fold takes 25 to 30 us a pair, 1 to 5 % of a MobileNetV3 block on 16 images of 4 to 16
    pixels, and less than the norm's own pass in every shape that was timed. So what does not fit is
    folded again for each batch; the first come stay, since a walk over more nodes than fit would
    find none of the latest.

    Args:
        limit: bytes of folded weights.
    """

    def __init__(self, limit: int = 64 << 20) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: dict[int, Fold] = {}

    def of(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> Fold:
        """The fold of a pair under given statistics, as weights and statistics are now."""
        key = id(mean)  # kept alive by the fold
        found = self._kept.get(key)
        if found is not None and found.holds(conv, norm, mean, var):
            return found
        made = Fold(conv, norm, mean, var)
        size = made.weight.nbytes
        if found is not None or (made.versions is not None and self.bytes + size <= self.limit):
            self.bytes += 0 if found is not None else size
            self._kept[key] = made
        return made


def apply_folded(folds: Sequence[Fold], call: Callable[[], Tensor]) -> Tensor:
    """Call a module of which some pairs run folded.

    Args:
        folds: of pairs of the module.
        call: applies the module.

    Returns:
        What `call` gives.

    Raises:
        NotAsTracedError: a pair did not run exactly once, its norm on its convolution's output.
    """
    try:
        for each in folds:
            each.start()
        y = call()
        if not all(each.is_done for each in folds):
            raise NotAsTracedError
        return y
    finally:
        for each in folds:
            each.stop()
