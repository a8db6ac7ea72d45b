"""A supernet as one compiled function: images, parents and choices in, logits out.

Stem, population layers and head are one function, which `torch.compile` takes whole: the layers
are one operator each, and the population is data, so that one compilation serves every population
of a size bucket. It is for those who build a search of their own around it; nothing in FastShift
compiles unless asked to, since a compilation takes longer than a short search.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, set_grad_enabled
from torch.nn import functional

from fastshift.errors import SpaceError, UnsupportedError
from fastshift.operators import layer_infer, layer_train
from fastshift.static_levels import StaticLevel, buckets, levels_of
from fastshift.supernet import Supernet
from fastshift.trie import Plan

__all__ = ["CompiledSupernet"]

MOST_SHAPES = 64  # compilations of one function; torch's own limit is 8
CAPTURING = ("reduce-overhead", "max-autotune")  # modes of torch.compile with graphs of its own
POLICIES = ("batch", "running", "ema")


class CompiledSupernet:
    """Logits of many architectures by one compiled function.

    Candidates are taken through `subtrie_size` at a time, those that share a prefix together; nodes
    are padded to a bucket (1, 2, 4, 8, 16, 24, ...), and each bucket and batch size is compiled
    once, at its first call. With `batch` the function is differentiable: gradients of the
    parameters are what a training step wants, zeros where no candidate uses one. With `running` and
    `ema` no logits carry a gradient.

    Args:
        supernet: of a described space; its weights are read where they are at each call.
        batch_norm: `batch` (moments of the batch), `running` (what pre-training left) or `ema` (the
            same after the shift steps).
        subtrie_size: candidates side by side; bounds memory.
        backend: of `torch.compile`.
        mode: of `torch.compile`, `max-autotune-no-cudagraphs` say; None for its default.

    Attributes:
        shapes: what was met so far, each of which was compiled: nodes of a sub-trie, images, and
            whether with gradients.

    Raises:
        SpaceError: a part of the supernet has no operator, or draws random numbers.
        ValueError: an unknown policy.

    Example:
        compiled = fs.CompiledSupernet(supernet)
        logits = compiled(images, archs)  # [P, N, num_classes]
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        batch_norm: str = "batch",
        subtrie_size: int = 8,
        backend: str = "inductor",
        mode: str | None = None,
    ) -> None:
        if batch_norm not in POLICIES:
            raise ValueError(f"batch_norm: {batch_norm!r}; expected one of {', '.join(POLICIES)}")
        self.supernet, self.batch_norm, self.subtrie_size = supernet, batch_norm, subtrie_size
        self._mode = mode
        self.shapes: set[tuple[int, int, bool]] = set()
        self._texts: list[str] = []  # of the levels; what the function is compiled for
        self._compiled = torch.compile(
            self._logits, fullgraph=True, dynamic=False, backend=backend, mode=mode
        )

    def __call__(self, images: Tensor, archs: np.ndarray | Sequence) -> Tensor:
        """Compute the logits of every architecture.

        Args:
            images: `[N, C, H, W]`, from any device.
            archs: choices `[P, L]`, a list of tuples, or of strings.

        Returns:
            `[P, N, num_classes]`, in the order given.

        Raises:
            ArchError: a row is not in the space.
            SpaceError: the head draws random numbers: dropout, in training mode.
            ValueError: no architectures, `ema` before any shift step, or a mode of `torch.compile`
                that captures graphs, on a GPU: `fs.Evaluator` has its own.
        """
        import torch._dynamo

        rows = self.supernet.space.as_archs(archs)
        device = next(self.supernet.parameters()).device
        if device.type == "cuda" and self._mode in CAPTURING:
            raise ValueError(
                f"mode: {self._mode!r} captures graphs, whose memory the kernels' tables may not "
                "share; expected None or 'max-autotune-no-cudagraphs' on a GPU"
            )
        if self.batch_norm == "ema" and not self.supernet.ema:
            raise ValueError("batch_norm: 'ema' has no statistics before the first shift step")
        reference = next(self.supernet.parameters())
        images = images.to(reference.device, reference.dtype)
        levels = self._describe(tuple(images.shape[1:]))
        given = [list(level.parameters) for level in levels]
        moments, classifier = self._moments(levels), self.supernet.head.classifier
        grad = torch.is_grad_enabled() and self.batch_norm == "batch"
        whole = Plan(rows, self.subtrie_size)
        found = []
        for first in range(0, whole.num_leaves, self.subtrie_size):
            part = whole.archs[first : first + self.subtrie_size]
            nodes = self.nodes(part)
            self.shapes.add((len(nodes[0][-1]), len(images), grad))
            with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES), set_grad_enabled(grad):
                logits = self._compiled(
                    images, *nodes, given, moments, classifier.weight, classifier.bias
                )
            found.append(logits[: len(part)])
        leaf = torch.from_numpy(whole.inverse).to(images.device)
        return torch.cat(found).index_select(0, leaf)

    def nodes(self, archs: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
        """Parents and choices of each block's nodes, padded to the candidates' bucket.

        Args:
            archs: distinct candidates in lexicographic order, `[D, L]`, at most `subtrie_size`.

        Returns:
            Of each block, `[M]` int32 each, on the supernet's device.
        """
        plan = Plan(archs, len(archs))
        size = next(size for size in buckets(self.subtrie_size) if size >= len(archs))
        device = next(self.supernet.parameters()).device
        parents, choices = [], []
        room = 1
        for block, parent, choice in zip(
            self.supernet.blocks, plan.parent, plan.choice, strict=True
        ):
            room = min(size, room * len(block))
            padded = np.zeros((2, room), np.int32)
            padded[1] = -1
            padded[0, : len(parent)], padded[1, : len(choice)] = parent, choice
            values = torch.from_numpy(padded).to(device)
            parents.append(values[0])
            choices.append(values[1])
        return parents, choices

    def _describe(self, image_size: tuple[int, ...]) -> list[StaticLevel]:
        """Read off the supernet what the function computes, and the tensors it computes with."""
        channels, height, width = image_size
        try:
            levels = levels_of(self.supernet, (height, width, channels), self.subtrie_size)
        except UnsupportedError as error:
            raise SpaceError(f"cannot be compiled as one function: {error}") from error
        dropout = self.supernet.head.dropout
        if dropout.training and dropout.p > 0:
            raise SpaceError(
                "head.dropout: its masks are of each candidate, and no part of one compiled "
                "function; put the supernet into evaluation mode, or set the probability to 0"
            )
        texts = [level.text for level in levels]
        if texts != self._texts:
            self._texts = texts
        return levels

    def _moments(self, levels: Sequence[StaticLevel]) -> list[Tensor]:
        """Of each level, mean and variance of every unit of each choice, `[O, K]`; else nothing."""
        if self.batch_norm == "batch":
            return []
        reference = next(self.supernet.parameters()).detach()
        kept = self.supernet.ema
        found = []
        for level in levels:
            width = level.layer.moments_floats
            table = reference.new_zeros(level.num_choices, width)
            for norm in level.norms:
                if self.batch_norm == "ema":
                    pair = [kept[f"{norm.name}.running_{kind}"] for kind in ("mean", "var")]
                else:
                    pair = [norm.module.running_mean, norm.module.running_var]
                own = slice(norm.first, norm.first + 2 * norm.channels)
                table[norm.choice, own] = torch.cat(pair)
            found.append(table)
        return found

    def _logits(
        self,
        images: Tensor,
        parents: list[Tensor],
        choices: list[Tensor],
        given: list[list[Tensor]],
        moments: list[Tensor],
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The compiled function: `[M, N, num_classes]`, of the last block's nodes."""
        rows = images.permute(0, 2, 3, 1).unsqueeze(0).contiguous()
        one = parents[0].new_zeros(1)
        blocks = len(parents)
        for position, (text, parameters) in enumerate(zip(self._texts, given, strict=True)):
            if 0 < position <= blocks:
                parent, choice = parents[position - 1], choices[position - 1]
            elif position == 0:
                parent, choice = one, one
            else:
                # The head's features: one node for each leaf, of the only choice.
                choice = choices[-1].clamp(max=0)
                parent = torch.arange(len(choice), dtype=torch.int32, device=choice.device)
            if moments:
                own = moments[position].index_select(0, choice.clamp(min=0))
                rows = layer_infer(rows, parent, choice, parameters, own, text)
            else:
                keep = torch.is_grad_enabled()
                rows = layer_train(rows, parent, choice, parameters, text, keep)[0]
        pooled = rows.mean((2, 3))
        # What stands in for a node that is not there may be anything, and nought times that too.
        pooled = pooled.masked_fill((choices[-1] < 0).view(-1, 1, 1), 0.0)
        return functional.linear(pooled, weight, bias)
