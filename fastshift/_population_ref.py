"""The population core in plain Python: read it, test the compiled one against it.

Every class and function takes and returns what its twin in `fastshift._core` does, draw by draw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

__all__ = [
    "PopulationRef",
    "RngRef",
    "SamplerRef",
    "build_trie_ref",
    "crowding_distance_ref",
    "non_dominated_sort_ref",
]

Arch = tuple[int, ...]

MASK = (1 << 64) - 1
MAX_REDRAWS = 128  # each succeeds with probability over 1/2
MAX_PROPOSALS = 100_000  # draws before the sampler gives up
TRIES_PER_ARCH = 10  # of a producer
MAX_LISTED = 1 << 16  # of sampled architectures, where the random fill falls short


class RngRef:
    """xoshiro256** (Blackman and Vigna, 2018), seeded by splitmix64."""

    def __init__(self, seed: int) -> None:
        self.state = []
        for _ in range(4):
            seed = (seed + 0x9E3779B97F4A7C15) & MASK
            z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
            self.state.append(z ^ (z >> 31))

    @classmethod
    def from_state(cls, state: Sequence[int]) -> RngRef:
        """Go on from four words."""
        rng = cls(0)
        rng.state = list(state)
        return rng

    def next(self) -> int:
        """Return 64 uniform bits."""
        a, b, c, d = self.state
        result = (_rotate((b * 5) & MASK, 7) * 9) & MASK
        c, d = c ^ a, d ^ b
        self.state = [a ^ d, b ^ c, c ^ ((b << 17) & MASK), _rotate(d, 45)]
        return result

    def below(self, n: int) -> int:
        """Return one of 0 to n - 1, n below 2^32, without bias (Lemire, 2019)."""
        for _ in range(MAX_REDRAWS):
            product = (self.next() >> 32) * n
            if product % (1 << 32) >= (1 << 32) % n:
                break
        return product >> 32

    def chance(self, prob: float) -> bool:
        """Return True with a probability, rounded down to a multiple of 2^-53."""
        return self.next() >> 11 < int(math.ldexp(prob, 53))


def _rotate(x: int, bits: int) -> int:
    return ((x << bits) | (x >> (64 - bits))) & MASK


class SamplerRef:
    """Architectures uniform over those within bins, filtered by the exact bounds."""

    def __init__(
        self,
        num_choices: np.ndarray,
        *,
        bins: np.ndarray,
        low_bin: int,
        high_bin: int,
        bounds: Sequence[tuple[np.ndarray, float, float, float]],
    ) -> None:
        self.num_choices = num_choices.tolist()
        self.num_blocks = len(self.num_choices)
        self.bins = bins.tolist()
        self.bounds = [(costs.tolist(), fixed, low, high) for costs, fixed, low, high in bounds]

        @cache
        def completions(level: int, total: int) -> int:
            """Count the ways to choose blocks `level` and on after a prefix of `total` bins."""
            if total > high_bin:
                return 0
            if level == self.num_blocks:
                return int(low_bin <= total)
            costs = self.bins[level][: self.num_choices[level]]
            return sum(completions(level + 1, total + cost) for cost in costs)

        self.completions = completions
        self.count = completions(0, 0)

    def unrank(self, ranks: np.ndarray) -> np.ndarray:
        """Return the architectures at places of the lexicographic order, `[n, L]`."""
        return self._rows([self.unrank_one(int(rank)) for rank in ranks])

    def unrank_one(self, rank: int) -> Arch:
        """Return the architecture at one place of the lexicographic order."""
        arch: list[int] = []
        total = 0
        for block, num in enumerate(self.num_choices):
            for choice in range(num):
                count = self.completions(block + 1, total + self.bins[block][choice])
                if rank < count:
                    break
                rank -= count
            arch.append(choice)
            total += self.bins[block][choice]
        return tuple(arch)

    def draw(self, rng: RngRef) -> tuple[Arch | None, int]:
        """Return a feasible architecture, or None after too many draws, and how many it took."""
        bits = max(self.count - 1, 0).bit_length()
        for proposal in range(MAX_PROPOSALS if self.count else 0):
            for _ in range(MAX_REDRAWS):
                rank = sum(rng.next() << 64 * i for i in range((bits + 63) // 64))
                rank &= (1 << bits) - 1
                if rank < self.count:
                    break
            arch = self.unrank_one(rank % self.count)
            if self.admits(arch):
                return arch, proposal + 1
        return None, MAX_PROPOSALS if self.count else 0

    def sample(self, num: int, *, rng: Sequence[int]) -> tuple[np.ndarray, list[int], int]:
        """Return up to `num` feasible rows, the generator after them, and the draws they took."""
        generator = RngRef.from_state(rng)
        archs, proposals = [], 0
        while len(archs) < num:
            arch, draws = self.draw(generator)
            proposals += draws
            if arch is None:
                break
            archs.append(arch)
        return self._rows(archs), generator.state, proposals

    def admits(self, arch: Arch) -> bool:
        """Return whether an architecture meets every bound."""
        for costs, cost, low, high in self.bounds:
            for row, choice in zip(costs, arch, strict=True):
                cost += row[choice]
            if not low <= cost <= high:
                return False
        return True

    def is_feasible(self, archs: np.ndarray) -> np.ndarray:
        """Return which rows meet every bound, `[P]` bool."""
        return np.array([self.admits(arch) for arch in archs.tolist()], np.bool_)

    def _rows(self, archs: Sequence[Arch]) -> np.ndarray:
        return np.array(archs, np.uint8).reshape(-1, self.num_blocks)


class PopulationRef:
    """The evolutionary loop of SPOS (Guo et al., 2020), with bounded producers."""

    def __init__(
        self,
        sampler: SamplerRef,
        *,
        population: int,
        parents: int,
        mutation: int,
        crossover: int,
        mutation_prob: float,
        keep: int,
        seen_lasts: bool,
        loss_first: bool,
        seed: int,
    ) -> None:
        self.sampler = sampler
        self.population = population
        self.num_parents = parents
        self.mutation = mutation
        self.crossover = crossover
        self.mutation_prob = mutation_prob
        self.keep = keep
        self.seen_lasts = seen_lasts
        self.loss_first = loss_first
        self.rng = RngRef(seed)
        self.seen: dict[Arch, None] = {}  # an ordered set
        self.scores: dict[Arch, tuple[Any, ...]] = {}  # error, loss, flops, version, generation
        self.generation = self.proposals = self.accepted = 0
        self.last_ask: dict[str, Any] = {}

    def ask(self) -> np.ndarray:
        """Return the next generation: mutants, children, then random architectures."""
        parents = list(self.scores)[: self.num_parents]
        report = dict.fromkeys(("parents", "mutants", "children", "random", "tries"), 0)
        self.last_ask = {**report, "parents": len(parents), "is_exhausted": False}
        if not self.seen_lasts:
            self.seen.clear()
        archs: list[Arch] = []
        if parents:
            self._produce("mutants", self.mutation, archs, lambda: self._mutate(parents))
            self._produce("children", self.crossover, archs, lambda: self._cross(parents))
        self._fill(archs)
        return np.array(archs, np.uint8).reshape(-1, self.sampler.num_blocks)

    def _produce(
        self, name: str, quota: int, archs: list[Arch], make: Callable[[], Arch | None]
    ) -> None:
        for _ in range(TRIES_PER_ARCH * quota):
            if self.last_ask[name] == quota:
                break
            self.last_ask["tries"] += 1
            arch = make()
            if arch is not None and self.sampler.admits(arch) and arch not in self.seen:
                self._add(name, arch, archs)

    def _add(self, name: str, arch: Arch, archs: list[Arch]) -> None:
        self.seen[arch] = None
        archs.append(arch)
        self.last_ask[name] += 1

    def _mutate(self, parents: list[Arch]) -> Arch:
        parent = parents[self.rng.below(len(parents))]
        return tuple(
            self.rng.below(num) if self.rng.chance(self.mutation_prob) else gene
            for gene, num in zip(parent, self.sampler.num_choices, strict=True)
        )

    def _cross(self, parents: list[Arch]) -> Arch:
        one = parents[self.rng.below(len(parents))]
        other = parents[self.rng.below(len(parents))]
        words = [self.rng.next() for _ in range(0, len(one), 64)]
        return tuple(other[i] if words[i // 64] >> i % 64 & 1 else one[i] for i in range(len(one)))

    def _fill(self, archs: list[Arch]) -> None:
        is_drawn = True

        def draw() -> Arch | None:
            nonlocal is_drawn
            if not is_drawn:
                return None
            arch, proposals = self.sampler.draw(self.rng)
            is_drawn = arch is not None
            self.proposals += proposals
            self.accepted += is_drawn
            return arch

        self._produce("random", self.population - len(archs), archs, draw)
        missing = self.population - len(archs)
        if not missing or self.sampler.count > MAX_LISTED:
            return
        listed = map(self.sampler.unrank_one, range(self.sampler.count))
        unseen = [arch for arch in listed if self.sampler.admits(arch) and arch not in self.seen]
        while unseen and len(archs) < self.population:
            i = self.rng.below(len(unseen))
            unseen[i], unseen[-1] = unseen[-1], unseen[i]
            self._add("random", unseen.pop(), archs)
        self.last_ask["is_exhausted"] = len(archs) < self.population

    def tell(
        self,
        archs: np.ndarray,
        errors: np.ndarray,
        losses: np.ndarray,
        flops: np.ndarray,
        version: int,
    ) -> None:
        """End a generation; where weights move only the present parents stay beside the new."""
        if not self.seen_lasts:
            self.scores = dict(list(self.scores.items())[: self.num_parents])
        rows = list(map(tuple, archs.tolist()))
        self._merge(rows, errors, losses, flops, version, [self.generation] * len(rows))
        self.seen.update(dict.fromkeys(rows))
        self.generation += 1

    def replace_scores(
        self,
        archs: np.ndarray,
        errors: np.ndarray,
        losses: np.ndarray,
        flops: np.ndarray,
        version: int,
    ) -> None:
        """Score kept architectures again; where weights move the others are dropped."""
        rows = list(map(tuple, archs.tolist()))
        for i, row in enumerate(rows):
            if row not in self.scores:
                raise ValueError(f"archs: kept architectures expected, row {i} is not one")
        generations = [self.scores[row][-1] for row in rows]
        if not self.seen_lasts:
            self.scores = {}
        self._merge(rows, errors, losses, flops, version, generations)

    def _merge(
        self,
        rows: list[Arch],
        errors: np.ndarray,
        losses: np.ndarray,
        flops: np.ndarray,
        version: int,
        generations: list[int],
    ) -> None:
        columns = (errors.tolist(), losses.tolist(), flops.tolist())
        for row, error, loss, cost, born in zip(rows, *columns, generations, strict=True):
            self.scores.pop(row, None)
            if not math.isnan(error) and not (self.loss_first and math.isnan(loss)):
                self.scores[row] = (error, loss, cost, version, born)
        ordered = sorted(self.scores.items(), key=self._order)
        self.scores = dict(ordered[: self.keep])

    def _order(self, item: tuple[Arch, tuple[Any, ...]]) -> tuple[Any, ...]:
        arch, (error, loss, flops, *_) = item
        if self.loss_first:
            return loss, error, flops, arch
        return error, math.isnan(loss), 0.0 if math.isnan(loss) else loss, flops, arch

    @property
    def kept(self) -> tuple[np.ndarray, ...]:
        """Architectures, best first, and their scores by column."""
        archs = np.array(list(self.scores), np.uint8).reshape(-1, self.sampler.num_blocks)
        columns = list(zip(*self.scores.values(), strict=True)) or [()] * 5
        dtypes = (np.float64, np.float64, np.int64, np.int64, np.int64)
        return archs, *(np.array(c, dtype) for c, dtype in zip(columns, dtypes, strict=True))

    def state(self) -> tuple[Any, ...]:
        """Generator, generation, proposals, accepted, seen, kept."""
        seen = np.array(list(self.seen), np.uint8).reshape(-1, self.sampler.num_blocks)
        counters = (self.generation, self.proposals, self.accepted)
        return self.rng.state, *counters, seen, self.kept

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Go on from what `state` returned."""
        rng, self.generation, self.proposals, self.accepted, seen, (archs, *columns) = state
        self.rng = RngRef.from_state(rng)
        self.seen = dict.fromkeys(map(tuple, seen.tolist()))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        self.scores = dict(zip(map(tuple, archs.tolist()), rows, strict=True))


