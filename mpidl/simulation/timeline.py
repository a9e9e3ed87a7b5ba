"""One iteration on one node, with its ranks' main threads, the exchange's threads and the wire.

All nodes do the same, so one is looked at; so do the ranks of a node. The processes, as `parameters/pipeline.py` and
`synchronizer.py` have them:

1. *main*: forward, which waits for each bucket's weights where it comes to them; backward, which announces a bucket
   when its gradients are ready; collect, which waits for all sums; update, bucket by bucket in forward's order.
2. *starting* and *ending* of reductions, in the order from the last bucket to the first: a bucket that was announced
   is packed by the thread and handed to the wire, at most four at a time; when its messages have come, the thread adds
   them up. The first bucket of the model, the last in this order, is announced when backward has ended, and so are the
   changes of buffers, one bucket more just before it. Counters that do not ride with it are gathered behind it.
3. *starting* and *ending* of publications: changes of buffers, for which main waits; weights in forward's order;
   squares.

2 and 3 are one thread: when it packs or adds, nothing else of it goes on (`_Thread`). It sees the end of an exchange
`poll_s` late.

What is simulated goes from one collect's end to the next: update, forward, backward, collect. At that point nothing is
under way: all sums have come, and main has waited until the weights of the iteration before are published. So each
iteration begins from the same state and takes as long, and every exchange has to be simulated once.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from mpidl.simulation.collectives import Collective

MAX_UNDER_WAY = 4
"""Buckets that are exchanged at the same time (`parameters/pipeline.py`)."""

CHANGES = -1
"""What stands for the changes of buffers beside the buckets' numbers, as in `parameters/pipeline.py`."""

_TOGETHER_S = 1e-9
"""Times no further apart are one: clocks round."""

Process = Generator["float | Callable[[], bool]", None, None]
"""Yields seconds to let pass, or a condition to wait for."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A bucket, or the changes of buffers: its work in seconds, and its exchanges."""

    pack_s: float
    """Adding up the node's rows for other nodes, of the thread."""
    add_s: float
    """Adding up what was received, of the thread."""
    update_s: float
    """The optimizer's, of the main thread."""
    reduce: Collective
    publish: tuple[Collective, ...]
    ready_s: float = 0.0
    """Seconds after backward's start when the last gradient is ready."""
    needed_s: float = 0.0
    """Seconds after forward's start when the first weight is needed."""


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What is done again and again."""

    forward_s: float
    backward_s: float
    parts: tuple[Part, ...]
    """The buckets, in forward's order."""
    changes: Part | None = None
    """Of the model's buffers."""
    counters: Collective | None = None
    """Behind the last sums; None: they ride with the last bucket's gradients."""
    squares: Collective | None = None
    poll_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """Without anything else."""
        return self.forward_s + self.backward_s

    @property
    def published(self) -> list[tuple[int, Part]]:
        """What goes from its owners to all, with its number, in that order."""
        return [*self._changes, *enumerate(self.parts)]

    @property
    def reduced(self) -> list[tuple[int, Part]]:
        """What goes to its owners, with its number, in that order."""
        last, *others = enumerate(self.parts)
        return [*reversed(others), *self._changes, last]

    @property
    def _changes(self) -> list[tuple[int, Part]]:
        return [] if self.changes is None else [(CHANGES, self.changes)]


@dataclasses.dataclass(frozen=True)
class Phases:
    """What an iteration takes, in seconds; `forward_s` and `backward_s` with the waits among them."""

    seconds: float
    forward_s: float
    backward_s: float
    collect_s: float
    """From backward's end until all sums are there."""
    update_s: float


class Wire(Protocol):
    """The network between nodes, with a clock."""

    @property
    def now(self) -> float:
        """Seconds since the start."""
        ...

    def start(self, collective: Collective) -> Callable[[], bool]:
        """Begin an exchange; the result tells whether it is over."""
        ...

    def advance(self, until: float) -> None:
        """Let time pass until then, or until an exchange ends."""
        ...


def simulate(iteration: Iteration, wire: Wire) -> Phases:
    """An iteration among others, on a wire that carries nothing yet."""
    course = _Course(iteration, wire)
    begin = wire.now
    _run([course.main(), *course.threads()], wire)
    update, forward, backward, collect = (end - start for start, end in itertools.pairwise([begin, *course.marks]))
    return Phases(update + forward + backward + collect, forward, backward, collect, update)


