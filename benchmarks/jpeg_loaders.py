"""Endless loaders of augmented JPEG batches, DALI's and torchvision's, over the same files.

Both take random windows, antialiased bilinear to one size, flip and normalise. Files are of two
kinds: photographs that are scaled down, and images as small as CIFAR's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastshift import data as fsdata

__all__ = ["KINDS", "PROVIDERS", "Kind", "assert_same_pixels", "batches", "write"]


@dataclass(frozen=True)
class Kind:
    """JPEG files, and the batches that are made of them.

    Attributes:
        num_images: files to train on.
        lowest: smallest height and width of a file, pixels.
        highest: largest height and width.
        window: side of the part of a photograph that is scaled to a file, or None: it is cut out.
        image_size: side of the images in a batch.
        batch_size: of them.
        round_batches: batches that are timed at once, a second's work or so.
    """

    num_images: int
    lowest: tuple[int, int]
    highest: tuple[int, int]
    window: int | None
    image_size: int
    batch_size: int
    round_batches: int


KINDS = {
    "photographs": Kind(192, (200, 200), (420, 500), None, 128, 32, 16),
    "small": Kind(1024, (32, 32), (32, 32), 128, 32, 128, 64),
}
MEAN_LEVELS, P99_LEVELS = 2.0, 8.0  # of 255, as in the tests
# With DALI's threads, or the loader's processes: with none it works in the caller's.
PROVIDERS = ("dali-1", "dali-2", "torchvision-0", "torchvision-2")


def write(root: Path, kind: Kind) -> None:
    """Write JPEG files of a kind, parts of two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for part, num in (("train", kind.num_images), ("val", 2)):
        for index in range(num):
            sides = rng.integers(kind.lowest, kind.highest, endpoint=True).tolist()
            height, width = (kind.window or side for side in sides)
            top, left = rng.integers(428 - height), rng.integers(641 - width)
            pixels = photographs[index % 2][top : top + height, left : left + width]
            file = root / part / str(index % 2) / f"{index:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels)
            if kind.window is not None:
                image = image.resize(sides[::-1], Image.Resampling.BOX)
            image.save(file, quality=90)


@contextmanager
def batches(
    provider: str, folder: Path, kind: Kind
) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """Give an endless iterator over batches, and end its threads or processes.

    Args:
        provider: one of `PROVIDERS`.
        folder: that `write` wrote.
        kind: of its files.

    Raises:
        AssertionError: DALI's pixels are not torchvision's.
    """
    name, _, helpers = provider.partition("-")
    before = torch.get_num_threads()
    torch.set_num_threads(int(helpers) or 1 if name == "dali" else 1)
    options = {"image_size": kind.image_size, "batch_size": kind.batch_size, "device": "cpu"}
    data = fsdata.load(f"dali:{folder}", validation_size=32, **options)
    found = None
    try:
        assert_same_pixels(data)
        if name == "dali":
            found = map(data.train.batch, range(10**6))
        else:
            found = iter(_torchvision_loader(folder, data, kind, int(helpers)))
        yield found
    finally:
        del found
        data.train._reader.close()
        torch.set_num_threads(before)


def _torchvision_loader(
    folder: Path, data, kind: Kind, num_workers: int
) -> torch.utils.data.DataLoader:
    from torchvision.datasets.folder import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.RandomResizedCrop(kind.image_size, antialias=True)]
    steps += [v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    images = ImageFolder(str(folder / "train"), v2.Compose(steps))
    sampler = torch.utils.data.RandomSampler(images, num_samples=10**6)
    return torch.utils.data.DataLoader(
        images, kind.batch_size, sampler=sampler, num_workers=num_workers, drop_last=True
    )


def assert_same_pixels(data) -> None:
    """Compare a batch with torchvision's pixels of the same windows."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    request = data.train._request((0, data.train.batch_size, "train"))
    images, _ = data.train.batch(0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    for image, file, window, flip in zip(
        images, request.files, request.windows.tolist(), request.flips, strict=True
    ):
        whole = v2.functional.pil_to_tensor(default_loader(file))
        size = list(image.shape[1:])
        expected = v2.functional.resized_crop(whole, *window, size, antialias=True)
        expected = expected.flip(-1) if flip else expected
        apart = (255 * (image * std + mean) - expected).abs().flatten()
        assert apart.mean() <= MEAN_LEVELS
        assert apart.quantile(0.99) <= P99_LEVELS
