"""Who computes how many partitions, so that all ranks end an iteration together. Pure; used by the coordinator.

What is known: after every group each rank reports its seconds of work per sample (`pace.py`), and the phases say what
adding up rows costs. What is decided: contiguous ranges of partitions, rank by rank and so node by node.

1. *estimate*: a rank's seconds per sample, and how far they may be wrong, from its last three groups (`pace.py`).
2. *propose*: the numbers of partitions that let the slowest rank end first; then cuts are moved where the tree needs
   fewer rows for it, as long as the slowest rank takes hardly longer. Even ranges are preferred where they are as good.
3. *decide*: move only if the predicted gain is more than `SMALLEST_GAIN` of the time, and more than `NUM_SIGMAS` times
   what the estimates are uncertain by. The next move is decided when a group has run with the last one. Who goes back
   to where it came from may do so at once; but with every return the next move waits twice as long, until none was
   made for a while, so that a disturbance that comes and goes is not run after.

Each rank keeps at least one partition, so its speed stays known, and it gets its share back when it is fast again.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from mpidl.parameters import Assignment
from mpidl.scheduling.pace import Estimates, Float64Array

SMALLEST_GAIN = 0.03
"""Of an iteration's time; less is not worth a move."""

NUM_SIGMAS = 3.0
"""Standard errors that a gain must exceed: with 16 ranks, one in some hundreds of estimates is off by as much."""

LONGEST_HOLD = 64
"""Groups between two moves, at most; as many without one let the returns be forgotten."""

_SLACK = (0.0, 0.02, 0.05, 0.1)
"""Shares of an iteration's time that are given up for fewer rows, to see whether it pays."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What an assignment's iteration takes, in seconds, as far as it depends on the assignment."""

    partition_s: tuple[float, ...]
    """Of one partition, on each rank."""
    node_of: tuple[int, ...]
    """Each rank's node, ascending."""
    row_s: float = 0.0
    """Of each row that a node's ranks add up."""
    sent_row_s: float = 0.0
    """Of each row that a node sends to the others; 0 where there is one node only."""

    def busiest(self, assignment: Assignment) -> int:
        """The rank that ends last."""
        return int(np.argmax(np.diff(assignment.starts) * np.array(self.partition_s)))

    def seconds(self, assignment: Assignment) -> float:
        """Of one iteration."""
        rank = self.busiest(assignment)
        return self._work(assignment, rank) + self._rows(assignment)

    def _work(self, assignment: Assignment, rank: int) -> float:
        start, stop = assignment.range_of(rank)
        return (stop - start) * self.partition_s[rank]

    def _rows(self, assignment: Assignment) -> float:
        return self.row_s * most_rows(assignment, self.node_of) + self.sent_row_s * most_sent(assignment, self.node_of)


@dataclasses.dataclass(frozen=True)
class Move:
    """A decision: from one assignment to another, and why."""

    before: Assignment
    after: Assignment
    rank: int
    """The most remarkable: whose share changes, and whose speed differs."""
    speed: float
    """Of that rank, with the median of the others as 1."""
    gain: float
    """Predicted share of an iteration's time that is saved."""


