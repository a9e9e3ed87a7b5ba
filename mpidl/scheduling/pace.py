"""How fast ranks compute: what each measures of itself, and what the coordinator makes of the reports. Pure.

Work is what a rank does for its own partitions: forward, backward, and waiting for their samples, since a rank that
reads slowly is slow; not waiting for other ranks.
"""

from __future__ import annotations

import collections
import itertools

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

PACE_FIELDS = ("seconds_per_sample", "deviation_s", "iterations")
"""What each rank reports of a group: the median over its iterations, the median of the absolute deviations from it, and
over how many; not a number where nothing was measured."""


class Pace:
    """Collects the work of a group's iterations on one rank.

    The first iteration of a run, which compiles and allocates, does not count.
    """

    def __init__(self) -> None:
        self._is_warm = False
        self._seconds = self._samples = 0.0
        self._measured: list[float] = []

    def add(self, seconds: float, samples: int) -> None:
        """A partition was computed."""
        self._seconds += seconds
        self._samples += samples

    def end_iteration(self, *, counts: bool) -> None:
        """All of this rank's partitions were; `counts` says whether they are as many and as large as is planned for."""
        if self._is_warm and counts and self._samples:
            self._measured.append(self._seconds / self._samples)
        self._is_warm = True
        self._seconds = self._samples = 0.0

    def take(self) -> Float64Array:
        """The values of PACE_FIELDS since the last call."""
        measured, self._measured = self._measured, []
        if not measured:
            return np.array([np.nan, np.nan, 0.0])
        median = np.median(measured)
        return np.array([median, np.median(np.abs(np.subtract(measured, median))), len(measured)])


FEWEST_GROUPS, FEWEST_ITERATIONS = 3, 8
"""What an estimate looks back on: the last groups, so many at least and with so many iterations together."""

_HISTORY = 16
"""Groups from which it is learned how much speeds change from one to the next."""

_ONE_ITERATION_ERROR = 0.25
"""Assumed relative error of a speed measured once; falls with the number of measurements."""

_GROUP_ERROR = 0.05
"""Assumed relative change from group to group, while nothing is known of it."""

_SIGMA = 1.4826
"""Standard deviation by median deviation, of a normal distribution."""

_MEDIAN_ERROR = 1.2533
"""Standard error of a median, by that of a mean."""


class Estimates:
    """The speeds of all ranks, from their reports.

    A rank's seconds per sample is the median over the groups looked back on: a change is believed when most of them
    show it (two of three), and one odd group changes nothing. At the beginning the first report has to do.
    """

    def __init__(self, num_ranks: int) -> None:
        self.seconds_per_sample: Float64Array = np.full(num_ranks, np.nan)
        """float64, (ranks,); not a number before it is known."""
        self._groups: collections.deque[tuple[Float64Array, Float64Array, float]] = collections.deque(maxlen=_HISTORY)
        self._changes: collections.deque[Float64Array] = collections.deque(maxlen=_HISTORY)

    @property
    def are_complete(self) -> bool:
        """Whether something is known of every rank."""
        return bool(np.all(self.seconds_per_sample > 0))

    def learn(self, paces: Float64Array) -> None:
        """Take a group's reports: float64, (ranks, 3), PACE_FIELDS of each rank."""
        medians, deviations, numbers = paces.T
        has_part = numbers > 0
        if not np.any(has_part):
            return
        within = np.full(len(paces), np.nan)
        within[has_part] = _MEDIAN_ERROR * _SIGMA * (deviations / medians / np.sqrt(numbers))[has_part]
        before = self.seconds_per_sample
        medians = np.where(has_part, medians, before)  # who had no part in it is as fast as before
        if np.any(np.isnan(medians)):
            self.seconds_per_sample = medians
            return
        if self.are_complete:
            self._changes.append(np.abs(medians / before - 1))
        self._groups.append((medians, np.fmax(within, np.nanmedian(within)), float(numbers.max())))
        self.seconds_per_sample = np.median([medians for medians, _, _ in self._looked_at()], axis=0)

    def _looked_at(self) -> list[tuple[Float64Array, Float64Array, float]]:
        """The groups that an estimate looks back on, newest first."""
        newest_first = list(reversed(self._groups))
        totals = itertools.accumulate(number for _, _, number in newest_first)
        enough = next((i + 1 for i, total in enumerate(totals) if total >= FEWEST_ITERATIONS), len(newest_first))
        return newest_first[: max(enough, FEWEST_GROUPS)]

    @property
    def errors(self) -> Float64Array:
        """Relative standard errors, float64, (ranks,): from iteration to iteration, and from group to group.

        A rank's own, or the ranks' median where that is more: a few measurements may agree by chance.
        """
        looked_at = self._looked_at()
        within = np.median([errors for _, errors, _ in looked_at], axis=0)
        unknown = _ONE_ITERATION_ERROR / sum(number for _, _, number in looked_at)
        found: Float64Array = np.hypot(within, unknown)
        if len(self._changes) < FEWEST_GROUPS:
            return np.hypot(found, _GROUP_ERROR)
        from_group_to_group = _SIGMA * np.fmax(np.median(self._changes, axis=0), np.median(self._changes))
        errors: Float64Array = np.fmax(found, _MEDIAN_ERROR * from_group_to_group / np.sqrt(len(looked_at)))
        return errors
