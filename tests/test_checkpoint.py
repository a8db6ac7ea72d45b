from __future__ import annotations

import math

import pytest
import torch

from fastshift import checkpoint


def _tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(24, generator=generator)
    return {
        "model": {
            "blocks.0.1.weight": flat[:12].view(3, 4),
            "blocks.0.2.weight": flat[12:].view(3, 4).t(),
            "counter": torch.tensor(seed),
            "empty": torch.zeros(0, 3),
        },
        "rng": {"torch": generator.get_state()[:40]},
    }


def _state(seed: int) -> dict[str, object]:
    return {
        "step": seed,
        "lr": 0.1 + seed / 3,
        "count": 3**200 + seed,
        "loss": [math.nan, math.inf, -math.inf, -0.0, 5e-324],
        "note": "é\n\ud800",
        "none": None,
        "flag": True,
    }


def _assert_same(found: checkpoint.Checkpoint | None, seed: int) -> None:
    assert found is not None
    assert found.serial == seed
    expected = _tensors(seed)
    assert found.tensors.keys() == expected.keys()
    for group, members in expected.items():
        assert found.tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor)
    assert repr(found.state) == repr(_state(seed))


def _save(root, seed: int, keep: int = 2):
    return checkpoint.save(root, seed, tensors=_tensors(seed), state=_state(seed), keep=keep)


def test_a_checkpoint_comes_back_exactly(tmp_path):
    assert checkpoint.load(tmp_path) is None
    for seed in range(4):
        folder = _save(tmp_path, seed)
        assert folder == tmp_path / "checkpoint" / f"{seed:08d}"
        _assert_same(checkpoint.load(tmp_path), seed)
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["00000002", "00000003", "LATEST"]


def test_a_flipped_byte_in_any_file_is_refused(tmp_path):
    folder = _save(tmp_path, 1)
    files = [tmp_path / "checkpoint" / "LATEST", *folder.iterdir()]
    assert len(files) == 5
    for path in files:
        good = path.read_bytes()
        for position in range(len(good)):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint/"):
                checkpoint.load(tmp_path)
        path.write_bytes(good)
    _assert_same(checkpoint.load(tmp_path), 1)
