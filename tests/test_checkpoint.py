from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors_torch

from fastshift import checkpoint
from fastshift.errors import CheckpointError


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


def _damage(path: Path) -> Iterator[str]:
    """Leave the file with one byte flipped (a sample of them), cut short, overlong, missing."""
    good = path.read_bytes()
    generator = random.Random(path.name)
    positions = range(len(good))
    for position in sorted(generator.sample(positions, min(len(good), 100))):
        flipped = good[position] ^ (1 << generator.randrange(8))
        path.write_bytes(good[:position] + bytes([flipped]) + good[position + 1 :])
        yield f"byte {position} of {path.name} is {flipped}"
    for length in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        yield f"{path.name} has {length} bytes"
    path.write_bytes(good + b"\n")
    yield f"{path.name} has a byte more"
    path.write_bytes(good)


def test_damage_to_any_byte_of_any_file_is_refused(tmp_path):
    _save(tmp_path, 0)
    folder = _save(tmp_path, 1)
    files = [tmp_path / "checkpoint" / "LATEST", *folder.iterdir()]
    assert len(files) == 5
    for path in files:
        for damage in _damage(path):
            with pytest.raises(CheckpointError, match="checkpoint/") as caught:
                pytest.fail(f"loaded although {damage}: {checkpoint.load(tmp_path)}")
            assert "\n" not in str(caught.value)
    _assert_same(checkpoint.load(tmp_path), 1)


def test_a_missing_file_is_refused_by_name(tmp_path):
    folder = _save(tmp_path, 1)
    for path in folder.iterdir():
        good = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.load(tmp_path)
        path.write_bytes(good)
    folder.rename(folder.with_name("00000007"))
    with pytest.raises(CheckpointError, match="names '00000001', which is missing"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="names '00000001', which is missing"):
        _save(tmp_path, 8)


def test_two_checkpoints_without_the_file_that_commits_one_are_refused(tmp_path):
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    (tmp_path / "checkpoint" / "LATEST").unlink()
    with pytest.raises(CheckpointError, match="LATEST is missing"):
        checkpoint.load(tmp_path)


def test_another_format_version_is_refused_by_number(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", 2)
        _save(tmp_path, 1)
        checkpoint.save_supernet(tmp_path, {}, {})
    with pytest.raises(CheckpointError, match="format 2, expected 1"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="format 2, expected 1"):
        checkpoint.load_supernet(tmp_path)


def test_the_same_serial_again_replaces_its_checkpoint_and_nothing_where_all_is_equal(tmp_path):
    first = _save(tmp_path, 10)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert _save(tmp_path, 10) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for count in range(1, 12):
        state = {"seconds": count}
        folder = checkpoint.save(tmp_path, 10, tensors={}, state=state, keep=1)
        assert folder.name == f"00000010-{count}"
        found = checkpoint.load(tmp_path)
        assert found is not None
        assert (found.serial, found.state) == (10, state)
    assert _save(tmp_path, 11, keep=1).name == "00000011"
    _assert_same(checkpoint.load(tmp_path), 11)
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["00000011", "LATEST"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep is 0"),
        ({"serial": -1}, "serial is -1"),
        ({"serial": 2}, "serial is 2, expected at least 3"),
        ({"state": {"a": {1: 2}}}, "state.a has the key 1"),
        ({"state": {"a": [0, {"b": np.int64(1)}]}}, r"state\.a\[1\]\.b is a int64"),
        ({"state": {"a": b"raw"}}, r"state\.a is a bytes"),
        ({"tensors": {"../model": {}}}, "group '../model'"),
        ({"tensors": {"model": {"a": torch.zeros(1, dtype=torch.complex128)}}}, "model holds"),
    ],
)
def test_what_cannot_be_saved_exactly_is_named(tmp_path, options, message):
    _save(tmp_path, 3)
    arguments = {"serial": 4, "tensors": {}, "state": {}, **options}
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, arguments.pop("serial"), **arguments)
    _assert_same(checkpoint.load(tmp_path), 3)


