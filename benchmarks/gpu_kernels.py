"""Each kernel at named shapes of three spaces, beside PyTorch's ops on the same device.

PyTorch's side has its weights in the rows' own type and channels innermost, so that it may use the
same tensor cores; of a gradient its forward pass is not timed. It runs node by node, as a loop over
architectures does. Both run from Python and, where they can, captured as CUDA graphs: then nothing
of a time is Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from catalogue import Case, Network, cases
from gpu_ceilings import plain_fp32, share
from gpu_items import Bench, Item, Row
from gpu_references import error_of
from gpu_timing import Call, Several, in_turns
from kernel_sites import SITES, Site, network
from torch import Tensor
from torch.nn import functional

from fastshift import _operators_ref
from fastshift.errors import CaptureError
from fastshift.graphs import CapturedStep
from fastshift.kernels import images
from fastshift.kernels.described import Layer

__all__ = ["items"]

MOST_COPIES = 256  # of the inputs, which together are to be larger than the cache
MOST_BYTES = 4 << 30  # of those copies
SECONDS = 3.0  # of a case's rounds
ORDER = ("layer_infer", "layer_train", "layer_backward", "candidate_loss")
TINY = Site("digits", 8, 4, 2, 1, 1, 1, "block 1", {})


def items(*, tiny: bool) -> list[Item]:
    """Every case: the types that people use first, within them the layers first.

    Args:
        tiny: at the shapes of a dry run, which Triton's interpreter can run.
    """
    sites, dtypes = ((TINY,), ("fp32",)) if tiny else (SITES, ("bf16", "fp32", "fp16"))
    places = [_place(site, tiny) for site in sites]
    found = [
        (case, place.levels[0].layer)
        for dtype in dtypes
        for place in places
        for case in cases(place, dtype)
    ]

    def rank(pair: tuple[Case, Layer]) -> tuple[int, int]:
        name = pair[0].name
        return dtypes.index(pair[0].dtype), ORDER.index(name) if name in ORDER else len(ORDER)

    return [
        Item("kernels", _name(case), partial(_measure, case, layer))
        for case, layer in sorted(found, key=rank)
    ]


def _name(case: Case) -> str:
    return f"{case.name} | {case.site} | {case.dtype}"


def _place(site: Site, tiny: bool) -> Network:
    place = network(site, whole=False)
    if not tiny:
        return place
    # The interpreter takes milliseconds a program: one op, four pixels, some of the parameters.
    small = {"choice": (3,), "rows": (1, 2, 2, 2, 8)}
    levels = tuple(replace(level, **small) for level in place.levels)
    return replace(place, levels=levels, parameters=place.parameters[:4])


def _measure(case: Case, layer: Layer, bench: Bench) -> Iterator[Row]:
    """Check a case, then time it and PyTorch in turns."""
    copies = _copies(case, bench)
    with plain_fp32():
        errors = {"triton": error_of(case, layer, copies[0], case.launcher)}
        calls: dict[str, Call | Several] = {"triton": _rotating(copies, case.launcher)}
        if case.dtype == "fp32" and case.dot and not bench.tiny:
            in_tf32 = partial(case.launcher, precision="tf32")
            errors["triton tf32"] = error_of(case, layer, copies[0], in_tf32, tf32=True)
            calls["triton tf32"] = _rotating(copies, in_tf32)
        calls["pytorch"] = _pytorch(case, layer, copies)
        calls |= _captured(calls, len(copies), bench, case)
        times = in_turns(calls, bench.stopwatch, bench.clock, seconds=SECONDS, **bench.rounds)
    for provider, found in times.items():
        own = found.row()
        precision = "tf32" if "tf32" in provider else case.dtype
        rates = share(
            bench.ceilings,
            precision,
            case.flops if case.dot else 0,
            case.read_bytes + case.written_bytes,
            1e-3 * own["median_ms"],
        )
        is_baseline = provider.startswith("pytorch")
        yield {
            "provider": provider,
            "is_baseline": is_baseline,
            **own,
            **rates,
            "error": None if is_baseline else errors[provider.removesuffix(" graph")],
            "rotated_bytes": len(copies) * case.read_bytes,
            "in_cache": len(copies) * case.read_bytes < 2 * bench.cache_bytes,
        }


def _copies(case: Case, bench: Bench) -> list[tuple]:
    """As many sets of inputs as are twice as large as the cache together, at least two."""
    wanted = -(-2 * bench.cache_bytes // case.read_bytes)
    fit = max(MOST_BYTES // (case.read_bytes + case.written_bytes), 1)
    number = max(min(wanted, fit, MOST_COPIES), 1 if case.read_bytes > MOST_BYTES // 2 else 2)
    return [case.prepare(bench.device.type) for _ in range(number)]


def _rotating(copies: list[tuple], launcher: Callable) -> Call:
    return lambda number: launcher(*copies[number % len(copies)])


def _captured(calls: dict[str, Call], number: int, bench: Bench, case: Case) -> dict[str, Several]:
    """Each call over all copies as one graph; where there are none, or one fails, it is told."""
    if bench.device.type != "cuda":
        bench.leave(f"{_name(case)}, graphs", "no CUDA graphs on a CPU")
        return {}
    found = {}
    for name, call in calls.items():

        def all_copies(call: Call = call) -> None:
            for index in range(number):
                call(index)

        step = CapturedStep(all_copies, torch.device("cuda", torch.cuda.current_device()))
        try:
            step.capture()
        except (CaptureError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            bench.leave(f"{_name(case)}, {name} graph", why)
            continue
        found[f"{name} graph"] = Several(step.replay, number)
    return found


def _pytorch(case: Case, layer: Layer, copies: list[tuple]) -> Call:
    """PyTorch's ops on the same inputs."""
    makers = {
        "sgd_step": _optimizer_step,
        "candidate_loss": _loss,
        "candidate_loss_backward": _loss_gradient,
        "augment_images": lambda given: partial(images.augment_images_ref, *given),
        "layer_infer": partial(_layer, layer),
        "layer_train": partial(_layer, layer),
        "layer_backward": partial(_layer_gradient, layer),
    }
    return _rotate([makers[case.name](given) for given in copies])


