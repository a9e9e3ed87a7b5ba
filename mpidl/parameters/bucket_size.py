"""How many cells make a bucket: given, or found out in the first iterations.

Few cells overlap better with backward, many cost fewer messages; which counts more depends on the wire, the ranks
and the model. So each of a few numbers is tried for some iterations, one after the other, and the fastest is kept. All
ranks try the same numbers in the same iterations and then agree on the slowest rank's times; the bits do not depend on
any of it.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from mpidl.runtime import World

SETTLING = 2
"""Iterations after a change that do not count: the first one of all announces nothing yet."""

COUNTED = 5
"""Iterations whose median counts."""

MIN_BUCKETS = 4
"""Fewer buckets than these leave nothing to overlap."""


class BucketSize:
    """The number of cells in a bucket, and its course.

    Args:
        world: the ranks that agree.
        num_cells: cells of the vector.
        fixed: the number wanted; None: it is found out.
    """

    def __init__(self, world: World, num_cells: int, fixed: int | None = None) -> None:
        self._world = world
        choices = [number for number in (1, 2, 4, 8, 16) if number * MIN_BUCKETS <= num_cells] or [1]
        self._choices = [max(1, min(fixed, num_cells))] if fixed is not None else choices
        self._medians: list[float] = []
        self._seconds: list[float] = []
        self._last: float | None = None
        self.value = self._choices[0]

    @property
    def is_settled(self) -> bool:
        """Whether the number will stay."""
        return len(self._choices) == 1 or len(self._medians) == len(self._choices)

    def observe(self) -> bool:
        """An iteration has ended; returns whether `value` has changed. Collective where it comes to a decision."""
        now = time.perf_counter()
        if self._last is not None and not self.is_settled:
            self._seconds.append(now - self._last)
        self._last = now
        if len(self._seconds) < SETTLING + COUNTED:
            return False
        self._medians.append(statistics.median(self._seconds[SETTLING:]))
        self._seconds = []
        before = self.value
        if self.is_settled:
            slowest = self._world.allreduce(np.array(self._medians), "max")
            self.value = self._choices[int(slowest.argmin())]
        else:
            self.value = self._choices[len(self._medians)]
        return self.value != before
