"""Convolutions whose batch norm and activation can be folded into them, found by a trace."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _torch_module
from torch.utils._pytree import tree_leaves

__all__ = [
    "ACTIVATIONS",
    "Pair",
    "conv_norm_pairs",
    "has_global_hooks",
    "is_changed",
    "runs_as_written",
    "unfold",
]

# Activations that a folded convolution can take along.
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)


class Pair(NamedTuple):
    """A convolution, its batch norm, and the activation that alone reads the norm's output."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: nn.Module | None


_GLOBAL_HOOKS = tuple(
    f"_global_{name}"
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
)


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
    alone reads the convolution's output. An activation is taken along where it is one of
    `ACTIVATIONS`, is called once, and alone reads the norm's output. A module that has hooks, that
    is compiled or that `torch.fx` cannot trace has no pairs. The module is not called; a copy is
    traced, once as long as its submodules and their plain attributes stay as they are (3 to 5 ms,
    as long as a small block takes to score).

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
    return not (has_global_hooks() or any(map(is_changed, owner.modules())))


def has_global_hooks() -> bool:
    """Whether calling any module at all runs something else too."""
    return any(getattr(_torch_module, name, None) for name in _GLOBAL_HOOKS)


def is_changed(module: nn.Module) -> bool:
    """Whether calling this module, its parts aside, runs other than its class's `forward`."""
    own = module.__dict__
    get = own.get
    return bool(
        get("_forward_hooks")
        or get("_forward_pre_hooks")
        or get("_backward_hooks")
        or get("_backward_pre_hooks")
        or "forward" in own
        or get("_compiled_call_impl") is not None
        or "_orig_mod" in module._modules  # what torch.compile gives
    )


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
        Pair(*(None if name is None else owner.get_submodule(name) for name in names))
        for names in _pair_names(root, graph, tracer.read)
    )


def _pair_names(
    root: nn.Module, graph: fx.Graph, read: set[int]
) -> list[tuple[str, str, str | None]]:
    called: dict[nn.Module, int] = {}
    read = set(read)
    for node in graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(node.target)
            called[module] = called.get(module, 0) + 1
        elif node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            read.add(id(getattr(root.get_submodule(path), name)))

    def is_lone(node: fx.Node, *kinds: type[nn.Module]) -> bool:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return False
        module = root.get_submodule(node.target)
        tensors = (*module.parameters(), *module.buffers())
        return type(module) in kinds and called[module] == 1 and not read & {id(t) for t in tensors}

    pairs = []
    for node in graph.nodes:
        if not is_lone(node, nn.BatchNorm2d):
            continue
        before = node.args[0]
        if isinstance(before, fx.Node) and is_lone(before, nn.Conv2d) and len(before.users) == 1:
            conv, norm = (n.target.removeprefix("owner.") for n in (before, node))
            after = next(iter(node.users), None) if len(node.users) == 1 else None
            takes = after is not None and is_lone(after, *ACTIVATIONS)
            pairs.append((conv, norm, after.target.removeprefix("owner.") if takes else None))
    return pairs
