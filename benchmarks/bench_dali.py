"""Time augmented batches of JPEG files: NVIDIA DALI on the CPU beside torchvision's loaders.

`OMP_NUM_THREADS=1 pytest benchmarks/bench_dali.py` gives images per second, decoding included. Both
sides take random windows, antialiased bilinear to one size, flip and normalise. DALI's threads and
the loader's processes are given; with 0 processes the loader works in the caller's.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fastshift import data as fsdata

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra dali)")
pytest.importorskip("torchvision")
sklearn_datasets = pytest.importorskip("sklearn.datasets")

from torchvision.datasets.folder import ImageFolder, default_loader  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

NUM_IMAGES, SIZE, BATCH, BATCHES = 192, 128, 32, 8
MEAN_LEVELS, P99_LEVELS = 2.0, 8.0  # of 255, as in the tests
PROVIDERS = ("dali-1", "dali-2", "torchvision-0", "torchvision-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write JPEG files with sides of 200 to 500 pixels, windows of two photographs."""
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("jpeg")
    photographs = sklearn_datasets.load_sample_images().images
    rng = np.random.default_rng(0)
    for part, num in (("train", NUM_IMAGES), ("val", 2)):
        for index in range(num):
            height, width = rng.integers(200, 421), rng.integers(200, 501)
            top, left = rng.integers(428 - height), rng.integers(641 - width)
            pixels = photographs[index % 2][top : top + height, left : left + width]
            file = root / part / str(index % 2) / f"{index:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image_module.fromarray(pixels).save(file, quality=90)
    return root


def load(folder):
    options = {"image_size": SIZE, "batch_size": BATCH, "validation_size": 32, "device": "cpu"}
    return fsdata.load(f"dali:{folder}", **options)


def torchvision_loader(folder, data, num_workers):
    """Make an endless loader of the same kind of batches."""
    steps = [v2.ToImage(), v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    images = ImageFolder(str(folder / "train"), v2.Compose(steps))
    sampler = torch.utils.data.RandomSampler(images, num_samples=10**6)
    loader = torch.utils.data.DataLoader(
        images, BATCH, sampler=sampler, num_workers=num_workers, drop_last=True
    )
    return iter(loader)


def assert_same_pixels(data):
    """Compare a batch with torchvision's pixels of the same windows."""
    request = data.train._request((0, BATCH, "train"))
    images, _ = data.train.batch(0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    for image, file, window, flip in zip(
        images, request.files, request.windows.tolist(), request.flips, strict=True
    ):
        whole = v2.functional.pil_to_tensor(default_loader(file))
        expected = v2.functional.resized_crop(whole, *window, [SIZE, SIZE], antialias=True)
        expected = expected.flip(-1) if flip else expected
        apart = (255 * (image * std + mean) - expected).abs().flatten()
        assert apart.mean() <= MEAN_LEVELS
        assert apart.quantile(0.99) <= P99_LEVELS


@pytest.mark.parametrize("provider", PROVIDERS)
def test_augmented_batches_of_jpeg_files(benchmark, folder, provider):
    name, _, helpers = provider.partition("-")
    before = torch.get_num_threads()
    torch.set_num_threads(int(helpers) or 1 if name == "dali" else 1)
    try:
        data = load(folder)
        assert_same_pixels(data)
        if name == "dali":
            batches = map(data.train.batch, range(10**6))
        else:
            batches = torchvision_loader(folder, data, int(helpers))
        images, labels = next(batches)
        assert images.shape == (BATCH, 3, SIZE, SIZE)
        assert labels.shape == (BATCH,)
        benchmark.pedantic(
            lambda: [next(batches) for _ in range(BATCHES)], rounds=7, warmup_rounds=1
        )
    finally:
        torch.set_num_threads(before)
    benchmark.extra_info |= {"images": BATCH * BATCHES, "load": os.getloadavg()[0]}
    if benchmark.stats is not None:
        rate = BATCH * BATCHES / benchmark.stats["median"]
        benchmark.extra_info["images_per_second"] = round(rate)
        print(f"\n{provider}: {rate:.0f} images/s, load {os.getloadavg()[0]:.1f}")
