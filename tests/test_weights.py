"""A supernet comes back from a file with its space, its weights and their version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastshift import spaces
from fastshift.batch_norm import start_ema
from fastshift.errors import CheckpointError
from fastshift.supernet import ChainSupernet, Supernet
from fastshift.weights import load_supernet, save_supernet


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    made = Supernet(spaces.digits(num_classes=7))
    made.version = 12
    return made


def test_space_weights_statistics_and_version_come_back(supernet, tmp_path):
    start_ema(supernet)
    path = save_supernet(supernet, tmp_path, {"note": "here"})
    for place in (tmp_path, path):
        loaded, meta = load_supernet(place)
        assert loaded.space.fingerprint() == supernet.space.fingerprint() == meta["fingerprint"]
        assert loaded.space.recipe == supernet.space.recipe
        assert (loaded.version, meta["version"], meta["note"]) == (12, 12, "here")
        tensors, expected = loaded.tensors(), supernet.tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_the_layout_of_the_weights_is_not_part_of_the_file(supernet, tmp_path):
    first = save_supernet(supernet, tmp_path / "a").read_bytes()
    supernet.to(memory_format=torch.channels_last)
    assert save_supernet(supernet, tmp_path / "b").read_bytes() == first


def test_costs_can_be_counted_for_images_of_another_size(supernet, tmp_path):
    save_supernet(supernet, tmp_path)
    loaded, _ = load_supernet(tmp_path, image_size=16)
    expected = spaces.digits(image_size=16, num_classes=7)
    arch = np.array([1, 2, 3, 0, 1, 2], np.uint8)
    assert loaded.space.flops(arch).tolist() == expected.flops(arch).tolist()
    assert loaded.space.trunk_fingerprint() == supernet.space.trunk_fingerprint()


def test_a_supernet_of_modules_is_refused_with_what_to_do(tmp_path):
    chain = ChainSupernet(
        nn.Conv2d(1, 4, 3, padding=1),
        [[nn.Identity(), nn.Conv2d(4, 4, 3, padding=1)]],
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        input_shape=(1, 8, 8),
    )
    save_supernet(chain, tmp_path)
    with pytest.raises(CheckpointError, match="build its ChainSupernet in Python"):
        load_supernet(tmp_path)
