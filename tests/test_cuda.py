"""On a CUDA device: captured steps against eager ones, and both against a CPU."""

from __future__ import annotations

import copy
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastshift as fs
from fastshift.backends import why_no_triton
from fastshift.batch_norm import start_ema
from fastshift.cli import main
from fastshift.evaluator import uploaded
from fastshift.graphs import CAPTURES, CapturedStep
from fastshift.prefetch import PrefetchedBatches, PrefetchedTrain, Prefetcher
from fastshift.static_supernet import static_supernet
from fastshift.supernet import Supernet
from fastshift.testing import (
    assert_as_accurate,
    changed_tensors,
    global_error,
    random_archs,
    randomise,
    stop_at,
    synthetic_data,
    tiny_space,
    tiny_supernet,
)
from fastshift.trainer import PathTrainer
from fastshift.trie import Plan

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and why_no_triton() is not None,
        reason=f"steps are not captured: {why_no_triton()}",
    ),
]

DATA = synthetic_data()
CAPTURED = {"score": ["captured"], "train": ["captured"]}  # what a search says of its steps


def _evaluator(net, **options):
    options = {"calibration": DATA.calibration, "subtrie_size": 4} | options
    return fs.Evaluator(net, DATA.validation, **options)


def _eager(monkeypatch):
    """Run the same functions over the same buffers, without graphs."""
    monkeypatch.setattr(CapturedStep, "capture", lambda step: step)
    monkeypatch.setattr(CapturedStep, "replay", lambda step: step.function())


def _train(net, updates=3, **options):
    start_ema(net)
    trainer = PathTrainer(net, **{"lr": 0.05, "ema": True} | options)
    losses = []
    for position in range(updates):
        plan = Plan(random_archs(net.space, 7, seed=position), 4)
        batch = DATA.train.batch(position, 10)
        losses.append(trainer.update(plan, *batch, position=position))
    return net.tensors() | trainer.optimizer.momenta(), losses, trainer


def _moved(state, start):
    """How far the weights went, on a CPU."""
    names = [name for name, value in start.items() if value.is_floating_point()]
    return [state[name].double().cpu() - start[name].double() for name in names]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["recalibrate", "batch", "running"])
def test_captured_scores_are_as_accurate_as_one_path_at_a_time_on_a_cpu(policy, precision):
    net = tiny_supernet()
    archs = random_archs(net.space, 9)
    options = {"batch_norm": policy, "precision": precision}
    found = _evaluator(copy.deepcopy(net).cuda(), **options).evaluate(archs)
    plain = _evaluator(net, **options, strategy="sequential").evaluate(archs)
    exact = _evaluator(copy.deepcopy(net).double(), batch_norm=policy).evaluate(archs)
    assert found.computed == "captured"
    assert_as_accurate([found.losses], [plain.losses], [exact.losses])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_scores_are_those_of_the_eager_functions_bit_for_bit(precision, monkeypatch):
    archs = random_archs(tiny_supernet().space, 9)
    found = _evaluator(tiny_supernet().cuda(), precision=precision).evaluate(archs)
    _eager(monkeypatch)
    plain = _evaluator(tiny_supernet().cuda(), precision=precision).evaluate(archs)
    assert np.array_equal(found.losses, plain.losses)
    assert np.array_equal(found.errors, plain.errors)


def test_replayed_updates_are_those_of_the_eager_functions_bit_for_bit(monkeypatch):
    found, losses, trainer = _train(tiny_supernet(dropout=0.2).cuda(), clip_norm=1.0)
    assert trainer.computed == "captured"
    _eager(monkeypatch)
    plain, plain_losses, _ = _train(tiny_supernet(dropout=0.2).cuda(), clip_norm=1.0)
    assert changed_tensors(plain, found) == set()
    assert losses == plain_losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5, "nesterov": True, "reduction": "mean"}])
def test_captured_updates_are_as_accurate_as_those_of_a_cpu(options, precision):
    net = tiny_supernet()
    start = {name: value.clone() for name, value in net.tensors().items()}
    found, _, trainer = _train(copy.deepcopy(net).cuda(), **options, precision=precision)
    plain = _train(copy.deepcopy(net), **options, precision=precision)[0]
    exact = _train(copy.deepcopy(net).double(), **options)[0]
    assert trainer.computed == "captured"
    assert_as_accurate(*(_moved(state, start) for state in (found, plain, exact)))


@contextmanager
def _refused_to_wait():
    """Let whatever waits for the device raise."""
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


