from collections.abc import Sequence

Unit = tuple[bool, int, int, int, int, bool]
Images = tuple[int, int, int]

def instruction_sets() -> list[str]: ...

class Block:
    def __init__(
        self,
        units: Sequence[Unit],
        main_units: int,
        frame: str,
        in_channels: int,
        out_channels: int,
    ) -> None: ...
    def forward(
        self,
        isa: str,
        images: Images,
        x: int,
        parameters: Sequence[int],
        eps: Sequence[float],
        saved: Sequence[int],
        y: int,
        threads: int,
    ) -> None: ...
    def backward(
        self,
        isa: str,
        images: Images,
        x: int,
        parameters: Sequence[int],
        eps: Sequence[float],
        saved: Sequence[int],
        dy: int,
        dx: int,
        gradients: Sequence[int],
        work: tuple[int, int],
        threads: int,
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
    ) -> None: ...
