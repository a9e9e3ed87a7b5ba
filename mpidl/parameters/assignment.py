"""Which rank computes which partitions, and what follows from it for the rows. Pure."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters import tree


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The contiguous range of partitions of every rank, in rank order."""

    num_partitions: int
    starts: tuple[int, ...]
    """(world_size + 1,): rank r computes partitions [starts[r], starts[r + 1])."""

    @classmethod
    def even(cls, num_partitions: int, world_size: int) -> Assignment:
        """Ranges as equal as possible; ranks hold nothing only when there are fewer partitions than ranks."""
        return cls(num_partitions, tuple(num_partitions * rank // world_size for rank in range(world_size + 1)))

    def range_of(self, rank: int) -> tuple[int, int]:
        """The partitions [start, stop) of a rank."""
        return self.starts[rank], self.starts[rank + 1]

    def num_slots(self, rank: int) -> int:
        """Rows that a rank needs while it computes its partitions in order."""
        return tree.num_slots(self.num_partitions, *self.range_of(rank))

    def rows_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The tree nodes in a rank's rows, slot by slot, when it has ended its last partition.

        The last partition's row stands by itself: the exchange adds it to the others in the same pass as the other
        ranks' rows.
        """
        start, stop = self.range_of(rank)
        if start == stop:
            return ()
        return (*tree.cover(self.num_partitions, start, stop - 1), (stop - 1, stop))

    def rows_sent(self, node_of: Sequence[int], node: int) -> int:
        """Rows that a node sends to each other one, its ranks' being added up as far as the tree allows.

        Args:
            node_of: each rank's node, ascending.
            node: which one.
        """
        first, last = bisect.bisect_left(node_of, node), bisect.bisect_right(node_of, node)
        return len(tree.cover(self.num_partitions, self.starts[first], self.starts[last]))


@dataclasses.dataclass(frozen=True, eq=False)
class Addends:
    """Rows that are added up into one, and the steps for `mpidl.kernels`."""

    rows: tuple[int, ...]
    """Indices of the rows."""
    steps: NDArray[np.int64]
    """(num_steps, 2 + kernels.MAX_OPERANDS)."""

    @classmethod
    def of_all(cls, num_rows: int) -> Addends:
        """As many rows as there are partitions."""
        (whole,) = tree.sums(num_rows, [(row, row + 1) for row in range(num_rows)])
        return cls.of(whole)

    @classmethod
    def of(cls, row_sum: tree.RowSum) -> Addends:
        """With the steps as the kernels take them."""
        steps = np.zeros((len(row_sum.steps), 2 + kernels.MAX_OPERANDS), np.int64)
        for line, step in zip(steps, row_sum.steps, strict=True):
            line[: len(step)] = step
        return cls(row_sum.rows, steps)


@dataclasses.dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of one iteration as one rank sees them: what its node holds, what other nodes send, how they add up."""

    local: tuple[tuple[int, int], ...]
    """(local rank, slot) of each row on this node, left to right."""
    sent: tuple[Addends, ...]
    """What this node sends: its rows added up as far as the tree allows; indices into `local`."""
    rows_of_node: tuple[int, ...]
    """How many rows each node sends."""
    partitions_of_node: tuple[tuple[int, int], ...]
    """The partitions [start, stop) of each node."""
    total: Addends
    """The whole sum; indices into `local`, followed by the rows of the other nodes, node by node."""


@functools.lru_cache(maxsize=256)
def row_plan(assignment: Assignment, node_of: tuple[int, ...], rank: int) -> RowPlan:
    """Work out the rows of an iteration.

    Args:
        assignment: who computes what.
        node_of: each rank's node, ascending.
        rank: whose view it is.
    """
    total = assignment.num_partitions
    node, num_nodes = node_of[rank], node_of[-1] + 1
    firsts = [node_of.index(n) for n in range(num_nodes)] + [len(node_of)]
    spans = tuple((assignment.starts[firsts[n]], assignment.starts[firsts[n + 1]]) for n in range(num_nodes))
    local, ranges = [], []
    for local_rank in range(firsts[node + 1] - firsts[node]):
        for slot, row in enumerate(assignment.rows_of(firsts[node] + local_rank)):
            local.append((local_rank, slot))
            ranges.append(row)
    remote = [row for n in range(num_nodes) if n != node for row in tree.cover(total, *spans[n])]
    whole = tree.sums(total, ranges + remote)
    assert len(whole) == 1, "the rows of all nodes do not cover the partitions"
    return RowPlan(
        local=tuple(local),
        sent=tuple(Addends.of(each) for each in tree.sums(total, ranges)),
        rows_of_node=tuple(len(tree.cover(total, *span)) for span in spans),
        partitions_of_node=spans,
        total=Addends.of(whole[0]),
    )
