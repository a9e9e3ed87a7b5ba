"""Which ranks are slow for good: pure; used on rank 0, which has every rank's report of every group.

A rank is slow in a group if it takes SLOW times the others' median time of work per sample. It is a straggler if it was
slow in most of the groups of the last OVER_S seconds, and none any more if it was in few. One slow group, a neighbour's
short job or a page cache that fills says nothing.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from numpy.typing import NDArray

SLOW = 1.2
OVER_S = 60.0
FEWEST_GROUPS = 10
MOST, FEW = 0.8, 0.2
"""Shares of the groups from which on a rank is a straggler, and up to which it is none any more."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A rank has become a straggler, or is none any more."""

    rank: int
    is_slow: bool
    ratio: float
    """Its time per sample by the others' median, the median of the groups looked back on."""


class Stragglers:
    """Looks back on groups.

    Args:
        num_ranks: of the run.
    """

    def __init__(self, num_ranks: int) -> None:
        self._known = np.zeros(num_ranks, bool)
        self._slow = np.zeros(num_ranks, int)
        """In how many of the groups looked back on each was slow."""
        self._groups: collections.deque[tuple[float, NDArray[np.float64]]] = collections.deque()
        self._total_s = 0.0

    def observe(self, seconds_per_sample: NDArray[np.float64], seconds: float) -> list[Change]:
        """Learn from a group; returns what has become known by it.

        Args:
            seconds_per_sample: float64, (ranks,); not a number where a rank has measured nothing.
            seconds: that the group took.
        """
        self._look_at(seconds_per_sample, seconds)
        if self._total_s < OVER_S or len(self._groups) < FEWEST_GROUPS:
            return []
        share = self._slow / len(self._groups)
        now = np.where(self._known, share > FEW, share >= MOST)
        changed, self._known = np.flatnonzero(now != self._known), now
        return [Change(rank, bool(now[rank]), self._ratio(rank)) for rank in changed.tolist()]

    def _look_at(self, seconds_per_sample: NDArray[np.float64], seconds: float) -> None:
        ratios = by_the_others(seconds_per_sample)
        self._groups.append((seconds, ratios))
        self._slow += ratios >= SLOW
        self._total_s += seconds
        while len(self._groups) > FEWEST_GROUPS and self._total_s - self._groups[0][0] >= OVER_S:
            oldest_s, oldest = self._groups.popleft()
            self._total_s -= oldest_s
            self._slow -= oldest >= SLOW

    def _ratio(self, rank: int) -> float:
        return float(np.nanmedian([ratios[rank] for _, ratios in self._groups]))


def by_the_others(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each rank's number by the median of the others'; not a number where one of the two is unknown."""
    found = np.full(len(seconds), np.nan)
    (known,) = np.nonzero(np.isfinite(seconds))
    if known.size < 2:
        return found
    ascending = np.sort(seconds[known])
    place = np.argsort(np.argsort(seconds[known], kind="stable"), kind="stable")
    low, high = (known.size - 2) // 2, (known.size - 1) // 2  # the middle of what is left without one
    middle = (ascending[low + (place <= low)] + ascending[high + (place <= high)]) / 2
    found[known] = seconds[known] / middle
    return found
