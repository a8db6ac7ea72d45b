"""Class folders of image files -> batches that NVIDIA DALI decodes, augments and normalises.

A batch is a pure function of (seed, stream, index, size), as everywhere: numpy draws its files,
windows, flips and colours from these numbers, and the pipeline is told them. DALI's own checkpoints
hold the state of its readers and generators, which is that of one order of requests; a run asks
several streams in turn, for batches of several sizes, and goes on from an integer.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastshift.data.batches import Batch, FixedBatches, Normalisation, TrainBatches
from fastshift.data.dali_reader import Reader, Request, check_installed
from fastshift.data.image_folder import FolderSource, open_image, read_folder
from fastshift.data.options import Options
from fastshift.data.resized_crop import ResizedCrop
from fastshift.errors import DataError

__all__ = ["DaliFixedBatches", "DaliSource", "DaliTrainBatches", "read_dali"]

CROP_AREA = 0.08
CHUNK = 64  # images decoded at a time for their pixels alone
UNREAD = frozenset({".gif"})  # what folders may hold and DALI does not decode


class DaliSource(FolderSource):
    """Labelled image files, decoded each time they are taken.

    Without augmentation an image is the middle square, scaled as an image folder's.

    Args:
        root: the folder that `files` are relative to.
        files: paths of the image files.
        labels: `[n]` int64.
        image_size: side of the decoded images, in pixels.
        device: where they are decoded and stay.
    """

    def __init__(
        self,
        root: Path,
        files: list[str],
        labels: np.ndarray,
        image_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(root, files, labels, image_size)
        self.device = device
        self._sizes = np.zeros((len(files), 2), np.int64)  # height and width; 0 until asked for

    def in_memory(self) -> DaliSource:
        """Return the source itself: windows are taken from the files, so each time anew."""
        return self

    def take(self, positions: np.ndarray) -> Tensor:
        """Decode the middle squares of the images at `positions`, `[n, 3, S, S]` uint8.

        Raises:
            DataError: a file is no image of 8 bits a channel, damaged, or of a format that DALI
                does not decode.
        """
        reader = Reader(self.image_size, self.device)
        pieces = [positions[at : at + CHUNK] for at in range(0, len(positions), CHUNK)]
        keys = [*range(len(pieces)), None]
        images = [
            reader.read(key, lambda index: self.middle(pieces[index]), following).cpu()
            for key, following in pairwise(keys)
        ]
        return torch.cat(images).contiguous()

    def subset(self, positions: np.ndarray, labels: np.ndarray) -> DaliSource:
        """Return a source of these images alone, with these labels."""
        files = [self.files[position] for position in positions]
        return DaliSource(self.root, files, labels, self.image_size, self.device)

    def paths(self, positions: np.ndarray) -> list[Path]:
        """Return the files at `positions`."""
        return [self.root / self.files[position] for position in positions]

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Return heights and widths in pixels, `[n, 2]`, from the headers; each is read once."""
        for position in positions[self._sizes[positions, 0] == 0]:
            with open_image(self.root / self.files[position]) as image:
                self._sizes[position] = image.height, image.width
        return self._sizes[positions]

    def middle(self, positions: np.ndarray) -> Request:
        """Return the request of the middle squares of images."""
        sizes = self.sizes(positions)
        side = sizes.min(axis=1)
        windows = np.stack([*(sizes - side[:, None]).T // 2, side, side], axis=1)
        num = len(positions)
        return Request(self.paths(positions), windows, np.zeros(num, bool), np.ones((num, 3)))

    def train_batches(
        self, positions: np.ndarray, *, options: Options, normalise: Normalisation, flip: bool
    ) -> DaliTrainBatches:
        """Return the images at `positions` as an endless stream."""
        augmentation = ResizedCrop(
            area=CROP_AREA if options.crop_area is None else options.crop_area,
            flip=flip,
            color_jitter=options.color_jitter,
        )
        return DaliTrainBatches(
            self,
            positions,
            batch_size=options.batch_size,
            seed=options.seed,
            normalise=normalise,
            augmentation=augmentation if options.augment else None,
        )

    def fixed_batches(
        self,
        positions: np.ndarray,
        *,
        batch_size: int,
        normalise: Normalisation,
        cache_bytes: int,
    ) -> DaliFixedBatches:
        """Return the images at `positions` as a list of batches, the same every time."""
        return DaliFixedBatches(
            self, positions, batch_size=batch_size, normalise=normalise, cache_bytes=cache_bytes
        )


class DaliTrainBatches(TrainBatches):
    """The training part as an endless stream, the next batch decoded while one is used.

    Images are channels last, on the source's device. Of several shards each gives its own part of
    a batch as many times as large, with the very images that whole batch has.

    Args:
        source: of the images.
        positions: of the training part in the source, `[n]`.
        batch_size: images in a batch of this shard.
        seed: fixes order and augmentation.
        normalise: of the training part.
        augmentation: or None.
        shard_id: which shard, from 0.
        num_shards: how many there are.
    """

    def __init__(
        self,
        source: DaliSource,
        positions: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        normalise: Normalisation,
        augmentation: ResizedCrop | None,
        shard_id: int = 0,
        num_shards: int = 1,
    ) -> None:
        super().__init__(
            source,
            positions,
            batch_size=batch_size,
            seed=seed,
            normalise=normalise,
            augmentation=augmentation,
        )
        self.shard_id, self.num_shards = shard_id, num_shards
        self.augmented = f"by DALI on {source.device}"
        has_colors = augmentation is not None and augmentation.color_jitter > 0
        self._reader = Reader(source.image_size, source.device, normalise, has_colors=has_colors)

    def __len__(self) -> int:
        """Return the number of whole batches of this shard in an epoch, at least 1."""
        return max(1, self.num_images // (self.batch_size * self.num_shards))

    def describe(self) -> dict[str, object]:
        """Return what is done to the images and where, ready for JSON."""
        return {**super().describe(), "decoder": f"dali on {self._source.device.type}"}

    def shard(self, shard_id: int, num_shards: int) -> DaliTrainBatches:
        """Return one of `num_shards` parts of the stream; together they are the whole stream.

        Raises:
            ValueError: there is no such shard.
        """
        _check_shard(shard_id, num_shards)
        return DaliTrainBatches(
            self._source,
            self._positions,
            batch_size=self.batch_size,
            seed=self.seed,
            normalise=self._normalise,
            augmentation=self.augmentation,
            shard_id=shard_id,
            num_shards=num_shards,
        )

    def batch(self, index: int, size: int | None = None, stream: str = "train") -> Batch:
        """Compute one batch of a stream; equal arguments give equal batches, in any order of calls.

        Batches asked for in order are decoded ahead; any other waits for its whole decoding.

        Args:
            index: which batch, from 0, without end.
            size: images in a batch; the default batch size if None.
            stream: name of the stream; another name gives other permutations and augmentation.

        Returns:
            Normalised images `[N, 3, S, S]` float32, channels last, and labels `[N]` int64.

        Raises:
            ValueError: `index` is negative or `size` is not positive.
            DataError: a file cannot be decoded.
        """
        size = self._checked_size(index, size)
        key, following = ((i, size, stream) for i in (index, index + 1))
        images = self._reader.read(key, self._request, following)
        return images, torch.from_numpy(self._source.labels[self._positions_of(key)])

    def _positions_of(self, key: tuple[int, int, str]) -> np.ndarray:
        index, size, stream = key
        start = (index * self.num_shards + self.shard_id) * size
        return self._positions[self._draw(start, start + size, stream)]

    def _request(self, key: tuple[int, int, str]) -> Request:
        index, size, stream = key
        positions = self._positions_of(key)
        if self.augmentation is None:
            return self._source.middle(positions)
        draws = self.augmentation.draw(size * self.num_shards, self._rng(stream, 1, index))
        own = draws[:, self.shard_id * size : (self.shard_id + 1) * size]
        source = self._source
        return self.augmentation.request(source.paths(positions), source.sizes(positions), own)


class DaliFixedBatches(FixedBatches):
    """A list of batches that are the same every time, the next decoded while one is used.

    Images are channels last, on the source's device.
    """

    def __init__(
        self,
        source: DaliSource,
        positions: np.ndarray,
        *,
        batch_size: int,
        normalise: Normalisation,
        cache_bytes: int,
    ) -> None:
        super().__init__(
            source, positions, batch_size=batch_size, normalise=normalise, cache_bytes=cache_bytes
        )
        self._cache_bytes = cache_bytes
        self._reader = Reader(source.image_size, source.device, normalise)

    def shard(self, shard_id: int, num_shards: int) -> DaliFixedBatches:
        """Return one of `num_shards` parts; together they hold every image once.

        Raises:
            ValueError: there is no such shard.
        """
        _check_shard(shard_id, num_shards)
        return DaliFixedBatches(
            self._source,
            self._positions[shard_id::num_shards],
            batch_size=self.batch_size,
            normalise=self._normalise,
            cache_bytes=self._cache_bytes,
        )

    def _read(self, index: int) -> Tensor:
        # kept batches are decoded in one pass, others in one pass after the other
        following: int | None = (index + 1) % len(self)
        if self._is_kept and (following == index or self._kept[following] is not None):
            following = None
        images = self._reader.read(
            index, lambda i: self._source.middle(self._positions_of(i)), following
        )
        if following is None:
            self._reader.close()
        return images


def read_dali(directory: str, options: Options) -> tuple[DaliSource, DaliSource, tuple[str, ...]]:
    """List the images of `train/` and `val/`, as an image folder's, to be decoded by DALI.

    Args:
        directory: the directory that holds both.
        options: the caller's choices: `image_size` and `device` are read here.

    Returns:
        The training set, the test set, and the class names, which are the folders of `train/`.

    Raises:
        DataError: the folder cannot be used (as an image folder), holds files of a format that DALI
            does not decode, or the device is none.
        MissingExtraError: DALI or Pillow is not installed.
    """
    check_installed()
    device = options.parsed_device()
    *parts, class_names = read_folder(directory, options.image_size, kind="dali")
    for part in parts:
        for file in part.files:
            if Path(file).suffix.lower() in UNREAD:
                raise DataError(f"dali:{directory}: {file} is of a format DALI does not decode")
    train, test = (
        DaliSource(part.root, part.files, part.labels, part.image_size, device) for part in parts
    )
    return train, test, class_names


def _check_shard(shard_id: int, num_shards: int) -> None:
    if not 0 <= shard_id < num_shards:
        raise ValueError(f"shard_id={shard_id}, num_shards={num_shards}: expected 0 <= id < shards")
