import numpy as np
from numpy.typing import NDArray

def build_trie(
    archs: NDArray[np.uint8], subtrie_size: int
) -> tuple[
    list[NDArray[np.int32]], list[NDArray[np.int32]], list[NDArray[np.int32]], NDArray[np.int32]
]: ...
