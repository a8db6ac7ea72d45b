"""A supernet of arbitrary modules on the command line, from pre-training to the exported file."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch

import fastshift as fs
from fastshift.cli import main
from fastshift.export import load_into, read_metadata

CHAIN = """
import torch
from torch import nn
from fastshift import ChainSupernet
from fastshift.ops import Head, Unit, identity
from fastshift.space import SearchSpace

def body(c):
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight

def parts(in_channels, num_classes, last=None):
    blocks = [[nn.Identity(), body(4), nn.Conv2d(4, 4, 1)] for _ in range(2)]
    if last is not None:
        blocks[1].append(last)
    stem = nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))
    return stem, blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                       nn.Dropout(0.1), nn.Linear(4, num_classes))

def chain(image_size, num_classes, in_channels):
    shape = (in_channels, image_size, image_size)
    return ChainSupernet(*parts(in_channels, num_classes), input_shape=shape, name="hand-made")

def stuck(image_size, num_classes, in_channels):
    shape = (in_channels, image_size, image_size)
    return ChainSupernet(*parts(in_channels, num_classes, Scale()), input_shape=shape)

def unmeasured(image_size, num_classes, in_channels):
    return ChainSupernet(*parts(in_channels, num_classes))

def ten(image_size, num_classes, in_channels):
    return ChainSupernet(*parts(in_channels, 10), input_shape=(in_channels, image_size, image_size))

def listed(image_size=8, num_classes=10, in_channels=1):
    return chain(image_size, num_classes, in_channels)

def listed_unmeasured(image_size=8, num_classes=10, in_channels=1):
    return unmeasured(image_size, num_classes, in_channels)

def module(image_size, num_classes, in_channels):
    return nn.Identity()