def test_a_layout_without_contiguous_memory_of_its_own_is_saved_by_value(tmp_path):
    base = torch.arange(24.0).view(1, 2, 3, 4)
    tensors = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(2, 3),
        "parameter": torch.nn.Parameter(base[:, 1]),
        "bfloat16": base.to(torch.bfloat16),
        "float64": base.double() / 3,
    }
    checkpoint.save(tmp_path, 1, tensors={"model": tensors}, state={})
    found = checkpoint.load(tmp_path)
    assert found is not None
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors["model"][name], tensor)
    found.tensors["model"]["float64"].add_(1)


@pytest.fixture
def no_sync(monkeypatch):
    """Spare the waiting: only a loss of power, which no test here causes, would tell."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class _Faults:
    """Counts the calls that touch the disk, and fails one of them, a write after half its bytes."""

    CALLS = ("open", "write", "fsync", "mkdir", "replace", "unlink", "rmdir")

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, error: BaseException, calls: tuple[str, ...] = CALLS
    ) -> None:
        self.error, self.left = error, -1
        for name in calls:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, call: Callable) -> Callable:
        def wrapped(*arguments, **options):
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise self.error
            return call(*arguments, **options)

        return wrapped


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("num_earlier", [0, 3])
def test_killed_at_any_call_to_the_disk_a_complete_checkpoint_is_left(
    tmp_path, monkeypatch, no_sync, num_earlier
):
    found_serials = []
    for call in itertools.count(1):
        root = tmp_path / str(call)
        for seed in range(num_earlier):
            _save(root, seed)
        with monkeypatch.context() as context, contextlib.suppress(_Killed):
            faults = _Faults(context, _Killed())
            faults.left = call
            _save(root, num_earlier)
        was_killed = faults.left <= 0
        found = checkpoint.load(root)
        found_serials.append(-1 if found is None else found.serial)
        if found is not None:
            _assert_same(found, found.serial)
        # Whatever was left behind is in nobody's way and goes with the next save.
        _save(root, num_earlier + 1, keep=1)
        _assert_same(checkpoint.load(root), num_earlier + 1)
        names = sorted(path.name for path in (root / "checkpoint").iterdir())
        assert names == [f"{num_earlier + 1:08d}", "LATEST"]
        if not was_killed:
            break
    assert call > 25
    assert set(found_serials) == {num_earlier - 1, num_earlier}
    assert found_serials == sorted(found_serials)


def test_killed_while_a_serial_is_saved_again_one_of_the_two_is_left(
    tmp_path, monkeypatch, no_sync
):
    found_states = []
    for call in itertools.count(1):
        root = tmp_path / str(call)
        checkpoint.save(root, 5, tensors={}, state={"seconds": 1})
        with monkeypatch.context() as context, contextlib.suppress(_Killed):
            faults = _Faults(context, _Killed())
            faults.left = call
            checkpoint.save(root, 5, tensors={}, state={"seconds": 2}, keep=1)
        found = checkpoint.load(root)
        assert found is not None
        found_states.append(found.state["seconds"])
        if faults.left > 0:
            break
    assert set(found_states) == {1, 2}
    assert found_states == sorted(found_states)


def test_a_full_disk_leaves_the_checkpoint_committed_before(tmp_path, monkeypatch, no_sync):
    found_serials = []
    for call in itertools.count(1):
        root = tmp_path / str(call)
        for seed in range(3):
            _save(root, seed)
        message = ""
        with monkeypatch.context() as context:
            faults = _Faults(context, OSError(errno.ENOSPC, "No space left on device"))
            faults.left = call
            try:
                _save(root, 3)
            except CheckpointError as error:
                message = str(error)
        was_full = faults.left <= 0
        found = checkpoint.load(root)
        assert found is not None
        _assert_same(found, found.serial)
        found_serials.append(found.serial)
        if message:
            assert "No space left on device" in message
            assert not list((root / "checkpoint").glob(".tmp-*"))
        else:
            assert found.serial == 3
        if not was_full:
            break
    assert call > 25
    assert set(found_serials) == {2, 3}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")
def test_every_file_is_on_the_disk_before_the_rename_that_shows_it(tmp_path, monkeypatch):
    _save(tmp_path, 0)
    events: list[tuple[str, Path]] = []

    def record(name: str) -> None:
        call = getattr(os, name)

        def recorded(place, *arguments):
            path = Path(f"/proc/self/fd/{place}").readlink() if isinstance(place, int) else place
            events.append((name, path))
            return call(place, *arguments)

        context.setattr(os, name, recorded)

    with monkeypatch.context() as context:
        for name in ("write", "fsync", "replace"):
            record(name)
        _save(tmp_path, 1)
    folder = tmp_path / "checkpoint"
    temporary = folder / ".tmp-00000001"
    renames = [index for index, (kind, _) in enumerate(events) if kind == "replace"]
    assert [events[index][1] for index in renames] == [temporary, folder / ".tmp-LATEST"]
    shown, committed = renames
    for index, (kind, path) in enumerate(events):
        if kind == "write":
            rename = shown if path.parent == temporary else committed
            assert ("fsync", path) in events[index:rename]
    assert events[shown - 1] == ("fsync", temporary)
    assert ("fsync", folder) in events[shown:committed]
    assert ("fsync", folder) in events[committed:]


def _meta() -> dict[str, object]:
    recipe = {"constructor": "digits", "image_size": 8, "note": 'a "quoted" \\ name: é'}
    return {"fingerprint": "abc", "name": "digits", "recipe": recipe}


def test_a_supernet_comes_back_exactly(tmp_path):
    tensors = _tensors(1)["model"]
    path = checkpoint.save_supernet(tmp_path / "new" / "supernet", tensors, _meta())
    assert path == tmp_path / "new" / "supernet" / "supernet.safetensors"
    for given in (path, path.parent, str(path.parent)):
        found, meta = checkpoint.load_supernet(given, fingerprint="abc")
        assert meta == _meta()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    written = path.read_bytes()
    checkpoint.save_supernet(path.parent, tensors, _meta())
    assert path.read_bytes() == written
    assert [item.name for item in path.parent.iterdir()] == ["supernet.safetensors"]
    assert safetensors_torch.load_file(path).keys() == tensors.keys()


def test_damage_to_any_byte_of_a_supernet_is_refused(tmp_path):
    path = checkpoint.save_supernet(tmp_path, {"a": torch.arange(5.0)}, _meta())
    for damage in _damage(path):
        with pytest.raises(CheckpointError, match=r"supernet\.safetensors") as caught:
            pytest.fail(f"loaded although {damage}: {checkpoint.load_supernet(path)}")
        assert "\n" not in str(caught.value)


def test_files_that_are_no_supernet_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_supernet(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    safetensors_torch.save_file({"a": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match="not a supernet of fastshift"):
        checkpoint.load_supernet(foreign)
    foreign.write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="not a supernet of fastshift"):
        checkpoint.load_supernet(foreign)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(tmp_path, bad):
    tensors = {"good": torch.ones(3), "stem.weight": torch.tensor([1.0, bad])}
    checkpoint.save_supernet(tmp_path, tensors, _meta())
    with pytest.raises(CheckpointError, match=r"not finite, in 'stem\.weight'"):
        checkpoint.load_supernet(tmp_path)


def test_a_supernet_of_another_space_is_refused_by_name(tmp_path):
    checkpoint.save_supernet(tmp_path, {}, _meta())
    with pytest.raises(CheckpointError, match=r"another space: 'digits'.*expected 'xyz'"):
        checkpoint.load_supernet(tmp_path, fingerprint="xyz")


def test_a_full_disk_leaves_the_supernet_written_before(tmp_path, monkeypatch):
    checkpoint.save_supernet(tmp_path, {"a": torch.zeros(3)}, _meta())
    for call in ("open", "write", "fsync", "replace"):
        with monkeypatch.context() as context:
            faults = _Faults(context, OSError(errno.ENOSPC, "No space left on device"), (call,))
            faults.left = 1
            with pytest.raises(CheckpointError, match=r"supernet\.safetensors.*No space left"):
                checkpoint.save_supernet(tmp_path, {"a": torch.ones(3)}, _meta())
            faults.left = -1
        assert not checkpoint.load_supernet(tmp_path)[0]["a"].any()
        assert [item.name for item in tmp_path.iterdir()] == ["supernet.safetensors"]
