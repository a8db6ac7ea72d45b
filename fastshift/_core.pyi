from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Rng = tuple[int, int, int, int] | list[int]
Bound = tuple[NDArray[np.float64], float, float, float]  # costs [L, O], fixed, low, high
# archs [K, L], errors, losses, flops, versions, generations
Kept = tuple[
    NDArray[np.uint8],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
]
State = tuple[Rng, int, int, int, NDArray[np.uint8], Kept]  # ..., seen [S, L], kept

class AskReport(TypedDict):
    parents: int
    mutants: int
    children: int
    random: int
    tries: int
    is_exhausted: bool

class Sampler:
    def __init__(
        self,
        num_choices: NDArray[np.int32],
        *,
        bins: NDArray[np.int32],
        low_bin: int,
        high_bin: int,
        bounds: list[Bound],
    ) -> None: ...
    @property
    def count(self) -> int: ...
    def sample(self, num: int, *, rng: Rng) -> tuple[NDArray[np.uint8], Rng, int]: ...
    def unrank(self, ranks: NDArray[np.uint64]) -> NDArray[np.uint8]: ...
    def is_feasible(self, archs: NDArray[np.uint8]) -> NDArray[np.bool_]: ...

class Population:
    def __init__(
        self,
        sampler: Sampler,
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
    ) -> None: ...
    @property
    def generation(self) -> int: ...
    @property
    def proposals(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def kept(self) -> Kept: ...
    @property
    def last_ask(self) -> AskReport: ...
    def ask(self) -> NDArray[np.uint8]: ...
    def tell(
        self,
        archs: NDArray[np.uint8],
        errors: NDArray[np.float64],
        losses: NDArray[np.float64],
        flops: NDArray[np.int64],
        version: int,
    ) -> None: ...
    def replace_scores(
        self,
        archs: NDArray[np.uint8],
        errors: NDArray[np.float64],
        losses: NDArray[np.float64],
        flops: NDArray[np.int64],
        version: int,
    ) -> None: ...
    def state(self) -> State: ...
    def set_state(self, state: State) -> None: ...

def seeded(seed: int) -> Rng: ...
def non_dominated_sort(objectives: NDArray[np.float64]) -> NDArray[np.int32]: ...
def crowding_distance(
    objectives: NDArray[np.float64], ranks: NDArray[np.int32]
) -> NDArray[np.float64]: ...
def build_trie(
    archs: NDArray[np.uint8], subtrie_size: int
) -> tuple[
    list[NDArray[np.int32]], list[NDArray[np.int32]], list[NDArray[np.int32]], NDArray[np.int32]
]: ...
