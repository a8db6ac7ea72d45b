"""What the verbs do, print and leave behind."""

from __future__ import annotations

import csv
import importlib
import inspect
import io
import json
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import yaml

import fastshift as fs
from fastshift import backends, build, checkpoint, cpu
from fastshift.cli import _stop_flag, main
from fastshift.config import VERBS, resolve
from fastshift.export import load_into, read_metadata

TINY = """
from fastshift.ops import Head, Unit, conv, identity, inverted_residual
from fastshift.space import SearchSpace

def tiny(image_size, num_classes, in_channels):
    stem = [Unit("dense", in_channels, 4, kernel=3)]
    blocks = [[identity(4), conv(4, 4, 3, 1), inverted_residual(4, 4, 1, 2, 3)]] * 4
    shape = {"in_channels": in_channels, "image_size": image_size}
    head = Head(4, (), num_classes)
    return SearchSpace("tiny", stem=stem, blocks=blocks, head=head, **shape)
"""

IMAGES = ["--data=digits", "--limit=100", "--validation-size=50", "--calibration-batches=1"]
IMAGES += ["--calibration-batch-size=25", "--quiet"]
SEARCH = ["--generations=1", "--population=4", "--parents=2", "--shift-steps=1", "--top-k=3"]
SEARCH += ["--shift-batch-size=8"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cli")
    (made / "tiny.py").write_text(TINY)
    return made


@pytest.fixture(scope="module")
def space(folder):
    return f"--space={folder / 'tiny.py'}:tiny"


@pytest.fixture(scope="module")
def supernet(folder, space):
    out = folder / "supernet"
    argv = ["pretrain", space, *IMAGES, f"--out={out}", "--steps=3", "--batch-size=8"]
    assert main(argv) == 0
    return out


@pytest.fixture(scope="module")
def run(folder, space):
    """A finished search with everything on."""
    out = folder / "run"
    stage = ["--pretrain-steps=2", "--pretrain-batch-size=8", "--flops=90%"]
    check = ["--retrain-check=2", "--retrain-epochs=1"]
    assert main(["search", space, *IMAGES, *SEARCH, *stage, *check, f"--out={out}"]) == 0
    return out


def result_of(out):
    return json.loads((out / "result.json").read_text())


# Search and transfer


def test_a_search_leaves_the_files_that_the_interface_names(run):
    for name in ("config.yaml", "scores.jsonl", "result.json", "supernet.safetensors"):
        assert (run / name).stat().st_size > 0
    assert (run / "checkpoint" / "LATEST").exists()
    assert "<html" in (run / "report.html").read_text()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["verb"], config["flops"], config["seed"]) == ("search", "90%", 0)
    assert {"fastshift", "torch", "triton", "python", "device"} <= config["versions"].keys()
    result = result_of(run)
    assert result["shift"]["constraints"] == {"flops": "90%"}
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert {"arch", "error", "loss", "generation", "weights_version"} <= scores[0].keys()


@pytest.mark.parametrize("layout", ["auto", "nchw"])
def test_each_stage_runs_over_the_buffers_of_captured_steps(space, layout, tmp_path, monkeypatch):
    pytest.importorskip("triton")  # beside whose kernels the loss and the update are defined
    monkeypatch.setenv("FASTSHIFT_STEPS", "static")
    here = lambda name: f"--out={tmp_path / name}"  # noqa: E731
    given = [space, *IMAGES, f"--layout={layout}"]
    assert main(["pretrain", *given, here("net"), "--steps=2", "--batch-size=8"]) == 0
    trained = [*given, *SEARCH, f"--supernet={tmp_path / 'net'}"]
    assert main(["search", *trained, "--retrain-check=1", "--retrain-epochs=1", here("run")]) == 0
    assert main(["search", *trained, "--shift=immediate", here("immediate")]) == 0
    assert main(["transfer", *trained, "--head-warmup-steps=2", here("transferred")]) == 0
    for name in ("run", "immediate", "transferred"):
        computed = result_of(tmp_path / name)["computed"]
        assert (computed["score"], computed["train"]) == (["static"], ["static"])
    one = [*given, f"--supernet={tmp_path / 'run'}", "--arch=best"]
    assert main(["retrain", *one, "--epochs=1", here("retrained")]) == 0


