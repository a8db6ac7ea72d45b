"""State in, files out, and back: everything a run needs to go on bit for bit.

A checkpoint is a folder of safetensors and JSON files, written beside the others, made durable, and
committed by one rename; whatever stops the program, the newest committed one is complete. No file
can run code when it is loaded, and every byte of it stands under a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from fastshift.durable import (
    TEMPORARY,
    naming,
    read_file,
    replace_file,
    sync_folder,
    write_file,
)
from fastshift.errors import CheckpointError

__all__ = ["FORMAT", "Checkpoint", "load", "load_supernet", "save", "save_supernet"]

FORMAT = 1

_FOLDER = "checkpoint"
_LATEST = "LATEST"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_SUPERNET = "supernet.safetensors"
_NO_DIGEST = "0" * 64
# The supernet's own checksum sits in its header, written as if it were all zeros.
_DIGEST = re.compile(rb'\{\\"sha256\\":\\"([0-9a-f]{64})\\"')


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found: the tensors by group and name (on the CPU), and the rest of the state."""

    serial: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    root: str | Path,
    serial: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Commit a checkpoint to `root/checkpoint/SERIAL/`, then remove all but the newest `keep`.

    Killed at any moment, or out of space, the checkpoint committed before stays valid and `load`
    returns it. Tensors that share memory are stored apart. Numbers in `state` come back exactly,
    NaN and infinities included; tuples come back as lists.

    Args:
        root: the run directory.
        serial: the checkpoint's number, at least that of the one committed last. The same number
            again replaces that one as safely (`SERIAL-1`), and writes nothing where all is equal.
        tensors: group -> name -> tensor; each group is one safetensors file.
        state: JSON-able values with string keys.
        keep: how many committed checkpoints stay, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: `serial`, `keep`, a group's name, or a value of `state` JSON cannot hold.
        CheckpointError: the files cannot be written (disk full, no permission).
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1")
    if serial < 0:
        raise ValueError(f"serial is {serial}, expected a number from 0")
    _check_json(state, "state")
    files = {_STATE: _json_bytes(state)}
    for group, members in tensors.items():
        if not re.fullmatch(r"\w[\w.-]*", group):
            raise ValueError(f"tensors has the group {group!r}, expected a plain file name")
        files[f"{group}.safetensors"] = _tensor_bytes(members, group)
    manifest = {
        "format": FORMAT,
        "serial": serial,
        "files": {
            name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()
        },
    }
    files[_MANIFEST] = _json_bytes(manifest)

    digest = _sha256(files[_MANIFEST])

    folder = Path(root) / _FOLDER
    name = f"{serial:08d}"
    committed = _committed(folder)
    if committed is not None:
        last, again = _order(committed[0])
        if serial < last:
            raise ValueError(f"serial is {serial}, expected at least {last}, committed last")
        if serial == last and digest == committed[1]:
            return folder / committed[0]
        if serial == last:
            name = f"{serial:08d}-{again + 1}"
    temporary, target = folder / f"{TEMPORARY}{name}", folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        _prune(folder, committed[0] if committed else None, keep)
        temporary.mkdir()
        for filename, data in files.items():
            write_file(temporary / filename, data)
        sync_folder(temporary)
        os.replace(temporary, target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        raise CheckpointError(f"checkpoint {serial} cannot be written: {error}") from error
    replace_file(folder / _LATEST, f"{name}\n{digest}\n".encode())
    with naming(folder, "pruned"):
        _prune(folder, name, keep)
    return target


def load(root: str | Path) -> Checkpoint | None:
    """Read the checkpoint committed last in a run directory, checking every byte of it.

    Args:
        root: the run directory.

    Returns:
        The checkpoint, or None where none was ever committed.

    Raises:
        CheckpointError: a file is missing, cut short, changed, or of another format version.
    """
    folder = Path(root) / _FOLDER
    committed = _committed(folder)
    if committed is None:
        if len(names := _serials(folder)) > 1:
            raise CheckpointError(f"{folder / _LATEST} is missing beside checkpoints {names}")
        return None
    name, digest = committed
    chosen = folder / name
    raw = read_file(chosen / _MANIFEST)
    if _sha256(raw) != digest:
        raise CheckpointError(f"{chosen / _MANIFEST} is damaged: not the file that {_LATEST} names")
    manifest = json.loads(raw)
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{chosen} has checkpoint format {manifest['format']!r}, expected {FORMAT}"
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    for filename, expected in manifest["files"].items():
        path = chosen / filename
        data = read_file(path)
        if len(data) != expected["bytes"]:
            raise CheckpointError(
                f"{path} is cut short or overlong: {len(data)} bytes, expected {expected['bytes']}"
            )
        if _sha256(data) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one recorded")
        if filename == _STATE:
            state = json.loads(data)
        else:
            tensors[filename.removesuffix(".safetensors")] = safetensors_torch.load(data)
    return Checkpoint(serial=manifest["serial"], tensors=tensors, state=state)


def save_supernet(
    directory: str | Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]
) -> Path:
    """Write `directory/supernet.safetensors`, replacing an older one by one rename.

    Args:
        directory: made where it is missing.
        tensors: the supernet's state, by name.
        meta: JSON-able values kept in the header: the space's `fingerprint`, `name`, `recipe`.

    Returns:
        The file.

    Raises:
        ValueError: a value of `meta` that JSON cannot hold exactly.
        CheckpointError: the file cannot be written; an older one is untouched.
    """
    _check_json(meta, "meta")
    header = json.dumps(
        {"sha256": _NO_DIGEST, "format": FORMAT, "meta": meta}, separators=(",", ":")
    )
    data = _tensor_bytes(tensors, "supernet", {"fastshift": header})
    found = _DIGEST.search(data)
    assert found is not None
    data = data[: found.start(1)] + _sha256(data).encode() + data[found.end(1) :]
    path = Path(directory) / _SUPERNET
    with naming(path.parent, "made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)
    return path


def load_supernet(
    path: str | Path, *, fingerprint: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a supernet's weights and what was saved about its space.

    Args:
        path: a directory with `supernet.safetensors`, or such a file.
        fingerprint: the fingerprint the supernet's space must have; None accepts any.

    Returns:
        The tensors by name (on the CPU) and `meta` as it was saved.

    Raises:
        CheckpointError: the file is missing, cut short, changed, of another format version or
            space, or holds a value that is not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / _SUPERNET
    data = read_file(path)
    header_end = 8 + int.from_bytes(data[:8], "little")
    found = _DIGEST.search(data, 8, header_end)
    if found is None:
        raise CheckpointError(f"{path} is not a supernet of fastshift, or its header is damaged")
    blank = data[: found.start(1)] + _NO_DIGEST.encode() + data[found.end(1) :]
    if _sha256(blank) != found[1].decode():
        raise CheckpointError(f"{path} is cut short or damaged: not the bytes its checksum names")
    header = json.loads(json.loads(data[8:header_end])["__metadata__"]["fastshift"])
    if header["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {header['format']!r}, expected {FORMAT}")
    meta = header["meta"]
    if fingerprint is not None and meta.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path} is a supernet of another space: {meta.get('name')!r} with fingerprint "
            f"{meta.get('fingerprint')!r}, expected {fingerprint!r}"
        )
    tensors = safetensors_torch.load(data)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path} holds values that are not finite, in {name!r}")
    return tensors, meta


