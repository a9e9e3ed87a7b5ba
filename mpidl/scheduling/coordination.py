"""What coordination costs: rank 0's time for plans and reports, of each group and of the whole run.

It is the time in which rank 0 does nothing but control: it builds a plan, starts and completes its broadcast, gathers
the report and records it. A group's last iteration ends in a wait for all ranks, so the gather behind it waits for no
rank that computes; that wait is in the iteration's time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Coordination:
    """Adds up this rank's control time; rank 0's counts."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._since_report_s = self._coordination_s = self._iterations_s = 0.0
        self._sizes: list[int] = []

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of the block."""
        self._began = time.perf_counter()
        try:
            yield
        finally:
            self._lap()
            self._began = None

    def _lap(self) -> None:
        """Add up what has passed of a block."""
        if self._began is not None:
            now = time.perf_counter()
            self._since_report_s, self._began = self._since_report_s + now - self._began, now

    def end_group(self, iterations: int, seconds: float) -> float:
        """Take what was counted since the last call; what follows in the same block counts for the next group.

        Args:
            iterations: of the group.
            seconds: that they took.

        Returns:
            Seconds of coordination.
        """
        self._lap()
        taken, self._since_report_s = self._since_report_s, 0.0
        self._coordination_s += taken
        self._iterations_s += seconds
        self._sizes.append(iterations)
        return taken

    def describe(self) -> dict[str, Any]:
        """Fields of the "end" event: what groups there were, and the share of coordination in their time."""
        total_s = self._coordination_s + self._iterations_s
        return {
            "groups": len(self._sizes),
            "group_sizes": [min(self._sizes), max(self._sizes)] if self._sizes else [],
            "coordination_s": self._coordination_s,
            "coordination_share": self._coordination_s / total_s if total_s else 0.0,
        }
