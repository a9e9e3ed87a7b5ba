"""The budget of an iteration: what has not started when it is spent is dropped. Pure; used by the coordinator.

A rank always computes its first partition. Before each other one it looks at the clock: if the budget, in seconds from
when the iteration began on this rank, is spent, this partition and the rest of its own are dropped. They add zeros and
weigh nothing, so the gradient is the mean over what was computed, and their losses count nowhere. Every rank sees in
the counters who dropped what before anything is updated; where that is more than the stated share of the iteration's
partitions, all ranks repeat the iteration without a budget. The first iteration of a run, which compiles and allocates
and waits for loaders to start, has none either.

The budget is given, or learned from the first iterations, in which nothing is dropped: for each of them the smallest
one is found that would have dropped no more than the share, and `_KEPT` of them must be satisfied. (BigDL's
`dropPercentage` takes one quantile over the tasks of all warm-up iterations; then about every second iteration would
exceed the share, and be repeated.)

Source: BigDL's DistriOptimizer, "drop percentage" (dropPercentage, warmupIterationNum).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_KEPT = 0.95


def most_dropped(share: float, num_partitions: int) -> int:
    """How many of an iteration's partitions may be dropped."""
    return int(share * num_partitions + 1e-9)


class DropBudget:
    """The budget over the course of a run; kept by the coordinator.

    Args:
        share: of an iteration's partitions that may be dropped.
        budget_s: seconds; None: learned.
        warmup: iterations to learn from, after the first of the run.
    """

    def __init__(self, share: float, budget_s: float | None, warmup: int) -> None:
        self._share = share
        self._num_left = 0 if budget_s is not None else warmup
        self._is_first = True
        self._budgets: list[float] = []
        self.value = budget_s or 0.0
        """Seconds; 0: nothing is dropped yet."""

    def observe(self, started: NDArray[np.float64]) -> None:
        """Learn from an iteration in which nothing was dropped.

        Args:
            started: float64, (partitions,): seconds from the iteration's begin on its rank to each partition's.
        """
        is_first, self._is_first = self._is_first, False
        if is_first or not self._num_left:
            return
        self._num_left -= 1
        self._budgets.append(float(np.sort(started)[-1 - most_dropped(self._share, started.size)]))
        if not self._num_left:
            self.value = float(np.quantile(self._budgets, _KEPT))
