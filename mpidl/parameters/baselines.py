"""The ways that the parameter manager replaces, as real strategies to select and to measure against.

Every rank stands for itself: no node shares memory, each holds its own weights. One iteration:

1. *collect*: each rank adds its rows up into one, then
   - `driver`: all gradients go to rank 0, which adds them in rank order (Spark's reduce);
   - `tree`: MPI_Reduce to rank 0, over several levels (Spark's treeAggregate);
   - `allreduce`: MPI_Allreduce, to everyone (Horovod, DistributedDataParallel).
   An allgather brings every partition's counters to all.
2. *update*: rank 0, with the whole optimizer; with `allreduce` every rank, each with a whole optimizer of its own.
3. *publish*: rank 0 broadcasts the weights; with `allreduce` nothing is left to do. The changes of the model's buffers
   are exchanged as `reduction.py` has it, the squares of the gradient by an allgather.

The sums' order is that of ranks or of the MPI library: not bit-stable. If a rank stops, the others wait in a
collective until the job is ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.assignment import Assignment, row_plan
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Bucket, Exchange, Float32Array
from mpidl.parameters.layout import Shards, Slice
from mpidl.parameters.reduction import Job, Lanes, Steps, ordered
from mpidl.parameters.scratch import Scratch
from mpidl.parameters.team import Team
from mpidl.parameters.wire import WIRES
from mpidl.runtime import Pending, World

BASELINES = ("driver", "tree", "allreduce")


def shards_for(strategy: str, size: int, world_size: int) -> Shards:
    """Rank 0 owns everything; with `allreduce` every rank does."""
    whole, nothing = ((0, size),), ((0, 0),)
    is_owner = [strategy == "allreduce" or rank == 0 for rank in range(world_size)]
    return Shards(whole, tuple(whole if owns else nothing for owns in is_owner))


class Baseline:
    """The exchange of one vector between ranks that share nothing; what `Pipeline` is to the parameter manager."""

    def __init__(
        self,
        exchange: Exchange,
        changes: Exchange,
        counters: Counters,
        strategy: str,
        share_squares: Callable[[World], Steps] | None,
    ) -> None:
        self.exchange = exchange
        self.changes = changes
        self.buckets = exchange.buckets(1)
        self.order = self.buckets
        self._counters = counters
        self._strategy = strategy
        self._share_squares = share_squares
        self._weights_only = False
        self._total = np.empty(exchange.size, np.float32)

    def set_changes(self, changes: Exchange) -> None:
        """Exchange these from now on."""
        self.changes = changes

    @property
    def exchange_bytes(self) -> dict[str, int]:
        """What the gradient takes in one row and summed."""
        return {"summed gradient": self._total.nbytes + self.exchange.sum.nbytes}

    def begin(self, assignment: Assignment) -> bool:
        """Nothing is announced here, so every iteration is new."""
        return True

    def announce(self, index: int) -> None:
        """Nothing is announced here."""

    def forget(self) -> None:
        """Nothing is rounded here."""

    def collect(self, assignment: Assignment) -> float:
        """Bring the sum over all ranks to those that update, and the counters to all. Collective."""
        world = self.exchange.world
        self._add_own_rows(assignment)
        self._counters.read_node(world, assignment)
        if self._strategy == "allreduce":
            world.start_allreduce(self._total, self.exchange.sum).wait()
        elif self._strategy == "tree":
            world.start_reduce(self._total, self.exchange.sum).wait()
        else:
            self._gather()
        for pending in self._counters.allgather(world, assignment):
            pending.wait()
        return 0.0

    def _add_own_rows(self, assignment: Assignment) -> None:
        world = self.exchange.world
        plan = row_plan(assignment, world.node_of, world.rank)
        self._total.fill(0)
        for addends in plan.sent:
            addresses = self.exchange.addresses([plan.local[i] for i in addends.rows], 0)
            part = np.empty_like(self._total)
            kernels.add_rows(np.array(addresses, dtype=np.int64), addends.steps, part)
            self._total += part

    def _gather(self) -> None:
        """All gradients at rank 0 at once, as many as there are ranks: what limits this strategy."""
        gathered = self.exchange.world.gather(self._total)
        if gathered is not None:
            np.sum(gathered, axis=0, out=self.exchange.sum)

    def mean(self, piece: Slice, divisor: float, squares: NDArray[np.float64]) -> None:
        """Turn the sum over a slice into the mean; `squares` as `kernels.mean_rows` has it."""
        kernels.divide(self.own_gradient(piece), divisor, squares)

    def own_gradient(self, piece: Slice) -> NDArray[np.float32]:
        """Where `mean` leaves a slice's gradient."""
        return self.exchange.sum[piece.own]

    def own_weights(self, piece: Slice) -> Float32Array:
        """Where the optimizer updates a slice."""
        return self.exchange.result[piece.start : piece.stop]

    def take_weights(self) -> None:
        """There are no others than this rank's copy."""

    def begin_publishing(self, *, weights_only: bool = False) -> None:
        """Weights are published all at once."""
        self._weights_only = weights_only

    def publish(self, bucket: Bucket) -> None:
        """Weights are published all at once."""

    def publish_changes(self, assignment: Assignment, divisor: float) -> None:
        """Bring the mean of the changes to all. Collective."""
        if not self.changes.size:
            return
        world = self.exchange.world
        plan = row_plan(assignment, world.node_of, world.rank)
        job = Job(self.changes, assignment, plan, WIRES["float32"], Lanes(world, world), Scratch(), Team())
        for pending in ordered(job, self.changes.whole(), None):
            pending.wait()
        self.changes.divide_sum(divisor)
        self.changes.spread()

    def end_publishing(self) -> None:
        """Bring rank 0's weights, and the gradient's squares, to all. Collective."""
        if self._strategy == "allreduce":
            return
        world = self.exchange.world
        world.broadcast(self.exchange.result)
        if self._share_squares is not None and not self._weights_only:
            for pending in self._share_squares(world):
                pending.wait()

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Nothing is under way."""

    def complete(self, pending: Pending) -> None:
        """Wait for a collective of the main thread's."""
        pending.wait()

    def close(self) -> None:
        """Nothing is left to end."""
