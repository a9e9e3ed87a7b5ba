"""A trace of all ranks as one file in Chrome's trace format, which ui.perfetto.dev and chrome://tracing open. Pure.

A rank is a process there, a track a thread; times are microseconds of rank 0's clock since the first span. Perfetto
takes a thread 0 for the process's main thread, whose number is the process's: so main threads have their rank's
number, and no two threads of the file the same one.

Viewers take spans of a track apart where one ends after what it lies in, or after the next one has begun, if only by a
rounding error. So begins and ends, not lengths, are rounded, to eighths of a microsecond: these, their sums and their
nanoseconds are exact, whether a reader keeps them in decimal, in binary or as whole nanoseconds.

Source: Trace Event Format, complete events (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Span = tuple[str, str, float, float]

_PART = 4096
"""Events that are written together."""

_MAIN = "main thread"


@dataclasses.dataclass(frozen=True)
class Clock:
    """A rank's clock beside rank 0's: its offset at two of its own times; in between it drifts evenly."""

    began: float = 0.0
    began_offset: float = 0.0
    ended: float = 1.0
    ended_offset: float = 0.0

    def aligned(self, at: float) -> float:
        """Rank 0's time at this rank's."""
        share = (at - self.began) / (self.ended - self.began) if self.ended > self.began else 0.0
        return at - (self.began_offset + share * (self.ended_offset - self.began_offset))


@dataclasses.dataclass(frozen=True)
class RankTrace:
    """What one rank recorded."""

    name: str
    clock: Clock
    spans: Sequence[Span]


def write_trace(path: Path, ranks: Sequence[RankTrace], facts: dict[str, Any]) -> None:
    """Write the file, or replace it.

    Args:
        path: of the file.
        ranks: in their order.
        facts: about the run, for who reads the file.

    Raises:
        OSError: it cannot be written; what was there is gone.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps(facts) + ', "traceEvents": [\n')
        part, is_first = [], True
        for event in events(ranks):
            part.append(json.dumps(event))
            if len(part) == _PART:
                file.write(("" if is_first else ",\n") + ",\n".join(part))
                part, is_first = [], False
        file.write(("" if is_first or not part else ",\n") + ",\n".join(part) + "\n]}\n")


def events(ranks: Sequence[RankTrace]) -> Iterator[dict[str, Any]]:
    """The trace's events: names of processes and threads, then the spans, each track's in their order."""
    zero = min((each.clock.aligned(span[2]) for each in ranks for span in each.spans), default=0.0)
    free = itertools.count(len(ranks))
    for rank, each in enumerate(ranks):
        yield _named("process_name", rank, rank, each.name)
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        # The main thread first, the others by name.
        tracks = sorted({track for track, *_ in each.spans}, key=lambda track: (track != _MAIN, track))
        threads = {track: rank if track == _MAIN else next(free) for track in tracks}
        for place, (track, number) in enumerate(threads.items()):
            yield _named("thread_name", rank, number, track)
            yield {
                "ph": "M", "name": "thread_sort_index", "pid": rank, "tid": number, "args": {"sort_index": place},
            }  # fmt: skip
        placed = [
            (_eighths(each.clock.aligned(began) - zero), _eighths(each.clock.aligned(ended) - zero), track, name)
            for track, name, began, ended in sorted(each.spans, key=lambda span: (span[2], -span[3]))
        ]
        # Of two that begin together the longer one is outside.
        for start, end, track, name in sorted(placed, key=lambda span: (span[0], -span[1])):
            yield {
                "ph": "X", "name": name, "cat": track, "pid": rank, "tid": threads[track],
                "ts": start / 8, "dur": (end - start) / 8,
            }  # fmt: skip


def _eighths(seconds: float) -> int:
    """In eighths of a microsecond, rounded."""
    return round(8e6 * seconds)


def _named(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}}
