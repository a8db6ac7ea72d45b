"""Images in memory beside a GPU: which device holds them, batches as on the host, what is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastshift import backends
from fastshift import data as fsdata
from fastshift.data import arrays
from fastshift.data.batches import TrainBatches
from fastshift.data.uploaded import UploadedTrainBatches
from fastshift.errors import DataError
from fastshift.pretrain import pretrain
from fastshift.search import search
from fastshift.testing import tiny_supernet


def pictures(num=400, size=8, channels=3, num_classes=4, seed=0):
    """Make random images, all different, and labels in turn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8)
    return images, np.arange(num) % num_classes


def _both_streams(device, **options):
    """The training part on the host, and the same on a device."""
    images, labels = pictures(60, 8, options.pop("channels", 3))
    plain = fsdata.from_arrays(images, labels, batch_size=7, seed=3, **options).train
    there = UploadedTrainBatches(
        device=device,
        source=plain._source,
        positions=plain._positions,
        batch_size=plain.batch_size,
        seed=plain.seed,
        normalise=plain._normalise,
        augmentation=plain.augmentation,
    )
    return plain, there


@pytest.mark.parametrize(
    "options", [{}, {"flip": False}, {"augment": False}, {"channels": 1, "flip": True}]
)
def test_batches_of_images_on_a_device_are_those_of_the_host(options):
    pytest.importorskip("triton", minversion="3.6")
    plain, there = _both_streams(torch.device("cpu"), **options)
    assert there.describe() == plain.describe()
    for key in ((0,), (20, 5), (3, 64, "shift"), (0,)):
        (images, labels), (found, same) = plain.batch(*key), there.batch(*key)
        assert torch.equal(found, images)
        assert torch.equal(same, labels)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def gpus(monkeypatch):
    """Two of them, to be told about."""
    monkeypatch.delenv("FASTSHIFT_DEVICE", raising=False)
    monkeypatch.delenv("FASTSHIFT_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_batches_of_images_on_a_gpu_are_those_of_the_host_but_for_a_rounding():
    plain, there = _both_streams(torch.device("cuda", 0))
    for index in (0, 9, 4):
        (images, labels), (found, same) = plain.batch(index), there.batch(index)
        assert found.device.type == "cuda"
        assert torch.allclose(found.cpu(), images, rtol=0, atol=2.0**-22)
        assert torch.equal(same, labels)


def test_a_gpu_holds_the_training_part_where_it_fits(gpus, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    given = pictures()

    def made(**options):
        return type(fsdata.from_arrays(*given, **options).train)

    assert made(device="cpu") is TrainBatches
    assert made(device="cuda") is made(device="cuda:0") is UploadedTrainBatches
    monkeypatch.setattr(arrays, "MOST_BYTES", 1000)
    assert made(device="cuda") is made() is TrainBatches


def test_the_device_of_images_in_memory_is_chosen_as_everywhere(gpus, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    given = pictures()

    def train(**options):
        return fsdata.from_arrays(*given, **options).train

    assert train().device == train(device="auto").device == torch.device("cuda")
    with pytest.raises(DataError, match="device='cuda:2': expected one of the 2 usable GPUs"):
        train(device="cuda:2")
    monkeypatch.setenv("FASTSHIFT_DEVICE", "cuda:1")
    assert train().device == torch.device("cuda", 1)
    monkeypatch.setenv("FASTSHIFT_DEVICE", "cpu")
    assert type(train()) is TrainBatches
    assert train(device="cuda").device == torch.device("cuda")
    with pytest.raises(DataError, match="device='tpu': expected auto, cpu, cuda or cuda:N"):
        train(device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("FASTSHIFT_DEVICE")
    assert type(train()) is TrainBatches
    with pytest.raises(DataError, match="device='cuda': no usable GPU"):
        train(device="cuda")
    monkeypatch.setenv("FASTSHIFT_DEVICE", "cuda")
    with pytest.raises(DataError, match="device='auto': FASTSHIFT_DEVICE=cuda: no usable GPU"):
        train()


def test_training_batches_say_where_they_are_augmented_and_why_not_on_the_gpu(gpus, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    given = pictures(60, 8, 3)

    def said(**options):
        return fsdata.from_arrays(*given, **options).train.augmented

    assert said(device="cpu") == "on the host"
    assert said() == said(device="cuda") == "on cuda"
    assert said(device="cuda:1") == "on cuda:1"
    monkeypatch.setenv("FASTSHIFT_BACKEND", "reference")
    why = "on the host: without the Triton kernels: FASTSHIFT_BACKEND=reference"
    assert said(device="cuda") == why
    monkeypatch.delenv("FASTSHIFT_BACKEND")
    monkeypatch.setattr(backends, "_lacks_triton", lambda: "triton is not installed")
    assert said(device="cuda") == "on the host: without the Triton kernels: triton is not installed"
    monkeypatch.setattr(backends, "_lacks_triton", lambda: None)
    monkeypatch.setattr(arrays, "MOST_BYTES", 1 << 10)
    assert said(device="cuda") == (
        "on the host: 0.00 GiB of images, more than the 0.00 that are kept on a GPU"
    )


def test_what_trains_says_where_its_batches_were_augmented():
    data = fsdata.from_arrays(*pictures(60, 8, 3), validation_size=10, batch_size=8)
    net, options = tiny_supernet(data.num_classes), {"batch_size": 8, "lr": 0.01}
    assert pretrain(net, data, steps=1, **options).augmented == "on the host"
    small = {"generations": 0, "population": 3, "parents": 2, "top_k": 2}
    small |= {"shift_steps": 1, "shift_batch_size": 8}
    data.train.augmented = "on cuda:0"
    assert search(net, data, **small).to_dict()["computed"]["augment"] == ["on cuda:0"]
    still = search(net, data, **small, shift="none")
    assert "augment" not in still.computed  # nothing was trained on