def _rotate(calls: list[Callable[[], object]]) -> Call:
    return lambda number: calls[number % len(calls)]()


def _loss(given: tuple) -> Callable[[], object]:
    logits, labels, _, smoothing = given
    flat, repeated = logits.flatten(0, 1), labels.repeat(len(logits))

    def call() -> tuple[Tensor, Tensor]:
        losses = functional.cross_entropy(
            flat, repeated, reduction="none", label_smoothing=smoothing
        )
        wrong = logits.argmax(dim=2) != labels
        return losses.view(len(logits), -1).sum(dim=1), wrong.sum(dim=1)

    return call


class _Gradient:
    """A gradient by autograd alone: its forward pass runs once on each stream.

    A pass back runs on the stream of its forward pass, so that of another stream could not be
    captured. On the stream of captures the first call, before them, makes one for it.
    """

    def __init__(self, forward: Callable[[], tuple[Tensor, Sequence[Tensor], Tensor]]) -> None:
        self._forward = forward
        self._made: dict[object, tuple[Tensor, Sequence[Tensor], Tensor]] = {}

    def __call__(self) -> tuple[Tensor | None, ...]:
        """The gradients of what `forward` gives, in the inputs it names, by a given one."""
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        if stream not in self._made:
            with torch.enable_grad():
                self._made[stream] = self._forward()
        y, inputs, dy = self._made[stream]
        return torch.autograd.grad(y, inputs, dy, retain_graph=True, allow_unused=True)


def _loss_gradient(given: tuple) -> Callable[[], object]:
    d_losses, logits, labels, _, smoothing = given

    def forward() -> tuple[Tensor, Sequence[Tensor], Tensor]:
        used = logits.clone().requires_grad_()
        losses = functional.cross_entropy(
            used.flatten(0, 1),
            labels.repeat(len(used)),
            reduction="none",
            label_smoothing=smoothing,
        )
        total = losses.view(len(used), -1).sum(dim=1)
        return total, [used], d_losses.to(total.dtype)

    return _Gradient(forward)


def _optimizer_step(given: tuple) -> Callable[[], object]:
    """One fused step of all parameters, as PyTorch has it."""
    parameters = [p.clone().requires_grad_() for p in given[0]]
    for parameter, gradient in zip(parameters, given[1], strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    is_fused = parameters[0].device.type == "cuda"
    return torch.optim.SGD(
        parameters,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        nesterov=True,
        fused=is_fused,
        foreach=not is_fused,
    ).step


def _layer(layer: Layer, given: tuple) -> Callable[[], object]:
    rows, parent, choice, parameters, *rest = given
    narrow = [p.to(rows.dtype) for p in parameters]
    nodes = parent.tolist(), choice.tolist()
    if isinstance(rest[0], Tensor):
        moments = rest[0].to(rows.dtype)
        return lambda: _operators_ref.infer(rows, *nodes, narrow, moments, layer)
    return lambda: _operators_ref.train(rows, *nodes, narrow, layer)


def _layer_gradient(layer: Layer, given: tuple) -> Callable[[], object]:
    dy, rows, parent, choice, parameters = given[:5]
    nodes = parent.tolist(), choice.tolist()

    def forward() -> tuple[Tensor, Sequence[Tensor], Tensor]:
        used = rows.clone().requires_grad_()
        narrow = [p.to(rows.dtype).requires_grad_() for p in parameters]
        return _operators_ref.train(used, *nodes, narrow, layer)[0], [used, *narrow], dy

    return _Gradient(forward)
