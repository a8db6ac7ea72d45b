"""Time a training batch, stage by stage and whole, and the decoding of an image folder.

`OMP_NUM_THREADS=1 pytest benchmarks/bench_data.py` gives images per second on one core.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch

from fastshift import data as fsdata

NUM_IMAGES = 20_000
SIZES = (128, 512)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(NUM_IMAGES) % 10


@pytest.fixture(scope="module")
def data(arrays):
    return fsdata.from_arrays(*arrays, device="cpu")


def measure(benchmark, step, size, rounds=100, **extra):
    """Time `step(index)` over successive indices and record images per second."""
    position = iter(range(10**9))
    benchmark.pedantic(lambda: step(next(position)), rounds=rounds, warmup_rounds=rounds // 10)
    benchmark.extra_info |= {"images": size, "threads": torch.get_num_threads(), **extra}
    if benchmark.stats is not None:
        benchmark.extra_info["images_per_second"] = round(size / benchmark.stats["median"])


def one_by_one(train, index, size):
    """Make batch `index` image by image, as a per-image pipeline does: the reference."""
    positions = train._positions[train._draw(index * size, (index + 1) * size, "train")]
    rng, augment = train._rng("train", 1, index), train.augmentation
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in astuple(train._normalise))
    pad, fill = augment.padding, torch.tensor(augment.fill, dtype=torch.uint8).view(3, 1, 1)
    offsets = rng.integers(2 * pad + 1, size=(2, size)).T.tolist()
    flips = (rng.random(size) < 0.5).tolist()
    images = []
    for position, (top, left), is_flipped in zip(positions, offsets, flips, strict=True):
        padded = fill.repeat(1, 32 + 2 * pad, 32 + 2 * pad)
        padded[:, pad:-pad, pad:-pad] = train._source.images[position]
        image = padded[:, top : top + 32, left : left + 32]
        image = image.flip(-1) if is_flipped else image
        images.append((image / 255 - mean) / std)
    return torch.stack(images), torch.from_numpy(train._source.labels[positions])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", ["one_by_one", "batched"])
def test_augmented_training_batch(benchmark, data, provider, size):
    train = data.train
    for left, right in zip(train.batch(3, size), one_by_one(train, 3, size), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    if provider == "batched":
        measure(benchmark, lambda index: train.batch(index, size), size)
    else:
        measure(benchmark, lambda index: one_by_one(train, index, size), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", ["draw", "take", "augment", "normalise"])
def test_stage_of_a_training_batch(benchmark, data, stage, size):
    train = data.train
    positions = train._positions[train._draw(0, size, "train")]
    images = train._source.take(positions)
    rng = np.random.default_rng(0)
    steps = {
        "draw": lambda index: train._draw(index * size, (index + 1) * size, "train"),
        "take": lambda index: train._source.take(positions),
        "augment": lambda index: train.augmentation(images, rng),
        "normalise": lambda index: train._normalise(images),
    }
    measure(benchmark, steps[stage], size)


def test_building_a_data_set_from_arrays(benchmark, arrays):
    built = benchmark.pedantic(fsdata.from_arrays, arrays, {"device": "cpu"}, rounds=3)
    assert built.train.num_images == NUM_IMAGES - 2000


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_decoding_a_folder_on_access(benchmark, arrays, tmp_path, suffix):
    image_module = pytest.importorskip("PIL.Image")
    side = 256
    images = arrays[0][: 64 * 64].reshape(64, side, side, 3)  # noise: the worst case for a codec
    for part in ("train", "val"):
        for index, image in enumerate(images):
            file = tmp_path / part / str(index % 2) / f"{index}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image_module.fromarray(image).save(file)
    on_disk = fsdata.load(f"folder:{tmp_path}", image_size=128, batch_size=32, max_memory_bytes=0)
    measure(benchmark, on_disk.train.batch, 32, rounds=10, suffix=suffix)