# That it "does not yet detect all synchronizing operations" is known.
watched = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


@watched
def test_changing_populations_replay_what_is_there_and_never_wait():
    net = tiny_supernet().cuda()
    sample = DATA.validation[0]
    plan = Plan(random_archs(net.space, 12), 4)
    _evaluator(net).evaluate(plan.archs)
    static, _ = static_supernet(net, plan, lambda: sample[0])
    scoring = static._scoring_pass(len(sample[0]))
    scoring.prepare("calibrate")  # no batch of this size was calibrated on
    steps, memory = dict(scoring.steps.steps), torch.cuda.memory_allocated()
    for seed in range(20):
        tables = static.state.tables(Plan(random_archs(net.space, 12, seed), 4))
        with _refused_to_wait():
            scoring.load(*sample)
            scoring.run("calibrate", tables, score=False)
            scoring.run("infer", tables, score=True)
        del tables
    assert scoring.steps.steps == steps
    assert torch.cuda.memory_allocated() <= memory
    assert all(step.is_captured for step in steps.values())


@watched
def test_updates_on_changing_populations_wait_for_nothing_but_their_report():
    net = tiny_supernet(dropout=0.2).cuda()
    trainer = PathTrainer(net, lr=0.05, clip_norm=1.0)
    batch = DATA.train.batch(0, 10)
    trainer.update(Plan(random_archs(net.space, 12), 4), *batch, position=0)
    static = trainer._static
    training = static._training_pass(10, net.head.dropout.p)
    for seed in range(20):
        plan = Plan(random_archs(net.space, 12, seed), 4)
        tables = static.static.state.tables(plan)
        static.update_of.begin(plan, 1.0)
        with _refused_to_wait():
            training.load(*batch)
            training.train(tables, key=(0, seed))
        loss, moved = static.update_of.end()
        assert np.isfinite(loss)
        assert moved


def test_updates_on_changing_populations_capture_and_take_nothing_more():
    net = tiny_supernet(dropout=0.2).cuda()
    trainer = PathTrainer(net, lr=0.01)

    def update(seed):
        plan = Plan(random_archs(net.space, 12, seed), 4)
        trainer.update(plan, *DATA.train.batch(seed, 10), position=seed)

    # What the optimiser keeps of each parameter is there once every choice was used.
    for seed in range(4):
        update(seed)
    training = trainer._static._training_pass(10, net.head.dropout.p)
    steps, memory = dict(training.steps.steps), torch.cuda.memory_allocated()
    captured, reserved = CAPTURES.count, torch.cuda.memory_reserved()
    for seed in range(4, 24):
        update(seed)
    assert trainer._static._training_pass(10, net.head.dropout.p) is training
    assert training.steps.steps == steps
    assert CAPTURES.count == captured
    # One plan's tables, as before.
    assert torch.cuda.memory_allocated() <= memory + 64 * 1024
    assert torch.cuda.memory_reserved() <= reserved


def test_graphs_of_updates_go_with_their_trainers_and_others_take_their_memory():
    net = tiny_supernet().cuda()
    options = {"generations": 1, "population": 4, "parents": 2, "top_k": 2, "shift_steps": 1}
    for _ in range(2):
        fs.pretrain(net, DATA, steps=2, lr=0.01, batch_size=8)
        gc.collect()
        result = fs.search(net, DATA, **options, shift_batch_size=8)
        assert result.computed == CAPTURED
        gc.collect()


def test_batches_of_several_sizes_and_memory_that_grew_change_no_score():
    net = tiny_supernet().cuda()
    start_ema(net)
    data = synthetic_data(validation=(4, 16, 8), calibration=(6, 10))
    archs = random_archs(net.space, 9)
    evaluator = fs.Evaluator(net, data.validation, calibration=data.calibration, subtrie_size=4)
    before = evaluator.evaluate(archs)
    plan = Plan(archs, 4)
    state = static_supernet(net, plan, lambda: data.validation[0][0])[0].state
    small = state.arena.memory.numel()
    still = PathTrainer(net, lr=0.0, momentum=0.0, weight_decay=0.0, ema=True)
    for size in (8, 64, 16):
        still.update(plan, *DATA.train.batch(0, size), position=0)
        assert np.array_equal(evaluator.evaluate(archs).losses, before.losses)
    assert still.computed == before.computed == "captured"
    assert state.arena.memory.numel() > small
    plain = fs.Evaluator(
        tiny_supernet(), data.validation, calibration=data.calibration, strategy="sequential"
    )
    exact = fs.Evaluator(tiny_supernet().double(), data.validation, calibration=data.calibration)
    losses = [evaluator.evaluate(archs).losses for evaluator in (plain, exact)]
    assert_as_accurate([before.losses], [losses[0]], [losses[1]])


