"""Reasons to stop a training before its end: a signal on any rank, a file, the time.

Each rank looks for itself and tells what it has seen in the flags of its partitions' counters, which come with the
gradients: all ranks see them after the same iteration, write a checkpoint there and leave. No message is sent for it.
"""

from __future__ import annotations

import bisect
import enum
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from mpidl.parameters import Assignment
from mpidl.parameters.counters import FIRST_FREE
from mpidl.runtime import Slurm, signals, warn

STOP_FILE = "STOP"
"""The name, in the run directory, of the file that stops the training."""

_LOOK_EVERY_S = 1.0
_LONGEST_MARGIN_S = 60.0
_MARGIN_SHARE = 0.1


class StopReason(enum.IntFlag):
    """Flags of a partition's counters."""

    SIGNAL = FIRST_FREE
    FILE = 2 * FIRST_FREE
    TIME = 4 * FIRST_FREE


class StopRequests:
    """What this rank has seen.

    Args:
        stop_file: looked for about once a second; None: by no-one here (rank 0 looks for it).
        end_time: when the job is ended (time.time); None: unknown. Asked for a margin before it, in which a checkpoint
            can be written: a tenth of the time left when this is made, at most a minute, and twice what the last
            checkpoint took, and the longest time so far from one iteration to the next, since there is no stopping
            within one.
        clock: seconds since the epoch, as time.time.
    """

    def __init__(
        self, stop_file: pathlib.Path | None, end_time: float | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._stop_file = stop_file
        self._end_time = end_time
        self._clock = clock
        self._looked_at = clock()
        self._has_file = False
        self._margin = 0.0 if end_time is None else min(_LONGEST_MARGIN_S, _MARGIN_SHARE * (end_time - clock()))
        self._checkpoint_s = 0.0
        self._iteration_s = 0.0

    def flags(self) -> int:
        """The reasons there are by now, as `StopReason`s."""
        found, now = 0, self._clock()
        if signals.received():
            found |= StopReason.SIGNAL
        if self._stop_file is not None and now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at, self._has_file = now, self._stop_file.exists()
        if self._has_file:
            found |= StopReason.FILE
        if self._end_time is not None:
            needed = self._margin + 2 * self._checkpoint_s + self._iteration_s
            found |= StopReason.TIME if now + needed >= self._end_time else 0
        return found

    def took_iteration(self, seconds: float) -> None:
        """Learn how long an iteration takes, with what was due after it."""
        self._iteration_s = max(seconds, self._iteration_s)

    def took_checkpoint(self, seconds: float) -> None:
        """Learn how long a checkpoint takes."""
        self._checkpoint_s = seconds

    def obeyed(self) -> None:
        """Take the file away: a resumed training is to go on."""
        if self._stop_file is not None:
            take_away(self._stop_file)


def take_away(path: pathlib.Path) -> None:
    """Remove a file that says something by being there; one that cannot be removed is told, and ends nothing."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a folder of that name, for one
        warn(f"{path} cannot be removed ({error.strerror}); do so before you resume this run")


def describe_stop(flags: NDArray[np.int64], assignment: Assignment) -> str | None:
    """The reason to stop in words, the same on all ranks; None: there is none.

    Args:
        flags: int, (num_partitions,); of an iteration's counters.
        assignment: of the iteration.
    """
    if not flags.any():
        return None
    texts = {
        StopReason.SIGNAL: "a signal to rank {rank}",
        StopReason.FILE: f"the file {STOP_FILE}",
        StopReason.TIME: "the end of the job's time",
    }
    for reason, text in texts.items():
        (asking,) = np.nonzero(flags & reason)
        if asking.size:
            return text.format(rank=bisect.bisect_right(assignment.starts, int(asking[0])) - 1)
    return None


def end_time_of_job(max_seconds: float | None, environment: Mapping[str, str] = os.environ) -> float | None:
    """When the job ends (time.time): by Slurm's word or `max_seconds` from now, whichever comes first.

    May ask Slurm, so one rank calls it.
    """
    slurm = Slurm.from_environment(environment)
    ends = [None if slurm is None else slurm.end_time(), None if max_seconds is None else time.time() + max_seconds]
    return min((end for end in ends if end is not None), default=None)
