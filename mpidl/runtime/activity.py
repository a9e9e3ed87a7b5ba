"""What each rank does at the moment, where the other ranks of its node can read it.

Every rank has a row of FIELDS in node-shared memory, float64, that it alone writes: its main thread all but "looked"
and "ends", which are the watchdog's (`watchdog.py`), and "bucket", the exchange's. A write is a store of one number,
some tens of nanoseconds; readers may see a row whose fields are from two moments, which does not matter to who reads
again and again. The segments of a dead rank stay readable. Times are seconds of the machine's monotonic clock, which
all its processes share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpidl.runtime.spans import MAIN, Spans

PHASES = (
    "starting",
    "the loop's own code",
    "reading data",
    "forward and backward",
    "reduce-scatter",
    "update",
    "allgather",
    "planning",
    "validation",
    "writing a checkpoint",
    "ending",
)
STARTING, OWN_CODE, DATA, COMPUTE, REDUCE_SCATTER, UPDATE, ALLGATHER, PLAN, VALIDATION, CHECKPOINT, ENDING = range(11)

FIELDS = (
    "pid", "iteration", "phase", "since", "waits_since", "bucket", "moved", "usual_s", "looked", "stack_file", "ends",
)  # fmt: skip
PID, ITERATION, PHASE, SINCE, WAITS_SINCE, BUCKET, MOVED, USUAL_S, LOOKED, STACK_FILE, ENDS = range(len(FIELDS))
NONE = -1.0
"""In fields that have no value."""

_TRACED = (PLAN, VALIDATION, CHECKPOINT)
"""Phases that a trace has from here; the others are told in more detail by whoever does them."""

_KEPT = 0.98
"""How much of the longest iteration is remembered from one to the next."""


class Activity:
    """This rank's row. Only `looked`, `beat` and `at_bucket` are called by other threads than the main one."""

    def __init__(self) -> None:
        self._row = np.full(len(FIELDS), NONE)
        self._row[[PID, ITERATION]] = os.getpid(), 0
        self._iteration_began: float | None = None
        self.spans = Spans()
        """What this rank did when, while a trace is taken; any thread may add to them."""
        self.enter(STARTING)

    def move_to(self, row: NDArray[np.float64]) -> None:
        """Go on in another row, which others can read."""
        row[:] = self._row
        self._row = row

    def enter(self, phase: int, iteration: int | None = None) -> None:
        """Begin a phase, an index of PHASES; of iteration `iteration`, counted from 1; default: the one before."""
        row = self._row
        if iteration is not None:
            row[ITERATION] = iteration
        row[BUCKET] = NONE
        row[PHASE] = phase
        row[SINCE] = row[MOVED] = time.monotonic()

    def beat(self) -> None:
        """Something has been done that a phase has many of: a batch evaluated, a piece of a file written."""
        self._row[MOVED] = time.monotonic()

    def end_iteration(self) -> None:
        """Learn how long iterations take: the longest of the last ones, slowly forgotten."""
        now, began = time.monotonic(), self._iteration_began
        self._iteration_began = self._row[MOVED] = now
        if began is not None:
            self._row[USUAL_S] = max(now - began, _KEPT * self._row[USUAL_S])

    def at_bucket(self, index: int) -> None:
        """The bucket that the exchange has come to."""
        self._row[BUCKET] = index
        self.beat()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block this rank waits for others, and can do nothing about it."""
        row = self._row
        row[WAITS_SINCE] = began = time.monotonic()
        try:
            yield
        finally:
            row[WAITS_SINCE] = NONE
            row[MOVED] = ended = time.monotonic()
            if self.spans.is_on:
                self.spans.add(MAIN, "waiting for others", began, ended)

    @contextlib.contextmanager
    def within(self, phase: int) -> Iterator[None]:
        """Be in a phase inside the block, and in the one before after it."""
        before, began = int(self._row[PHASE]), time.monotonic()
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)
            if self.spans.is_on and phase in _TRACED:
                self.spans.add(MAIN, PHASES[phase], began, time.monotonic())

    def set_stack_file(self, descriptor: int) -> None:
        """Where this process writes its stack when it is asked to."""
        self._row[STACK_FILE] = descriptor

    def looked(self) -> None:
        """This rank's watchdog is awake."""
        self._row[LOOKED] = time.monotonic()

    @property
    def iteration(self) -> int:
        """The one that this rank is in, from 1."""
        return int(self._row[ITERATION])


@dataclasses.dataclass(frozen=True)
class RankState:
    """What is known of one rank; times in seconds before the moment of looking."""

    rank: int
    host: str
    pid: int
    iteration: int
    phase: str
    phase_s: float
    waits_s: float | None
    """How long it has been waiting for other ranks; None: it does not."""
    bucket: int | None
    process: str = ""
    """"dead", "stopped", or nothing where the process runs."""
    stack: str = ""
    """Its main thread's, innermost call last; empty where it could not be read."""


def read_state(row: NDArray[np.float64], rank: int, host: str, now: float) -> RankState:
    """What a row says."""
    waits_since, bucket = float(row[WAITS_SINCE]), int(row[BUCKET])
    return RankState(
        rank=rank,
        host=host,
        pid=int(row[PID]),
        iteration=int(row[ITERATION]),
        phase=PHASES[int(row[PHASE])],
        phase_s=now - float(row[SINCE]),
        waits_s=None if waits_since == NONE else now - waits_since,
        bucket=None if bucket == NONE else bucket,
    )