def test_a_population_scores_the_same_whatever_was_replayed_before():
    net = tiny_supernet().cuda()
    archs = random_archs(net.space, 9)
    first = _evaluator(net).evaluate(archs).losses
    for seed in range(5):
        _evaluator(net).evaluate(random_archs(net.space, 3 + 4 * seed, seed))
    assert np.array_equal(_evaluator(net).evaluate(archs).losses, first)


def test_threads_take_turns_and_give_the_scores_of_each_alone():
    nets = [tiny_supernet().cuda(), tiny_supernet(seed=1).cuda()]
    jobs = [(net, random_archs(net.space, 9, seed)) for net in nets for seed in range(2)]
    wanted = [_evaluator(copy.deepcopy(net)).evaluate(archs).losses for net, archs in jobs]

    def scored(job):
        found = [_evaluator(job[0]).evaluate(job[1]) for _ in range(4)]
        assert {scores.computed for scores in found} == {"captured"}
        return [scores.losses for scores in found]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for losses, alone in zip(pool.map(scored, jobs), wanted, strict=True):
            assert all(np.array_equal(one, alone) for one in losses)


def test_what_no_path_used_keeps_its_bits_and_a_spoiled_update_moves_nothing():
    net = tiny_supernet().cuda()
    trainer = PathTrainer(net, lr=0.1, weight_decay=0.1)
    plan = Plan(np.array([[1, 0, 1, 0], [2, 0, 0, 0]], np.uint8))
    images, labels = DATA.train.batch(0, 8)
    before = {name: value.clone() for name, value in net.tensors().items()}
    trainer.update(plan, images, labels, position=0)
    moved = {".".join(name.split(".")[:3]) for name in changed_tensors(before, net.tensors())}
    assert {name for name in moved if name.startswith("blocks")} == {
        *("blocks.0.1", "blocks.0.2", "blocks.1.0", "blocks.2.1", "blocks.3.0")
    }
    before = {name: value.clone() for name, value in net.tensors().items()}
    trainer.update(plan, torch.full_like(images, torch.nan), labels, position=1)
    assert trainer.skipped == 1
    assert changed_tensors(before, net.tensors()) == set()


def _searched(net, data, shift, **options):
    """The result of a small search, and how far the weights went."""
    start = {name: value.clone().cpu() for name, value in net.tensors().items()}
    options |= {"generations": 1, "population": 6, "parents": 3, "top_k": 3, "shift_steps": 2}
    options |= {"shift_batch_size": 8, "head_warmup_steps": 2, "subtrie_size": 4, "shift": shift}
    result = fs.search(net, data, **options, seed=3)
    return result, _moved(net.tensors(), start)


@pytest.mark.parametrize("shift", ["accumulate", "immediate", "every:3"])
def test_a_whole_search_on_a_gpu_agrees_with_one_on_a_cpu(shift):
    plain, one = _searched(tiny_supernet(), DATA, shift)
    found, two = _searched(tiny_supernet().cuda(), DATA, shift)
    assert found.computed == CAPTURED
    assert [row.arch for row in plain.top] == [row.arch for row in found.top]
    assert global_error(two, one) < 1e-3


def test_a_whole_search_in_bfloat16_on_a_gpu_is_as_accurate_as_one_on_a_cpu():
    """Of a search whose best are more than two hundredths apart, so that rounding moves no rank."""
    plain, one = _searched(tiny_supernet(), DATA, "immediate", precision="bf16")
    found, two = _searched(tiny_supernet().cuda(), DATA, "immediate", precision="bf16")
    data = synthetic_data()
    for batches in (data.validation, data.calibration):
        batches[:] = [(images.double(), labels) for images, labels in batches]
    _, exact = _searched(tiny_supernet().double(), data, "immediate")
    assert found.computed == CAPTURED
    assert [row.arch for row in plain.top] == [row.arch for row in found.top]
    assert_as_accurate(two, one, exact)


