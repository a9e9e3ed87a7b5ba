"""Numbers over iterations, from a run's groups. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpidl.report_page.runs import Group, Run

Float64Array = NDArray[np.float64]

MOST_POINTS = 400
"""Of a curve or along a heat map: more than can be told apart."""

ON_TIME = 1.1
"""A rank that takes at most so many times the median rank's time is not called slow."""


def bins(groups: Sequence[Group], most: int = MOST_POINTS) -> list[Sequence[Group]]:
    """Neighbours together, so that there are at most `most`; launches on other ranks apart.

    Args:
        groups: in the order of their iterations.
        most: bins, but for one more where the number of ranks changes.
    """
    size = -(-len(groups) // most) or 1
    found: list[list[Group]] = []
    for group in groups:
        if not found or len(found[-1]) == size or len(found[-1][0].counts) != len(group.counts):
            found.append([])
        found[-1].append(group)
    return list(found)


def ends(binned: Sequence[Sequence[Group]]) -> Float64Array:
    """Iterations that are done at each bin's end: float64, (bins,)."""
    return np.array([groups[-1].iteration for groups in binned], float)


def edges(binned: Sequence[Sequence[Group]]) -> Float64Array:
    """The iteration before the first bin, and each bin's end: float64, (bins + 1,)."""
    first = binned[0][0]
    return np.concatenate([[first.iteration - first.iterations], ends(binned)])


def losses(binned: Sequence[Sequence[Group]]) -> Float64Array:
    """The mean loss of each bin, weighed by samples: float64, (bins,)."""
    return np.array([_mean([g.loss for g in groups], [g.samples for g in groups]) for groups in binned])


def throughputs(binned: Sequence[Sequence[Group]]) -> Float64Array:
    """Samples per second of iterating, without validations and checkpoints: float64, (bins,)."""
    return np.array([sum(g.samples for g in groups) / sum(g.seconds for g in groups) for groups in binned])


def phases(binned: Sequence[Sequence[Group]]) -> dict[str, Float64Array]:
    """Seconds of an iteration by phase, and "other" for the rest of it: each float64, (bins,)."""
    names = list(dict.fromkeys(name for groups in binned for group in groups for name in group.phases))
    iterations = np.array([sum(g.iterations for g in groups) for groups in binned], float)
    found = {
        name: np.array([sum(g.phases.get(name, 0.0) for g in groups) for groups in binned]) / iterations
        for name in names
    }
    whole = np.array([sum(g.seconds for g in groups) for groups in binned]) / iterations
    found["other"] = np.maximum(whole - sum(found.values(), np.zeros(len(binned))), 0.0)
    return {name: values for name, values in found.items() if values.any()}


def paces(binned: Sequence[Sequence[Group]]) -> Float64Array:
    """Seconds of work per sample: float64, (ranks, bins); not a number where a rank measured nothing."""
    table = np.full((most_ranks(binned), len(binned)), np.nan)
    for column, groups in enumerate(binned):
        rows = [group.seconds_per_sample for group in groups if group.seconds_per_sample]
        if rows:
            table[: len(rows[0]), column] = [_median(values) for values in zip(*rows, strict=True)]
    return table


def counts(binned: Sequence[Sequence[Group]]) -> Float64Array:
    """Partitions of each rank in a bin's last group: float64, (ranks, bins); not a number for absent ranks."""
    table = np.full((most_ranks(binned), len(binned)), np.nan)
    for column, groups in enumerate(binned):
        table[: len(groups[-1].counts), column] = groups[-1].counts
    return table


def most_ranks(binned: Sequence[Sequence[Group]]) -> int:
    """The most ranks that any launch had."""
    return max(len(groups[0].counts) for groups in binned)


def times_median(table: Float64Array) -> Float64Array:
    """Each rank's pace by the median rank's: float64, (ranks, bins)."""
    medians = np.array([_median(column) for column in table.T])
    return np.asarray(table / medians, float)


@dataclasses.dataclass(frozen=True)
class RankPace:
    """How fast a rank of the last launch was."""

    rank: int
    seconds_per_sample: float
    """Median over groups."""
    times_median: float
    """By the median rank's."""
    share_slowest: float
    """Of the groups in which it was the slowest."""
    counts: tuple[int, int]
    """Partitions in the first and the last group."""

    @property
    def is_slow(self) -> bool:
        """Whether others wait for it."""
        return self.times_median > ON_TIME


def rank_paces(run: Run) -> list[RankPace]:
    """The last launch's ranks; empty where nothing was measured."""
    ranks = int(run.start["ranks"])
    first = int(run.start.get("first_iteration", 0))
    groups = [group for group in run.groups if group.iteration > first and len(group.seconds_per_sample) == ranks]
    table = np.array([group.seconds_per_sample for group in groups]).reshape(-1, ranks)
    measured = table[~np.isnan(table).any(axis=1)]
    if not len(measured):
        return []
    medians = np.median(measured, axis=0)
    slowest = np.bincount(measured.argmax(axis=1), minlength=ranks) / len(measured)
    typical = float(np.median(medians))
    return [
        RankPace(rank, pace, pace / typical, share, (groups[0].counts[rank], groups[-1].counts[rank]))
        for rank, (pace, share) in enumerate(zip(medians.tolist(), slowest.tolist(), strict=True))
    ]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return float(np.average(values, weights=weights))


def _median(values: Sequence[float] | Float64Array) -> float:
    """Of those that are numbers; not a number where none is."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(np.median(known)) if known.size else float("nan")