"""

IMAGES = ["--data=digits", "--limit=100", "--validation-size=50", "--calibration-batches=1"]
IMAGES += ["--calibration-batch-size=25", "--quiet"]
SEARCH = ["--generations=1", "--population=4", "--parents=2", "--shift-steps=1", "--top-k=3"]
SEARCH += ["--shift-batch-size=8", "--flops=90%"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("chain")
    (made / "nets.py").write_text(CHAIN)
    return made


@pytest.fixture(scope="module")
def named(folder):
    """The option that names a function of the file."""
    return lambda function="chain": f"--space={folder / 'nets.py'}:{function}"


@pytest.fixture(scope="module")
def supernet(folder, named):
    out = folder / "supernet"
    argv = ["pretrain", named(), *IMAGES, f"--out={out}", "--steps=3", "--batch-size=8"]
    assert main(argv) == 0
    return out


@pytest.fixture(scope="module")
def run(folder, named):
    """A finished search with everything on."""
    out = folder / "run"
    stage = ["--pretrain-steps=2", "--pretrain-batch-size=8"]
    check = ["--retrain-check=1", "--retrain-epochs=1"]
    assert main(["search", named(), *IMAGES, *SEARCH, *stage, *check, f"--out={out}"]) == 0
    return out


@pytest.fixture
def refused(capsys):
    def check(*argv: str, says: str) -> None:
        assert main(list(argv)) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("fastshift: error: ")
        assert shown.err.count("\n") == 1
        assert says in shown.err

    return check


def load_data():
    options = {"limit": 100, "validation_size": 50, "calibration_batches": 1}
    return fs.data.load("digits", calibration_batch_size=25, **options)


def built(folder, function="chain", num_classes=10):
    shape = {"image_size": 8, "num_classes": num_classes, "in_channels": 1}
    return fs.spaces.make(f"{folder / 'nets.py'}:{function}", **shape)


def test_pre_training_is_that_of_the_library_from_the_seeds_weights(supernet, folder):
    torch.manual_seed(0)
    expected = built(folder).to(memory_format=torch.channels_last)
    fs.pretrain(expected, load_data(), steps=3, batch_size=8)
    loaded, meta = fs.load_supernet(supernet, into=built(folder))
    assert meta["version"] == 3
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_a_search_leaves_a_result_a_page_and_retrained_networks(run):
    result = json.loads((run / "result.json").read_text())
    assert result["space"]["name"] == "hand-made"
    assert [row["kind"] for row in result["retrained"]] == ["winner", "random"]
    assert "<html" in (run / "report.html").read_text()


def test_a_search_goes_from_a_saved_supernet(supernet, named, tmp_path):
    out = tmp_path / "run"
    argv = ["search", f"--supernet={supernet}", named(), *IMAGES, *SEARCH, f"--out={out}"]
    assert main([*argv, "--no-report"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert {row["weights_version"] for row in result["top"]} == {3 + 2}


def test_a_transfer_has_a_head_for_the_new_classes(supernet, named, folder, tmp_path):
    out = tmp_path / "run"
    argv = ["transfer", f"--supernet={supernet}", named(), *IMAGES, *SEARCH, f"--out={out}"]
    assert main([*argv, "--no-report", "--classes=7,3", "--head-warmup-steps=2"]) == 0
    moved, meta = fs.load_supernet(out, into=built(folder, num_classes=2))
    assert moved.head[3].out_features == 2
    assert meta["version"] == 3 + 2 + 2


def test_evaluate_gives_the_scores_of_the_library(supernet, named, folder, capsys):
    argv = ["evaluate", f"--supernet={supernet}", named(), *IMAGES, "--archs=random:3"]
    assert main(argv) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    data = load_data()
    net, _ = fs.load_supernet(supernet, into=built(folder))
    net.to(memory_format=torch.channels_last)
    score = fs.Evaluator(net, data.validation, calibration=data.calibration)
    assert [float(row["error"]) for row in rows] == score([r["arch"] for r in rows]).tolist()


def test_retrain_and_export_the_winner(run, named, folder, tmp_path):
    out = tmp_path / "retrained"
    chosen = [f"--supernet={run}", "--arch=best", named(), *IMAGES]
    assert main(["retrain", *chosen, "--epochs=1", f"--out={out}"]) == 0
    content = json.loads((out / "retrained.json").read_text())
    best = json.loads((run / "result.json").read_text())["best"]["arch"]
    assert content["arch"] == best
    space = built(folder).space
    assert content["params"] == space.params([best])[0]
    file = tmp_path / "net.pt2"
    assert main(["export", f"--supernet={out}", named(), "--quiet", f"--out={file}"]) == 0
    program = torch.export.load(file)
    assert program.module()(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_retrain_needs_no_supernet(named, tmp_path):
    argv = ["retrain", named(), "--arch=12", *IMAGES, "--epochs=1", f"--out={tmp_path / 'a'}"]
    assert main(argv) == 0


@pytest.mark.parametrize("format", ["torch", "safetensors", "onnx"])
def test_an_exported_network_is_the_one_that_was_scored(run, named, folder, format, tmp_path):
    argv = ["export", f"--supernet={run}", "--arch=best", named(), *IMAGES, f"--format={format}"]
    assert main([*argv, f"--out={tmp_path}"]) == 0
    best = json.loads((run / "result.json").read_text())["best"]
    (file,) = tmp_path.iterdir()
    facts = read_metadata(file)
    assert (facts["arch"], facts["space"]) == (best["arch"], "hand-made")
    if format == "safetensors":
        net = built(folder).subnet(best["arch"])
        load_into(net, file)
        wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in load_data().validation)
        assert wrong / 50 == pytest.approx(best["error"], abs=1e-6)


def test_spaces_lists_the_modules(folder, capsys):
    assert main(["spaces", f"{folder / 'nets.py'}:listed"]) == 0
    shown = capsys.readouterr().out
    assert "hand-made: 2 choice blocks, 9 architectures, 1x8x8 images, 10 classes" in shown
    assert "    1: Sequential, 2,304 FLOPs, 152 parameters" in shown
    assert main(["spaces", f"{folder / 'nets.py'}:listed_unmeasured"]) == 0
    shown = capsys.readouterr().out
    assert "chain: 2 choice blocks, 9 architectures, 10 classes" in shown
    assert "flops" not in shown


def test_a_saved_supernet_of_modules_needs_its_function(supernet, refused):
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, "--archs=random:2"]
    refused(*argv, says="expected --space FILE.py:FUNCTION with the function that made it")


@pytest.mark.parametrize("function", ["stuck", "--space=digits"])
def test_a_saved_supernet_of_modules_is_not_loaded_into_others(supernet, named, refused, function):
    space = function if function.startswith("--") else named(function)
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, "--archs=random:2", space]
    refused(*argv, says="a supernet of another space, 'hand-made'")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("unmeasured", "a ChainSupernet without input_shape"),
        ("ten", "a ChainSupernet with num_classes 10; expected 2"),
        ("module", "expected a SearchSpace or a ChainSupernet, got Identity"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(
    named, refused, function, says, tmp_path
):
    out = tmp_path / "run"
    argv = ["pretrain", named(function), *IMAGES, "--classes=1,2", "--steps=1", f"--out={out}"]
    refused(*argv, says=says)
    assert not out.exists()


def test_modules_that_cannot_start_anew_are_refused_before_any_work(named, refused, tmp_path):
    out = tmp_path / "run"
    stage = ["--pretrain-steps=1", "--retrain-check=1"]
    argv = ["search", named("stuck"), *IMAGES, *SEARCH, *stage, f"--out={out}"]
    refused(*argv, says="blocks.1.3: reset_parameters of its Scale is missing")
    argv = ["retrain", named("stuck"), "--arch=03", *IMAGES, "--epochs=1", f"--out={out}"]
    refused(*argv, says="blocks.1: reset_parameters of its Scale is missing")
    assert not out.exists()
