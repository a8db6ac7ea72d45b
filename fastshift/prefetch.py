"""Batches that lie on the host, for a GPU: the next one is made and copied while one is used.

A batch is a function of what it is asked by, whoever makes it and when, so the position of a run
stays the number of batches that it has used. What was made in vain, before a stop or a jump, costs
its making and nothing else.

On a CPU each batch is made when it is asked for: a thread beside the step would take from it the
cores that it computes on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

__all__ = ["PrefetchedBatches", "PrefetchedTrain", "Prefetcher"]

Batch = tuple[Tensor, Tensor]
Copied = tuple["Batch | None", "torch.cuda.Event | None"]  # the event ends its copy


class Prefetcher:
    """Give batches by their keys, on a device, the next one made by a thread meanwhile.

    Two batches are held at most, on the host and on the device, the one that was given and the
    next; the one before is a third for as long as who asks keeps it. A batch is copied once the
    stream that asks has used all those before the last one given, so that a host far ahead of its
    device waits here, and no more memory is taken. The thread starts with the second batch, and
    only for a GPU whose first batch lay on the host; it ends with `close`. A batch is made by one
    thread at a time.

    Args:
        make: gives the batch of a key, images and labels; None behind the last.
        device: where batches are wanted.
    """

    def __init__(self, make: Callable[[Any], Batch | None], device: torch.device) -> None:
        self._make, self.device = make, device
        self._is_wanted = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._pending: tuple[Hashable, Future[Copied]] | None = None
        self._used: torch.cuda.Event | None = None  # all batches before the last one given

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, key: Hashable, following: Hashable | None = None) -> Batch | None:
        """Give the batch of a key.

        Args:
            key: of the batch.
            following: the key that will probably be asked for next; any other costs the making of
                this one. None for none.

        Returns:
            What `make` gives, on the device; the present stream may use it at once.

        Raises:
            Exception: what making this very batch raised; the error of a batch that was made ahead
                and is not asked for is dropped with it.
        """
        if not self._is_wanted and self._pending is None:
            return self._make(key)
        ahead = None
        if self._pending is not None:
            wait([self._pending[1]])
            (found, future), self._pending = self._pending, None
            ahead = future if found == key else None
            del future  # and with it a batch made in vain
        copied = self._copied(key, self._used) if ahead is None else ahead.result()
        if copied[1] is not None:
            self._used = self._asked()
        if self._is_wanted and copied[0] is not None and following is not None:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(
                    1,
                    "batches",
                    # which a new thread would take from the environment
                    initializer=torch.set_num_threads,
                    initargs=(torch.get_num_threads(),),
                )
            self._pending = following, self._worker.submit(self._copied, following, self._used)
        return self._received(*copied)

    def close(self) -> None:
        """End the thread, once the batch that it is at is made; another batch starts a new one."""
        self._pending = None
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None

    def _asked(self) -> torch.cuda.Event:
        """What the present stream was given so far; the thread that waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        torch.cuda.current_stream(self.device).record_event(event)
        return event

    def _copied(self, key: Hashable, used: torch.cuda.Event | None) -> Copied:
        """Make a batch and, once others are used, begin its copy on a stream of its own."""
        batch = self._make(key)
        if batch is None:
            return None, None
        if batch[0].device.type != "cpu":
            self._is_wanted = False  # there already, as all of its source are
            return batch, None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if used is not None:
            used.synchronize()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            images, labels = (self._moved(part) for part in batch)
            return (images, labels), self._stream.record_event()

    def _moved(self, part: Tensor) -> Tensor:
        if part.device.type != "cpu":
            return part
        return part.pin_memory().to(self.device, non_blocking=True)

    def _received(self, batch: Batch | None, copied: torch.cuda.Event | None) -> Batch | None:
        """Have the present stream wait for a copy, whose memory is then kept until it is used."""
        if batch is not None and copied is not None:
            present = torch.cuda.current_stream(self.device)
            present.wait_event(copied)
            for part in batch:
                part.record_stream(present)  # the memory is of the other stream
        return batch


class PrefetchedTrain:
    """A training stream, its next batch made and copied while one is used.

    Args:
        train: with `batch(index, size, stream)`, a pure function of its arguments.
        device: where batches are wanted; a CPU's are made when they are asked for.
        stop: index behind the last batch, where that is known.
    """

    def __init__(self, train: Any, device: torch.device, stop: int | None = None) -> None:
        self._stop = stop
        self._prefetcher = Prefetcher(lambda key: train.batch(*key), device)

    def __enter__(self) -> PrefetchedTrain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; another batch starts a new one."""
        self._prefetcher.close()

    def batch(self, index: int, size: int | None = None, stream: str = "train") -> Batch:
        """Give a batch as `train` does, on the device; the next of its stream is made ahead."""
        following = None if index + 1 == self._stop else (index + 1, size, stream)
        return self._prefetcher.batch((index, size, stream), following)


class PrefetchedBatches:
    """Batches that can be iterated again, the next one made and copied while one is used.

    Args:
        batches: pairs of images and labels.
        device: where they are wanted; for a CPU they are as they were given.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches; the thread ends with the iteration, whole or not."""
        given = iter(self.batches)
        with Prefetcher(lambda _: next(given, None), self.device) as prefetcher:
            index = 0
            while (batch := prefetcher.batch(index, index + 1)) is not None:
                yield batch
                index += 1