def test_pre_training_on_a_gpu_learns(monkeypatch):
    losses, update = [], PathTrainer.update

    def note(trainer, *given, **options):
        losses.append(update(trainer, *given, **options))
        return losses[-1]

    monkeypatch.setattr(PathTrainer, "update", note)
    net = tiny_supernet().cuda()
    result = fs.pretrain(net, DATA, steps=30, lr=0.05, batch_size=16)
    assert result.computed == "captured"
    assert net.version == len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    options = {"steps": 6, "lr": 0.05, "batch_size": 8, "paths_per_step": 3}
    whole, parts = tiny_supernet(dropout=0.2).cuda(), tiny_supernet(dropout=0.2).cuda()
    fs.pretrain(whole, DATA, **options)
    first = fs.pretrain(parts, DATA, **options, out=tmp_path, stop=stop_at(3))
    assert first.stopped
    parts = tiny_supernet(dropout=0.2).cuda()
    rest = fs.pretrain(parts, DATA, **options, out=tmp_path, resume=True)
    assert rest.computed == "captured"
    assert changed_tensors(whole.tensors(), parts.tensors()) == set()


def test_an_architecture_is_retrained_where_its_supernet_is():
    train = SimpleNamespace(batch=DATA.train.batch, num_images=48)
    data = SimpleNamespace(**vars(DATA) | {"train": train, "test": DATA.validation})
    net = tiny_supernet().cuda()
    found = fs.retrain(net, "1012", data, epochs=2, batch_size=16, lr=0.05)
    assert found.steps == 6
    assert 0 <= found.test_error <= 1
    assert {p.device.type for p in (*found.net.parameters(), *found.path.parameters())} == {"cuda"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_a_second_gpu_scores_as_the_first():
    archs = random_archs(tiny_supernet().space, 6)
    one, two = (_evaluator(tiny_supernet().to(f"cuda:{i}")).evaluate(archs) for i in range(2))
    assert one.computed == two.computed == "captured"
    assert np.array_equal(one.losses, two.losses)
    trainer = PathTrainer(tiny_supernet().to("cuda:1"), lr=0.05)
    trainer.update(Plan(archs, 4), *DATA.train.batch(0, 8), position=0)
    assert trainer.computed == "captured"


def test_one_compiled_function_serves_a_gpu():
    net = tiny_supernet().cuda().train()
    images = DATA.train.batch(0, 6)[0]
    archs = random_archs(net.space, 6)
    compiled = fs.CompiledSupernet(net, backend="aot_eager")
    with torch.no_grad():
        found = compiled(images, archs).cpu()
        plain = torch.stack([tiny_supernet().train()(images, arch) for arch in archs])
        exact = tiny_supernet().double().train()
        exact = torch.stack([exact(images.double(), arch) for arch in archs])
    assert_as_accurate([found], [plain], [exact])


def test_memory_is_bounded_by_the_sub_tries():
    data = synthetic_data(image_size=32, validation=(256,), calibration=(256,))
    peaks = {}
    for candidates in (4, 4, 24):  # the first for what is made once: kernels, cuBLAS's memory
        net = randomise(Supernet(tiny_space(image_size=32))).cuda()
        evaluator = fs.Evaluator(net, data.validation, calibration=data.calibration, subtrie_size=4)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        evaluator.evaluate(random_archs(net.space, candidates))
        peaks[candidates] = torch.cuda.max_memory_reserved() - before
        del net, evaluator
    assert peaks[24] <= 1.1 * peaks[4]


def test_fixed_batches_are_uploaded_once():
    reads = []

    class Batches(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    net = tiny_supernet().cuda()
    evaluator = fs.Evaluator(net, Batches(DATA.validation), batch_norm="running")
    archs = random_archs(net.space, 3)
    first = evaluator.evaluate(archs).losses
    assert len(reads) == 2
    assert np.array_equal(evaluator.evaluate(archs).losses, first)
    assert len(reads) == 2


# Batches of the host, made and copied ahead


def test_a_batch_copied_ahead_is_whole_when_it_is_used_and_stays_so_until_then():
    """The stream that uses it is far behind: memory freed too early would be written again."""
    device, size = torch.device("cuda", torch.cuda.current_device()), 4096
    sums = []
    with PrefetchedTrain(DATA.train, device, stop=24) as train:
        for index in range(24):
            images, labels = train.batch(index, size)
            assert images.device == labels.device == device
            torch.cuda._sleep(20_000_000)
            sums.append((images.double().sum(), labels.sum()))
            del images, labels
    for index, found in enumerate(sums):
        wanted = DATA.train.batch(index, size)
        assert found[1].item() == wanted[1].sum().item()
        assert abs(found[0].item() - wanted[0].double().sum().item()) < 1e-6


def test_a_host_far_ahead_holds_few_batches_on_its_device():
    device = torch.device("cuda", torch.cuda.current_device())
    images, labels = torch.randn(256, 3, 64, 64), torch.zeros(256, dtype=torch.int64)
    size = images.nbytes + labels.nbytes
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    for there, _ in PrefetchedBatches([(images, labels)] * 24, device):
        assert there.device == device
        torch.cuda._sleep(100_000_000)
    taken = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
    assert size <= taken <= 5 * size


def _ahead(asked, monkeypatch):
    """Note what is made ahead, or make nothing ahead."""
    plain = Prefetcher.batch

    def batch(self, key, following=None):
        found = plain(self, key, following if asked is not None else None)
        if asked is not None:
            asked.append(self._pending is not None)
        return found

    monkeypatch.setattr(Prefetcher, "batch", batch)


def test_training_on_batches_copied_ahead_is_the_same_to_the_bit(monkeypatch):
    found, asked = {}, []
    for own in (asked, None):
        with monkeypatch.context() as patched:
            _ahead(own, patched)
            net = tiny_supernet(dropout=0.2).cuda()
            trained = fs.pretrain(net, DATA, steps=6, batch_size=12, lr=0.05)
            assert trained.computed == "captured"
            found[own is None] = net.tensors()
    assert changed_tensors(found[True], found[False]) == set()
    assert asked == [True] * 5 + [False]


def test_scoring_data_copied_ahead_gives_the_same_scores_to_the_bit():
    net = tiny_supernet().cuda()
    archs = random_archs(net.space, 9)
    device = next(net.parameters()).device
    parts = [uploaded(part, device, 0) for part in (DATA.validation, DATA.calibration)]
    assert all(isinstance(part, PrefetchedBatches) for part in parts)
    found = fs.Evaluator(net, parts[0], calibration=parts[1], subtrie_size=4).evaluate(archs)
    plain = _evaluator(net).evaluate(archs)
    assert found.computed == plain.computed == "captured"
    assert np.array_equal(found.losses, plain.losses)


# What users type


def _commands(folder, device):
    """A search from nothing, a transfer and an export on a device: results and the folder."""
    images = ["--data=digits", "--limit=200", "--validation-size=60", "--calibration-batches=1"]
    images += ["--calibration-batch-size=40", "--quiet", f"--device={device}"]
    sizes = ["--generations=1", "--population=4", "--parents=2", "--top-k=2", "--shift-steps=2"]
    sizes += ["--shift-batch-size=16"]
    space, run, carried = "--space=digits", folder / "run", folder / "carried"
    stage = ["--pretrain-steps=3", "--pretrain-batch-size=16"]
    assert main(["search", space, *images, *sizes, *stage, f"--out={run}"]) == 0
    again = [space, f"--supernet={run}", *images]
    assert main(["transfer", *again, *sizes, "--head-warmup-steps=2", f"--out={carried}"]) == 0
    assert main(["export", *again, "--arch=best", f"--out={folder / 'net.pt2'}"]) == 0
    return [json.loads((out / "result.json").read_text()) for out in (run, carried)]


def test_the_commands_run_on_a_gpu_and_what_they_leave_is_read_without_one(tmp_path):
    for found in _commands(tmp_path, "cuda"):
        assert {name: found["computed"][name] for name in CAPTURED} == CAPTURED
        assert found["computed"]["augment"][0].startswith("on cuda")
    network = torch.export.load(tmp_path / "net.pt2").module()
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    kept, _ = fs.load_supernet(tmp_path / "run")
    assert all(value.device.type == "cpu" for value in kept.tensors().values())


def test_pretraining_on_images_that_lie_on_the_gpu_is_as_accurate_as_on_the_host():
    images, labels = (torch.cat(part).numpy() for part in zip(*DATA.validation, strict=True))
    images = np.clip(images.transpose(0, 2, 3, 1) * 40 + 128, 0, 255).astype(np.uint8)
    options = {"validation_size": 8, "calibration_batches": 1, "calibration_batch_size": 8}

    def trained(device, dtype=torch.float32):
        data = fs.data.from_arrays(images, labels, device=device, **options)
        net = tiny_supernet().to(device, dtype)
        start = {name: value.clone() for name, value in net.tensors().items()}
        done = fs.pretrain(net, data, steps=2, batch_size=8, lr=0.05)
        return done, _moved(net.tensors(), start)

    (found, moved), (_, plain), (_, exact) = (
        trained("cuda"),
        trained("cpu"),
        trained("cpu", torch.float64),
    )
    assert found.computed == "captured"
    assert found.augmented.startswith("on cuda")
    assert_as_accurate(moved, plain, exact)
