"""Where the time of an iteration goes."""

from __future__ import annotations

import time

from mpidl.runtime.spans import MAIN, Spans

PHASES = ("wait", "local_sum", "reduce_scatter", "update", "allgather")


class PhaseTimes:
    """Seconds by phase. A lap ends a phase: the time since the last lap, or since `start`, is added to it.

    Args:
        spans: get each lap, where a trace is taken.
    """

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin the first phase of an iteration."""
        self._last = time.perf_counter()

    def lap(self, phase: str, *, of_it_local_sum: float = 0.0) -> None:
        """End a phase; `of_it_local_sum` seconds of it were local summation and are counted there."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last - of_it_local_sum
        self.seconds["local_sum"] += of_it_local_sum
        if self._spans.is_on:
            self._spans.add(MAIN, phase, self._last, now)
        self._last = now

    def take(self) -> dict[str, float]:
        """The seconds since the last call, which begin anew."""
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken
