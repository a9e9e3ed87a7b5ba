"""`--trace N`: what all ranks did in N iterations, in one file.

Which iterations they are follows from the settings alone, so all ranks know without a word: the first ones, which
compile and fill caches, are left out where the training is long enough.

1. *begin*: before the first of them, clocks are compared (`runtime/clocks.py`), and recording is switched on.
2. *record*: each rank appends to a list of its own (`runtime/spans.py`); no message is sent.
3. *end*: after the last one, or the training's: recording is switched off, clocks are compared once more, the lists are
   gathered on rank 0, which aligns their times and writes the file. All wait for that; it is in no iteration's time.

If a rank stops, others wait in 1 or 3 as in any collective, until the job is ended. A training that ends by an error
leaves no trace. A file that cannot be written is a warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl.runtime import World, clocks
from mpidl.telemetry.trace_file import Clock, RankTrace, write_trace

FILE_NAME = "trace.json"

WARM_UP = 5
"""Iterations that are left out at the beginning."""


class Tracing:
    """The trace of one training. All methods are collective.

    Args:
        num_iterations: to record; 0: none.
        first: iterations that are done when the training begins.
        total: and when it ends.
        world: all ranks.
        run_dir: gets the file.
        record: takes an event and its fields; rank 0's counts.
    """

    def __init__(
        self,
        num_iterations: int,
        first: int,
        total: int,
        world: World,
        run_dir: Path | None,
        record: Callable[..., None],
    ) -> None:
        self._stop = min(first + WARM_UP + num_iterations, total)
        self._first = max(first, self._stop - num_iterations) if num_iterations else -1
        self._world = world.for_purpose("trace")
        self._run_dir = run_dir
        self._record = record
        self._began = 0.0
        self._offsets: NDArray[np.float64] = np.zeros((0, 2))

    def is_due(self, iteration: int) -> bool:
        """Whether `begin` or `end` is due, after so many iterations."""
        return iteration == (self._stop if self._world.activity.spans.is_on else self._first)

    def turn(self, iteration: int) -> None:
        """Begin, or end, where that is due; the weights have to be complete."""
        if self._world.activity.spans.is_on:
            self.end(iteration)
        else:
            self._begin()

    def _begin(self) -> None:
        self._offsets = clocks.offsets(self._world)
        self._began = time.perf_counter()
        self._world.barrier()
        self._world.activity.spans.begin()

    def end(self, iteration: int) -> None:
        """Write the file, if a trace is being taken."""
        if not self._world.activity.spans.is_on:
            return
        spans = self._world.activity.spans.end()
        offsets, ended = clocks.offsets(self._world), time.perf_counter()
        gathered = self._world.gather_object((self._began, ended, spans))
        if gathered is not None and self._run_dir is not None:
            self._write(self._run_dir / FILE_NAME, gathered, offsets, iteration)
        self._first = -1  # one is enough

    def _write(self, path: Path, gathered: list[Any], offsets: NDArray[np.float64], iteration: int) -> None:
        ranks = [
            RankTrace(
                f"rank {rank} ({self._world.hostnames[rank]})",
                Clock(began, float(self._offsets[rank, 0]), ended, float(offsets[rank, 0])),
                spans,
            )
            for rank, (began, ended, spans) in enumerate(gathered)
        ]
        error_s = float(max(self._offsets[:, 1].max(), offsets[:, 1].max()))
        facts = {"first_iteration": self._first + 1, "last_iteration": iteration, "clock_error_us": 1e6 * error_s}
        try:
            write_trace(path, ranks, facts)
        except OSError as error:
            self._record("warning", message=f"{path} cannot be written ({error.strerror}); the run goes on without it")
            return
        clock = f"; clocks agree to {1e6 * error_s:.0f} us" if error_s else ""
        message = f"trace of iterations {self._first + 1} to {iteration}: {path}, for ui.perfetto.dev{clock}"
        self._record("trace", iteration=iteration, path=str(path), clock_error_s=error_s, message=message)
