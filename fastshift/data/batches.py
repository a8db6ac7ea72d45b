"""Images and labels in memory or on disk -> batches: an endless training stream, and fixed lists.

A batch of the training stream is a pure function of (seed, stream, index, size), so the position of
a run in its data is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fastshift.data.options import Options
from fastshift.errors import DataError

__all__ = ["Augmentation", "FixedBatches", "Normalisation", "Source", "TrainBatches"]

Batch = tuple[Tensor, Tensor]


class Source(Protocol):
    """Labelled square images of one size, addressed by position."""

    labels: np.ndarray  # `[n]` int64
    in_channels: int
    image_size: int
    is_in_memory: bool

    @property
    def num_bytes(self) -> int:
        """Size of the decoded images, in bytes."""

    def in_memory(self) -> Source:
        """Return a source of the same images that holds them decoded."""

    def take(self, positions: np.ndarray) -> Tensor:
        """Return the images at `positions`, `[n, C, H, W]` uint8, a copy."""

    def subset(self, positions: np.ndarray, labels: np.ndarray) -> Source:
        """Return a source of these images alone, with these labels."""

    def digest(self) -> str:
        """Return a sha256 over what the source holds, as hexadecimal digits."""

    def train_batches(
        self, positions: np.ndarray, *, options: Options, normalise: Normalisation, flip: bool
    ) -> TrainBatches:
        """Return the images at `positions` as an endless stream.

        Args:
            positions: of the training part, `[n]`.
            options: the caller's choices.
            normalise: of the training part.
            flip: whether augmentation flips.

        Raises:
            DataError: an option is given that this kind of source has not, or there is no
                such device.
        """
        for name, unset in (("crop_area", None), ("color_jitter", 0)):
            if (value := getattr(options, name)) != unset:
                raise DataError(f"{name}={value}: only data from dali:DIR has it, expected {unset}")
        augmentation = Augmentation(
            padding=self.image_size // 8,
            fill=tuple(round(255 * mean) for mean in normalise.mean),
            flip=flip,
        )
        batches = TrainBatches(
            self,
            positions,
            batch_size=options.batch_size,
            seed=options.seed,
            normalise=normalise,
            augmentation=augmentation if options.augment else None,
        )
        if not self.is_in_memory and options.parsed_device().type == "cuda":
            batches.augmented = "on the host: the images are read from files"
        return batches

    def fixed_batches(
        self,
        positions: np.ndarray,
        *,
        batch_size: int,
        normalise: Normalisation,
        cache_bytes: int,
    ) -> FixedBatches:
        """Return the images at `positions` as a list of batches, the same every time."""
        return FixedBatches(
            self, positions, batch_size=batch_size, normalise=normalise, cache_bytes=cache_bytes
        )


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation, in units of the full pixel range (0 to 1)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Turn `[N, C, H, W]` uint8 into normalised float32 of the same shape."""
        scale, shift = self.factors()
        normalised = images.to(torch.float32, memory_format=torch.contiguous_format)
        normalised *= scale.view(-1, 1, 1)
        normalised += shift.view(-1, 1, 1)
        return normalised

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return what a channel's pixels are multiplied by, and what is added then, `[C]` each."""
        scale = [1 / (255 * std) for std in self.std]
        shift = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        return torch.tensor(scale), torch.tensor(shift)


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the padded image, then a horizontal flip for half of the images.

    It works on uint8, a quarter of the memory traffic of float32: with the normalisation behind it
    a batch takes half the time that it takes the other way round.

    Attributes:
        padding: pixels added on each side before the crop; 0 for no crop.
        fill: value of the added pixels per channel: the mean, so zero (to half a level) once
            normalised.
        flip: whether images are flipped.
    """

    padding: int
    fill: tuple[int, ...]
    flip: bool

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment a whole batch, `[N, C, H, W]` uint8, each image by its own draw."""
        # numpy: its gather of windows takes 0.2 ms at [128, 3, 32, 32], torch's 1.2 ms
        pixels = images.numpy()
        num, channels, height, width = pixels.shape
        (top, left), flips = self.draw(num, rng)
        if self.padding:
            pad = self.padding
            padded = np.empty((num, channels, height + 2 * pad, width + 2 * pad), np.uint8)
            padded[:] = np.array(self.fill, np.uint8)[:, None, None]
            padded[:, :, pad : pad + height, pad : pad + width] = pixels
            windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (2, 3))
            pixels = windows[np.arange(num), :, top, left]
        if self.flip:
            flipped = np.flatnonzero(flips)
            pixels[flipped] = pixels[flipped][..., ::-1]
        return torch.from_numpy(pixels)

    def draw(self, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw for so many images: top and left of each crop, `[2, num]`, and who is flipped."""
        corners, flips = np.zeros((2, num), np.int64), np.zeros(num, bool)
        if self.padding:
            corners = rng.integers(2 * self.padding + 1, size=(2, num))
        if self.flip:
            flips = rng.random(num) < 0.5
        return corners, flips

    def describe(self) -> dict[str, object]:
        """Return what it does, ready for JSON."""
        return {"crop_padding": self.padding, "flip": self.flip}


class TrainBatches:
    """The training part as an endless stream of batches.

    The stream is the concatenation of one permutation of the training part per epoch; batch `index`
    of size `n` is its positions `index * n` to `(index + 1) * n`. Permutations depend on (seed,
    stream, epoch), augmentation on (seed, stream, index); streams of other names are independent.

    Attributes:
        num_images: size of the training part.
        batch_size: images in a batch where `batch` is given no size.
        augmented: where its images are augmented and normalised, `on the host` or `on cuda:0`, and
            why not on the GPU that was named.
    """

    augmented = "on the host"

    def __init__(
        self,
        source: Source,
        positions: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        normalise: Normalisation,
        augmentation: Augmentation | None,
    ) -> None:
        self.num_images = len(positions)
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self._source = source
        self._positions = positions
        self._normalise = normalise
        self._permutations: dict[tuple[str, int], np.ndarray] = {}
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of whole batches in an epoch, at least 1."""
        return max(1, self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the next epoch's batches of the stream `train`."""
        start = self._epoch * len(self)
        self._epoch += 1
        return map(self.batch, range(start, start + len(self)))

    def batch(self, index: int, size: int | None = None, stream: str = "train") -> Batch:
        """Compute one batch of a stream; equal arguments give equal batches, in any order of calls.

        Args:
            index: which batch, from 0, without end.
            size: images in a batch; the default batch size if None.
            stream: name of the stream; another name gives other permutations and augmentation.

        Returns:
            Normalised images `[N, C, H, W]` float32, contiguous, and labels `[N]` int64.

        Raises:
            ValueError: `index` is negative or `size` is not positive.
        """
        size = self._checked_size(index, size)
        positions = self._positions[self._draw(index * size, (index + 1) * size, stream)]
        images = self._source.take(positions)
        if self.augmentation is not None:
            images = self.augmentation(images, self._rng(stream, 1, index))
        return self._normalise(images), torch.from_numpy(self._source.labels[positions])

    def describe(self) -> dict[str, object]:
        """Return what is done to the images, ready for JSON."""
        if self.augmentation is None:
            return {"crop_padding": 0, "flip": False}
        return self.augmentation.describe()

    def _checked_size(self, index: int, size: int | None) -> int:
        """Return the size of a batch that was asked for, the default resolved."""
        size = self.batch_size if size is None else size
        if index < 0 or size < 1:
            raise ValueError(f"index={index}, size={size}: expected index >= 0 and size >= 1")
        return size

    def _draw(self, start: int, stop: int, stream: str) -> np.ndarray:
        """Return elements `start` to `stop` of the stream's concatenated permutations."""
        num = self.num_images
        parts = []
        for epoch in range(start // num, (stop - 1) // num + 1):
            offset = epoch * num
            permutation = self._permutation(stream, epoch)
            parts.append(permutation[max(0, start - offset) : stop - offset])
        return np.concatenate(parts)

    def _permutation(self, stream: str, epoch: int) -> np.ndarray:
        key = (stream, epoch)
        if key not in self._permutations:
            if len(self._permutations) >= 8:  # streams x the two epochs at a boundary
                del self._permutations[next(iter(self._permutations))]
            self._permutations[key] = self._rng(stream, 0, epoch).permutation(self.num_images)
        return self._permutations[key]

    def _rng(self, stream: str, kind: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, crc32(stream.encode()), kind, index))


class FixedBatches:
    """A list of batches that are the same every time, without augmentation.

    Normalised batches are kept once they were asked for, where all of them fit in `cache_bytes`.

    Attributes:
        num_images: images in all batches.
        batch_size: images in each batch but the last.
    """

    def __init__(
        self,
        source: Source,
        positions: np.ndarray,
        *,
        batch_size: int,
        normalise: Normalisation,
        cache_bytes: int,
    ) -> None:
        self.num_images = len(positions)
        self.batch_size = batch_size
        self._source = source
        self._positions = positions
        self._normalise = normalise
        self._kept: list[Batch | None] = [None] * -(-len(positions) // batch_size)
        image_bytes = 4 * source.in_channels * source.image_size**2
        self._is_kept = len(positions) * image_bytes <= cache_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        """Return batch `index`: images `[N, C, H, W]` float32 and labels `[N]` int64.

        Raises:
            IndexError: there is no such batch.
        """
        index = range(len(self))[index]
        batch = self._kept[index]
        if batch is None:
            positions = self._positions_of(index)
            batch = self._read(index), torch.from_numpy(self._source.labels[positions])
            if self._is_kept:
                self._kept[index] = batch
        return batch

    def _positions_of(self, index: int) -> np.ndarray:
        return self._positions[index * self.batch_size : (index + 1) * self.batch_size]

    def _read(self, index: int) -> Tensor:
        """Return the normalised images of batch `index`."""
        return self._normalise(self._source.take(self._positions_of(index)))