def non_dominated_sort_ref(objectives: np.ndarray) -> np.ndarray:
    """Rank rows `[P, M]` by peeling fronts; rows with a NaN share the rank after the last."""
    rows = [tuple(row) for row in objectives.tolist()]
    left = {i for i, row in enumerate(rows) if not any(map(math.isnan, row))}
    ranks, front = [0] * len(rows), 0
    while left:
        first = {i for i in left if not any(_dominates(rows[j], rows[i]) for j in left)}
        for i in first:
            ranks[i] = front
        left -= first
        front += 1
    for i, row in enumerate(rows):
        if any(map(math.isnan, row)):
            ranks[i] = front
    return np.array(ranks, np.int32)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def crowding_distance_ref(objectives: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Measure how far apart the neighbours of each row are in its front (Deb et al., 2002)."""
    rows = objectives.tolist()
    distance = [0.0] * len(rows)
    valid = [i for i, row in enumerate(rows) if not any(map(math.isnan, row))]
    for rank in {int(ranks[i]) for i in valid}:
        for m in range(objectives.shape[1]):
            front = sorted((i for i in valid if ranks[i] == rank), key=lambda i: (rows[i][m], i))
            span = rows[front[-1]][m] - rows[front[0]][m]
            distance[front[0]] = distance[front[-1]] = math.inf
            if not 0.0 < span < math.inf:
                continue
            for before, i, after in zip(front, front[1:], front[2:], strict=False):
                distance[i] += (rows[after][m] - rows[before][m]) / span
    return np.array(distance, np.float64)


def build_trie_ref(
    archs: Sequence[Sequence[int]], subtrie_size: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Lay out the prefix tree of sorted architectures and cut it into segments.

    Level `l` has one node for each distinct prefix of length `l + 1`. A segment is a run of levels
    of a run of candidates: either whole subtrees with at most `subtrie_size` candidates together
    (down to the last level), or a trunk, the unbranched head of a subtree that has more.

    Args:
        archs: choices, `[P, L]`, strictly increasing in lexicographic order.
        subtrie_size: candidates a segment of whole subtrees may hold, at least 1.

    Returns:
        `parent` and `choice`, for each level the nodes' `[M_l]` int32; `leaves`, `[M_l + 1]`
        int32, node `m` owning the candidates `leaves[m]` to `leaves[m + 1]`; `segments`, `[S, 5]`
        int32: parent segment (or -1), start level, stop level, first and stop candidate.

    Raises:
        ValueError: no rows, rows that are not strictly increasing, `subtrie_size` below 1.
    """
    rows = [tuple(int(choice) for choice in arch) for arch in archs]
    if not rows or not rows[0]:
        raise ValueError(f"archs: at least one row and one column expected, got {rows!r}")
    if subtrie_size < 1:
        raise ValueError(f"subtrie_size: at least 1 expected, got {subtrie_size}")
    for i in range(1, len(rows)):
        if not rows[i - 1] < rows[i]:
            raise ValueError(
                "archs: strictly increasing rows (lexicographic) expected, "
                f"row {i} does not follow row {i - 1}"
            )
    num_blocks = len(rows[0])
    parents, choices, leaves = [], [], []
    above = {(): 0}
    for level in range(num_blocks):
        starts: dict[tuple[int, ...], int] = {}  # prefix -> first candidate
        for i, row in enumerate(rows):
            starts.setdefault(row[: level + 1], i)
        parents.append(np.array([above[prefix[:-1]] for prefix in starts], np.int32))
        choices.append(np.array([prefix[-1] for prefix in starts], np.int32))
        leaves.append(np.array([*starts.values(), len(rows)], np.int32))
        above = {prefix: node for node, prefix in enumerate(starts)}

    segments: list[tuple[int, int, int, int, int]] = []

    def cut(parent: int, level: int, first: int, stop: int) -> None:
        bounds = [i for i in leaves[level].tolist() if first <= i <= stop]
        packed = first  # the open group is [packed, child)
        for child, end in itertools.pairwise(bounds):
            is_large = end - child > subtrie_size
            if child > packed and (is_large or end - packed > subtrie_size):
                segments.append((parent, level, num_blocks, packed, child))
                packed = child
            if is_large:
                branch = next(
                    below
                    for below in range(level + 1, num_blocks)
                    if rows[child][below] != rows[end - 1][below]
                )
                segments.append((parent, level, branch, child, end))
                cut(len(segments) - 1, branch, child, end)
                packed = end
        if stop > packed:
            segments.append((parent, level, num_blocks, packed, stop))

    cut(-1, 0, 0, len(rows))
    return parents, choices, leaves, np.array(segments, np.int32).reshape(-1, 5)
