"""Where things are computed, and how exactly: names of devices, and what a GPU is set to."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import fastshift as fs
from fastshift import data as fsdata
from fastshift import device as devices
from fastshift import evaluator as evaluators
from fastshift import trainer as trainers
from fastshift.device import parse_device, settle_on, use_device
from fastshift.errors import ConfigError
from fastshift.evaluator import Evaluator, uploaded
from fastshift.prefetch import PrefetchedBatches
from fastshift.testing import random_archs, synthetic_data, tiny_supernet
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

CPU = torch.device("cpu")
retrains = import_module("fastshift.retrain")  # in the package its name is the function's
DATA = synthetic_data()


@pytest.fixture
def gpus(monkeypatch):
    """Two of them, to be told about."""
    monkeypatch.delenv("FASTSHIFT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.delenv("FASTSHIFT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_name_means_a_device_that_is_there(gpus, monkeypatch):
    assert parse_device("auto") == torch.device("cuda")
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    assert parse_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert parse_device("cpu") == CPU
    with pytest.raises(ValueError, match="one of the 2 usable GPUs"):
        parse_device("cuda:2")
    monkeypatch.setenv("FASTSHIFT_DEVICE", "cuda:1")
    assert parse_device("auto") == torch.device("cuda", 1)
    assert parse_device("cpu") == CPU
    monkeypatch.setenv("FASTSHIFT_DEVICE", "auto")
    assert parse_device("auto") == torch.device("cuda")
    for name in ("tpu", "cuda:2"):
        monkeypatch.setenv("FASTSHIFT_DEVICE", name)
        with pytest.raises(ValueError, match=f"^FASTSHIFT_DEVICE={name}: expected "):
            parse_device("auto")


def test_without_a_gpu_auto_is_the_cpu(no_gpu):
    assert parse_device("auto") == CPU
    with pytest.raises(ValueError, match="no usable GPU"):
        parse_device("cuda")
    for name in ("tpu", "meta", "", "cuda:x"):
        with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
            parse_device(name)


def test_the_suite_takes_the_cpu_where_no_device_is_named():
    assert parse_device("auto") == CPU
    assert fsdata.Options().parsed_device() == CPU


FLAGS = ("allow_tf32", "deterministic", "benchmark")


@pytest.fixture
def current(monkeypatch):
    """Which devices became the current one, and what cuDNN was set to there."""
    found = []

    @contextmanager
    def device(which):
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    for name, value in zip(FLAGS, (True, False, True), strict=True):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    return found


def _flags():
    return tuple(getattr(torch.backends.cudnn, name) for name in FLAGS)


def test_on_a_gpu_fp32_is_fp32_and_runs_repeat_and_afterwards_all_is_as_it_was(current):
    with use_device(torch.device("cuda", 1)):
        assert _flags() == (False, True, False)
    assert _flags() == (True, False, True)
    with pytest.raises(KeyError), use_device(torch.device("cuda", 1)):
        raise KeyError
    assert _flags() == (True, False, True)
    assert current == [1, 1]
    with use_device(CPU):
        assert _flags() == (True, False, True)
    settle_on(torch.device("cuda", 1))
    assert _flags() == (False, True, False)


# Each in a process of its own: what was asked for once cannot be taken back.
PRECISION = """
import os, torch
from fastshift.device import fp32_precision
matmul = torch.backends.cuda.matmul
for how in {!r}:
    if os.fork() == 0:
        exec(how)
        print(fp32_precision(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older PyTorch"
)
def test_however_pytorch_is_asked_the_precision_is_known(fresh):
    wanted = {
        "": "ieee",
        "torch.set_float32_matmul_precision('highest')": "ieee",
        "torch.set_float32_matmul_precision('high')": "tf32",
        "matmul.allow_tf32 = True": "tf32",
        "matmul.fp32_precision = 'ieee'": "ieee",
        "matmul.fp32_precision = 'tf32'": "tf32",
    }
    assert fresh(PRECISION.format(list(wanted))).split() == list(wanted.values())


ASKED = """
import contextlib, os, torch
from fastshift.device import use_device

cudnn = torch.backends.cudnn
torch.cuda.device = contextlib.nullcontext
torch.cuda.set_device = lambda device: None

def parts():
    return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision

for how in {!r}:
    if os.fork() == 0:
        exec(how)
        before = parts()
        with use_device(torch.device("cuda", 0)):
            within = (cudnn.allow_tf32, *parts())
        assert parts() == before, (how, parts(), before)
        print(*within, flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="an older PyTorch")
def test_however_pytorch_is_asked_convolutions_are_exact_and_left_as_they_were(fresh):
    exact, tf32 = "False ieee ieee", "True tf32 tf32"
    wanted = {
        "": exact,
        "cudnn.conv.fp32_precision = 'ieee'": exact,
        "cudnn.conv.fp32_precision = 'tf32'": exact,
        "cudnn.rnn.fp32_precision = 'ieee'": exact,
        "cudnn.allow_tf32 = False": exact,
        "torch.backends.fp32_precision = 'ieee'": exact,
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'": tf32,
        "torch.set_float32_matmul_precision('high')": tf32,
    }
    assert fresh(ASKED.format(list(wanted))).splitlines() == list(wanted.values())


def test_tf32_is_used_where_pytorch_is_asked_for_it(current):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with use_device(torch.device("cuda", 0)):
            assert _flags() == (True, True, False)
    finally:
        torch.set_float32_matmul_precision(before)


def test_scores_updates_and_tests_are_computed_there(monkeypatch):
    used = []

    @contextmanager
    def note(device):
        used.append(device)
        yield

    for module in (evaluators, trainers, retrains):
        monkeypatch.setattr(module, "use_device", note)
    net = tiny_supernet()
    archs = random_archs(net.space, 2)
    for strategy in ("shared", "sequential"):
        Evaluator(net, DATA.validation, batch_norm="running", strategy=strategy)(archs)
    PathTrainer(net, lr=0.1).update(Plan(archs), *DATA.train.batch(0, 4), position=0)
    assert used == [CPU] * 3
    fs.retrain(net, "0000", _with_test(), epochs=1, batch_size=24)
    assert used == [CPU] * len(used)
    assert len(used) > 4


def _with_test():
    train = SimpleNamespace(batch=DATA.train.batch, num_images=24)
    return SimpleNamespace(**vars(DATA) | {"train": train, "test": DATA.validation})


def test_an_architecture_is_retrained_where_its_supernet_is(monkeypatch):
    asked = []

    def parse(name):
        asked.append(str(name))
        raise ValueError("expected another")

    monkeypatch.setattr(retrains, "parse_device", parse)
    net, data = tiny_supernet(), _with_test()
    for given, options in ((net, {}), (net.space, {}), (net, {"device": "auto"})):
        with pytest.raises(ConfigError, match=r"device: '(cpu|auto)'; expected another"):
            fs.retrain(given, "0000", data, **options)
    assert asked == ["cpu", "cpu", "auto"]


def test_batches_are_uploaded_where_they_fit_and_else_at_each_iteration():
    batches = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)) for _ in range(3)]
    size = 3 * (2 * 3 * 4 + 2 * 8)
    found = uploaded(iter(batches), torch.device("meta"), size)
    assert [(len(x), x.device.type, y.device.type) for x, y in found] == [(2, "meta", "meta")] * 3
    found = uploaded(batches, torch.device("meta"), size - 1)
    assert isinstance(found, PrefetchedBatches)
    assert all(own is given for own, given in zip(found, batches, strict=True))


class _Counted(list):
    """Batches that count how often they are read."""

    reads = 0

    def __iter__(self):
        for batch in super().__iter__():
            _Counted.reads += 1
            yield batch


def test_batches_are_read_once_for_a_device_of_their_own(monkeypatch):
    _Counted.reads = 0
    net = tiny_supernet()
    evaluator = Evaluator(net, _Counted(DATA.validation), batch_norm="running")
    parameter = SimpleNamespace(device=torch.device("meta"))
    monkeypatch.setattr(net, "parameters", lambda: iter([parameter]))
    first = evaluator._there("batches")
    assert [x.device.type for x, _ in first] == ["meta"] * len(DATA.validation)
    assert evaluator._there("batches") is first
    assert _Counted.reads == len(DATA.validation)
    evaluator.batches = list(DATA.validation)
    assert evaluator._there("batches") is not first
    assert evaluator._there("calibration") is None


def test_a_batch_is_read_once_for_the_size_of_the_images(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.setenv("FASTSHIFT_STEPS", "static")
    _Counted.reads = 0
    net = tiny_supernet()
    evaluator = Evaluator(net, _Counted(DATA.validation), batch_norm="running")
    for _ in range(3):
        evaluator(random_archs(net.space, 2))
    # Once for its size; then all, once for the sizes of batches and once to be scored.
    assert _Counted.reads == 1 + 3 * 2 * len(DATA.validation)


def _readings(source):
    """Where code asks whether a name is that of a GPU; a device's `type` may be asked anywhere."""

    def is_named(node):
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(isinstance(p, ast.Constant) and str(p.value).startswith("cuda") for p in parts)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides):
                continue
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            sides = node.args if node.func.attr in ("startswith", "find", "count", "match") else []
        else:
            continue
        if any(map(is_named, sides)):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    ("asked", "is_reading"),
    [
        ("options.device.startswith('cuda')", True),
        ("device in ('cuda', 'cuda:0')", True),
        ("'cuda' in name", True),
        ("str(device) != 'cuda'", True),
        ("device.type == 'cuda'", False),
        ("name in ('cpu', 'auto')", False),
    ],
)
def test_a_question_of_a_devices_name_is_told_from_one_of_its_type(asked, is_reading):
    assert list(_readings(asked)) == [asked] * is_reading


def test_only_one_module_decides(request):
    for path in (request.path.parents[1] / "fastshift").glob("**/*.py"):
        text = path.read_text()
        if path.name in ("device.py", "queries.py", "backends.py", "graphs.py"):
            continue
        assert "cuda.is_available" not in text, path
        assert not list(_readings(text)), path


def test_devices_are_named_in_one_place():
    named = ["TURN", "fp32_precision", "in_turn", "parse_device", "settle_on", "use_device"]
    assert devices.__all__ == named
    assert fsdata.Options().device == "auto"
