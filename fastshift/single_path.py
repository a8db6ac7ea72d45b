"""One architecture by itself: its space, and a supernet of it whose weights are drawn anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fastshift.errors import SpaceError
from fastshift.space import ModuleSpace, SearchSpace
from fastshift.supernet import ChainSupernet, Supernet

__all__ = ["check_resets", "fresh_path", "single_path"]

Arch = Sequence[int] | str | np.ndarray


def single_path(space: SearchSpace, arch: Arch) -> SearchSpace:
    """Make the space of one architecture alone; batch norms of a described one are affine.

    Args:
        space: the architecture's.
        arch: choices, `[L]`, or their string.

    Returns:
        A space of as many blocks, each with one choice.

    Raises:
        ArchError: `arch` is not in the space.
    """
    row = space.as_archs([arch] if isinstance(arch, str) else np.asarray(arch))[0].tolist()
    name = f"{space.name}/{space.format(row)}"
    if isinstance(space, ModuleSpace):

        def chosen(table: np.ndarray) -> list[list[int]]:
            return [[line[choice]] for line, choice in zip(table.tolist(), row, strict=True)]

        return ModuleSpace(
            name,
            num_choices=[1] * space.num_blocks,
            flops_table=chosen(space.flops_table),
            params_table=chosen(space.params_table),
            fixed_flops=space.fixed_flops,
            fixed_params=space.fixed_params,
            identities=chosen(space.identities),
            in_channels=space.in_channels,
            image_size=space.image_size,
            num_classes=space.num_classes,
            labels=[[block[choice]] for block, choice in zip(space.labels, row, strict=True)],
        )
    return SearchSpace(
        name,
        stem=space.stem,
        blocks=[[block[choice]] for block, choice in zip(space.blocks, row, strict=True)],
        head=space.head,
        in_channels=space.in_channels,
        image_size=space.image_size,
        affine=True,
    )


def fresh_path(source: SearchSpace | ChainSupernet, arch: Arch, seed: int) -> ChainSupernet:
    """Make a supernet of one architecture alone, its weights drawn from a seed.

    From a description it is built. Of modules it holds copies, each drawn anew by its own
    `reset_parameters`; buffers that this leaves, such as a fixed mask, stay as they are.

    Args:
        source: a described space, or a supernet.
        arch: choices, `[L]`, or their string.
        seed: of the weights; the global generator is left as it was.

    Returns:
        The supernet, on the CPU.

    Raises:
        ArchError: `arch` is not in the space.
        SpaceError: a space without a description, or modules that cannot be drawn anew.
    """
    space = source if isinstance(source, SearchSpace) else source.space
    alone = single_path(space, arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if alone.blocks:
            return Supernet(alone)
        if isinstance(source, SearchSpace):
            raise SpaceError(
                f"space {space.name!r} has no description to build a network from; expected its "
                "ChainSupernet"
            )
        net = source.subnet(arch).cpu()
        _reset(net)
        return ChainSupernet(net.stem, [[op] for op in net.blocks], net.head, space=alone)


def check_resets(supernet: ChainSupernet) -> None:
    """Refuse a supernet with a module whose weights cannot be drawn anew, `SpaceError` names it."""
    if not supernet.space.blocks:
        with torch.random.fork_rng(devices=[]):
            _reset(copy.deepcopy(supernet).cpu())


@torch.no_grad()
def _reset(net: nn.Module) -> None:
    """Draw every weight anew, those of the innermost modules first."""
    for parameter in net.parameters():
        if parameter.is_floating_point():
            parameter.fill_(torch.nan)  # by which a parameter is found that no module draws
    for name, module in reversed(list(net.named_modules())):
        if not callable(getattr(module, "reset_parameters", None)):
            continue
        try:
            module.reset_parameters()
        except Exception as error:  # of the user's own module: anything can come out of it
            raise SpaceError(
                f"{name}: reset_parameters of its {type(module).__name__} fails with {error!r}"
            ) from error
    for name, module in net.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.isnan().any():
                kind = type(module).__name__
                has = callable(getattr(module, "reset_parameters", None))
                why = f"leaves {key} as it was" if has else "is missing"
                raise SpaceError(
                    f"{name}: reset_parameters of its {kind} {why}; it is what draws weights anew "
                    "where an architecture is trained from scratch"
                )
