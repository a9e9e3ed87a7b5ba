"""Which rank computes which partitions, and what follows from it for the rows. Pure."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

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


@dataclasses.dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of one iteration as one rank sees them: what its node holds, what other nodes send, how they add up."""

    local: tuple[tuple[int, int], ...]
    """(local rank, slot) of each row on this node, left to right."""
    node_additions: NDArray[np.int64]
    """(k, 2) additions among `local` that merge the node's rows as far as the tree allows."""
    node_rows: tuple[int, ...]
    """Indices into `local` of the rows that are left after `node_additions`: what this node sends."""
    rows_of_node: tuple[int, ...]
    """How many rows each node sends."""
    partitions_of_node: tuple[tuple[int, int], ...]
    """The partitions [start, stop) of each node."""
    order: tuple[int, ...]
    """Order in which (`local` rows, then the other nodes' rows, node by node) stand from left to right."""
    additions: NDArray[np.int64]
    """(k, 2) additions over rows in `order`, ending with the whole sum in row 0."""


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
    local, local_ranges = [], []
    for local_rank in range(firsts[node + 1] - firsts[node]):
        for slot, row in enumerate(tree.cover(total, *assignment.range_of(firsts[node] + local_rank))):
            local.append((local_rank, slot))
            local_ranges.append(row)
    node_pairs, node_rows = tree.additions(total, local_ranges)
    remote = [row for n in range(num_nodes) if n != node for row in tree.cover(total, *spans[n])]
    ranges = local_ranges + remote
    order = sorted(range(len(ranges)), key=ranges.__getitem__)
    pairs, left = tree.additions(total, [ranges[i] for i in order])
    assert left == [0], "the rows of all nodes do not cover the partitions"
    return RowPlan(
        local=tuple(local),
        node_additions=_pairs(node_pairs),
        node_rows=tuple(node_rows),
        rows_of_node=tuple(len(tree.cover(total, *span)) for span in spans),
        partitions_of_node=spans,
        order=tuple(order),
        additions=_pairs(pairs),
    )


def _pairs(pairs: list[tuple[int, int]]) -> NDArray[np.int64]:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
