"""How a run stands, as its events tell it: the same for who trains and for who reads its metrics. Pure."""

from __future__ import annotations

import collections
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]

_RATE_OVER_S = 60.0
"""The time left is judged by what was done in so many seconds, and in two groups at least."""


class Status:
    """Takes events as they come, or as `metrics.jsonl` has them; what is not known yet is None or empty."""

    def __init__(self) -> None:
        self.start: Fields = {}
        self.group: Fields = {}
        self.validation: Fields = {}
        self.checkpoint: Fields = {}
        self.end: Fields = {}
        self.lost: Sequence[Fields] = ()
        """Ranks that were lost, without which the run goes on."""
        self.note = ""
        """The last thing that was told in words."""
        self.counts: list[int] = []
        """Partitions of each rank."""
        self.iteration = 0
        self.started_at = self.at = 0.0
        """Of the run, and of the last event; seconds since the epoch."""
        self._marks: collections.deque[tuple[float, int]] = collections.deque()

    def apply(self, event: str, fields: Fields, at: float) -> None:
        """Learn from an event.

        Args:
            event: its name; unknown ones count as a sign of life.
            fields: its content.
            at: when it was; seconds since the epoch.
        """
        self.at = at
        if event == "start" and fields.get("goes_on"):
            self._go_on(fields, at)
        elif event == "start":
            vars(self).update(vars(Status()))  # a run that is resumed begins anew
            self.start, self.iteration = fields, int(fields.get("first_iteration", 0))
            self.started_at = self.at = at
            self.counts = [stop - start for start, stop in fields.get("partition_ranges", ())]
            self._marks.append((at, self.iteration))
        elif event == "group":
            self.group = fields
            if "partition_starts" in fields:
                self.counts = [stop - start for start, stop in itertools.pairwise(fields["partition_starts"])]
            self._reach(int(fields["iteration"]), at)
        elif event in ("validation", "checkpoint", "end"):
            setattr(self, event, fields)
        if fields.get("message"):
            self.note = str(fields["message"])

    def _go_on(self, fields: Fields, at: float) -> None:
        """Others carry the run on, from an iteration that may have been reached before; the rest stays."""
        self.start, self.lost, self.group = fields, fields["lost"], {}
        self.iteration, self.started_at = int(fields["first_iteration"]), at - float(fields["elapsed_s"])
        self.counts = [stop - start for start, stop in fields["partition_ranges"]]
        self._marks.clear()
        self._marks.append((at, self.iteration))

    def _reach(self, iteration: int, at: float) -> None:
        self.iteration = iteration
        self._marks.append((at, iteration))
        while len(self._marks) > 2 and self._marks[0][0] < at - _RATE_OVER_S:
            self._marks.popleft()

    @property
    def epoch(self) -> int:
        """The one that the run is in, from 1."""
        per_epoch = max(int(self.start.get("iterations_per_epoch", 1)), 1)
        return min(self.iteration // per_epoch + 1, max(self.epochs, 1))

    @property
    def epochs(self) -> int:
        """Of the whole training."""
        return int(self.start.get("epochs", 0))

    @property
    def total_iterations(self) -> int:
        """Of the whole training."""
        return int(self.start.get("total_iterations", 0))

    def seconds_left(self, now: float) -> float | None:
        """Until the last iteration, with validations and checkpoints as often as lately; None: unknown."""
        (began, first), (ended, last) = (self._marks[0], self._marks[-1]) if self._marks else ((0.0, 0), (0.0, 0))
        if last <= first:
            return None
        whole = (self.total_iterations - last) * (ended - began) / (last - first)
        return max(whole - (now - ended), 0.0)

    def samples_at(self, iteration: int) -> int:
        """Of the training set, that so many iterations of the training go over; those of every epoch count again."""
        train_samples, per_epoch = int(self.start["train_samples"]), int(self.start["iterations_per_epoch"])
        epochs, more = divmod(iteration, max(per_epoch, 1))
        return epochs * train_samples + more * int(self.start["batch_size"])

    @property
    def paces(self) -> list[float]:
        """Each rank's seconds of work per sample by the median of all; not a number where nothing was measured."""
        return relative(self.group.get("seconds_per_sample", ()))

    @property
    def slowest(self) -> tuple[int, float] | None:
        """The rank with the most work per sample, and that by the median of all; None: unknown."""
        known = [(pace, -rank) for rank, pace in enumerate(self.paces) if not math.isnan(pace)]
        if not known:
            return None
        pace, rank = max(known)
        return -rank, pace

    def name_of(self, rank: int) -> str:
        """`rank 3 (node07)`."""
        places = self.start.get("places", ())
        return f"rank {rank} ({places[rank]['host']})" if rank < len(places) else f"rank {rank}"


def relative(seconds: Sequence[float | str]) -> list[float]:
    """Numbers by their median; those that are not finite (also as texts) stay NaN."""
    numbers = [float(each) for each in seconds]
    known = [each for each in numbers if math.isfinite(each) and each > 0]
    middle = statistics.median(known) if known else math.nan
    return [each / middle if math.isfinite(each) and each > 0 else math.nan for each in numbers]
