"""Batch norms folded into the convolutions before them, for as long as a module is called.

The module itself is what runs, with its convolution answering for both of a pair, and for the
activation behind them; each run checks that these met as their trace said (`tracing`), or is done
again unfolded. What the trace cannot see is a reader outside of the module's own tensors: one that
keeps a norm's output in a global finds it activated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastshift.tracing import Pair

__all__ = ["Fold", "FoldCache", "NotAsTracedError", "apply_folded", "fold"]


# As PyTorch's own compiler names them to oneDNN's convolution. Its ReLUs are not among them: they
# make a number of NaN, and a network that has diverged would get a score.
_FUSED = {nn.Hardswish: "hardswish", nn.SiLU: "swish"}
_IN_PLACE = {
    nn.ReLU: torch.relu_,
    nn.ReLU6: lambda x: functional.relu6(x, inplace=True),
    nn.Hardswish: lambda x: functional.hardswish(x, inplace=True),
    nn.SiLU: lambda x: functional.silu(x, inplace=True),
}


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
    """A pair under given statistics: its convolution does the work of both, and of an activation.

    Args:
        pair: of a trace.
        mean, var: that the norm normalises by, `[C]` each.
    """

    def __init__(self, pair: Pair, mean: Tensor, var: Tensor) -> None:
        self.pair = pair
        self.sources = _sources(pair, mean, var)
        self.versions = _versions(self.sources)
        self.weight, self.bias = fold(pair.conv, pair.norm, mean, var)
        self._awaited: list[nn.Module] = []  # that are to read the row next, in this order
        self._row: Tensor | None = None
        self._version: int | None = None
        self._is_activated = False

    def holds(self, pair: Pair, mean: Tensor, var: Tensor) -> bool:
        """Whether this was made of just these values, as they are now."""
        sources = _sources(pair, mean, var)
        return all(a is b for a, b in zip(sources, self.sources, strict=True)) and (
            self.versions is not None and self.versions == _versions(sources)
        )

    def start(self) -> None:
        """Let the pair's modules run folded."""
        self._row, self._awaited = None, [m for m in self.pair if m is not None]
        # Past nn.Module.__setattr__, as an instance's attribute in front of its class's.
        for module, forward in zip(
            self.pair, (self._convolve, self._normalise, self._activate), strict=True
        ):
            if module is not None:
                module.__dict__["forward"] = forward

    def stop(self) -> None:
        """Let the pair's modules run as themselves again."""
        self._row = None
        for module in self.pair:
            if module is not None:
                module.__dict__.pop("forward", None)

    @property
    def is_done(self) -> bool:
        """Whether the pair, and its activation, have run, once."""
        return not self._awaited

    def _convolve(self, x: Tensor) -> Tensor:
        conv, _, activation = self.pair
        if self._awaited[:1] != [conv]:
            raise NotAsTracedError
        self._is_activated = _can_fuse(conv, activation, x)
        if self._is_activated:
            y = torch.ops.mkldnn._convolution_pointwise(
                x,
                self.weight,
                self.bias,
                conv.padding,
                conv.stride,
                conv.dilation,
                conv.groups,
                _FUSED[type(activation)],
                [],
                "",
            )
        else:
            y = conv._conv_forward(x, self.weight, self.bias)
        return self._passed_on(y)

    def _normalise(self, x: Tensor) -> Tensor:
        return self._passed_on(self._awaited_by(self.pair.norm, x))

    def _activate(self, x: Tensor) -> Tensor:
        activation = self.pair.activation
        y = self._awaited_by(activation, x)
        return self._passed_on(y if self._is_activated else _IN_PLACE[type(activation)](y))

    def _awaited_by(self, module: nn.Module, x: Tensor) -> Tensor:
        if self._awaited[:1] != [module] or x is not self._row or _version(x) != self._version:
            raise NotAsTracedError
        return x

    def _passed_on(self, y: Tensor) -> Tensor:
        del self._awaited[0]
        self._row, self._version = (y, _version(y)) if self._awaited else (None, None)
        return y


def _can_fuse(conv: nn.Conv2d, activation: nn.Module | None, x: Tensor) -> bool:
    """Whether oneDNN's convolution gives the activation along: float32 on a CPU."""
    return (
        type(activation) in _FUSED
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def _sources(pair: Pair, mean: Tensor, var: Tensor) -> tuple:
    conv, norm, _ = pair
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

    def of(self, pair: Pair, mean: Tensor, var: Tensor) -> Fold:
        """The fold of a pair under given statistics, as weights and statistics are now."""
        key = id(mean)  # kept alive by the fold
        found = self._kept.get(key)
        if found is not None and found.holds(pair, mean, var):
            return found
        made = Fold(pair, mean, var)
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
        NotAsTracedError: a pair did not run exactly once, each part on what the one before gave.
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