def _run(processes: Sequence[Process], wire: Wire) -> None:
    """Advance processes until all have ended."""
    waiting: list[tuple[Process, Callable[[], bool]]] = [(process, lambda: True) for process in processes]
    sleeping: list[tuple[float, Process]] = []
    while waiting or sleeping:
        due = [process for time, process in sleeping if time <= wire.now + _TOGETHER_S]
        sleeping = [(time, process) for time, process in sleeping if time > wire.now + _TOGETHER_S]
        woken = next((index for index, (_, is_over) in enumerate(waiting) if is_over()), None)
        if woken is not None and not due:
            due = [waiting.pop(woken)[0]]
        for process in due:
            wanted = next(process, None)
            if callable(wanted):
                waiting.append((process, wanted))
            elif wanted is not None:
                sleeping.append((wire.now + wanted, process))
        if not due:
            wire.advance(min((time for time, _ in sleeping), default=math.inf))


class _Thread:
    """The exchange's: one thing at a time."""

    def __init__(self) -> None:
        self._is_busy = False

    def work(self, seconds: float) -> Process:
        yield lambda: not self._is_busy
        self._is_busy = True
        yield seconds
        self._is_busy = False


class _Course:
    """The processes, and what they tell each other: which buckets are ready, reduced, updated, published."""

    def __init__(self, iteration: Iteration, wire: Wire) -> None:
        self.of, self.wire = iteration, wire
        self.marks: list[float] = []
        """The ends of update, forward, backward and collect."""
        self._thread = _Thread()
        self._ready: set[int] = set()
        self._updated: set[int] = set()
        self._published: set[int] = set()
        self._is_reduced = self._is_published = False

    def main(self) -> Process:
        """The main thread."""
        for phase in (self._update, self._forward, self._backward, self._collect):
            yield from phase()
            self.marks.append(self.wire.now)

    def _update(self) -> Process:
        for index, part in self.of.published:
            yield part.update_s
            self._updated.add(index)
            if index == CHANGES:
                yield self._has(self._published, CHANGES)

    def _forward(self) -> Process:
        passed = 0.0
        for index in sorted(range(len(self.of.parts)), key=lambda index: self.of.parts[index].needed_s):
            part = self.of.parts[index]
            yield part.needed_s - passed
            passed = part.needed_s
            yield self._has(self._published, index)
        yield self.of.forward_s - passed

    def _backward(self) -> Process:
        passed = 0.0
        for index in sorted(range(1, len(self.of.parts)), key=lambda index: self.of.parts[index].ready_s):
            part = self.of.parts[index]
            yield part.ready_s - passed
            passed = part.ready_s
            self._ready.add(index)
        yield self.of.backward_s - passed
        self._ready |= {CHANGES, 0}  # with the counters, when backward has ended

    def _collect(self) -> Process:
        yield lambda: self._is_reduced
        yield lambda: self._is_published

    def threads(self) -> Sequence[Process]:
        """The four courses of the exchange's thread."""
        reducing: collections.deque[Callable[[], bool]] = collections.deque()
        publishing: collections.deque[tuple[Callable[[], bool], ...]] = collections.deque()
        return (
            self._start_reductions(reducing),
            self._end_reductions(reducing),
            self._start_publications(publishing),
            self._end_publications(publishing),
        )

    def _start_reductions(self, under_way: collections.deque[Callable[[], bool]]) -> Process:
        for index, part in self.of.reduced:
            yield lambda: len(under_way) < MAX_UNDER_WAY
            yield self._has(self._ready, index)
            yield from self._thread.work(part.pack_s)
            under_way.append(self.wire.start(part.reduce))

    def _end_reductions(self, under_way: collections.deque[Callable[[], bool]]) -> Process:
        for index, part in self.of.reduced:
            yield lambda: bool(under_way)
            yield under_way[0]
            yield self.of.poll_s
            yield from self._thread.work(part.add_s)
            if index == 0 and self.of.counters is not None:
                yield self.wire.start(self.of.counters)
                yield self.of.poll_s
            under_way.popleft()
        self._is_reduced = True

    def _start_publications(self, under_way: collections.deque[tuple[Callable[[], bool], ...]]) -> Process:
        for index, part in self.of.published:
            yield lambda: len(under_way) < MAX_UNDER_WAY
            yield self._has(self._updated, index)
            yield from self._thread.work(0.0)
            under_way.append(tuple(self.wire.start(each) for each in part.publish))
        if self.of.squares is not None:
            yield lambda: len(under_way) < MAX_UNDER_WAY
            under_way.append((self.wire.start(self.of.squares),))

    def _end_publications(self, under_way: collections.deque[tuple[Callable[[], bool], ...]]) -> Process:
        for index, _ in self.of.published:
            yield from self._see(under_way)
            self._published.add(index)
        if self.of.squares is not None:
            yield from self._see(under_way)
        self._is_published = True

    def _see(self, under_way: collections.deque[tuple[Callable[[], bool], ...]]) -> Process:
        yield lambda: bool(under_way)
        yield from under_way[0]
        yield self.of.poll_s
        under_way.popleft()

    @staticmethod
    def _has(numbers: set[int], wanted: int) -> Callable[[], bool]:
        return lambda: wanted in numbers
