from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Unit = tuple[bool, int, int, int, int, bool]
Images = tuple[int, int, int]

def instruction_sets() -> dict[str, str]: ...
def buffer(floats: int) -> NDArray[np.float32]: ...
def release_memory() -> None: ...
def memory_use() -> dict[str, int]: ...

class Block:
    def __init__(
        self,
        units: Sequence[Unit],
        main_units: int,
        frame: str,
        in_channels: int,
        out_channels: int,
    ) -> None: ...
    def inference_lines(self, images: Images, bf16: bool = False) -> list[int]: ...
    def saved_floats(self, images: Images, bf16: bool = False) -> int: ...
    def statistics_floats(self) -> int: ...
    def forward(
        self,
        isa: str,
        images: Images,
        x: int,
        parameters: Sequence[int],
        eps: Sequence[float],
        saved: int,
        statistics: int,
        y: int,
        threads: int,
        bf16: bool = False,
        packed: PackedWeights | None = None,
    ) -> None: ...
    def backward(
        self,
        isa: str,
        images: Images,
        x: int,
        parameters: Sequence[int],
        eps: Sequence[float],
        saved: int,
        statistics: int,
        dy: int,
        dx: int,
        gradients: Sequence[int],
        threads: int,
        bf16: bool = False,
        packed: PackedWeights | None = None,
        add: bool = False,
    ) -> None: ...
    def infer(
        self,
        isa: str,
        images: Images,
        x: int,
        parameters: Sequence[int],
        eps: Sequence[float],
        moments: Sequence[int],
        y: int,
        pooled: bool,
        threads: int,
        bf16: bool = False,
        packed: PackedWeights | None = None,
    ) -> None: ...

class PackedWeights:
    def __init__(self, block: Block) -> None: ...
