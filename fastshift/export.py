"""A subnet -> a file that runs without FastShift: a `torch.export` program, safetensors, or ONNX.

Every file is written beside its final place, read back, and its logits compared with the network's
before it takes its name; a file that exists is therefore a file that agreed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastshift.errors import CheckpointError, ConfigError, missing_extra

__all__ = ["FORMATS", "Exported", "checked_path", "export", "load_into", "read_metadata"]

FORMATS = {"torch": ".pt2", "safetensors": ".safetensors", "onnx": ".onnx"}

_FORMAT_VERSION = 1
_METADATA_KEY = "fastshift"
_RESERVED = ("format", "arch", "input_shape", "dtype", "num_outputs", "torch")

# Largest |difference| of a logit over the largest |logit|. A reloaded state dict gives the same
# bits; the exported program runs the same kernels; ONNX folds batch norms into convolutions.
_TOLERANCE = {"torch": 1e-5, "safetensors": 0.0, "onnx": 1e-4}

# The first is what deployment mostly runs and what a tracer would most easily specialise to.
_PARITY_BATCH_SIZES = (1, 3)


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: the file.
        format: `torch`, `safetensors` or `onnx`.
        parity: largest absolute difference of a logit from the network's, over the largest
            absolute logit.
        num_bytes: size of the file.
    """

    path: Path
    format: str
    parity: float
    num_bytes: int


def export(
    net: nn.Module,
    arch: str,
    path: str | os.PathLike[str],
    *,
    format: str = "torch",
    input_shape: Sequence[int],
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a network with its weights and check that the file computes the same logits.

    The network is copied, put on the CPU and into evaluation mode; it is not changed itself. The
    batch size stays free in `torch` and `onnx` files, the other dimensions are fixed. Neither holds
    a source path, and a `torch` file holds no pickle. The file appears only when it passed.

    Args:
        net: a plain network of one input `[N, C, H, W]` and one output `[N, classes]`.
        arch: the architecture's string, kept in the file's metadata.
        path: a file name with the format's suffix (`.pt2`, `.safetensors`, `.onnx`), or an existing
            directory, where the file is called after `arch`.
        format: `torch` (loads with `torch.export.load`), `safetensors` (the state dict; `load_into`
            a network of the same structure) or `onnx` (needs the extra `onnx`).
        input_shape: `(C, H, W)` of one image.
        metadata: JSON-able facts to keep in the file, such as the space's recipe, the classes and
            the mean and standard deviation that images are normalised by.

    Returns:
        Where the file lies, how large it is and how closely its logits agree.

    Raises:
        ConfigError: an argument cannot be used.
        CheckpointError: a weight is not finite, the network cannot be exported, the file cannot be
            written, or its logits differ from the network's.
        MissingExtraError: `format` is `onnx` and its packages are not installed.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    shape = _checked_shape(input_shape)
    target = checked_path(path, format, arch)
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    # Two images: the tracer fixes sizes 0 and 1, and the batch would no longer be free.
    example = torch.zeros(2, *shape, dtype=_checked_dtype(net))
    logits = [net(images) for images in _images(example)]
    if any(out.ndim != 2 or not bool(torch.isfinite(out).all()) for out in logits):
        raise CheckpointError(
            f"architecture {arch}: logits of shape {list(logits[0].shape)} for images "
            f"{[1, *shape]}; expected finite [N, classes]"
        )
    facts = _facts(arch, example, logits[0].shape[1], metadata)
    writer = {"torch": _write_torch, "safetensors": _write_safetensors, "onnx": _write_onnx}[format]
    with _beside(target) as draft:
        try:
            reload = writer(net, draft, example, facts)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        parity = _parity(reload, example, logits)
        if not parity <= _TOLERANCE[format]:
            raise CheckpointError(
                f"architecture {arch}: logits of the {format} file differ by {parity:.3g} of the "
                f"largest logit; expected at most {_TOLERANCE[format]:g}; no file was written"
            )
        # safetensors writes for its user alone: whoever may read other new files may read this one.
        like = draft.with_name("mode")
        like.touch()
        os.chmod(draft, like.stat().st_mode & 0o777)
        os.replace(draft, target)
    return Exported(target, format, parity, target.stat().st_size)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the facts that `export` kept in a file, without loading its weights where possible.

    Args:
        path: a file written by `export`, of any format.

    Returns:
        `format`, `arch`, `input_shape`, `dtype`, `num_outputs`, `torch`, and what the caller added.

    Raises:
        ConfigError: the suffix is none of the formats'.
        CheckpointError: the file is damaged or was not written by `export`.
        MissingExtraError: an ONNX file, and `onnx` is not installed.
    """
    path = Path(path)
    try:
        if path.suffix == FORMATS["torch"]:
            text = _torch_metadata(path)
        elif path.suffix == FORMATS["safetensors"]:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY)
        elif path.suffix == FORMATS["onnx"]:
            properties = _import_onnx()[0].load(path).metadata_props
            text = {item.key: item.value for item in properties}.get(_METADATA_KEY)
        else:
            suffixes = ", ".join(FORMATS.values())
            raise ConfigError(f"path is {str(path)!r}; expected a name ending in one of {suffixes}")
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if text is None:
        raise CheckpointError(f"{path} has no metadata; expected a file that export wrote")
    facts = json.loads(text)
    if facts.get("format") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {facts.get('format')!r}; expected {_FORMAT_VERSION}"
        )
    return facts


def load_into(net: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load an exported safetensors file into a network of the same structure, strictly.

    Args:
        net: the network to fill; its tensors keep their device and type.
        path: a `.safetensors` file written by `export`.

    Returns:
        The file's metadata.

    Raises:
        CheckpointError: the file is damaged, or its tensors are not those of `net`.
    """
    facts = read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        net.load_state_dict(tensors, strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not fit the network: {error}") from error
    return facts


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape)
    if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ConfigError(f"input_shape is {input_shape!r}; expected positive integers (C, H, W)")
    return shape


def checked_path(path: str | os.PathLike[str], format: str, arch: str) -> Path:
    """The file that `export` would write.

    Args:
        path: a file name with the format's suffix, or an existing directory.
        format: one of `FORMATS`.
        arch: the architecture's string.

    Raises:
        ConfigError: the name has another suffix.
    """
    path, suffix = Path(path), FORMATS[format]
    if path.is_dir():
        path = path / f"{arch}{suffix}"
    if path.suffix != suffix:
        raise ConfigError(
            f"path is {str(path)!r}; expected a name ending in {suffix!r} or an existing directory"
        )
    return path


def _checked_dtype(net: nn.Module) -> torch.dtype:
    floating = {}
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        floating[tensor.dtype] = name
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name!r} is not finite; expected finite weights")
    if len(floating) != 1:
        raise CheckpointError(
            f"weights are of types {sorted(map(str, floating))}; expected one floating type"
        )
    return next(iter(floating))


