"""The threads of a rank that share the work of a kernel.

A kernel runs without the GIL, so threads run it side by side, each on another part of its range. Parts are cut at
multiples of the kernels' block, over which squares are added up, and no element depends on another: the bits do not
depend on the number of threads.

*Who does what.* Whoever asks puts the parts into a queue, wakes the helpers, and takes part after part itself; helpers
do the same, and say of each part that it is done. When none is left, the asker waits for those that others have taken:
nobody sees a range half done, and a helper that wakes up late (a sleeping core takes 50 microseconds, a busy one more)
finds nothing to do and keeps nobody waiting.

*How many.* A rank computes with as many threads as it has cores. The main thread shares its work with all of them, as
torch's stand still meanwhile. The thread that exchanges buckets (`driver.py`) does so only while the main thread waits
for it; while backward, the update or the next forward run, it takes the one core that it takes anyway.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence

from mpidl import kernels

PART_SIZE = 16 * kernels.BLOCK_SIZE
"""Elements of the smallest part that is shared: 256 KiB, some ten times what it takes to get it."""

Work = Callable[[int, int, int, int], object]
"""(thread, index, start, stop): works on the elements [start, stop) of a range."""


class _Task:
    """Parts of ranges that are left to do, and how those that were done have ended."""

    def __init__(self, work: Work, sizes: Sequence[int], part_size: int) -> None:
        self._work = work
        self._left = collections.deque(
            (index, start, min(size, start + part_size))
            for index, size in enumerate(sizes)
            for start in range(0, size, part_size)
        )
        self.num_parts = len(self._left)
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def help(self, thread: int) -> None:
        """Do parts as long as there are any."""
        while True:
            try:
                part = self._left.popleft()
            except IndexError:
                return
            try:
                self._work(thread, *part)
            except BaseException as error:
                self._ended.put(error)
            else:
                self._ended.put(None)

    def wait(self) -> None:
        """Return when all parts have ended; raise what one of them has raised."""
        failures = [error for error in [self._ended.get() for _ in range(self.num_parts)] if error is not None]
        if failures:
            raise failures[0]


class Helpers:
    """Threads that sleep until they are asked; started when they first are."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._asked: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()

    def ask(self, task: _Task, number: int) -> None:
        """Let so many of them help."""
        with self._starting:
            for i in range(len(self._threads) + 1, self.number + 1):
                self._threads.append(threading.Thread(target=self._run, args=(i,), name="mpidl-kernels", daemon=True))
                self._threads[-1].start()
        for _ in range(number):
            self._asked.put(task)

    def _run(self, thread: int) -> None:
        while (task := self._asked.get()) is not None:
            task.help(thread)
            del task  # what it works on may be freed while this thread sleeps

    def close(self) -> None:
        """End them."""
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


@dataclasses.dataclass(frozen=True)
class Team:
    """The caller's thread and its helpers."""

    helpers: Helpers = dataclasses.field(default_factory=lambda: Helpers(0))
    is_free: Callable[[], bool] = lambda: True
    """Whether the helpers may be asked now."""

    @property
    def num_threads(self) -> int:
        """How many there are."""
        return 1 + self.helpers.number

    def run(self, sizes: Sequence[int], work: Work, max_size: int | None = None) -> None:
        """Work on ranges, each element in one call; calls may come from several threads at a time.

        Args:
            sizes: of the ranges.
            work: gets the number of the thread, below `num_threads`, and a part of one range that begins at a block.
            max_size: of a part, a multiple of BLOCK_SIZE; None: whole ranges will do.
        """
        total = sum(sizes)
        if not self.helpers.number or total < 2 * PART_SIZE or not self.is_free():
            for index, size in enumerate(sizes):
                step = max_size or max(size, 1)
                for start in range(0, size, step):
                    work(0, index, start, min(size, start + step))
            return
        # Some parts more than threads, for who is quicker; not many, as only one is in the interpreter at a time.
        wanted = max(PART_SIZE, total // (2 * self.num_threads) // kernels.BLOCK_SIZE * kernels.BLOCK_SIZE)
        task = _Task(work, sizes, min(wanted, max_size or wanted))
        self.helpers.ask(task, min(self.helpers.number, task.num_parts - 1))
        task.help(0)
        task.wait()
