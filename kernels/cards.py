"""Published figures of the cards that kernels are compiled for: what their sizes are estimated by.

Estimates choose between forms of a launch and bound what it may take; they are no times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["CARDS", "Card", "card_of"]


@dataclass(frozen=True, eq=False)
class Card:
    """A card's published figures; rates are dense, in multiply-adds a second, two FLOP each.

    Attributes:
        name: as its maker calls it.
        bandwidth: of its memory, bytes a second.
        rates: by the type of the operands of a matrix product; `vector` without tensor cores.
        shared: bytes of shared memory that a multiprocessor gives to its programs.
        multiprocessors: how many it has.
        cache: bytes of its second-level cache.
        few_sums: whether code for it spills where a launch of inference does many kinds of jobs,
            unless a thread holds fewer sums than on others; found by compiling.
    """

    name: str
    bandwidth: float
    rates: dict[str, float]
    shared: int
    multiprocessors: int
    cache: int
    few_sums: bool = False


# Data sheets of the SXM (HGX) cards, by compute capability.
CARDS = {
    80: Card(
        "A100 80GB",
        2.039e12,
        {"fp16": 156e12, "bf16": 156e12, "tf32": 78e12, "vector": 9.75e12},
        164 * 1024,
        108,
        40 * 2**20,
    ),
    90: Card(
        "H100",
        3.35e12,
        {"fp16": 494.5e12, "bf16": 494.5e12, "tf32": 247.25e12, "vector": 33.5e12},
        228 * 1024,
        132,
        50 * 2**20,
    ),
    100: Card(
        "B200",
        8e12,
        {"fp16": 1125e12, "bf16": 1125e12, "tf32": 562.5e12, "vector": 40e12},
        228 * 1024,
        148,
        126 * 2**20,
        few_sums=True,
    ),
}


def card_of(device: torch.device) -> tuple[Card, int]:
    """The figures that stand for a device, and its multiprocessors.

    Args:
        device: a CUDA device has those of the newest listed card that is no newer, but its own
            second-level cache and shared memory; what is none and what is older have those of the
            listed card with the smallest cache.
    """
    smallest = min(CARDS.values(), key=lambda card: card.cache)
    if device.type != "cuda" or not torch.cuda.is_available():
        return smallest, smallest.multiprocessors
    major, minor = torch.cuda.get_device_capability(device)
    listed = [card for capability, card in CARDS.items() if capability <= 10 * major + minor]
    found = torch.cuda.get_device_properties(device)
    card = replace(
        listed[-1] if listed else smallest,
        shared=found.shared_memory_per_multiprocessor,
        cache=found.L2_cache_size,
    )
    return card, found.multi_processor_count
