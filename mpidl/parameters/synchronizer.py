"""One iteration's synchronisation: rows of all ranks in, updated weights in every node's copy.

One iteration, in phases (the same words stand in `Synchronizer.synchronize`):

1. *compute*: each rank runs its partitions; autograd adds into the rank's rows (`rows.py`).
2. *local sum*: after a node barrier every row of the node is complete; ranks merge the rows of their node.
3. *reduce_scatter*: merged rows go to the shards' owners (`reduction.py`), with the partitions' counters.
4. *update*: the owner divides the sum by the samples that ran and lets its optimizer update its shard, in place, in
   the node's one copy of the weights. Nobody reads weights between the two barriers.
5. *allgather*: shards go to the other nodes' copies; a node barrier ends the iteration.

With one node phases 3 and 5 send nothing: two node barriers are all the synchronisation there is. A loss that is not
finite is seen by every rank in phase 3, from the counters, before anything is updated: all raise.

If a rank stops, the others of its node wait in a barrier, those of other nodes in the exchange, until the launcher or
the abort hook ends them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.errors import LayoutError, MpidlError, NonFiniteLossError
from mpidl.parameters import counters as fields
from mpidl.parameters import tree
from mpidl.parameters.assignment import Assignment, RowPlan, row_plan
from mpidl.parameters.buffers import ModelBuffers
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Exchange
from mpidl.parameters.layout import FlatLayout, block_pieces
from mpidl.parameters.reduction import Reduction, Rows
from mpidl.parameters.timing import PhaseTimes
from mpidl.parameters.update import ShardOptimizer
from mpidl.runtime import World, on_all_ranks, share

_INTO_THE_FIRST = np.array([[0, 1]], dtype=np.int64)


class Synchronizer:
    """The memory of one model on all ranks, and the exchange over it. Construction is collective.

    Args:
        world: all ranks.
        layout: of the trainable parameters.
        buffers: of the model.
        assignment: the largest one that `synchronize` will be called with.
        reduction: how rows reach the owners of shards.

    Raises:
        SharedMemoryError: on every rank: there is no room.
    """

    def __init__(
        self, world: World, layout: FlatLayout, buffers: ModelBuffers, assignment: Assignment, reduction: Reduction
    ) -> None:
        self.world = world
        slots = assignment.num_slots(world.rank)
        self.gradients = Exchange(world, layout.size, slots)
        """Rows of gradients in, weights out."""
        self.changes = Exchange(world, buffers.layout.size, slots)
        """Rows of weighted changes of buffers in, their mean out."""
        self.counters = Counters(world, assignment.num_partitions)
        start, stop = self.gradients.shard
        self.gradient = np.zeros(stop - start, np.float32)
        """This rank's shard of the mean gradient, float32."""
        self._square_pieces = block_pieces(self.gradients.shards, kernels.BLOCK_SIZE)
        num_blocks = -(-layout.size // kernels.BLOCK_SIZE)
        self.squares = share(world, 8 * num_blocks if world.local_rank == 0 else 0)[0].view(np.float64)
        """Sums of squares of the mean gradient, block by block, float64; the node's one copy."""
        self.times = PhaseTimes()
        self._buffers = buffers
        self._reduce = reduction

    def lay_out_changes(self) -> None:
        """Make the rows of buffers anew, after it has become known which travel. Collective."""
        self.world.node_barrier()
        self.changes = Exchange(self.world, self._buffers.layout.size, self.gradients.num_slots)

    def merge_own_rows(self, assignment: Assignment, partition: int, slot: int) -> None:
        """Add up this rank's newest rows as far as the tree allows, now that `partition` in row `slot` is done."""
        start, _ = assignment.range_of(self.world.rank)
        for merge in range(tree.merges(assignment.num_partitions, start, partition)):
            own = tuple((self.world.local_rank, slot - merge - back) for back in (1, 0))
            for exchange in (self.gradients, self.changes):
                kernels.add_rows(exchange.addresses(own, 0), _INTO_THE_FIRST, exchange.size)

    def synchronize(self, assignment: Assignment, update: ShardOptimizer) -> NDArray[np.float64]:
        """Phases 2 to 5 of an iteration. Collective.

        Args:
            assignment: the same on all ranks; this rank has ended all of its partitions.
            update: this rank's optimizer.

        Returns:
            float64, (num_partitions, 4): loss_sum, weight, samples, flags of every partition.

        Raises:
            NonFiniteLossError, LayoutError: on every rank, before anything was updated.
        """
        world, times = self.world, self.times
        times.start()
        world.node_barrier()
        times.lap("wait")
        self.counters.read_node(world, assignment)
        plan = row_plan(assignment, world.node_of, world.rank)
        rows = self._reduce(self.gradients, assignment, plan, self.counters)
        times.lap("reduce_scatter", of_it_local_sum=rows.local_sum_s)
        table = self.counters.table[: assignment.num_partitions].copy()
        try:
            _check_table(table)
        except MpidlError:
            self._buffers.reset()  # forward has written into them
            world.node_barrier()  # whoever catches this may write counters and rows anew: not before all have read
            raise
        weight = float(table[:, fields.WEIGHT].sum())
        if weight > 0:
            self._sum(rows, weight)
            times.lap("local_sum")
            update.step()
            times.lap("update")
            self.gradients.distribute(self.gradients.result, self.gradients.shards)
            self.gradients.distribute(self.squares, self._square_pieces)
            self._exchange_buffers(assignment, weight, plan)
        world.node_barrier()
        if not weight > 0:
            self._buffers.reset()
        elif self._buffers.advance(self.changes.result):
            self.lay_out_changes()
        times.lap("allgather")
        return table

    def _sum(self, rows: Rows, weight: float) -> None:
        """The mean gradient over this rank's shard."""
        first, last = self._square_pieces[self.world.rank]
        kernels.sum_rows(rows.addresses, rows.additions, weight, self.gradient, self.squares[first:last])

    def _exchange_buffers(self, assignment: Assignment, weight: float, plan: RowPlan) -> None:
        """Phases 2 to 5 for the changes of buffers, whose mean is the result itself."""
        changes = self.changes
        if changes.size == 0:
            return
        rows = self._reduce(changes, assignment, plan, None)
        start, stop = changes.shard
        squares = np.empty(-(-(stop - start) // kernels.BLOCK_SIZE))
        kernels.sum_rows(rows.addresses, rows.additions, weight, changes.result[start:stop], squares)
        changes.distribute(changes.result, changes.shards)


def _check_table(table: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~np.isfinite(table[:, fields.LOSS_SUM]))
    if bad.size:
        raise on_all_ranks(NonFiniteLossError(f"the loss of partition {bad[0]} is {table[bad[0], fields.LOSS_SUM]}"))
    odd = np.flatnonzero(~(np.isfinite(table[:, fields.WEIGHT]) & (table[:, fields.WEIGHT] >= 0)))
    if odd.size:
        raise on_all_ranks(NonFiniteLossError(f"the weight of partition {odd[0]} is {table[odd[0], fields.WEIGHT]}"))
    flags = table[:, fields.FLAGS]
    if flags.min() != flags.max():
        raise on_all_ranks(
            LayoutError(
                f"rank {int(flags.argmax())} called step() without num_samples, rank {int(flags.argmin())} with it; "
                "all ranks must do alike"
            )
        )