class Balancer:
    """Learns the ranks' speeds and moves partitions.

    Args:
        assignment: the one that the run begins with; it is what "even" means.
        node_of: each rank's node, ascending.
    """

    def __init__(self, assignment: Assignment, node_of: tuple[int, ...]) -> None:
        self.assignment = assignment
        """The one for the plans to come."""
        self.estimates = Estimates(len(node_of))
        """Of the ranks' speeds."""
        self._even = self._left = assignment
        self._node_of = node_of
        self._num_returns = self._num_calm = 0
        self._most_rows: tuple[int, ...] | None = None

    def observe(
        self,
        ran: Assignment,
        paces: Float64Array,
        *,
        samples: float = 1.0,
        local_sum_s: float = 0.0,
        reduce_scatter_s: float = 0.0,
    ) -> Move | None:
        """Learn from a group's reports; returns the move that is to be made, if any: `assignment` is it already.

        Args:
            ran: the assignment that the group ran with.
            paces: float64, (ranks, 3): PACE_FIELDS of each rank.
            samples: of a partition.
            local_sum_s: measured seconds of an iteration for adding up rows.
            reduce_scatter_s: and for sending them, as far as it was not hidden behind computing.
        """
        self.estimates.learn(paces)
        self._num_calm += 1
        if self._num_calm >= LONGEST_HOLD:
            self._num_returns = 0
        is_held = self._num_returns > 0 and self._num_calm < min(2**self._num_returns, LONGEST_HOLD)
        if ran != self.assignment or is_held or not self.estimates.are_complete:
            return None
        costs = Costs(
            tuple((samples * self.estimates.seconds_per_sample).tolist()),
            self._node_of,
            local_sum_s / most_rows(ran, self._node_of),
            reduce_scatter_s / most_sent(ran, self._node_of),
        )
        fewest = cut(best_counts(costs.partition_s, ran.num_partitions))
        if not self._is_worth(fewest, dataclasses.replace(costs, row_s=0.0, sent_row_s=0.0)):
            return None  # soon known, and so it is nearly always
        proposed = self._propose(fewest, costs)
        return self._move(proposed, costs) if self._is_worth(proposed, costs) else None

    def confine(self, ran: Assignment) -> None:
        """What was decided did not fit into memory, and `ran` stays: never need more rows than it does."""
        self.assignment = ran
        self._most_rows = tuple(map(ran.num_slots, range(len(self._node_of))))

    def _propose(self, fewest: Assignment, costs: Costs) -> Assignment:
        """Phase 2, from the assignment of least work for the slowest rank."""
        found = [self.assignment, self._even]
        for slack in _SLACK:
            longest_s = (1 + slack) * max(n * s for n, s in zip(np.diff(fewest.starts), costs.partition_s, strict=True))
            found.append(_with_fewer_rows(fewest, costs, longest_s))
        found = [each for each in found if self._fits(each)]
        best_s = min(map(costs.seconds, found))
        if self._even in found and costs.seconds(self._even) <= 1.01 * best_s:
            return self._even
        return min(found, key=costs.seconds)

    def _fits(self, assignment: Assignment) -> bool:
        most = self._most_rows
        return most is None or all(assignment.num_slots(rank) <= rows for rank, rows in enumerate(most))

    def _is_worth(self, proposed: Assignment, costs: Costs) -> bool:
        """Phase 3."""
        now_s, then_s = costs.seconds(self.assignment), costs.seconds(proposed)
        errors = self.estimates.errors
        error_s = math.hypot(
            *(costs.seconds(each) * errors[costs.busiest(each)] for each in (self.assignment, proposed))
        )
        return now_s - then_s > max(SMALLEST_GAIN * now_s, NUM_SIGMAS * error_s)

    def _move(self, proposed: Assignment, costs: Costs) -> Move:
        before, self.assignment = self.assignment, proposed
        self._num_returns += proposed == self._left
        self._left, self._num_calm = before, 0
        seconds = self.estimates.seconds_per_sample
        changes = np.log(np.diff(proposed.starts) / np.diff(before.starts))
        rank = int((np.abs(changes) + np.abs(np.log(seconds / np.median(seconds)))).argmax())
        others = float(np.median(np.delete(seconds, rank)))
        gain = 1 - costs.seconds(proposed) / costs.seconds(before)
        return Move(before, proposed, rank, others / float(seconds[rank]), gain)


def most_rows(assignment: Assignment, node_of: Sequence[int]) -> int:
    """Rows that the ranks of a node add up, on the node with the most."""
    rows = [0] * (node_of[-1] + 1)
    for rank, node in enumerate(node_of):
        rows[node] += len(assignment.rows_of(rank))
    return max(rows)


def most_sent(assignment: Assignment, node_of: Sequence[int]) -> int:
    """Rows that a node sends, of the node that sends most."""
    return max(assignment.rows_sent(node_of, node) for node in range(node_of[-1] + 1))


def best_counts(partition_s: Sequence[float], num_partitions: int) -> list[int]:
    """How many partitions each rank computes, at least one, so that the rank that takes longest takes least."""
    shares = num_partitions / np.array(partition_s) / np.sum(1 / np.array(partition_s))
    counts = [max(1, int(share)) for share in shares]  # none of them ends later than the best
    if sum(counts) > num_partitions:
        counts = [1] * len(partition_s)
    ends = [((counts[rank] + 1) * seconds, rank) for rank, seconds in enumerate(partition_s)]
    heapq.heapify(ends)
    for _ in range(num_partitions - sum(counts)):
        _, rank = ends[0]
        counts[rank] += 1
        heapq.heapreplace(ends, ((counts[rank] + 1) * partition_s[rank], rank))
    return counts


def cut(counts: Sequence[int]) -> Assignment:
    """So many partitions for each rank, one rank after the other."""
    starts = (0, *itertools.accumulate(counts))
    return Assignment(starts[-1], starts)


def _with_fewer_rows(assignment: Assignment, costs: Costs, longest_s: float) -> Assignment:
    """Move one cut after the other to where fewest rows are needed, while no rank takes longer than `longest_s`."""
    most = [max(1, math.floor(longest_s / seconds * (1 + 1e-9))) for seconds in costs.partition_s]
    starts = list(assignment.starts)
    for rank in range(1, len(starts) - 1):
        first, last = starts[rank - 1], starts[rank + 1]
        places = range(max(first + 1, last - most[rank]), min(last - 1, first + most[rank - 1]) + 1)
        here = starts[rank]
        starts[rank] = min(places, key=_row_cost(starts, rank, costs), default=here)
    return Assignment(assignment.num_partitions, tuple(starts))


def _row_cost(starts: Sequence[int], rank: int, costs: Costs) -> Callable[[int], tuple[float, int]]:
    """Of the place where `rank` begins: what the rows of both sides cost; then how far it is from where it was."""

    def cost(place: int) -> tuple[float, int]:
        tried = Assignment(starts[-1], (*starts[:rank], place, *starts[rank + 1 :]))
        rows = costs.row_s * (len(tried.rows_of(rank - 1)) + len(tried.rows_of(rank)))
        if costs.node_of[rank - 1] != costs.node_of[rank]:
            rows += costs.sent_row_s * sum(tried.rows_sent(costs.node_of, costs.node_of[r]) for r in (rank - 1, rank))
        return rows, abs(place - starts[rank])

    return cost
