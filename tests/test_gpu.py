"""The GPU suite: what it refuses, names and leaves out, and its whole path on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import gpu
import gpu_gate
import gpu_kernels
import gpu_networks
from catalogue import cases
from gpu_ceilings import CEILINGS, share
from gpu_items import Bench, Item
from gpu_references import FLOORS, error_of
from gpu_report import DRY_RUN, tables
from gpu_timing import Clock, OutOfTimeError, Several, in_turns

from fastshift.backends import is_interpreted
from fastshift.kernels import loss
from fastshift.testing import global_error

ROOT = Path(__file__).parents[1]
DRY = ["--device", "cpu", "--tiny"]
CPU = torch.device("cpu")
KERNELS = (
    "layer_infer",
    "layer_train",
    "layer_backward",
    "candidate_loss",
    "candidate_loss_backward",
    "sgd_step",
    "augment_images",
)


# Kernels that this process compiled for a GPU cannot run dry as well.
dry = pytest.mark.skipif(not is_interpreted(), reason="the kernels are compiled here")


@pytest.fixture
def green(monkeypatch):
    """The kernels' part of the gate, which takes a process of its own, passes."""
    monkeypatch.setattr(gpu_gate, "_kernels", lambda tests, clock, tiny: dict.fromkeys(tests, ""))


def _break_the_loss(monkeypatch):
    plain = loss._loss_fwd_triton

    def broken(*given):
        losses, wrong = plain(*given)
        return losses * 1.001, wrong

    monkeypatch.setattr(loss, "_loss_fwd_triton", broken)


def test_without_cuda_everything_is_named_as_not_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "record.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("No CUDA device")
    named = set(re.findall(r"^not measured: (.*)$", said, re.MULTILINE))
    assert named > {f"ceilings | {name}" for name in CEILINGS}
    for kernel in KERNELS:
        for site in ("shufflenet_v2 224", "nasbench_macro 32", "digits 8"):
            assert any(name.startswith(f"{kernel} | {site}") for name in named), (kernel, site)
    for part in ("evaluator", "shift step"):
        for generation in (0, 5, 10):
            assert f"{part} | shufflenet_v2 64 | generation {generation} | bf16" in named
    assert not list(tmp_path.iterdir())


def test_every_test_of_the_gate_is_there(fresh):
    names = gpu_gate.tests_by_name(gpu_gate.KERNEL_TESTS)
    options = [*gpu_gate.arguments(names), "--collect-only"]
    said = fresh(f"import pytest\nassert pytest.main({options}) == 0")
    assert set(names) <= set(said.splitlines()), said


@dry
@pytest.mark.slow
def test_a_broken_kernel_is_refused_by_its_own_test(capsys, monkeypatch, tmp_path):
    # A plugin of the gate's own process; the other kernels' tests pass there.
    (tmp_path / "broken_loss.py").write_text(
        "from fastshift.kernels import loss\n"
        "plain = loss._loss_fwd_triton\n"
        "def broken(*given):\n"
        "    losses, wrong = plain(*given)\n"
        "    return losses * 1.001, wrong\n"
        "loss._loss_fwd_triton = broken\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p broken_loss")
    record = tmp_path / "record.json"
    assert gpu.main([*DRY, "--json", str(record)]) == 1
    said = capsys.readouterr().out
    assert "REFUSED, nothing was timed" in said
    assert f"1 failed, {len(gpu_gate.KERNEL_TESTS) - 1} passed" in said
    assert all(f"not measured: {item.name}" in said for item in gpu.items(tiny=True))
    assert "median" not in said
    assert not record.exists()


@dry
@pytest.mark.usefixtures("green")
def test_a_wrong_evaluation_is_refused(capsys, monkeypatch):
    def run(device, archs, dtype, strategy, precision):
        spoiled = 1e-3 if strategy == "shared" else 0.0
        ran = {"scores ran": "modules: asked", "update ran": "modules: asked"}
        return ran | {"scores": [torch.ones(4) + spoiled], "update": [torch.ones(4)]}

    monkeypatch.setattr(gpu_gate, "_run", run)
    assert gpu.main(DRY) == 1
    assert "REFUSED, nothing was timed: modules, fp32, scores: error" in capsys.readouterr().out


@dry
@pytest.mark.usefixtures("green")
def test_a_dry_run_says_so_in_its_table_and_its_record(capsys, tmp_path):
    path = tmp_path / "record.json"
    assert gpu.main([*DRY, "--only", r"^evaluator|^candidate_loss", "--json", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == DRY_RUN
    assert DRY_RUN in said[-3:]
    record = json.loads(path.read_text())
    assert record["dry_run"] == DRY_RUN
    assert record["clock"] == "CPU clock"
    assert set(record["ceilings"]) == set(CEILINGS)
    assert set(record["gate"]) > set(gpu_gate.KERNEL_TESTS)
    assert {"device", "torch", "triton", "python", "commit"} <= set(record["environment"])
    assert "no CUDA graphs on a CPU" in record["left_out"].values()
    rows = record["rows"]
    for row in rows:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        [line] = [x for x in said if x.startswith(f"{row['item']} ") and f" {row['provider']}" in x]
        assert f"{row['median_ms']:.4g}" in line
    evaluator = {row["provider"]: row for row in rows if row["part"] == "evaluator"}
    assert {"modules", "static", "released loop"} < set(evaluator)
    assert [name for name in evaluator if name.startswith("eager")]
    assert evaluator["static"]["of_ceiling"] > 0
    errors = [row["error"] for row in rows if row["provider"] == "triton"]
    assert len(errors) == 2
    assert all(0 <= error < 1e-5 for error in errors)


@dry
def test_a_kernel_that_is_wrong_at_a_named_shape_is_not_timed(monkeypatch):
    _break_the_loss(monkeypatch)
    [item] = gpu.items(tiny=True, pattern=r"^candidate_loss \|")
    with pytest.raises(AssertionError, match=r"candidate_loss: error 0\.001"):
        list(item.measure(Bench(CPU, Clock(100.0), True)))


def _spoiled(name, launcher):
    """A launcher one of whose results is wrong."""

    def launch(*given, **options):
        found = launcher(*given, **options)
        if name == "layer_train":
            found[1].mul_(1.001)
        elif name == "layer_backward":
            next(value for value in found[1] if value.any()).zero_()
        else:
            given[2][-1].mul_(1.1)
        return found

    return launch


@dry
@pytest.mark.usefixtures("like_a_device")
@pytest.mark.parametrize(
    ("name", "dtype", "wrong"),
    [
        ("layer_train", "fp32", "of its statistics"),
        ("layer_backward", "fp32", "of the gradient of parameter"),
        ("layer_backward", "bf16", "of the gradient of parameter"),
        ("sgd_step", "bf16", "of its momenta"),
    ],
)
def test_every_result_is_compared_before_it_is_timed(name, dtype, wrong):
    place = gpu_kernels._place(gpu_kernels.TINY, True)
    [case] = [case for case in cases(place, dtype) if case.name == name]
    layer = place.levels[0].layer
    assert error_of(case, layer, case.prepare("cpu"), case.launcher) < 2 * FLOORS[dtype]
    with pytest.raises(AssertionError, match=wrong):
        error_of(case, layer, case.prepare("cpu"), _spoiled(name, case.launcher))


def test_a_gradients_forward_pass_runs_once_on_each_stream_and_never_in_a_capture(monkeypatch):
    streams = ["main"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    passes = []

    def forward():
        passes.append(streams[-1])
        x = torch.ones(3, requires_grad=True)
        return (2 * x).sum(), [x], torch.tensor(1.0)

    gradient = gpu_kernels._Gradient(forward)
    for stream in ("main", "main", "captures", "captures", "main"):
        streams.append(stream)
        assert torch.equal(gradient()[0], torch.full((3,), 2.0))
    assert passes == ["main", "captures"]


@dry
@pytest.mark.parametrize("name", ["layer_backward", "candidate_loss_backward"])
def test_pytorchs_gradients_are_the_kernels(name, monkeypatch):
    found = {}
    monkeypatch.setattr(gpu_kernels, "in_turns", lambda calls, *_, **__: found.update(calls) or {})
    monkeypatch.setattr(gpu_kernels, "_captured", lambda *_: {})
    [item] = gpu.items(tiny=True, pattern=rf"^{name} \|")
    list(item.measure(Bench(CPU, Clock(100.0), True)))
    ours, theirs = found["triton"](0), found["pytorch"](0)
    if name == "layer_backward":
        ours = [ours[0], *ours[1]]
    pairs = [(a, b) for a, b in zip(_flat(ours), theirs, strict=True) if b is not None]
    assert len(pairs) >= 1
    assert global_error([a for a, _ in pairs], [b for _, b in pairs]) < 1e-4


def _flat(found):
    return [found] if isinstance(found, torch.Tensor) else found


@dry
@pytest.mark.parametrize("part", ["evaluator", "shift step"])
def test_calls_of_networks_take_their_batches_in_turn(part, monkeypatch):
    found = {}
    monkeypatch.setattr(gpu_networks, "in_turns", lambda calls, *_, **__: found.update(calls) or {})
    [item] = gpu.items(tiny=True, pattern=rf"^{part} \|")
    list(item.measure(Bench(CPU, Clock(100.0), True)))
    del found[gpu_networks.LOOP]  # which gives nothing
    assert len(found) >= 3
    for name, call in found.items():
        losses = [float(np.mean(np.asarray(call(i)))) for i in range(gpu_networks.SETS + 1)]
        assert len({round(loss, 4) for loss in losses}) == gpu_networks.SETS, name
        assert losses[0] == pytest.approx(losses[-1], rel=1e-5)


def test_what_captures_took_is_told_apart():
    row = {"item": "search | x", "provider": "graph", "is_baseline": False, "median_ms": 1.0}
    record = {
        "dry_run": None,
        "environment": {"commit": "c"},
        "clock": "CUDA events",
        "seconds": 1.0,
        "gate": {},
        "ceilings": {},
        "rows": [row | {"captures": 52, "capture_s": 3.14}],
        "left_out": {},
    }
    said = tables(record)
    assert "- search | x, graph: 52 graphs, 3.14 s" in said
    record["rows"] = [row | {"captures": 0, "capture_s": 0.0}]
    assert "graphs," not in tables(record)


def _item(name, measure, part="kernels"):
    return Item(part, name, measure)


def test_what_does_not_fit_its_share_is_tried_again_at_the_end_and_else_left_out():
    asked = []

    def greedy(bench):
        asked.append(bench.clock.left)
        if len(asked) == 1:
            raise OutOfTimeError("too little")
        yield {"provider": "x"}

    def never(bench):
        bench.clock.need(10 * bench.clock.seconds, "all of it")
        yield {}

    bench = Bench(CPU, Clock(100.0), True)
    wanted = [_item("greedy", greedy, "evaluator"), _item("never", never)]
    rows, wrong = gpu._run(wanted, bench)
    assert [row["item"] for row in rows] == ["greedy"]
    assert asked[0] < 36
    assert asked[1] > 99
    assert list(bench.left_out) == ["never"]
    assert not wrong


def test_after_a_failure_of_the_device_nothing_more_is_timed():
    def fails(bench):
        raise RuntimeError("an illegal memory access")

    def fine(bench):
        yield {"provider": "x"}

    bench = Bench(CPU, Clock(100.0), True)
    wanted = [_item("a", fine), _item("b", fails), _item("c", fine)]
    rows, wrong = gpu._run(wanted, bench)
    assert [row["item"] for row in rows] == ["a"]
    assert wrong == ["b: RuntimeError: an illegal memory access"]
    assert bench.left_out == {"c": "b failed before it"}


def test_what_turns_out_wrong_has_no_figure_and_stops_nothing_else():
    def unequal(bench):
        yield {"provider": "x"}
        raise AssertionError("error 1")

    def fine(bench):
        yield {"provider": "x"}

    bench = Bench(CPU, Clock(100.0), True)
    rows, wrong = gpu._run([_item("a", unequal), _item("b", fine)], bench)
    assert [row["item"] for row in rows] == ["b"]
    assert wrong == ["a: error 1"]


def test_calls_are_timed_in_turns_and_each_is_given_its_number():
    order = []

    def stopwatch(call):
        before = len(order)
        call()
        return float(sum(seconds for _, _, seconds in order[before:]))

    def call(name, seconds):
        return lambda number: order.append((name, number, seconds))

    calls = {"a": call("a", 4.0), "b": Several(lambda: order.append(("b", 0, 6.0)), 3)}
    times = in_turns(calls, stopwatch, Clock(1e6), rounds=2, fewest=1)
    assert times["a"].samples == (4.0, 4.0)
    assert times["b"].samples == (2.0, 2.0)
    assert [name for name, _, _ in order] == list("abababba")
    assert [number for name, number, _ in order if name == "a"] == [0, 1, 0, 1]
    with pytest.raises(OutOfTimeError, match="the fewest rounds"):
        in_turns({"a": call("a", 4.0)}, stopwatch, Clock(3.0))


def test_a_share_of_the_ceilings_is_the_larger_one():
    ceilings = {"bf16 product": 1000.0, "copy": 100.0}
    found = share(ceilings, "bf16", 50, 40, 0.5)
    assert found == {"of_product": 0.2, "of_copy": 0.8, "of_ceiling": 0.8}


def test_a_dry_run_is_one_or_the_other():
    for options in (["--tiny"], ["--device", "cpu"], [*DRY, "--only", "no such name"]):
        with pytest.raises(SystemExit):
            gpu.main(options)


def test_a_dry_run_with_compiled_kernels_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "is_interpreted", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(DRY)
    assert "--tiny: this process has compiled kernels" in capsys.readouterr().err


def test_a_dry_run_of_its_own_process_sees_no_gpu():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['gpu.py', '--device', 'cpu', '--tiny', '--only', 'no such name']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    import os\n"
        "    print(os.environ['CUDA_VISIBLE_DEVICES'] == '', os.environ['TRITON_INTERPRET'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "True 1", done.stderr


@pytest.mark.slow
def test_the_whole_program_runs_dry(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *DRY, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    items = {row["item"] for row in record["rows"]}
    assert items == {item.name for item in gpu.items(tiny=True)}
    parts = {row["part"] for row in record["rows"]}
    assert parts == {"kernels", "evaluator", "shift step", "search"}
