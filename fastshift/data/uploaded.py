"""A training part that lies on a GPU as uint8 -> batches that are augmented there.

Orders and draws are the host's, so a batch holds the images that it has on a CPU; their values
differ by a rounding, where a device multiplies and adds at once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastshift.data.batches import Augmentation, Batch, TrainBatches
from fastshift.device import use_device

__all__ = ["MOST_BYTES", "UploadedTrainBatches"]

MOST_BYTES = 1 << 30  # of a training part that is kept on a device


class UploadedTrainBatches(TrainBatches):
    """The training part as an endless stream of batches on a device.

    Images are channels last. They are uploaded with the first batch; of each batch then no more
    than the positions and draws of its images.

    Args:
        device: to hold them.
        rest: as for `TrainBatches`.
    """

    def __init__(self, *, device: torch.device, **rest: object) -> None:
        super().__init__(**rest)
        self.device = device
        self.augmented = f"on {device}"
        self._images: Tensor | None = None
        self._constants: tuple[Tensor, Tensor, Tensor] | None = None

    def batch(self, index: int, size: int | None = None, stream: str = "train") -> Batch:
        """Compute one batch of a stream, as `TrainBatches` does; its labels are on the host."""
        from fastshift.kernels.images import augment_images

        size = self._checked_size(index, size)
        drawn = self._draw(index * size, (index + 1) * size, stream)
        if self._images is None:
            self._upload()
        augmentation = self.augmentation or Augmentation(0, (), False)
        corners, flips = augmentation.draw(size, self._rng(stream, 1, index))
        values = np.concatenate((drawn, corners.ravel(), flips)).astype(np.int32)
        with use_device(self.device):
            there = self._there(torch.from_numpy(values))
            images = augment_images(
                self._images.index_select(0, there[:size]),
                there[size : 3 * size].view(2, size),
                there[3 * size :].to(torch.uint8),
                *self._constants,
                padding=augmentation.padding,
            )
        return images, torch.from_numpy(self._source.labels[self._positions[drawn]])

    def _there(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def _upload(self) -> None:
        fill = self.augmentation.fill if self.augmentation else ()
        fill = fill or (0,) * self._source.in_channels
        given = torch.tensor(fill, dtype=torch.uint8), *self._normalise.factors()
        self._constants = tuple(value.to(self.device) for value in given)
        self._images = self._source.take(self._positions).to(self.device)