def _committed(folder: Path) -> tuple[str, str] | None:
    """The committed folder's name and its manifest's checksum, as `LATEST` says."""
    path = folder / _LATEST
    if not path.exists():
        return None
    found = re.fullmatch(rb"([0-9]{8,}(?:-[0-9]+)?)\n([0-9a-f]{64})\n", raw := read_file(path))
    if found is None:
        raise CheckpointError(f"{path} is damaged: {raw[:80]!r}, expected a folder and a checksum")
    name, digest = found[1].decode(), found[2].decode()
    if not (folder / name).is_dir():
        raise CheckpointError(f"{path} names {name!r}, which is missing from {folder}")
    return name, digest


def _serials(folder: Path) -> list[str]:
    """The names of the checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    pattern = re.compile("[0-9]{8,}(-[0-9]+)?")
    return sorted((p.name for p in folder.iterdir() if pattern.fullmatch(p.name)), key=_order)


def _order(name: str) -> tuple[int, int]:
    """The serial in a folder's name, and how often it was saved again."""
    serial, _, again = name.partition("-")
    return int(serial), int(again or 0)


def _prune(folder: Path, committed: str | None, keep: int) -> None:
    """Remove what no reader needs: unfinished saves, and all but `keep` committed checkpoints."""
    names = _serials(folder)
    last = names.index(committed) + 1 if committed is not None else 0
    stale = [folder / name for name in names[: max(last - keep, 0)] + names[last:]]
    for path in [*stale, *folder.glob(f"{TEMPORARY}*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_json(value: object, where: str) -> None:
    """Refuse what JSON would change or cannot hold."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}, expected a string")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where} is a {type(value).__name__}, expected a value JSON can hold")


def _json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _tensor_bytes(
    tensors: Mapping[str, Tensor], where: str, metadata: dict[str, str] | None = None
) -> bytes:
    """The safetensors file of these tensors, each copied to memory of its own."""
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        return safetensors_torch.save(copies, metadata)
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{where} holds a tensor of unknown kind: {error}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