def _facts(arch: str, example: Tensor, num_outputs: int, metadata: Mapping[str, Any] | None) -> str:
    extra = dict(metadata or {})
    taken = [key for key in _RESERVED if key in extra]
    if taken:
        raise ConfigError(f"metadata has the key {taken[0]!r}; it is one of {_RESERVED}")
    dtype = str(example.dtype).removeprefix("torch.")
    shape = list(example.shape[1:])
    values = (_FORMAT_VERSION, arch, shape, dtype, num_outputs, torch.__version__)
    try:
        return json.dumps({**dict(zip(_RESERVED, values, strict=True)), **extra}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata cannot be written as JSON: {error}") from error


def _images(example: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for size in _PARITY_BATCH_SIZES:
        yield torch.randn(size, *example.shape[1:], generator=generator, dtype=example.dtype)


def _parity(reload: Callable[[Tensor], Tensor], example: Tensor, expected: list[Tensor]) -> float:
    differences = []
    for images, logits in zip(_images(example), expected, strict=True):
        scale = logits.abs().max().clamp_min(torch.finfo(example.dtype).tiny)
        differences.append((reload(images) - logits).abs().max() / scale)
    return float(torch.stack(differences).max())  # NaN where any is


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give a draft of the same name in a folder beside `target`, removed with what is left in it.

    The name is kept because a `.pt2` archive names its root folder after the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".export-"))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder)


def _program(net: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of a user's module under the tracer: anything can come out of it
        raise CheckpointError(
            f"torch.export cannot trace the network: {_first_line(error)}"
        ) from error
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # source paths of the exporting machine
            if getattr(node.target, "namespace", None) == "fastshift":
                raise CheckpointError(
                    f"the network calls {node.target}, which needs FastShift to load; expected a "
                    "plain subnet"
                )
    return program


def _first_line(error: BaseException) -> str:
    """What is wrong, in the words of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _write_torch(
    net: nn.Module, path: Path, example: Tensor, facts: str
) -> Callable[[Tensor], Tensor]:
    program = _program(net, example)
    program.example_inputs = None  # they would be the only pickle in the file
    torch.export.save(program, path, extra_files={"metadata.json": facts})
    with warnings.catch_warnings():
        # PyTorch 2.11 and older say it of the file's bytes, which nothing writes to.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(path).module()


def _torch_metadata(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        # An archive may hold others; cut short it ends in one of theirs, which does not begin it.
        if min((entry.header_offset for entry in archive.infolist()), default=0):
            raise zipfile.BadZipFile("its end is missing")
        names = [name for name in archive.namelist() if name.endswith("/extra/metadata.json")]
        return archive.read(names[0]).decode() if names else None


def _write_safetensors(
    net: nn.Module, path: Path, example: Tensor, facts: str
) -> Callable[[Tensor], Tensor]:
    tensors = {name: tensor.clone().contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, path, metadata={_METADATA_KEY: facts})
    empty = copy.deepcopy(net)
    for tensor in empty.state_dict().values():
        tensor.zero_()
    load_into(empty, path)
    return empty


def _import_onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "onnx", extra="onnx") from error
    return onnx, onnxruntime


def _write_onnx(
    net: nn.Module, path: Path, example: Tensor, facts: str
) -> Callable[[Tensor], Tensor]:
    onnx, onnxruntime = _import_onnx()
    program = _program(net, example)
    try:
        with warnings.catch_warnings():
            # What PyTorch says here is of its own parts; the file is compared with the network.
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"torch.onnx cannot convert the network: {_first_line(error)}"
        ) from error
    model = exported.model_proto
    graph = model.graph
    described = (graph, *graph.node, *graph.input, *graph.output, *graph.value_info)
    for item in (*described, *graph.initializer):
        item.ClearField("metadata_props")  # source paths and traces of the exporting machine
        item.ClearField("doc_string")
    onnx.helper.set_model_props(model, {_METADATA_KEY: facts})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
