"""The exchange on one node: the ranks read each other's rows in shared memory, and nothing travels.

One iteration: 1. *collect*: a node barrier says that all rows and counters are complete; 2. each rank adds up all rows
of the node over its own shard, slice by slice, and updates it in the node's one copy of the weights; 3. *wait*: a node
barrier says that all shards are updated. Nobody reads weights, and nobody writes rows, between the two barriers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.assignment import Assignment, RowPlan, row_plan
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Bucket, Exchange
from mpidl.parameters.layout import Slice


class Direct:
    """The exchange of one vector inside a node; what `Pipeline` is to several."""

    def __init__(self, exchange: Exchange, counters: Counters) -> None:
        self.exchange = exchange
        self.buckets = exchange.buckets(len(exchange.shards.cells))
        self.order = self.buckets
        self._counters = counters
        self._plan: RowPlan | None = None
        self._is_updating = False

    def begin(self, assignment: Assignment) -> bool:
        """Nothing is announced here, so every iteration is new."""
        return True

    def announce(self, index: int) -> None:
        """Nothing is announced here."""

    def collect(self, assignment: Assignment) -> float:
        """Wait until all rows and counters are complete. Collective."""
        world = self.exchange.world
        world.node_barrier()
        self._counters.read_node(world, assignment)
        self._plan = row_plan(assignment, world.node_of, world.rank)
        return 0.0

    def mean(self, piece: Slice, divisor: float, squares: NDArray[np.float64]) -> None:
        """The mean over a slice of this rank's shard; `squares` as `kernels.mean_rows` has it."""
        assert self._plan is not None, "collect comes first"
        mean_of_node(self.exchange, self._plan, piece, divisor, squares)

    def begin_publishing(self) -> None:
        """The updates of this iteration begin."""
        self._is_updating = True

    def publish(self, bucket: Bucket) -> None:
        """The update has written where everyone reads."""

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Return when all ranks have updated their shards. Collective once an iteration."""
        if self._is_updating:
            self._is_updating = False
            self.exchange.world.node_barrier()

    def close(self) -> None:
        """Nothing is left to end."""


def mean_of_node(exchange: Exchange, plan: RowPlan, piece: Slice, divisor: float, squares: NDArray[np.float64]) -> None:
    """Add up the rows of the one node there is over a slice of this rank's shard, and divide, into its sum."""
    addresses = exchange.addresses([plan.local[i] for i in plan.total.rows], piece.start)
    out = exchange.sum[piece.own]
    kernels.mean_rows(np.array(addresses, dtype=np.int64), plan.total.steps, divisor, out, squares)
