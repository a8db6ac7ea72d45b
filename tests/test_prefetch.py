"""Batches made ahead for a GPU: the same ones, in time, two at most, and no thread left behind."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from search_cases import SMALL, small_data

from fastshift import prefetch
from fastshift.errors import NonFiniteLossError
from fastshift.evaluator import Evaluator, uploaded
from fastshift.prefetch import PrefetchedBatches, PrefetchedTrain, Prefetcher
from fastshift.pretrain import pretrain
from fastshift.search import search, transfer
from fastshift.testing import changed_tensors, micro_supernet, random_archs, synthetic_data

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class _Event:
    """What a stream was given before; it has passed when the device is there."""

    def __init__(self, blocking=False):
        assert blocking
        self.passed = threading.Event()

    def synchronize(self):
        assert self.passed.wait(20), "the device never came so far"


class _Stream:
    """A stream whose copies are made when someone waits for them."""

    def __init__(self, device=None):
        self.copies, self.events, self.is_behind = [], [], False

    def record_event(self, event=None):
        if event is not None:
            self.events.append(event)
            if not self.is_behind:
                event.passed.set()
            return event
        found, self.copies = self.copies, []
        return found

    def wait_event(self, event):
        for made, source in event:
            made.copy_(source)


class _Cuda:
    """What of `torch.cuda` a copy on a stream of its own takes."""

    Stream, Event = _Stream, _Event

    def __init__(self):
        self.present, self.local = _Stream(), threading.local()
        self.made, self.kept = [], []

    def current_stream(self, device):
        assert device == CUDA
        return getattr(self.local, "stream", self.present)

    @contextmanager
    def device(self, device):
        assert device == CUDA
        yield

    @contextmanager
    def stream(self, stream):
        self.local.stream = stream
        yield
        del self.local.stream


@pytest.fixture
def cuda(monkeypatch):
    """A GPU by name: memory before its copy is no number, and pinned memory is marked."""
    found, to = _Cuda(), torch.Tensor.to
    monkeypatch.setattr(torch, "cuda", found)

    def pinned(tensor):
        made = tensor.clone()
        made.is_pinned_here = True
        return made

    def copied(tensor, *place, **options):
        if place[:1] != (CUDA,):
            return to(tensor, *place, **options)
        assert options == {"non_blocking": True}
        assert tensor.is_pinned_here
        stream = found.current_stream(CUDA)
        assert stream is not found.present
        made = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else -1)
        stream.copies.append((made, tensor))
        found.made.append(weakref.ref(made))
        return made

    def kept(tensor, stream):
        assert stream is found.present
        found.kept.append(weakref.ref(tensor))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)
    return found


@pytest.fixture
def everywhere(cuda, monkeypatch):
    """Let what computes on a CPU prefetch as for a GPU."""
    plain = Prefetcher.__init__
    monkeypatch.setattr(Prefetcher, "__init__", lambda self, make, _: plain(self, make, CUDA))


class _Train:
    """A stream of numbered batches that notes what it is asked for and by whom."""

    def __init__(self, seconds=lambda index: 0.0, fails=()):
        self.seconds, self.fails, self.asked = seconds, fails, []
        self.threads, self.busy = set(), threading.Lock()

    def batch(self, index, size=None, stream="train"):
        assert self.busy.acquire(blocking=False), "two threads at once"
        try:
            self.asked.append(index)
            self.threads.add(threading.current_thread())
            time.sleep(self.seconds(index))
            if index in self.fails:
                raise ValueError(f"batch {index} of {stream}")
            images = torch.full((size or 2, 1, 1, 1), float(index))
            return images, torch.full((size or 2,), index)
        finally:
            self.busy.release()


def _numbers(batch):
    images, labels = batch
    assert images.flatten().tolist() == labels.tolist()
    return labels.tolist()


def _workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    assert _workers() == []
    yield
    assert _workers() == []


# Which batch comes


@pytest.mark.parametrize("slow", ["making", "using"])
def test_batches_come_in_their_order_whoever_is_slow(slow, cuda):
    rng = np.random.default_rng(0)
    train = _Train(lambda index: rng.random() * 0.01 if slow == "making" else 0.0)
    with PrefetchedTrain(train, CUDA, stop=9) as ahead:
        for index in range(9):
            assert _numbers(ahead.batch(index, 3)) == [index] * 3
            time.sleep(rng.random() * 0.01 if slow == "using" else 0.0)
    assert train.asked == [*range(9)]
    assert len(train.threads) == 2  # the first batch is made by who asks for it


def test_the_next_batch_is_made_while_one_is_used_and_no_other(cuda):
    train = _Train()
    with PrefetchedTrain(train, CUDA) as ahead:
        for index in range(4):
            ahead.batch(index)
            until = time.monotonic() + 20
            while len(train.asked) < index + 2 and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.01)
            assert train.asked == [*range(index + 2)]


def test_a_jump_and_another_stream_cost_the_batch_made_ahead_and_nothing_else(cuda):
    train = _Train(lambda index: 0.01)
    with PrefetchedTrain(train, CUDA) as ahead:
        for index, size, stream in (
            (0, 2, "a"),
            (5, 2, "a"),
            (6, 2, "a"),
            (7, 2, "b"),
            (8, 1, "b"),
        ):
            assert _numbers(ahead.batch(index, size, stream)) == [index] * size
    assert train.asked[:3] == [0, 1, 5]
    assert {5, 6, 7, 8} <= set(train.asked)


def test_at_most_two_batches_are_held(cuda):
    train = _Train()
    with PrefetchedTrain(train, CUDA, stop=12) as ahead:
        for index in range(12):
            batch = ahead.batch(index)
            until = time.monotonic() + 20
            while len(cuda.made) < 2 * min(index + 2, 12) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.005)
            held = sum(made() is not None for made in cuda.made)
            assert held == len(batch) * (2 if index < 11 else 1)
            del batch


def test_a_batch_made_in_vain_is_gone_when_the_next_is_copied(cuda):
    train, held = _Train(), {}
    plain = train.batch

    def batch(index, *asked):
        held[index] = sum(made() is not None for made in cuda.made)
        return plain(index, *asked)

    train.batch = batch
    with PrefetchedTrain(train, CUDA) as ahead:
        for index in range(0, 12, 3):
            ahead.batch(index)
    assert [held[index] for index in range(0, 12, 3)] == [0] * 4


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_host_far_ahead_waits_for_its_device(is_ahead, cuda):
    """No batch is copied before the last but one is used, made ahead or not."""
    cuda.present.is_behind = True
    train, given = _Train(), []

    def ask():
        with Prefetcher(train.batch, CUDA) as prefetcher:
            for index in range(9):
                following = index + 1 if is_ahead and index < 8 else None
                given.append(_numbers(prefetcher.batch(index, following)))

    host = threading.Thread(target=ask)
    host.start()
    for used in range(-1, 9):  # batches that the device is through with, but for what was before
        expected = min(used + 2, 9)
        until = time.monotonic() + 20
        while len(cuda.made) < 2 * expected and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(cuda.made) == 2 * expected
        if used < 8:
            cuda.present.events[used + 1].passed.set()
    host.join(20)
    assert given == [[index] * 2 for index in range(9)]


def test_a_batch_is_used_behind_its_copy_and_its_memory_is_kept_for_who_uses_it(cuda):
    with PrefetchedTrain(_Train(), CUDA, stop=3) as ahead:
        for index in range(3):
            batch = ahead.batch(index)
            assert _numbers(batch) == [index] * 2  # it would be no number before the copy
            assert [kept() for kept in cuda.kept[-2:]] == list(batch)


# Where nothing is made ahead


def test_on_a_cpu_each_batch_is_made_when_it_is_asked_for():
    train = _Train()
    with PrefetchedTrain(train, CPU) as ahead:
        for index in range(3):
            assert _numbers(ahead.batch(index)) == [index] * 2
            assert train.asked == [*range(index + 1)]
    assert train.threads == {threading.current_thread()}


def test_batches_that_lie_on_the_device_are_made_when_they_are_asked_for(cuda):
    made = []

    def batch(index, size, stream):
        made.append(threading.current_thread())
        return torch.empty(2, 1, 1, 1, device="meta"), torch.tensor([index] * 2)

    train = _Train()
    train.batch = batch
    with PrefetchedTrain(train, CUDA) as ahead:
        for index in range(3):
            images, labels = ahead.batch(index)
            assert images.device.type == "meta"
            assert labels.tolist() == [index] * 2
    assert made == [threading.current_thread()] * 3


def test_no_batch_is_lost_where_only_some_lie_on_the_device(cuda):
    there = [index in (1, 2, 4) for index in range(6)]
    batches = [
        (torch.empty(2, 1, 1, 1, device="meta" if on else "cpu"), torch.tensor([index] * 2))
        for index, on in enumerate(there)
    ]
    for _ in range(5):  # whoever is first to know
        found = [labels.tolist() for _, labels in PrefetchedBatches(batches, CUDA)]
        assert found == [[index] * 2 for index in range(6)]


def test_labels_that_lie_on_the_device_stay_there(cuda):
    batches = [(torch.zeros(2, 1, 1, 1), torch.empty(2, device="meta")) for _ in range(3)]
    for images, labels in PrefetchedBatches(batches, CUDA):
        assert torch.equal(images, torch.zeros(2, 1, 1, 1))
        assert labels.device.type == "meta"


# Errors, and what stays behind


def test_an_error_is_raised_at_its_batch_and_the_stream_goes_on(cuda):
    train = _Train(fails=(0, 3))
    with PrefetchedTrain(train, CUDA) as ahead:
        with pytest.raises(ValueError, match="batch 0 of train"):
            ahead.batch(0)
        for index in (1, 2):
            assert _numbers(ahead.batch(index)) == [index] * 2
        for _ in range(2):
            with pytest.raises(ValueError, match="batch 3 of train"):
                ahead.batch(3)
        assert _numbers(ahead.batch(4)) == [4] * 2


def test_the_error_of_a_batch_that_no_one_asks_for_is_not_raised(cuda):
    with PrefetchedTrain(_Train(fails=(1, 3)), CUDA) as ahead:
        assert _numbers(ahead.batch(0)) == [0] * 2
        assert _numbers(ahead.batch(2)) == [2] * 2


def test_it_ends_with_the_thread_gone_and_may_begin_again(cuda):
    train = _Train(lambda index: 0.01)
    ahead = PrefetchedTrain(train, CUDA)
    for index in range(2):
        assert _numbers(ahead.batch(index)) == [index] * 2
        assert len(_workers()) == 1
        ahead.close()
        assert _workers() == []


def test_fixed_batches_are_iterated_again_and_a_broken_iteration_ends_its_thread(cuda):
    given = [(torch.full((2, 1), float(i)), torch.full((2,), i)) for i in range(4)]
    batches = PrefetchedBatches(given, CUDA)
    for _ in range(2):
        assert [labels.tolist() for _, labels in batches] == [[i, i] for i in range(4)]
        assert _workers() == []

    def use():
        for _, labels in batches:
            if labels[0] == 1:
                raise KeyError("used badly")

    with pytest.raises(KeyError, match="used badly"):
        use()
    assert _workers() == []
    assert list(PrefetchedBatches([], CUDA)) == []


# In what trains and scores


def _run(kind, **options):
    """Everything that a run leaves, and its data."""
    net, data = micro_supernet(), small_data()
    if kind == "pretrain":
        pretrain(net, data, steps=4, batch_size=6, lr=0.05, **options)
    else:
        start = transfer if kind == "transfer" else search
        own = {"shift": kind} if kind != "transfer" else {"head_warmup_steps": 2}
        start(net, data, seed=3, **SMALL, **own, **options)
    return net.tensors(), data


@pytest.mark.parametrize("kind", ["pretrain", "accumulate", "immediate", "uniform", "transfer"])
def test_a_run_is_the_same_to_the_bit(kind, request):
    plain, data = _run(kind)
    request.getfixturevalue("everywhere")
    found, ahead = _run(kind)
    assert changed_tensors(plain, found) == set()
    assert [row for row in ahead.train.asked if row in data.train.asked] == data.train.asked
    if kind == "pretrain":
        assert ahead.train.asked == data.train.asked


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", ["pretrain", "accumulate"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, NonFiniteLossError])
def test_a_run_that_ends_with_an_error_leaves_no_thread(kind, error):
    asked = []

    def stop():
        asked.append(len(_workers()))
        if len(asked) == 3:
            raise error
        return False

    with pytest.raises(error):
        _run(kind, stop=stop)
    assert max(asked) == 1


def test_scoring_data_too_large_to_keep_is_copied_a_batch_ahead(everywhere, monkeypatch):
    monkeypatch.setenv("FASTSHIFT_STEPS", "modules")  # others read a batch for its size
    data, net = synthetic_data(), micro_supernet()
    archs = random_archs(net.space, 5)
    plain = Evaluator(net, data.validation, calibration=data.calibration)
    wanted = plain.evaluate(archs)
    found = Evaluator(
        net,
        uploaded(data.validation, CUDA, 0),
        calibration=uploaded(data.calibration, CUDA, 0),
    )
    started = []
    submit = prefetch.ThreadPoolExecutor.submit

    def noted(pool, *job):
        started.append(job)
        return submit(pool, *job)

    monkeypatch.setattr(prefetch.ThreadPoolExecutor, "submit", noted)
    scores = found.evaluate(archs)
    assert np.array_equal(scores.losses, wanted.losses)
    assert len(started) == len(data.validation) + len(data.calibration)
