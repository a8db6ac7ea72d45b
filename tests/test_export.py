"""Exported files run without FastShift and compute the network's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastshift.errors import CheckpointError, ConfigError, MissingExtraError
from fastshift.export import FORMATS, export, load_into, read_metadata

SHAPE = (3, 8, 8)

# Runs in a fresh interpreter where FastShift cannot be imported, and prints the logits.
WITHOUT_FASTSHIFT = """
import json, sys
import torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastshift":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
net = torch.export.load(sys.argv[1]).module()
images = torch.arange(4 * 192).reshape(4, 3, 8, 8).sin()
logits = [net(images[:size]).tolist() for size in (1, 2, 4)]
try:
    import fastshift
except ImportError:
    print(json.dumps(logits))
"""


class ShuffleNet(nn.Module):
    """Two kinds of split, a depthwise convolution, a shortcut, pooling, dropout, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.shuffled = self._unit(8, groups=8)
        self.chunked = self._unit(8, groups=1)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(16, 5, bias=False)

    @staticmethod
    def _unit(channels: int, groups: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=groups, bias=False),
            nn.BatchNorm2d(channels, affine=groups == 1),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = torch.cat((x[:, ::2], self.shuffled(x[:, 1::2])), dim=1)
        left, right = x.chunk(2, dim=1)
        x = x + torch.cat((left, self.chunked(right)), dim=1)
        return self.classifier(self.dropout(x.mean(dim=(2, 3))))


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = ShuffleNet()
    with torch.no_grad():  # statistics that are not the identity
        for _ in range(3):
            net(torch.randn(16, *SHAPE) * 2 + 1)
    return net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return make_net()


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    metadata = {"classes": ["cat", "dog"], "mean": [0.5, 0.25, 0.125]}
    return {
        format: export(
            net, "0123", folder, format=format, input_shape=SHAPE, metadata=metadata
        ).path
        for format in FORMATS
    }


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_carries_the_architecture_and_the_callers_facts(
    files: dict[str, Path], format: str
) -> None:
    facts = read_metadata(files[format])
    assert files[format].name == f"0123{FORMATS[format]}"
    assert facts["arch"] == "0123"
    assert facts["input_shape"] == list(SHAPE)
    assert facts["dtype"] == "float32"
    assert facts["num_outputs"] == 5
    assert facts["classes"] == ["cat", "dog"]
    assert facts["mean"] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_may_be_read_by_whoever_may_read_other_new_files(
    files: dict[str, Path], format: str, tmp_path: Path
) -> None:
    (tmp_path / "new").touch()
    assert files[format].stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_torch_file_runs_where_fastshift_cannot_be_imported(
    net: nn.Module, files: dict[str, Path]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FASTSHIFT, str(files["torch"])],
        capture_output=True,
        text=True,
        check=True,
        cwd=files["torch"].parent,
    )
    images = torch.arange(4 * 192).reshape(4, 3, 8, 8).sin()
    with torch.no_grad():
        for size, logits in zip((1, 2, 4), json.loads(done.stdout), strict=True):
            expected = net.eval()(images[:size])
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-6)


def test_an_onnx_file_takes_any_batch_size_and_agrees_with_the_network(
    net: nn.Module, files: dict[str, Path]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
    for size in (1, 2, 7):
        images = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(size))
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = net.eval()(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_a_safetensors_file_fills_a_network_of_the_same_structure_bit_for_bit(
    net: nn.Module, files: dict[str, Path]
) -> None:
    other = ShuffleNet()
    facts = load_into(other, files["safetensors"])
    assert facts["arch"] == "0123"
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_a_file_holds_no_path_of_the_machine_that_wrote_it(
    files: dict[str, Path], format: str
) -> None:
    content = files[format].read_bytes()
    assert b".py" not in content
    assert str(Path.cwd()).encode() not in content


def test_a_torch_file_is_the_same_bytes_each_time(net: nn.Module, tmp_path: Path) -> None:
    once = export(net, "0", tmp_path / "a" / "net.pt2", input_shape=SHAPE)
    again = export(net, "0", tmp_path / "b" / "net.pt2", input_shape=SHAPE)
    assert once.path.read_bytes() == again.path.read_bytes()
    assert once.num_bytes == once.path.stat().st_size
    assert 0 <= once.parity <= 1e-5


def test_exporting_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    net = make_net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export(net, "0", tmp_path / "net.safetensors", format="safetensors", input_shape=SHAPE)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_float64_network_is_exported_in_float64(tmp_path: Path) -> None:
    done = export(
        make_net().double(), "0", tmp_path / "net.safetensors", format="safetensors",
        input_shape=SHAPE,
    )  # fmt: skip
    assert read_metadata(done.path)["dtype"] == "float64"


def test_a_network_that_calls_our_operators_is_refused_as_a_torch_file(tmp_path: Path) -> None:
    library = torch.library.Library("fastshift", "FRAGMENT")
    library.define("export_test_double(Tensor x) -> Tensor")
    library.impl("export_test_double", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("export_test_double", lambda x: torch.empty_like(x), "Meta")

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(torch.ops.fastshift.export_test_double(images.mean((2, 3))))

    with pytest.raises(CheckpointError, match=r"export_test_double.*needs FastShift to load"):
        export(Calls(), "0", tmp_path / "net.pt2", input_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


class Branches(nn.Module):
    """Decides by its values, which no exported program can."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Bessel(nn.Module):
    """Uses an operator that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("format", "module", "says"),
    [
        ("torch", Branches(), "torch.export cannot trace the network: .*data-dependent"),
        ("onnx", Bessel(), "torch.onnx cannot convert the network: .*bessel_j0"),
    ],
    ids=["torch", "onnx"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_module_that_a_format_cannot_hold_is_refused(
    format: str, module: nn.Module, says: str, tmp_path: Path
) -> None:
    net = nn.Sequential(module, nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(CheckpointError, match=says):
        export(net, "0", tmp_path, format=format, input_shape=SHAPE)
    assert not list(tmp_path.iterdir())


def test_a_file_whose_logits_differ_never_appears(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_damaged(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        damaged = {name: tensor * 1.01 for name, tensor in tensors.items()}
        save_file(damaged, path, metadata=metadata)

    monkeypatch.setattr(sys.modules["fastshift.export"], "save_file", write_damaged)
    with pytest.raises(CheckpointError, match="logits of the safetensors file differ by"):
        export(net, "0", tmp_path / "n.safetensors", format="safetensors", input_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_the_old_file(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nothing(*args: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "net.safetensors"
    path.write_text("the old file")
    monkeypatch.setattr(sys.modules["fastshift.export"], "save_file", write_nothing)
    with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
        export(net, "0", path, format="safetensors", input_shape=SHAPE)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    net = make_net()
    with torch.no_grad():
        net.classifier.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"'classifier\.weight' is not finite"):
        export(net, "0", tmp_path / "net.pt2", input_shape=SHAPE)


def test_tensors_of_another_network_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="does not fit the network"):
        load_into(nn.Linear(2, 2), files["safetensors"])


def test_a_file_cut_short_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    for format in ("torch", "safetensors"):
        cut = tmp_path / f"cut{FORMATS[format]}"
        cut.write_bytes(files[format].read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_metadata(cut)


def test_a_safetensors_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    assert load_file(path).keys() == {"weight"}
    with pytest.raises(CheckpointError, match="has no metadata"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"format": "pickle"}, "format is 'pickle'; expected one of torch, safetensors, onnx"),
        ({"path": "net.onnx"}, r"path is 'net.onnx'; expected a name ending in '.pt2'"),
        ({"input_shape": (3, 8)}, r"input_shape is \(3, 8\); expected positive integers"),
        ({"input_shape": (3, 0, 8)}, "expected positive integers"),
        ({"metadata": {"arch": "1"}}, "metadata has the key 'arch'"),
        ({"metadata": {"mean": float("nan")}}, "metadata cannot be written as JSON"),
        ({"metadata": {"net": object()}}, "metadata cannot be written as JSON"),
    ],
)
def test_an_unusable_argument_is_named(
    net: nn.Module, tmp_path: Path, keywords: dict[str, object], message: str
) -> None:
    arguments = {"path": tmp_path / "net.pt2", "input_shape": SHAPE, **keywords}
    with pytest.raises(ConfigError, match=message):
        export(net, "0", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_onnx_package_is_named_with_its_extra(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime'.*\.\[onnx\]"):
        export(net, "0", tmp_path / "net.onnx", format="onnx", input_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []
