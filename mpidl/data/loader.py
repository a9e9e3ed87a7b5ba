"""Batches of a data set in the order in which they were requested, read ahead where that is safe."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from mpidl.data.order import Int64Array, Order, Request, kept_random_state
from mpidl.data.sources import Batch, Source
from mpidl.errors import ConfigError

_BATCHES_AHEAD = 3  # read and not taken yet
_LOOK_UP_SIZE = 4096  # positions whose samples are looked up together


class Loader:
    """Serves batches of an epoch's order.

    Which samples a batch has, and what random numbers their augmentation draws, depends on the seed, the epoch
    and the samples only: not on the number of workers, nor on what was requested before.

    A source without randomness (arrays) is read ahead by a thread. A Dataset is read in `next`, by the calling
    thread, when there are no workers: the random generators of torch, NumPy and `random` belong to the whole
    process, and a thread that seeds and draws from them would race with the dropout of the training going on.
    The calling thread puts them back as they were. With workers, other processes read ahead.

    Example:
        with Loader(source, seed=1, shuffle=True) as loader:
            loader.request(epoch=0, start=0, stop=64)
            inputs, targets = loader.next()
    """

    def __init__(self, source: Source, *, seed: int, num_workers: int = 0, shuffle: bool) -> None:
        """Start the thread or the worker processes; does not wait for them.

        Args:
            source: what `as_source` returns.
            seed: the run's seed: of the order and of the samples' random numbers.
            num_workers: processes that read a Dataset; arrays have no use for them.
            shuffle: whether an epoch has an order of its own, or the samples' own order.

        Raises:
            ConfigError: num_workers is negative.
            DataError: the Dataset cannot be sent to worker processes.
        """
        if num_workers < 0:
            raise ConfigError(f"{num_workers} loader workers; give 0 (read in the training process) or more")
        self._order = Order(num_samples=len(source), seed=seed, shuffle=shuffle)
        self._reader = _start_reader(source, self._order, num_workers)
        self._num_outstanding = 0
        # Also runs when the loader is forgotten and when the interpreter ends.
        self._finalizer = weakref.finalize(self, self._reader.close)

    def request(self, epoch: int, start: int, stop: int) -> None:
        """Queue the batch of positions [start, stop) of an epoch's order; does not block.

        Raises:
            ValueError: the positions are not within the data set, or there are none.
        """
        if not 0 <= start < stop <= self._order.num_samples:
            raise ValueError(f"positions [{start}, {stop}) of a data set of {self._order.num_samples} samples")
        self._check_open()
        self._reader.request(Request(epoch, start, stop))
        self._num_outstanding += 1

    def next(self) -> Batch:
        """Give the oldest batch that was requested and not yet given, waiting for it if need be.

        Raises:
            IndexError: nothing is outstanding.
            ReadError: a sample could not be read (its index is the error's `index`), or a worker died.
        """
        self._check_open()
        if not self._num_outstanding:
            raise IndexError("no batch is outstanding; call request first")
        self._num_outstanding -= 1
        return self._reader.next()

    def skip(self) -> None:
        """Forget the oldest batch that was requested and not yet given, without waiting for it.

        Raises:
            IndexError: nothing is outstanding.
        """
        self._check_open()
        if not self._num_outstanding:
            raise IndexError("no batch is outstanding; call request first")
        self._num_outstanding -= 1
        self._reader.skip()

    def forget(self) -> None:
        """Forget all batches that were requested and not yet given; others may be requested then."""
        while self._num_outstanding:
            self.skip()

    def close(self) -> None:
        """End the thread or the processes and forget all requests. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("the loader is closed")


class _Reader(Protocol):
    """One way to read: batches come out in the order in which requests went in."""

    def request(self, request: Request) -> None: ...

    def next(self) -> Batch: ...

    def skip(self) -> None: ...

    def close(self) -> None: ...


def _start_reader(source: Source, order: Order, num_workers: int) -> _Reader:
    if not source.needs_seeds:
        return _ThreadReader(source, order)
    if num_workers:
        from mpidl.data.workers import WorkerPool

        return WorkerPool(source, order, num_workers)
    return _InlineReader(source, order)


class _InlineReader:
    """Reads in the calling thread, when the batch is asked for."""

    def __init__(self, source: Source, order: Order) -> None:
        self._source = source
        self._order = order
        self._queued: deque[Request] = deque()

    def request(self, request: Request) -> None:
        self._queued.append(request)

    def next(self) -> Batch:
        request = self._queued.popleft()
        (indices,) = self._order.indices([request])
        with kept_random_state(), _one_torch_thread():
            return self._source.read(indices, self._order.seeds(request.epoch, indices))

    def skip(self) -> None:
        self._queued.popleft()

    def close(self) -> None:
        self._queued.clear()


class _ThreadReader:
    """Reads ahead in one thread, a few batches and no more."""

    def __init__(self, source: Source, order: Order) -> None:
        self._source = source
        self._order = order
        self._changed = threading.Condition()  # guards the four below
        self._queued: deque[Request] = deque()
        self._outcomes: deque[tuple[Batch, Exception | None]] = deque()
        self._num_skipped = 0  # of those that are not read yet, the first ones
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="mpidl-loader", daemon=True)
        self._thread.start()

    def request(self, request: Request) -> None:
        with self._changed:
            self._queued.append(request)
            self._changed.notify_all()

    def next(self) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: self._outcomes)
            batch, error = self._outcomes.popleft()
            self._changed.notify_all()
        if error is not None:
            raise error
        return batch

    def skip(self) -> None:
        with self._changed:
            if self._outcomes:
                self._outcomes.popleft()
            else:
                self._num_skipped += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():  # where the garbage collector closes the loader
            self._thread.join()

    def _run(self) -> None:
        looked_up: deque[Int64Array] = deque()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._can_read(bool(looked_up)))
                if self._is_closed:
                    return
                requests = [] if looked_up else self._take_requests()
            if requests:
                looked_up.extend(self._order.indices(requests))
            indices = looked_up.popleft()
            if self._num_skipped == 0:
                outcome = self._read(indices)
            with self._changed:
                if self._num_skipped:  # perhaps since it was read
                    self._num_skipped -= 1
                    continue
                self._outcomes.append(outcome)
                self._changed.notify_all()

    def _can_read(self, has_indices: bool) -> bool:
        return len(self._outcomes) < _BATCHES_AHEAD and (has_indices or bool(self._queued))

    def _take_requests(self) -> list[Request]:
        """Take the requests to look up together: of one epoch, and not too many."""
        requests = [self._queued.popleft()]
        size = requests[0].stop - requests[0].start
        while self._queued and self._queued[0].epoch == requests[0].epoch and size < _LOOK_UP_SIZE:
            requests.append(self._queued.popleft())
            size += requests[-1].stop - requests[-1].start
        return requests

    def _read(self, indices: Int64Array) -> tuple[Batch, Exception | None]:
        try:
            return self._source.read(indices, None), None
        except Exception as error:  # for the thread that waits in next()
            return None, error


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Read with one torch thread, as workers do: more threads can add in another order and give other bits."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
