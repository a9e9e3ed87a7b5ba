"""What this rank did when: spans that are recorded while a trace is taken.

A span is (track, name, begin, end), in seconds of the machine's monotonic clock, which `time.monotonic` and
`time.perf_counter` both read on Linux and macOS, and which all processes of a host share. Those of one track follow
each other or lie inside each other; what goes on beside something else has a track of its own. Whoever records asks
`is_on` first: that is all it costs while no trace is taken. Any thread may record: an append to a list is one step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

Span = tuple[str, str, float, float]

MAIN, CHECKPOINTS, PLANS, READY = "main thread", "checkpoint thread", "plans on their way", "buckets: node barrier"
"""Tracks."""


class Spans:
    """Those of one rank."""

    def __init__(self) -> None:
        self.is_on = False
        self._recorded: list[Span] = []

    def begin(self) -> None:
        """Record from now on."""
        self._recorded = []
        self.is_on = True

    def end(self) -> list[Span]:
        """Record nothing more; returns what was recorded."""
        self.is_on = False
        recorded, self._recorded = self._recorded, []
        return recorded

    def add(self, track: str, name: str, began: float, ended: float) -> None:
        """Record a span that has ended."""
        self._recorded.append((track, name, began, ended))

    @contextlib.contextmanager
    def within(self, track: str, name: str) -> Iterator[None]:
        """Record the block, where a trace is taken as it begins."""
        if not self.is_on:
            yield
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(track, name, began, time.perf_counter())