def test_the_winner_and_random_architectures_are_retrained_and_compared(run):
    rows = result_of(run)["retrained"]
    assert [row["kind"] for row in rows] == ["winner", "random", "random"]
    assert rows[0]["arch"] == result_of(run)["best"]["arch"]
    assert len({row["arch"] for row in rows}) == 3
    for row in rows:
        assert 0 <= row["test_accuracy"] <= 1
        assert 0 <= row["error_supernet"] <= 1


def test_the_table_has_the_best_architectures_and_the_retrained_ones(run, capsys, space):
    stage = ["--pretrain-steps=2", "--pretrain-batch-size=8", "--flops=90%"]
    check = ["--retrain-check=2", "--retrain-epochs=1"]
    argv = ["search", space, *IMAGES, *SEARCH, *stage, *check, f"--out={run}", "--resume"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    result = result_of(run)
    for row in [*result["top"], *result["retrained"]]:
        assert row["arch"] in shown.out
    assert "Retrained from scratch" in shown.out
    assert f"report: {run}/report.html" in shown.out


def test_a_search_goes_from_a_given_supernet_and_says_when_it_needs_no_rich(
    supernet, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["search", f"--supernet={supernet}", *IMAGES, *SEARCH, f"--out={tmp_path / 'run'}"]
    assert main([*argv, "--no-report"]) == 0
    shown = capsys.readouterr().out
    assert result_of(tmp_path / "run")["best"]["arch"] in shown
    assert "\u2500" not in shown
    assert not (tmp_path / "run" / "report.html").exists()
    versions = {row["weights_version"] for row in result_of(tmp_path / "run")["top"]}
    assert versions == {3 + 2}  # three pre-training steps, two generations of one shift step


def test_without_matplotlib_a_search_ends_well_and_says_how_to_install_it(
    supernet, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["search", f"--supernet={supernet}", *IMAGES, *SEARCH, f"--out={tmp_path / 'run'}"]
    assert main(argv) == 0
    assert "-e '.[report]'" in capsys.readouterr().out


def test_a_transfer_has_a_head_for_the_new_classes(supernet, tmp_path):
    out = tmp_path / "run"
    argv = ["transfer", f"--supernet={supernet}", *IMAGES, *SEARCH, f"--out={out}", "--no-report"]
    assert main([*argv, "--classes=7,3", "--head-warmup-steps=2"]) == 0
    moved, meta = fs.load_supernet(out)
    assert moved.space.num_classes == 2
    assert meta["version"] == 3 + 2 + 2
    assert result_of(out)["budget"]["updates"] == 4
    assert result_of(out)["space"]["num_classes"] == 2


def test_options_can_stand_in_a_file_and_a_saved_file_repeats_the_run(run, tmp_path):
    out = tmp_path / "again"
    argv = ["search", f"--config={run / 'config.yaml'}", f"--out={out}", "--quiet", "--no-report"]
    assert main([*argv, "--retrain-check=0"]) == 0
    assert result_of(out)["top"] == result_of(run)["top"]
    weights = [(path / "supernet.safetensors").read_bytes() for path in (out, run)]
    assert weights[0] == weights[1]


def test_pre_training_can_be_held_within_constraints(space, tmp_path, monkeypatch):
    asked = []

    def watched(supernet, data, **keywords):
        asked.append(keywords["options"].constraints)
        return fs.pretrain(supernet, data, **keywords)

    monkeypatch.setattr("fastshift.commands.pretrain", watched)
    argv = ["pretrain", space, *IMAGES, f"--out={tmp_path / 'a'}", "--steps=2", "--batch-size=8"]
    assert main([*argv, "--flops=60%", "--params=:90%"]) == 0
    assert asked == [{"flops": "60%", "params": ":90%"}]


def test_progress_goes_to_standard_error_and_quiet_silences_it(space, tmp_path, capsys):
    images = [word for word in IMAGES if word != "--quiet"]
    argv = ["pretrain", space, *images, f"--out={tmp_path / 'a'}", "--steps=1", "--batch-size=8"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("pretrain 1/1")
    assert shown.out.startswith(f"{tmp_path / 'a'}/supernet.safetensors: 1 steps")


def test_options_that_decide_nothing_in_a_search_are_named(supernet, tmp_path, capsys):
    argv = ["search", f"--supernet={supernet}", *IMAGES, *SEARCH, "--no-report"]
    more = ["--shift=none", "--pretrain-steps=7"]
    assert main([*argv, *more, f"--out={tmp_path / 'none'}"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "fastshift: not used, since with --shift none no weights move: "
        "--shift-steps, --shift-batch-size",
        "fastshift: not used, since the weights come from --supernet: --pretrain-steps",
    ]
    assert main([*argv, f"--out={tmp_path / 'accumulate'}"]) == 0
    assert capsys.readouterr().err == ""


def test_a_finished_run_says_that_it_is_one_unless_it_should_be_quiet(supernet, space, capsys):
    argv = ["pretrain", space, *IMAGES, f"--out={supernet}", "--steps=3", "--batch-size=8"]
    weights = (supernet / "supernet.safetensors").read_bytes()
    shown = []
    for more in ([], ["--no-quiet"]):
        assert main([*argv, "--resume", *more]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    assert shown[0].out.startswith(f"{supernet}/supernet.safetensors: 3 steps")
    assert shown[0].err == ""
    assert shown[1].err == f"fastshift: {supernet}: finished before; remove it to start anew\n"
    assert (supernet / "supernet.safetensors").read_bytes() == weights


def test_blocks_that_see_one_pixel_are_named_before_a_run(tmp_path, capsys):
    wide = ["--space=nasbench_macro", "--space-options=width=0.25"]
    argv = ["pretrain", *wide, *IMAGES, "--steps=1", "--batch-size=4"]
    assert main([*argv, f"--out={tmp_path / 'small'}"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nasbench_macro with images of 8 px: 2 of its 8 blocks see maps of one pixel" in said
    assert main([*argv, "--image-size=16", f"--out={tmp_path / 'larger'}"]) == 0
    assert capsys.readouterr().err == ""


def test_a_population_smaller_than_ten_is_all_parents_by_default(supernet, tmp_path):
    argv = ["search", f"--supernet={supernet}", *IMAGES, f"--out={tmp_path / 'run'}"]
    few = [word for word in SEARCH if not word.startswith("--parents")]
    assert main([*argv, *few, "--no-report"]) == 0
    assert result_of(tmp_path / "run")["shift"]["parents"] == 4


def test_a_run_that_goes_on_elsewhere_says_what_is_different(space, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["pretrain", space, *IMAGES, f"--out={out}", "--steps=1", "--batch-size=8"]
    assert main(argv) == 0
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("threads: 1", "threads: 64"))
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "began with threads 64, here is 1" in said


# Interruption


def test_ctrl_c_saves_the_state_and_leaves_with_three(space, tmp_path, capsys):
    out = tmp_path / "run"

    def interrupt() -> None:
        while not (out / "checkpoint" / "LATEST").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    stage = ["--steps=1000000", "--batch-size=8", "--checkpoint-seconds=0.05"]
    assert main(["pretrain", space, *IMAGES, *stage, f"--out={out}"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fastshift: interrupted; --resume with the same options goes on")
    assert signal.getsignal(signal.SIGINT) == before
    state = checkpoint.load(out).state
    assert 0 < state["step"] < 1000000
    assert not (out / "supernet.safetensors").exists()


def test_an_interrupted_check_of_the_winner_is_made_again(run, space, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stage = ["--pretrain-steps=2", "--pretrain-batch-size=8", "--flops=90%", "--no-report"]
    check = ["--retrain-check=2", "--retrain-epochs=1"]
    argv = ["search", space, *IMAGES, *SEARCH, *stage, *check, f"--out={out}"]

    def interrupted(*args, **keywords):
        signal.raise_signal(signal.SIGINT)
        return fs.retrain(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("fastshift.commands.retrain", interrupted)
        assert main(argv) == 3
    assert "retrained" not in result_of(out)
    assert main([*argv, "--resume"]) == 0
    assert result_of(out)["retrained"] == result_of(run)["retrained"]


def test_a_second_signal_ends_the_program_at_once(monkeypatch, capfd):
    sent = []
    with _stop_flag() as flag:
        signal.raise_signal(signal.SIGTERM)
        assert flag.is_set()
        assert "once more stops at once" in capfd.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
            signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


# Scoring, ranking, retraining, export


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_evaluate_writes_the_scores_that_the_evaluator_gives(supernet, capsys, tmp_path):
    (tmp_path / "archs").write_text("0120  # the first\n\n2222\n0000\n")
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, f"--archs={tmp_path / 'archs'}"]
    assert main(argv) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row["arch"] for row in rows] == ["0120", "2222", "0000"]
    net, _ = fs.load_supernet(supernet)
    options = {"limit": 100, "validation_size": 50, "calibration_batches": 1}
    data = fs.data.load("digits", calibration_batch_size=25, **options)
    net.to(memory_format=torch.channels_last)
    archs = ["0120", "2222", "0000"]
    errors = fs.Evaluator(net, data.validation, calibration=data.calibration)(archs)
    assert [np.float32(row["error"]) for row in rows] == errors.tolist()
    assert {row["weights_version"] for row in rows} == {"3"}
    assert [int(row["flops"]) for row in rows] == net.space.flops(archs).tolist()
    assert main([*argv, "--strategy=sequential", f"--out={tmp_path / 'scores.csv'}"]) == 0
    again = rows_of((tmp_path / "scores.csv").read_text())
    np.testing.assert_allclose(
        [float(row["loss"]) for row in again], [float(row["loss"]) for row in rows], rtol=1e-4
    )


def test_random_architectures_are_distinct_feasible_and_seeded(supernet, capsys):
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, "--batch-norm=running", "--flops=50%"]
    shown = []
    for more in ("--archs=random:6", "--archs=random:6", "--seed=1"):
        assert main([*argv, "--archs=random:6", more]) == 0
        shown.append([row["arch"] for row in rows_of(capsys.readouterr().out)])
    assert shown[0] == shown[1] != shown[2]
    assert len(set(shown[0])) == 6
    space = fs.load_supernet(supernet)[0].space
    assert (space.flops(shown[0]) <= 0.5 * space.largest("flops")).all()


def test_evaluate_reads_standard_input_and_its_own_output(supernet, capsys, monkeypatch):
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES]
    assert main([*argv, "--archs=random:3"]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(first))
    assert main([*argv, "--archs=-"]) == 0
    assert capsys.readouterr().out == first


def test_rank_prints_the_order_preservation_and_writes_it(tmp_path, capsys):
    archs = [f"{i:02b}" for i in range(4)]
    (tmp_path / "scores.csv").write_text(
        "arch,error\n" + "".join(f"{a},{0.1 * i}\n" for i, a in enumerate(archs))
    )
    (tmp_path / "truth.csv").write_text(
        "arch,a,b\n" + "".join(f"{a},{90 - i},{90 - i}\n" for i, a in enumerate(archs))
    )
    argv = ["rank", str(tmp_path / "scores.csv"), f"--truth={tmp_path / 'truth.csv'}", "--top-k=3"]
    assert main([*argv, "--independent-run", f"--out={tmp_path / 'rank.json'}"]) == 0
    assert "tau, best 3 by run 0  1.000" in capsys.readouterr().out
    found = json.loads((tmp_path / "rank.json").read_text())
    assert (found["tau_global"], found["independent_run"], found["regret"]) == (1.0, 0, 0.0)


@pytest.fixture(scope="module")
def retrained(run, folder):
    out = folder / "retrained"
    argv = ["retrain", f"--supernet={run}", "--arch=best", *IMAGES, "--epochs=1", f"--out={out}"]
    assert main(argv) == 0
    return out


def test_retrain_trains_the_winner_and_shows_it_again(run, retrained, capsys):
    content = json.loads((retrained / "retrained.json").read_text())
    assert content["arch"] == result_of(run)["best"]["arch"]
    assert content["test_error"] == pytest.approx(1 - content["test_accuracy"])
    argv = ["retrain", f"--supernet={run}", "--arch=best", *IMAGES, "--epochs=1"]
    assert main([*argv, f"--out={retrained}", "--resume"]) == 0
    assert capsys.readouterr().out.startswith(f"{content['arch']}: test error")


def test_an_exported_network_is_the_one_that_was_scored(run, tmp_path, capsys):
    argv = ["export", f"--supernet={run}", "--arch=best", *IMAGES, "--format=safetensors"]
    assert main([*argv, f"--out={tmp_path}"]) == 0
    best = result_of(run)["best"]
    facts = read_metadata(tmp_path / f"{best['arch']}.safetensors")
    assert (facts["arch"], facts["weights"]) == (best["arch"], "inherited")
    net, _ = fs.load_supernet(run)
    subnet = net.subnet(best["arch"])
    load_into(subnet, tmp_path / f"{best['arch']}.safetensors")
    options = {"limit": 100, "validation_size": 50, "calibration_batches": 1}
    data = fs.data.load("digits", calibration_batch_size=25, **options)
    wrong = sum(int((subnet(x).argmax(1) != y).sum()) for x, y in data.validation)
    assert wrong / 50 == pytest.approx(best["error"], abs=1e-6)
    assert facts["mean"] == list(data.mean)


def test_an_export_calibrates_on_the_device_that_is_named(run, tmp_path, monkeypatch):
    placed = []

    def place(config, supernet):
        placed.append(config["device"])
        return build.place(config, supernet)

    monkeypatch.setattr("fastshift.queries.place", place)
    argv = ["export", f"--supernet={run}", "--arch=best", *IMAGES, "--format=safetensors"]
    assert main([*argv, "--device=cpu", f"--out={tmp_path}"]) == 0
    assert placed == ["cpu"]


def test_an_exported_retrained_network_needs_no_data_and_no_fastshift(retrained, tmp_path):
    argv = ["export", f"--supernet={retrained}", "--quiet", f"--out={tmp_path / 'net.pt2'}"]
    assert main(argv) == 0
    program = torch.export.load(tmp_path / "net.pt2")
    assert program.module()(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_report_writes_the_page_of_a_run(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    assert (run / "report.html").exists()


@pytest.mark.parametrize("verb", ["report", "spaces", "info"])
def test_a_verb_without_progress_answers_alike_when_it_should_be_quiet(run, capsys, verb):
    argv = [verb, str(run)] if verb == "report" else [verb]
    shown = []
    for more in ([], ["--quiet"]):
        assert main([*argv, *more]) == 0
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert shown[1].err == ""


# Spaces and the machine


def test_spaces_are_listed_with_size_and_costs(capsys):
    assert main(["spaces"]) == 0
    shown = capsys.readouterr().out
    assert "shufflenet_v2: 20 choice blocks, 1,099,511,627,776 architectures" in shown
    assert "nasbench_macro: 8 choice blocks, 6,561 architectures" in shown
    assert main(["spaces", "digits", "--num-classes=5"]) == 0
    shown = capsys.readouterr().out
    assert "5 classes" in shown
    assert "  block 6\n    0: identity, 0 FLOPs, 0 parameters" in shown


def _info(capsys, monkeypatch, code=0, cuda=False, capability=(9, 0), **environment):
    for name in ("FASTSHIFT_BACKEND", "FASTSHIFT_CPU_ISA", "FASTSHIFT_STEPS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert main(["info"]) == code
    return capsys.readouterr()


def test_info_says_which_implementation_runs_and_why_others_do_not(capsys, monkeypatch):
    shown = _info(capsys, monkeypatch).out
    assert f"torch        {torch.__version__}" in shown
    assert torch.backends.cpu.get_cpu_capability() in shown
    best = cpu.instruction_set()
    for kernel in ("block forward ", "block backward", "block infer   "):
        assert f"  {kernel} cpu, {best}\n" in shown
    assert "on a CPU; cpu is compiled C++, reference is PyTorch:\n" in shown
    assert "  others         PyTorch: ops that are modules" in shown
    assert "  cpu          runs\n" in shown
    assert "  reference    not chosen: FASTSHIFT_BACKEND=reference would\n" in shown
    assert f"  triton       does not run: {backends.backends()['triton']}\n" in shown
    shown = re.sub(" +", " ", shown)
    assert f" {best} runs\n" in shown
    for name, reason in cpu.instruction_sets().items():
        expected = f"does not run: {reason}" if reason else f"not chosen: FASTSHIFT_CPU_ISA={name}"
        assert name == best or f" {name} {expected}" in shown


def test_info_follows_the_environment(capsys, monkeypatch):
    shown = _info(capsys, monkeypatch, FASTSHIFT_CPU_ISA="generic").out
    assert "  block infer    cpu, generic\n" in shown
    assert " generic runs\n" in re.sub(" +", " ", shown)
    assert "  FASTSHIFT_CPU_ISA=generic\n" in shown
    shown = _info(capsys, monkeypatch, FASTSHIFT_BACKEND="reference").out
    assert "  block infer    reference\n" in shown
    assert "  reference    runs\n" in shown
    assert "  cpu          not chosen: FASTSHIFT_BACKEND=cpu would\n" in shown


def test_info_says_how_a_batch_goes_through_a_population(capsys, monkeypatch):
    shown = _info(capsys, monkeypatch).out
    assert "  cpu            one after the other, from Python: graphs need a CUDA device\n" in shown
    shown = _info(capsys, monkeypatch, FASTSHIFT_STEPS="static").out
    assert "  cpu            static buffers, no graphs: FASTSHIFT_STEPS=static\n" in shown
    shown = _info(capsys, monkeypatch, code=2, FASTSHIFT_STEPS="graphs")
    assert "FASTSHIFT_STEPS: 'graphs'; expected one of static, modules" in shown.err


def test_info_says_where_training_batches_are_augmented(capsys, monkeypatch):
    assert "  cpu            on the host; of dali:DIR by DALI\n" in _info(capsys, monkeypatch).out


def test_info_says_that_a_gpu_augments_what_it_can_hold(capsys, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shown = _info(capsys, monkeypatch, cuda=True).out
    assert "  cuda           on the GPU, of images in memory up to 1 GiB; of others" in shown
    shown = _info(capsys, monkeypatch, cuda=True, FASTSHIFT_BACKEND="reference").out
    assert "  cuda           on the host, a batch ahead: FASTSHIFT_BACKEND=reference;" in shown


def test_info_says_that_a_device_is_too_old_for_the_kernels(capsys, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    lacking = "a card has compute capability 7.5; expected 8.0 or newer"
    shown = _info(capsys, monkeypatch, cuda=True, capability=(7, 5)).out
    assert f"  triton       does not run: {lacking}\n" in shown
    assert "  on CUDA        reference: " in shown
    assert f"  cuda           one after the other, from Python: {lacking}\n" in shown
    assert f"  cuda           on the host, a batch ahead: {lacking};" in shown
    asked = {"code": 2, "cuda": True, "capability": (7, 5), "FASTSHIFT_BACKEND": "triton"}
    assert f"'triton' cannot run: {lacking}" in _info(capsys, monkeypatch, **asked).err
    shown = _info(capsys, monkeypatch, cuda=True, capability=(8, 0)).out
    assert "  on CUDA        triton: " in shown


def test_info_ends_with_what_cannot_run(capsys, monkeypatch):
    known = {**cpu.instruction_sets(), "amx": "broken"}
    monkeypatch.setattr(cpu, "instruction_sets", lambda: known)
    cpu._instruction_set.cache_clear()
    for name, value in (("FASTSHIFT_CPU_ISA", "amx"), ("FASTSHIFT_BACKEND", "triton")):
        shown = _info(capsys, monkeypatch, code=2, **{name: value})
        assert "  block infer    nothing\n" in shown.out
        assert f"{name}: '{value}' cannot run" in shown.err
        assert shown.err.count("\n") == 1


def test_help_names_every_verb_and_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert verb in shown
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = capsys.readouterr().out
    for section in VERBS["search"]:
        for option in section.options():
            assert option.flag in shown


@pytest.mark.parametrize("verb", VERBS)
def test_help_speaks_of_defaults_as_a_user_would(verb):
    for section in VERBS[verb]:
        for option in section.options():
            assert option.help, option.flag
            words = set(re.findall(r"[A-Za-z_]+", option.help))
            assert not words & {"None", "True", "False", "tuple", "dict", "bool"}, option.flag


def test_help_names_what_stands_for_a_value_and_what_is_on_by_default(capsys):
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--out DIR", "--seed N ", "--config FILE", "--data SPEC", "--classes N,N,..."):
        assert words in shown
    assert "write report.html, where matplotlib is installed. (default: yes)" in shown
    assert "(default: None)" not in shown


@pytest.mark.parametrize(
    ("layout", "is_last"), [("auto", True), ("channels_last", True), ("nchw", False)]
)
def test_the_layout_decides_the_order_of_the_weights(layout, is_last):
    config = resolve("search", {"layout": layout, "device": "cpu"}, {})
    space = fs.spaces.digits(in_channels=3)  # with one channel both orders are the same
    supernet = build.place(config, build.fresh_supernet(space, 0))
    weight = supernet.get_parameter("stem.0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == is_last


def test_the_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first = build.fresh_supernet(fs.spaces.digits(), 3).state_dict()
    torch.manual_seed(2)
    again = build.fresh_supernet(fs.spaces.digits(), 3).state_dict()
    other = build.fresh_supernet(fs.spaces.digits(), 4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.classifier.weight"], other["head.classifier.weight"])


# The library's face


def test_public_names_are_sorted_present_and_pinned():
    assert fs.__all__ == sorted(fs.__all__)
    for name in fs.__all__:
        assert hasattr(fs, name)
    assert {"pretrain", "search", "transfer", "retrain", "export", "data", "spaces"} <= set(
        fs.__all__
    )


def test_the_program_starts_without_what_it_may_not_need(fresh):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['fastshift', '--version']\n"
        "try:\n"
        "    runpy.run_module('fastshift', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "heavy = 'matplotlib sklearn scipy rich tensorboard onnx torchvision PIL nvidia triton'\n"
        "loaded = {m.partition('.')[0] for m in sys.modules} & set(heavy.split())\n"
        "assert not loaded, loaded\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert fresh(code) == f"fastshift {fs.__version__}\n"


@pytest.mark.parametrize("name", ["export", "pretrain", "retrain", "search"])
def test_a_function_stays_one_though_a_module_has_its_name(name):
    importlib.import_module(f"fastshift.{name}")
    assert inspect.isfunction(getattr(fs, name))
