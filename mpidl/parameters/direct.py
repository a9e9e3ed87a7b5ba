"""The exchange on one node: the ranks read each other's rows in shared memory, and nothing travels.

One iteration: 1. *collect*: a node barrier says that all rows and counters are complete; 2. each rank adds up all rows
of the node over its own shard, slice by slice, and updates it in the node's one copy of the weights; 3. a node
barrier says that all shards are updated. Nobody reads weights, and nobody writes rows, between the two barriers; but
where something needs the whole gradient before the update, each rank leaves the sum over its own shard in its own first
row, where it alone reads this part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.assignment import Assignment, RowPlan, row_plan
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Bucket, Exchange
from mpidl.parameters.layout import Slice, blocks_of
from mpidl.parameters.team import Team
from mpidl.runtime import Pending


class Direct:
    """The exchange of one vector inside a node; what `Pipeline` is to several.

    Args:
        exchange: of gradients and weights, without sums.
        changes: of the changes of the model's buffers.
        counters: of the partitions.
        slices: this rank's shard.
        team: of those who add up.
        keeps_gradient: whether the gradient of the whole shard is wanted at once, instead of one slice's after another.
    """

    def __init__(
        self,
        exchange: Exchange,
        changes: Exchange,
        counters: Counters,
        slices: Sequence[Slice],
        team: Team,
        *,
        keeps_gradient: bool,
    ) -> None:
        self.exchange = exchange
        self.changes = changes
        # Used again for slice after slice, it stays in cache, and no gradient is ever written to memory.
        self._gradient = np.zeros(max((each.size for each in slices), default=0), np.float32)
        self._whole: NDArray[np.float32] | None = None
        """The row in which the gradient is left, over this rank's shard; None: one slice's after another."""
        if keeps_gradient:
            self.keep_gradient()
        self.buckets = [exchange.whole()]
        self.order = self.buckets
        self._counters = counters
        self._team = team
        self._plan: RowPlan | None = None

    def set_changes(self, changes: Exchange) -> None:
        """Exchange these from now on."""
        self.changes = changes

    def begin(self, assignment: Assignment) -> bool:
        """Nothing is announced here, so every iteration is new."""
        return True

    def announce(self, index: int) -> None:
        """Nothing is announced here."""

    def forget(self) -> None:
        """Nothing is rounded here."""

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
        mean_of_node(self.exchange, self._plan, piece, divisor, self.own_gradient(piece), squares, self._team)

    def keep_gradient(self) -> None:
        """Keep the whole shard's gradient; what `own_gradient` gave before is not used any more."""
        self._gradient = np.empty(0, np.float32)
        self._whole = self.exchange.rows[0]

    def own_gradient(self, piece: Slice) -> NDArray[np.float32]:
        """Where `mean` leaves a slice's gradient."""
        return self._gradient[: piece.size] if self._whole is None else self._whole[piece.start : piece.stop]

    @property
    def exchange_bytes(self) -> dict[str, int]:
        """What the summed gradient takes beside the rows."""
        return {"summed gradient": self._gradient.nbytes}

    def own_weights(self, piece: Slice) -> NDArray[np.float32]:
        """Where the optimizer updates a slice of this rank's shard."""
        return self.exchange.result[piece.start : piece.stop]

    def take_weights(self) -> None:
        """There are no others than the node's copy."""

    def begin_publishing(self, *, weights_only: bool = False) -> None:
        """Nothing is published here."""

    def publish(self, bucket: Bucket) -> None:
        """The update has written where everyone reads."""

    def publish_changes(self, assignment: Assignment, divisor: float) -> None:
        """Write the mean of the changes over this rank's shard."""
        plan = row_plan(assignment, self.exchange.world.node_of, self.exchange.world.rank)
        for piece in self.changes.pieces(self.changes.whole(), self.exchange.world.rank):
            out, unused = self.changes.result[piece.start : piece.stop], np.empty(-(-piece.size // kernels.BLOCK_SIZE))
            mean_of_node(self.changes, plan, piece, divisor, out, unused, self._team)

    def end_publishing(self) -> None:
        """Nothing is under way."""

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """The node barrier at the end of `Synchronizer.synchronize` is all there is to wait for."""

    def complete(self, pending: Pending) -> None:
        """Wait for a collective of the main thread's."""
        pending.wait()

    def close(self) -> None:
        """Nothing is left to end."""


def mean_of_node(
    exchange: Exchange,
    plan: RowPlan,
    piece: Slice,
    divisor: float,
    out: NDArray[np.float32],
    squares: NDArray[np.float64],
    team: Team,
) -> None:
    """Add up the rows of the one node there is over a slice of this rank's shard, and divide, into `out`."""
    addresses = np.array(exchange.addresses([plan.local[i] for i in plan.total.rows], piece.start), dtype=np.int64)

    def mean(thread: int, index: int, start: int, stop: int) -> None:
        blocks = blocks_of((start, stop), kernels.BLOCK_SIZE)
        own_squares = squares[blocks.start : blocks.stop]
        kernels.mean_rows(addresses + 4 * start, plan.total.steps, divisor, out[start:stop], own_squares)

    team.run([piece.size], mean)
