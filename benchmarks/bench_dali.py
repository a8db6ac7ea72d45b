"""Time augmented batches of JPEG files: NVIDIA DALI on the CPU beside torchvision's loaders.

`OMP_NUM_THREADS=1 pytest benchmarks/bench_dali.py` gives images per second, decoding included; the
record is `dali.py`'s, where they take turns.
"""

from __future__ import annotations

import os

import pytest
from jpeg_loaders import KINDS, PROVIDERS, batches, write

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra dali)")
for package in ("torchvision", "sklearn.datasets", "PIL.Image"):
    pytest.importorskip(package)

BATCHES = 8


@pytest.fixture(scope="module", params=KINDS)
def files(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("jpeg")
    write(root, KINDS[request.param])
    return root, KINDS[request.param]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_augmented_batches_of_jpeg_files(benchmark, files, provider):
    folder, kind = files
    num, side = kind.batch_size, kind.image_size
    with batches(provider, folder, kind) as given:
        images, labels = next(given)
        assert images.shape == (num, 3, side, side)
        assert labels.shape == (num,)
        benchmark.pedantic(lambda: [next(given) for _ in range(BATCHES)], rounds=7, warmup_rounds=1)
    benchmark.extra_info |= {"images": num * BATCHES, "load": os.getloadavg()[0]}
    if benchmark.stats is not None:
        rate = num * BATCHES / benchmark.stats["median"]
        benchmark.extra_info["images_per_second"] = round(rate)
        print(f"\n{side} pixels, {provider}: {rate:.0f} images/s, load {os.getloadavg()[0]:.1f}")
