"""Exchanges one after the other, of which several are under way at a time: courses of a driver (`driver.py`)."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Generator, Sequence

from mpidl.parameters.driver import Awaited, Condition, Course, Flag
from mpidl.parameters.reduction import Steps

MAX_UNDER_WAY = 4
"""Buckets that are exchanged at the same time: enough to keep the wire busy, few enough to cost no memory."""

Errand = tuple[int, Callable[[], Steps]]
"""A number, by which flags know it, and its exchange."""


def two_stage(
    errands: Sequence[Errand],
    start: Callable[[Errand], Generator[Awaited, None, Steps]],
    end: Callable[[Errand, Steps], Course],
    done: Flag,
    note: Callable[[int, int, Sequence[float]], None] = lambda *_: None,
) -> tuple[Course, Course]:
    """Two courses: one starts errand after errand, the other ends them in the same order.

    Args:
        errands: what to do.
        start: what begins one.
        end: what ends it.
        done: raised when all have ended.
        note: gets each one's place in the row, its number, and when it was begun, started, arrived, and had ended.
    """
    under_way: collections.deque[tuple[Errand, Steps, Awaited, tuple[float, float]]] = collections.deque()

    def starting() -> Course:
        for errand in errands:
            yield Condition(lambda: len(under_way) < MAX_UNDER_WAY)
            steps = yield from start(errand)
            began = time.perf_counter()
            awaited = next(steps)
            under_way.append((errand, steps, awaited, (began, time.perf_counter())))

    def ending() -> Course:
        for number, _ in enumerate(errands):
            yield Condition(lambda: bool(under_way))
            errand, steps, awaited, times = under_way[0]
            yield awaited
            arrived = time.perf_counter()
            yield from end(errand, steps)
            note(number, errand[0], (*times, arrived, time.perf_counter()))
            under_way.popleft()
        done.raise_flag()

    return starting(), ending()
