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


def _chain(kernel: int = 3, image_size: int = 8, classes: int = 3) -> ChainSupernet:
    return ChainSupernet(
        nn.Conv2d(1, 4, 3, padding=1),
        [[nn.Identity(), nn.Conv2d(4, 4, kernel, padding=kernel // 2), nn.BatchNorm2d(4)]],
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)),
        input_shape=(1, image_size, image_size),
    )


def test_a_supernet_of_modules_is_refused_with_what_to_do(tmp_path):
    save_supernet(_chain(), tmp_path)
    with pytest.raises(CheckpointError, match="build its ChainSupernet in Python"):
        load_supernet(tmp_path)


def test_a_supernet_of_modules_is_filled_from_its_file(tmp_path):
    chain = _chain()
    chain.version = 5
    start_ema(chain)
    save_supernet(chain, tmp_path, {"note": "here"})
    fresh = _chain()
    loaded, meta = load_supernet(tmp_path, into=fresh)
    assert loaded is fresh
    assert (loaded.version, meta["note"]) == (5, "here")
    tensors, expected = loaded.tensors(), chain.tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"kernel": 5}, "flops, params"), ({"image_size": 16}, "image_size, flops")],
    ids=["params", "size"],
)
def test_a_supernet_of_other_modules_is_refused_by_what_differs(changes, what, tmp_path):
    save_supernet(_chain(), tmp_path)
    with pytest.raises(CheckpointError, match=f"another space, 'chain'.*differs in {what}"):
        load_supernet(tmp_path, into=_chain(**changes))


def test_modules_for_images_of_another_size_take_the_weights_where_that_is_asked_for(tmp_path):
    chain = _chain()
    save_supernet(chain, tmp_path)
    loaded, _ = load_supernet(tmp_path, image_size=16, into=_chain(image_size=16))
    assert torch.equal(loaded.stem.weight, chain.stem.weight)
    with pytest.raises(CheckpointError, match="differs in params"):
        load_supernet(tmp_path, image_size=16, into=_chain(kernel=5, image_size=16))


def test_the_space_of_a_new_head_is_that_of_modules_built_with_it(tmp_path):
    chain = _chain()
    chain.reset_head(7, seed=0)
    save_supernet(chain, tmp_path)
    loaded, _ = load_supernet(tmp_path, into=_chain(classes=7))
    assert torch.equal(loaded.head[2].weight, chain.head[2].weight)
