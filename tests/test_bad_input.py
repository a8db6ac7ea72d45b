"""What a user gives and cannot be used gets exit code 2 and one line; no traceback, no trace."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastshift import checkpoint, cpu
from fastshift.backends import backends
from fastshift.cli import main

TINY = """
from fastshift.ops import Head, Unit, conv, identity
from fastshift.space import SearchSpace

def tiny(image_size, num_classes, in_channels, width=4):
    stem = [Unit("dense", in_channels, width, kernel=3)]
    blocks = [[identity(width), conv(width, width, 3, 1)]] * 4
    shape = {"in_channels": in_channels, "image_size": image_size}
    head = Head(width, (), num_classes)
    return SearchSpace("tiny", stem=stem, blocks=blocks, head=head, **shape)
"""

IMAGES = ["--data=digits", "--limit=80", "--validation-size=40", "--calibration-batches=1"]
IMAGES += ["--calibration-batch-size=20", "--quiet"]
SEARCH = ["--pretrain-steps=2", "--pretrain-batch-size=8", "--generations=1", "--population=3"]
SEARCH += ["--parents=2", "--shift-steps=1", "--shift-batch-size=8", "--top-k=2", "--no-report"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def space(folder):
    (folder / "tiny.py").write_text(TINY)
    return f"--space={folder / 'tiny.py'}:tiny"


@pytest.fixture(scope="module")
def supernet(folder, space):
    out = folder / "supernet"
    assert main(["pretrain", space, *IMAGES, f"--out={out}", "--steps=2", "--batch-size=8"]) == 0
    return out


@pytest.fixture
def refused(capsys):
    def check(*argv: str | Path, says: str | list[str]) -> None:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        shown = capsys.readouterr()
        assert code == 2
        assert shown.out == ""
        lines = shown.err.splitlines()
        assert len(lines) == 1, shown.err
        assert lines[0].startswith("fastshift: error: ")
        for word in [says] if isinstance(says, str) else says:
            assert word in lines[0]

    return check


def npz(path: Path, **changes: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": rng.integers(0, 256, (9, 8, 8, 1), dtype=np.uint8),
        "y_test": np.arange(9) % 3,
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return f"--data=npz:{path}"


def search(space: str, out: Path, *more: str) -> list[str]:
    return ["search", space, *IMAGES, *SEARCH, f"--out={out}", *more]


# Verbs, options, files of options


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "VERB"),
        (["serch"], "serch"),
        (["search", "--genrations", "3"], "'--genrations'; expected one of --generations"),
        (["search", "--qqqqqqqq=3"], "unknown option '--qqqqqqqq'; see search --help"),
        (["search", "digits"], "unknown argument 'digits'; see search --help"),
        (["search", "--generations"], "--generations"),
        (["search"], "--out is missing"),
        (["search", "--out", "x"], "--data is missing"),
        (["search", "--out", "x", "--data", "digits"], "--space is missing"),
        (["transfer", "--out", "x", "--data", "digits"], "--supernet is missing"),
        (["rank"], "SCORES is missing"),
        (["report"], "RUN is missing"),
    ],
)
def test_an_incomplete_or_unknown_command_is_refused(refused, argv, says):
    refused(*argv, says=says)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--generations=many", "generations: 'many'; expected a whole number"),
        ("--generations=1.5", "generations: '1.5'"),
        ("--generations=-1", "generations: -1; expected at least 0"),
        ("--population=0", "population: 0; expected at least 1"),
        ("--population=3 --parents=4", "parents: 4; expected at most population, 3"),
        ("--parents=0", "parents: 0; expected at least 1"),
        ("--seed=-1", "seed"),
        ("--seed=x", "seed: 'x'; expected a whole number"),
        ("--pretrain-steps=0", "pretrain_steps: 0; expected at least 1"),
        ("--pretrain-lr=nan", "pretrain_lr: 'nan'; expected a finite number"),
        ("--pretrain-lr=-0.1", "pretrain_lr: -0.1"),
        ("--pretrain-sampler=sobol", "pretrain_sampler: 'sobol'; expected one of uniform, fair"),
        ("--pretrain-momentum=2", "pretrain_momentum: 2.0; expected at most 1"),
        ("--shift=sideways", "shift: 'sideways'; expected one of accumulate"),
        ("--shift=every:0", "shift: 'every:0'"),
        ("--batch-norm=ema --shift=none", "batch_norm: 'ema'; expected another"),
        ("--batch-norm=layer", "batch_norm: 'layer'; expected one of recalibrate"),
        ("--strategy=psychic", "strategy: 'psychic'"),
        ("--score-by=vibes", "score_by"),
        ("--mutation=5", "mutation + crossover must be at most population"),
        ("--mutation-prob=1.5", "mutation_prob must be in [0, 1]"),
        ("--device=abacus", "device: 'abacus'; expected auto, cpu, cuda"),
        ("--precision=fp8", "precision: 'fp8'; expected one of fp32, bf16"),
        ("--layout=diagonal", "layout: 'diagonal'"),
        ("--validation-size=0.999", "validation_size=0.999"),
        ("--classes=1", "classes=[1]: expected at least two"),
        ("--classes=a,b", "classes: 'a,b'; expected whole numbers"),
        ("--space-options=width", "space_options: 'width'; expected NAME=VALUE"),
        ("--space-options=depth=3", "depth"),
        ("--pretrain-warmup-steps=3", "pretrain_warmup_steps: 3; expected at most steps, 2"),
        ("--retrain-check=-1", "retrain_check: -1"),
        ("--retrain-check=16", "retrain_check: 16; expected at most 15, the feasible"),
        ("--retrain-epochs=0", "retrain_epochs: 0"),
        ("--retrain-warmup-epochs=21", "retrain_warmup_epochs: 21; expected at most epochs, 20"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name_before_anything_is_written(
    refused, space, tmp_path, option, says
):
    refused(*search(space, tmp_path / "run", *option.split()), says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(refused, space, supernet, tmp_path):
    refused(*search(space, tmp_path / "run", "--device=cuda"), says="device: 'cuda'")
    argv = ["export", f"--supernet={supernet}", "--arch=0101", *IMAGES, f"--out={tmp_path}"]
    refused(*argv, "--device=cuda", says="device: 'cuda'")


def test_a_backend_that_cannot_run_is_refused_with_the_reason(
    refused, space, tmp_path, monkeypatch
):
    monkeypatch.setenv("FASTSHIFT_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = ["FASTSHIFT_BACKEND", "triton", backends()["triton"]]
    refused(*search(space, tmp_path / "run"), says=says)
    monkeypatch.setenv("FASTSHIFT_BACKEND", "metal")
    refused(*search(space, tmp_path / "run"), says=["'metal'", "expected one of reference"])


def _break_amx(monkeypatch):
    known = {**cpu.instruction_sets(), "amx": "broken"}
    monkeypatch.setattr(cpu, "instruction_sets", lambda: known)
    cpu._instruction_set.cache_clear()


@pytest.mark.parametrize(
    ("name", "says"), [("amx", "'amx' cannot run: broken"), ("sse9", "'sse9'")]
)
def test_an_instruction_set_that_cannot_run_is_refused_with_those_that_can(
    refused, space, tmp_path, monkeypatch, name, says
):
    _break_amx(monkeypatch)
    monkeypatch.setenv("FASTSHIFT_CPU_ISA", name)
    able = [name for name, reason in cpu.instruction_sets().items() if reason is None]
    expected = f"expected one of {', '.join(able)}"
    refused(*search(space, tmp_path / "run"), says=["FASTSHIFT_CPU_ISA", says, expected])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("generatoins: 3", ["unknown option 'generatoins'", "generations"]),
        ("generations: [3]", "generations: ['3']"),
        ("generations: 3\ngenerations: 4", "twice"),
        ("- 3", "option: value"),
        ("{", "is not YAML"),
        ("verb: pretrain", "another verb"),
        ("config: other.yaml", "unknown option 'config'"),
    ],
)
def test_a_file_of_options_is_checked_like_the_command_line(refused, tmp_path, text, says):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    refused("search", "--config", file, says=says)


def test_a_missing_file_of_options_is_named(refused, tmp_path):
    refused("search", "--config", tmp_path / "no.yaml", says="no.yaml cannot be read")


# Spaces and data


@pytest.mark.parametrize("name", ["resnet", "missing.py:space", "tiny.py"])
def test_an_unknown_space_is_refused(refused, tmp_path, name):
    refused(*search(f"--space={name}", tmp_path / "run"), says=["space", name])


def test_a_file_of_a_space_that_fails_is_refused_with_its_error(refused, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(**_): return 1 / 0\ndef number(**_): return 3\n")
    for function, says in (("mine", "ZeroDivisionError"), ("number", "got int"), ("no", "'no'")):
        spec = f"--space={tmp_path / 'mine.py'}:{function}"
        refused(*search(spec, tmp_path / "run"), says=says)


@pytest.mark.parametrize(
    "spec", ["mnist", "npz:", "digits:3", "npz:missing.npz", "dali:x", "folder:no"]
)
def test_an_unknown_or_missing_data_set_is_refused(refused, space, tmp_path, spec):
    refused(*search(space, tmp_path / "run", f"--data={spec}"), says=spec.partition(":")[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x_train": np.zeros((60, 8, 8, 1), np.float32)}, "x_train: dtype float32"),
        ({"x_train": np.zeros((60, 8, 8), np.uint8)}, "x_train: shape [60, 8, 8]"),
        ({"x_train": np.zeros((60, 8, 8, 2), np.uint8)}, "x_train: shape"),
        ({"x_train": np.zeros((60, 8, 6, 1), np.uint8)}, "8x6"),
        ({"y_train": np.zeros(59, np.int64)}, "59 labels for 60 images"),
        ({"y_train": np.arange(60) % 3 - 1}, "label -1"),
        ({"y_train": np.arange(60) % 3 * 2}, "none is 1"),
        ({"y_train": np.arange(60) / 3}, "y_train: dtype float64"),
        ({"y_train": np.zeros(60, np.int64)}, "all 60 are 0, expected at least two classes"),
        ({"y_test": np.arange(9)}, "test labels: highest 8"),
        ({"x_test": None}, "members"),
        ({"meta": np.zeros(1), "train_0": np.zeros(1)}, "a pixpack container"),
    ],
)
def test_a_malformed_npz_is_refused_by_what_is_wrong(refused, space, tmp_path, changes, says):
    spec = npz(tmp_path / "data.npz", **changes)
    refused(*search(space, tmp_path / "run", spec, "--limit=none"), says=says)


def test_a_truncated_npz_is_refused(refused, space, tmp_path):
    spec = npz(tmp_path / "data.npz")
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(whole[: len(whole) // 2])
    refused(*search(space, tmp_path / "run", spec), says=["npz:", "cannot be read"])


def test_an_empty_folder_of_images_is_refused(refused, space, tmp_path):
    for part in ("train/a", "train/b", "val/a"):
        (tmp_path / "images" / part).mkdir(parents=True)
    spec = f"--data=folder:{tmp_path / 'images'}"
    refused(*search(space, tmp_path / "run", spec), says="train/a holds no image")
    for part in ("train/a", "train/b", "val/a"):
        Image.new("L", (8, 8), 3).save(tmp_path / "images" / part / "1.png")
    refused(*search(space, tmp_path / "run", spec, "--limit=none"), says="has 1 image")


# Constraints and architectures


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--flops=1", ["no architecture of tiny", "the cheapest, 0000", "the dearest, 1111"]),
        ("--flops=99G:", ["no architecture of tiny", "the dearest, 1111"]),
        ("--flops=9M:1M", "above the upper bound"),
        ("--flops=lots", "cannot read 'lots'"),
        ("--flops=-5", "cannot read '-5'"),
        ("--flops=150%", "at most 100%"),
        ("--params=1:2:3", "expected 330M"),
    ],
)
def test_a_malformed_or_infeasible_constraint_is_refused_before_pre_training(
    refused, space, tmp_path, option, says
):
    refused(*search(space, tmp_path / "run", option), says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sampler=fair", "--flops=60%"], "sampler: 'fair'; expected uniform with constraints"),
        (["--flops=1"], "no architecture of tiny"),
        (["--params=lots"], "cannot read 'lots'"),
        (["--flops=:30%", "--params=90%:"], "no architecture"),
    ],
    ids=["fair", "infeasible", "malformed", "together"],
)
def test_constraints_that_pre_training_cannot_meet_are_refused(
    refused, space, tmp_path, options, says
):
    out = tmp_path / "run"
    refused("pretrain", space, *IMAGES, "--steps=2", *options, f"--out={out}", says=says)
    assert not out.exists()


def test_constraints_that_only_together_leave_nothing_are_refused(refused, space, tmp_path):
    argv = search(space, tmp_path / "run", "--flops=:30%", "--params=90%:")
    refused(*argv, says=["no architecture", "cheapest"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("010\n", ["line 1", "'010'", "4"]),
        ("0101\n01011\n", "line 2"),
        ("0102\n", ["line 1", "2"]),
        ("01a1\n", "line 1"),
        ("0101\n0101\n", "stands in line 1 already"),
        ("\n\n", "holds none"),
        ("arch,error\n0109,1\n", "line 2"),
    ],
)
def test_an_architecture_of_wrong_length_or_choice_is_refused_with_its_line(
    refused, supernet, tmp_path, text, says
):
    (tmp_path / "archs").write_text(text)
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, f"--archs={tmp_path / 'archs'}"]
    refused(*argv, says=says)


@pytest.mark.parametrize("spec", ["random:0", "random:x", "random:17", "nowhere.txt", "0101"])
def test_architectures_that_cannot_be_had_are_refused(refused, supernet, spec):
    refused("evaluate", f"--supernet={supernet}", *IMAGES, f"--archs={spec}", says=spec)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "expected at most random:16, all that tiny has"),
        (["--flops=60%"], "expected at most random:11, all that satisfy the constraints"),
    ],
)
def test_more_random_architectures_than_there_are_are_refused_with_their_number(
    refused, supernet, options, says
):
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, "--archs=random:1000000", *options]
    refused(*argv, says=["'random:1000000'", says])


@pytest.mark.parametrize("verb", ["export", "retrain"])
def test_one_architecture_is_checked_as_well(refused, supernet, tmp_path, verb):
    common = [verb, f"--supernet={supernet}", *IMAGES, f"--out={tmp_path / 'x'}"]
    refused(*common, says="--arch is missing")
    refused(*common, "--arch=01", says="'01'")
    refused(*common, "--arch=0191", says="0191")
    refused(*common, "--arch=best", says=["best", "result.json"])


# Supernets and runs


@pytest.fixture
def copy(supernet, tmp_path):
    """A supernet to damage."""
    (tmp_path / "copy").mkdir()
    data = (supernet / "supernet.safetensors").read_bytes()
    (tmp_path / "copy" / "supernet.safetensors").write_bytes(data)
    return tmp_path / "copy"


def test_a_supernet_cut_short_or_with_flipped_bytes_is_refused(refused, copy, tmp_path):
    file = copy / "supernet.safetensors"
    whole = file.read_bytes()
    argv = ["search", f"--supernet={copy}", *IMAGES, *SEARCH, f"--out={tmp_path / 'run'}"]
    for damaged in (whole[:-7], whole[:40], b"", whole[:-9] + b"\x55" + whole[-8:]):
        file.write_bytes(damaged)
        refused(*argv, says="supernet.safetensors")
    file.unlink()
    refused(*argv, says=["supernet.safetensors", "cannot be read"])
    assert not (tmp_path / "run").exists()


def test_a_supernet_with_nan_in_its_weights_is_refused_naming_the_tensor(refused, copy, tmp_path):
    tensors, meta = checkpoint.load_supernet(copy)
    name = next(name for name in tensors if name.endswith("1.1.0.weight"))
    tensors[name].view(-1)[0] = float("nan")
    checkpoint.save_supernet(copy, tensors, meta)
    argv = ["search", f"--supernet={copy}", *IMAGES, *SEARCH, f"--out={tmp_path / 'run'}"]
    refused(*argv, says=["not finite", name])


def test_a_supernet_of_another_space_is_refused(refused, supernet, space, tmp_path):
    common = [f"--supernet={supernet}", *IMAGES, f"--out={tmp_path / 'run'}"]
    refused("search", *common, "--space=digits", says=["of another space", "'tiny'"])
    wider = [space, "--space-options=width=8"]
    refused("search", *common, *wider, says="of another space")
    refused("transfer", *common, *wider, says="of another space")
    refused("search", *common, "--classes=1,2,3", says=["num_classes 10", "fastshift transfer"])


def test_a_supernet_for_other_images_is_refused(refused, supernet, tmp_path):
    spec = npz(
        tmp_path / "rgb.npz",
        x_train=np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
        x_test=np.zeros((9, 8, 8, 3), np.uint8),
    )
    for verb in ("search", "transfer"):
        argv = [verb, f"--supernet={supernet}", *IMAGES, spec, "--limit=none"]
        refused(*argv, f"--out={tmp_path / 'run'}", says=["in_channels 1", "have 3"])


@pytest.fixture(scope="module")
def run(folder, space):
    """A finished search."""
    out = folder / "run"
    assert main([*search(space, out, "--checkpoint-seconds=0")]) == 0
    return out


def test_a_directory_with_a_run_is_refused_without_resume(refused, run, space):
    before = (run / "scores.jsonl").read_bytes()
    refused(*search(space, run), says=["holds a run already", "--resume"])
    refused("pretrain", space, *IMAGES, f"--out={run}", says="holds a run already")
    assert (run / "scores.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--seed=7", "seed=0, this one 7"),
        ("--generations=2", "generations=1, this one 2"),
        ("--flops=60%", "flops=none, this one 60%"),
        ("--limit=90", "limit=80, this one 90"),
    ],
)
def test_a_resume_with_other_options_is_refused_naming_the_first(refused, run, space, option, says):
    refused(*search(space, run, "--resume", option), says=says)


def test_a_resume_by_another_verb_is_refused(refused, run, space):
    argv = ["pretrain", space, *IMAGES, f"--out={run}", "--resume"]
    refused(*argv, says="another verb")


def test_a_directory_that_cannot_be_made_is_refused(refused, space, tmp_path):
    (tmp_path / "file").write_text("")
    refused(*search(space, tmp_path / "file"), says="is a file")
    refused(*search(space, tmp_path / "file" / "run"), says="file")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-3] if how == "cut" else data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("name", ["state.json", "supernet.safetensors", "manifest.json", "LATEST"])
def test_a_damaged_checkpoint_of_a_run_is_refused_naming_the_file(
    refused, run, space, tmp_path, name, how
):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "result.json").unlink()  # as if the run had not ended
    latest = out / "checkpoint" / "LATEST"
    folder = out / "checkpoint" / latest.read_text().split()[0]
    damage(latest if name == "LATEST" else folder / name, how)
    refused(*search(space, out, "--checkpoint-seconds=0", "--resume"), says=name)


def test_a_damaged_result_is_refused(refused, run, space, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "result.json").write_text("{")
    refused(*search(space, out, "--resume"), says="result.json cannot be read")
    refused("report", out, says="result.json")
    argv = ["export", f"--supernet={out}", "--arch=best", *IMAGES, f"--out={tmp_path}"]
    refused(*argv, says="result.json")


def test_a_score_log_shorter_than_recorded_is_refused(refused, run, space, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "result.json").unlink()
    log = out / "scores.jsonl"
    log.write_bytes(log.read_bytes()[:100])
    refused(*search(space, out, "--checkpoint-seconds=0", "--resume"), says="scores.jsonl")


@pytest.mark.parametrize("after", [3, 20, 40])
def test_a_full_disk_stops_the_run_and_the_old_checkpoint_goes_on(
    capsys, monkeypatch, run, space, tmp_path, after
):
    out = tmp_path / "run"
    writes = 0
    write = os.write

    def full(file: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        code = main(search(space, out, "--checkpoint-seconds=0"))
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err.count("\n") == 1, shown.err
    assert "No space left on device" in shown.err
    assert main(search(space, out, "--checkpoint-seconds=0", "--resume")) == 0
    results = [json.loads((path / "result.json").read_text()) for path in (out, run)]
    assert results[0]["top"] == results[1]["top"]
    weights = [(path / "supernet.safetensors").read_bytes() for path in (out, run)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("option", "stage"), [("--pretrain-lr=1e30", "pretrain"), ("--shift-lr=1e30", "search")]
)
def test_three_losses_in_a_row_that_are_not_finite_stop_the_run_with_its_state(
    capsys, space, tmp_path, option, stage
):
    out = tmp_path / "run"
    argv = search(space, out, option, "--pretrain-steps=8", "--shift-steps=8")
    assert main(argv) == 4
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1, shown.err
    assert "not finite in 3 updates in a row" in shown.err
    state = checkpoint.load(out).state
    counters = state["counters"] if stage == "pretrain" else state["shifter"]["counters"]
    assert counters["skipped"] == 3
    assert ("evolution" in state) == (stage == "search")
    assert not (out / "result.json").exists()
    assert main([*argv, "--resume"]) == 4


# What other verbs read


def test_ranking_refuses_tables_that_do_not_fit(refused, tmp_path):
    scores, truth = tmp_path / "scores.csv", tmp_path / "truth.csv"
    argv = ["rank", scores, "--truth", truth]
    refused(*argv, says="scores.csv")
    scores.write_text("arch,loss\n00,1\n01,2\n")
    refused(*argv, says="expected error")
    scores.write_text("arch,error\n00,1\n01,2\n")
    refused(*argv, says="truth.csv")
    truth.write_text("arch,acc\n00,90\n")
    refused(*argv, says="'01' has no true accuracy")
    truth.write_text("arch,acc\n00,90\n01,91\n")
    refused(*argv, "--score-by=loss", says="score_by is 'loss'")
    refused(*argv, "--independent-run", says="independent_run is 0")
    refused(*argv, "--top-k=1", says="top_k: 1; expected at least 2")


def test_a_report_of_what_is_no_run_is_refused(refused, tmp_path):
    refused("report", tmp_path, says="result.json cannot be read")


def test_an_export_that_cannot_be_written_is_refused(refused, run, tmp_path):
    common = ["export", f"--supernet={run}", "--arch=best", *IMAGES]
    refused(*common, f"--out={tmp_path / 'net.txt'}", says="net.txt")
    refused(*common, f"--out={tmp_path}", "--format=gif", says="format: 'gif'")
    refused(*common, f"--out={tmp_path}", "--batch-norm=batch", says="batch_norm: 'batch'")


def test_scores_that_could_not_be_written_are_not_even_computed(refused, supernet, tmp_path):
    out = tmp_path / "no" / "scores.csv"
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, "--archs=random:2", f"--out={out}"]
    refused(*argv, says="scores.csv")


def test_a_file_that_is_there_is_never_overwritten(refused, supernet, tmp_path):
    out = tmp_path / "scores.csv"
    out.write_text("mine")
    argv = ["evaluate", f"--supernet={supernet}", *IMAGES, "--archs=random:2"]
    refused(*argv, f"--out={out}", says=["scores.csv' is there already", "remove it, or give"])
    for name in ("scores.csv", "truth.csv"):
        (tmp_path / name).write_text("arch,error\n0101,0.5\n0102,0.6\n1111,0.7\n")
    argv = ["rank", out, "--truth", tmp_path / "truth.csv", "--top-k=2"]
    refused(*argv, "--out", tmp_path / "truth.csv", says="truth.csv' is there already")
    (tmp_path / "0101.safetensors").write_text("mine")
    common = ["export", f"--supernet={supernet}", "--arch=0101", *IMAGES, "--format=safetensors"]
    for place in (tmp_path, tmp_path / "0101.safetensors"):
        refused(*common, f"--out={place}", says="0101.safetensors' is there already")
    assert (tmp_path / "0101.safetensors").read_text() == "mine"


# Scoring images


@pytest.mark.parametrize("split", ["--split-seed=1", "--validation-size=30", "--limit=90"])
def test_a_supernet_is_not_scored_on_images_it_was_trained_on(supernet, refused, split):
    images = [word for word in IMAGES if not word.startswith(split.split("=")[0])]
    says = ["split with", "give the same --limit, --classes, --validation-size and --split-seed"]
    refused("evaluate", f"--supernet={supernet}", *images, split, "--archs=random:2", says=says)
