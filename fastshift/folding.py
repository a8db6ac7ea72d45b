"""Batch norms folded into the convolutions before them: found in any module, applied in scoring.

A pair is found by tracing a copy of the module and folded only where nothing else can see the
difference. The module itself is what runs, with its convolution answering for both of the pair, and
each run checks that the pair met as traced.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _torch_module
from torch.utils._pytree import tree_leaves

__all__ = [
    "Fold",
    "FoldCache",
    "NotAsTracedError",
    "apply_folded",
    "conv_norm_pairs",
    "fold",
    "runs_as_written",
    "unfold",
]

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class NotAsTracedError(Exception):
    """A module ran its convolutions and batch norms otherwise than its trace did."""


# Finding pairs


class _Root(nn.Module):
    """Calls a module with one argument, so that its other arguments keep their defaults."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x: Tensor) -> Tensor:
        return self.owner(x)


class _Tracer(fx.Tracer):
    """Notes the tensors that a module reads past the submodules they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple, tuple[Pair, ...]]] = WeakKeyDictionary()


def conv_norm_pairs(owner: nn.Module) -> tuple[Pair, ...]:
    """Find the convolutions of a module whose batch norm can be folded into them.

    Both are of exactly the types `nn.Conv2d` and `nn.BatchNorm2d`, are called once, and the norm
    alone reads the convolution's output. A module that has hooks, that is compiled or that
    `torch.fx` cannot trace has no pairs. The module is not called; a copy is traced, once as long
    as its submodules and their plain attributes stay as they are (3 to 5 ms, as long as a small
    block takes to score).

    Args:
        owner: any module of one tensor.

    Returns:
        The pairs, in the order they are called.
    """
    if not runs_as_written(owner):
        return ()
    state = _state(owner)
    found = _FOUND.get(owner)
    if found is None or found[0] != state:
        found = _FOUND[owner] = state, _trace_pairs(owner)
    return found[1]


def unfold(owner: nn.Module) -> None:
    """Remember that a module has no pairs, since it did not run as traced."""
    _FOUND[owner] = _state(owner), ()


def runs_as_written(owner: nn.Module) -> bool:
    """Whether calling a module and its parts runs their classes' `forward` and nothing else."""
    if any(getattr(_torch_module, f"_global_{name}", None) for name in _HOOKS):
        return False
    for module in owner.modules():
        own = vars(module)
        if (
            "forward" in own
            or any(own.get(f"_{name}") for name in _HOOKS)
            or own.get("_compiled_call_impl") is not None
            or "_orig_mod" in module._modules  # what torch.compile gives
        ):
            return False
    return True


def _state(owner: nn.Module) -> tuple:
    """What a trace depends on: the submodules, and the plain values their code may branch on."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (ref(module), *((k, v) for k, v in vars(module).items() if isinstance(v, plain)))
        for module in owner.modules()
    )


def _trace_pairs(owner: nn.Module) -> tuple[Pair, ...]:
    norms = [module for module in owner.modules() if type(module) is nn.BatchNorm2d]
    if not any(norm.track_running_stats for norm in norms):
        return ()
    tensors = [*owner.parameters(), *owner.buffers()]
    tracer = _Tracer()
    try:
        # A forward that keeps things in its module keeps them in the copy, which shares tensors.
        root = _Root(copy.deepcopy(owner, {id(tensor): tensor for tensor in tensors}))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(root)
    except Exception:  # the user's code met a stand-in for a tensor; with tensors it may do well
        return ()
    kept = (vars(module) for module in root.modules())
    if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves([dict(own) for own in kept])):
        return ()
    return tuple(
        (owner.get_submodule(conv), owner.get_submodule(norm))
        for conv, norm in _pair_names(root, graph, tracer.read)
    )


def _pair_names(root: nn.Module, graph: fx.Graph, read: set[int]) -> list[tuple[str, str]]:
    called: dict[nn.Module, int] = {}
    read = set(read)
    for node in graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(node.target)
            called[module] = called.get(module, 0) + 1
        elif node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            read.add(id(getattr(root.get_submodule(path), name)))

    def is_lone(node: fx.Node, kind: type[nn.Module]) -> bool:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return False
        module = root.get_submodule(node.target)
        tensors = (*module.parameters(), *module.buffers())
        return type(module) is kind and called[module] == 1 and not read & {id(t) for t in tensors}

    pairs = []
    for node in graph.nodes:
        if not is_lone(node, nn.BatchNorm2d):
            continue
        before = node.args[0]
        if isinstance(before, fx.Node) and is_lone(before, nn.Conv2d) and len(before.users) == 1:
            pairs.append(tuple(n.target.removeprefix("owner.") for n in (before, node)))
    return pairs


# Folding them


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
