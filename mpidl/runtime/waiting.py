"""Waiting for MPI without taking a core from a rank that computes.

MPI's own blocking calls spin. That is the fastest way when every rank has a core of its own, and the slowest when
ranks share cores (`mpirun -n 4` on a two-core laptop): the spinning rank holds the core that the awaited rank needs.
There, a rank tests its request a few times, gives its core away after each test, and then sleeps briefly.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

TESTS_BEFORE_SLEEP = 100
SLEEP_S = 5e-5


class Request(Protocol):
    """The part of an MPI request that waiting needs."""

    def Test(self) -> bool: ...  # noqa: D102
    def Wait(self) -> bool: ...  # noqa: D102


def wait(request: Request, shares_cores: bool) -> None:
    """Return when the request is complete.

    Args:
        request: any MPI request of this rank.
        shares_cores: whether more ranks than cores run on this machine.
    """
    if not shares_cores:
        request.Wait()
        return
    for _ in range(TESTS_BEFORE_SLEEP):
        if request.Test():
            return
        os.sched_yield()
    while not request.Test():
        time.sleep(SLEEP_S)


class Pending:
    """A collective that was started and must be completed by every rank, even if its content is no longer wanted."""

    def __init__(
        self,
        request: Request,
        shares_cores: bool,
        waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._request = request
        self._shares_cores = shares_cores
        self._waiting = waiting

    def is_over(self) -> bool:
        """Let MPI move what it can; returns whether the collective is complete on this rank."""
        return bool(self._request.Test())

    def wait(self) -> None:
        """Return when the collective is complete on this rank."""
        with self._waiting():
            wait(self._request, self._shares_cores)


class Patience:
    """How somebody waits who looks again and again at several things.

    Args:
        yields: how often the core is only given away, before the first sleep.
        first_s: the first sleep.
        longest_s: what sleeps grow to, each twice as long as the last; default: they stay the same.
    """

    def __init__(
        self, yields: int = TESTS_BEFORE_SLEEP, first_s: float = SLEEP_S, longest_s: float | None = None
    ) -> None:
        self._yields = yields
        self._first_s, self._longest_s = first_s, first_s if longest_s is None else longest_s
        self.reset()

    def reset(self) -> None:
        """Something has moved."""
        self._left, self._sleep_s = self._yields, self._first_s

    def pause(self) -> None:
        """Nothing has: give the core away."""
        if self._left > 0:
            self._left -= 1
            os.sched_yield()
            return
        time.sleep(self._sleep_s)
        self._sleep_s = min(2 * self._sleep_s, self._longest_s)


def completes_within(request: Request, limit_s: float) -> bool:
    """Wait at most so many seconds, without taking a core; returns whether the request is complete."""
    deadline = time.monotonic() + limit_s
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(SLEEP_S)
    return True
