"""One iteration's synchronisation: rows of all ranks in, updated weights in every node's copy.

One iteration, in phases (the same words stand in `Synchronizer.synchronize`):

1. *compute*: each rank runs its partitions; autograd adds into the rank's rows (`rows.py`).
2. *collect*: the rows of all ranks are added up in the tree's order for the shards' owners, and with them come the
   partitions' counters: on one node (`direct.py`) a barrier is all it takes, as the owner reads the rows where they
   are; between nodes (`pipeline.py`) the exchange has been going on since the first bucket was complete.
3. *update*: the owner divides the sum by the samples that ran and lets its optimizer update its shard, slice by slice,
   in place, in the node's one copy of the weights. Nobody reads weights until:
4. *publish*: shards go to the other nodes' copies. `wait` returns when the weights are complete.

A loss that is not finite is seen by every rank in phase 2, from the counters, before anything is updated: all raise.

If a rank stops, the others of its node wait in a barrier, those of other nodes in the exchange, until the launcher or
the abort hook ends them.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.errors import MpidlError, NonFiniteLossError
from mpidl.parameters import counters as fields
from mpidl.parameters import tree
from mpidl.parameters.assignment import Assignment
from mpidl.parameters.baselines import BASELINES, Baseline, shards_for
from mpidl.parameters.buffers import ModelBuffers
from mpidl.parameters.clipping import Clipping
from mpidl.parameters.counters import Counters, check_dropped, check_table
from mpidl.parameters.direct import Direct
from mpidl.parameters.exchange import Bucket, Exchange, Float32Array
from mpidl.parameters.layout import FlatLayout, Shards
from mpidl.parameters.pipeline import CHANGES, SQUARES, Pipeline
from mpidl.parameters.reduction import REDUCTIONS
from mpidl.parameters.squares import Squares
from mpidl.parameters.team import Helpers, Team
from mpidl.parameters.timing import PhaseTimes
from mpidl.parameters.update import ShardOptimizer
from mpidl.parameters.wire import Wire
from mpidl.runtime import World, activity, on_all_ranks

STRATEGIES = (*REDUCTIONS, *BASELINES)
"""The parameter manager's two reductions, and what it is measured against."""

SLICE_SIZE = 256 * kernels.BLOCK_SIZE
"""Elements that a thread adds up and updates at a time: their gradient stays in cache in between (4 MiB)."""


class Synchronizer:
    """The memory of one model on all ranks, and the exchange over it. Construction is collective.

    Args:
        world: all ranks.
        layout: of the trainable parameters.
        buffers: of the model.
        assignment: rows are made for it, and counters for its partitions; `reserve` makes more rows for others.
        reduction: one of STRATEGIES: how gradients reach those who update, and who that is.
        wire: what travels between nodes.
        clipping: of the mean gradient.
        by_slices: whether the optimizer may be called for one slice after another.
        error_feedback: whether what a wire's rounding takes from a gradient is added to the next one.

    Raises:
        SharedMemoryError: on every rank: there is no room.
    """

    def __init__(
        self,
        world: World,
        layout: FlatLayout,
        buffers: ModelBuffers,
        assignment: Assignment,
        reduction: str,
        wire: Wire,
        clipping: Clipping,
        *,
        by_slices: bool,
        error_feedback: bool = False,
    ) -> None:
        self.world = world
        is_direct = world.num_nodes == 1 and reduction not in BASELINES
        self.moves_keep_bits = is_direct or (reduction == "ordered" and not wire.rounds)
        """Whether results are the same to the last bit whoever computes which partition."""
        self._slots = slots_of(assignment, world.size)
        slots = self._slots[world.rank]
        shards = _shards(world, layout.size, reduction)
        self.gradients = Exchange(world, layout.size, slots, shards, with_sums=not is_direct)
        """Rows of gradients in, weights out."""
        changes = Exchange(world, buffers.layout.size, slots)
        self.counters = Counters(world, assignment.num_partitions)
        self._squares = Squares(world, self.gradients.shards, layout.size)
        self.slices = self.gradients.shards.slices(world.rank, SLICE_SIZE * world.threads_per_rank)
        """This rank's shard, in the pieces that are updated at a time."""
        self.times = PhaseTimes(world.activity.spans)
        self._buffers = buffers
        self._clipping = clipping
        self._by_slices = by_slices
        self._helpers = Helpers(world.threads_per_rank - 1)
        self._team = Team(self._helpers)
        share_squares = self._squares.share if clipping.norm is None else None  # else they are before the update
        self.route: Direct | Pipeline | Baseline
        if reduction in BASELINES:
            self.route = Baseline(self.gradients, changes, self.counters, reduction, share_squares)
        elif is_direct:
            keeps_gradient = clipping.norm is not None or not by_slices
            self.route = Direct(
                self.gradients, changes, self.counters, self.slices, self._team, keeps_gradient=keeps_gradient
            )
        else:
            self.route = Pipeline(
                self.gradients, changes, self.counters, REDUCTIONS[reduction], wire, self._team, share_squares,
                error_feedback=error_feedback,
            )  # fmt: skip

    @property
    def changes(self) -> Exchange:
        """Rows of weighted changes of buffers in, their mean out."""
        return self.route.changes

    def lay_out_changes(self) -> None:
        """Make the rows of buffers anew, after it has become known which travel. Collective."""
        self.world.node_barrier()
        self.route.set_changes(Exchange(self.world, self._buffers.layout.size, self.gradients.num_slots))

    def reserve(self, assignment: Assignment) -> None:
        """Have rows enough for an assignment of the same partitions, for good. Collective; nothing is sent if they are.

        What every rank has follows from the assignments, so all know whether some rank needs more.

        Raises:
            SharedMemoryError: on every rank: there is no room; the rows that there are stay.
        """
        slots = [max(pair) for pair in zip(self._slots, slots_of(assignment, self.world.size), strict=True)]
        if slots == self._slots:
            return
        for exchange in (self.gradients, self.changes):
            exchange.grow(slots[self.world.rank])
        self._slots = slots

    def merge_own_rows(self, assignment: Assignment, partition: int, slot: int) -> None:
        """Add up this rank's newest rows as far as the tree allows, now that `partition` in row `slot` is done.

        After the last partition nothing is: the exchange reads all rows at once.
        """
        start, stop = assignment.range_of(self.world.rank)
        if partition == stop - 1:
            return
        for merge in range(tree.merges(assignment.num_partitions, start, partition)):
            for exchange in (self.gradients, self.changes):
                self._add(exchange.rows[slot - merge - 1], exchange.rows[slot - merge])

    def _add(self, into: Float32Array, other: Float32Array) -> None:
        self._team.run([into.size], lambda _, __, a, b: np.add(into[a:b], other[a:b], out=into[a:b]))

    def synchronize(
        self, assignment: Assignment, update: ShardOptimizer, most_dropped: int | None = None
    ) -> NDArray[np.float64]:
        """Phases 2 to 4 of an iteration, but for the end of 4, which is `wait`. Collective.

        Args:
            assignment: the same on all ranks; this rank has ended all of its partitions.
            update: this rank's optimizer.
            most_dropped: how many partitions may have been dropped.

        Returns:
            float64, (num_partitions, 6): `counters.FIELDS` of every partition.

        Raises:
            NonFiniteLossError, LayoutError, TooManyDroppedError: on every rank, before anything was updated.
        """
        self.times.start()
        self.world.activity.enter(activity.REDUCE_SCATTER)
        table = self._collect(assignment, most_dropped)
        self.world.activity.enter(activity.UPDATE)
        self.route.wait()  # what is left of the last iteration; nobody computes with it any more
        self.times.lap("allgather")
        weight = float(table[:, fields.WEIGHT].sum())
        if weight > 0:
            if self._by_slices and update.has_hooks:
                self._stop_slicing(update)
            if self._clipping.norm is None and self._by_slices:
                self._update_in_cache(update, assignment, weight)
            else:
                self._update(update, assignment, weight)
        self.route.complete(self.world.start_node_barrier())
        if not weight > 0:
            self._buffers.reset()
            self.route.forget()
        elif self._buffers.advance(self.changes.result):
            self.lay_out_changes()
        self.times.lap("allgather")
        self.world.activity.end_iteration()
        return table

    def norm(self) -> float:
        """The L2 norm of the last iteration's mean gradient over all parameters."""
        self.route.wait([SQUARES])
        return self._squares.norm()

    def wait(self, indices: Iterable[int]) -> None:
        """Return when the weights of these buckets are complete on this node. Not collective."""
        self.times.start()
        with self.world.activity.within(activity.ALLGATHER):
            self.route.wait(indices)
        self.times.lap("allgather")

    def publish_all(self) -> None:
        """Bring every rank's shard of the weights to all nodes. Collective."""
        self.route.begin_publishing(weights_only=True)
        self.route.end_publishing()
        self.world.node_barrier()
        self.route.wait()

    def _collect(self, assignment: Assignment, most_dropped: int | None) -> NDArray[np.float64]:
        """Phase 2; returns the counters of all partitions."""
        local_sum_s = self.route.collect(assignment)
        table = self.counters.table[: assignment.num_partitions].copy()
        if np.any(table[:, fields.FLAGS].astype(int) & fields.TOO_EARLY):
            self.route.forget()
            local_sum_s += self.route.collect(assignment)
        self.times.lap("wait" if isinstance(self.route, Direct) else "reduce_scatter", of_it_local_sum=local_sum_s)
        with self._nothing_updated():
            check_table(table)
            check_dropped(table, most_dropped)
        return table

    @contextlib.contextmanager
    def _nothing_updated(self) -> Iterator[None]:
        """Let an error of all ranks end the iteration as if it had not begun."""
        try:
            yield
        except MpidlError:
            self._buffers.reset()  # forward has written into them
            self.route.forget()
            self.world.node_barrier()  # whoever catches this may write counters and rows anew: not before all have read
            raise

    def _stop_slicing(self, update: ShardOptimizer) -> None:
        """From now on the optimizer's step, and its hooks, see the whole shard at once."""
        self._by_slices = False
        if isinstance(self.route, Direct):
            self.route.keep_gradient()
            update.set_gradients([self.route.own_gradient(each) for each in self.slices])

    def _update_in_cache(self, update: ShardOptimizer, assignment: Assignment, weight: float) -> None:
        """Phase 3 run by run of slices: each is added up, or divided, and updated before the next; bucket by bucket."""
        with self._publishing(assignment, weight) as publish, update.updating():
            if not self.slices:
                update.step(0, 0)  # torch's schedulers want to see a step
            for bucket in reversed(self.route.order):
                for first, last in self._runs_in(bucket):
                    for index in range(first, last):
                        self._mean(index, weight)
                    update.step(first, last)
                publish(bucket)

    def _update(self, update: ShardOptimizer, assignment: Assignment, weight: float) -> None:
        """Phase 3 where something needs the whole gradient first."""
        for index in range(len(self.slices)):
            self._mean(index, weight)
        factor = 1.0 if self._clipping.norm is None else self._clipping.factor(self._norm_before_update())
        with self._publishing(assignment, weight), update.updating():
            if factor != 1.0:
                for each in self.slices:
                    self.route.own_gradient(each)[:] *= np.float32(factor)
            update.step(0, len(self.slices))

    def _norm_before_update(self) -> float:
        world = self.world
        world.node_barrier()
        if world.num_nodes > 1 and not self.gradients.shards.is_replicated:
            for pending in self._squares.share(world):
                pending.wait()
        world.node_barrier()
        norm = self._squares.norm()
        with self._nothing_updated():
            if not math.isfinite(norm):
                raise on_all_ranks(NonFiniteLossError(f"the norm of the gradient is {norm}"))
        return norm

    @contextlib.contextmanager
    def _publishing(self, assignment: Assignment, weight: float) -> Iterator[Callable[[Bucket], None]]:
        """Publish the changes first, and at the block's end all that was not published inside.

        Also what an exception of the optimizer's has left: who catches it may go on, or close.
        """
        self.route.begin_publishing()
        self.route.publish_changes(assignment, weight)
        self.route.wait([CHANGES])  # weights would get in front of what is short and wanted now
        self.times.lap("allgather")
        try:
            yield self.route.publish
        except BaseException:
            self.route.end_publishing()
            # Others of the node may still read rows and write weights. Between nodes the driver knows when they are
            # done; a barrier there would wait for ranks that wait for this one in the next collective.
            if isinstance(self.route, Direct):
                self.world.node_barrier()  # in place of the iteration's last one
            else:
                self.route.wait()
            raise
        self.times.lap("update")
        self.route.end_publishing()

    def _runs_in(self, bucket: Bucket) -> Iterator[tuple[int, int]]:
        """The slices of this rank's shard that a bucket has, in runs [first, last) of not much more than SLICE_SIZE."""
        first, stop = (bisect.bisect_left(self.slices, cut, key=lambda each: each.start) for cut in bucket.span)
        size = 0
        for index in range(first, stop):
            size += self.slices[index].size
            if size >= SLICE_SIZE or index == stop - 1 or isinstance(self.route, Direct):
                yield first, index + 1
                first, size = index + 1, 0

    def _mean(self, index: int, weight: float) -> None:
        each = self.slices[index]
        squares = self._squares.of(each)
        self.times.lap("update")
        self.route.mean(each, weight, squares)
        self._clipping.clip_values(self.route.own_gradient(each), squares)
        self.times.lap("local_sum")

    def close(self) -> None:
        """End what goes on in the background. Collective."""
        self.route.close()
        self._helpers.close()

    def abandon(self) -> None:
        """End what this rank does in the background; messages were given up. Not collective."""
        self._helpers.close()


def slots_of(assignment: Assignment, world_size: int) -> list[int]:
    """Rows that each rank needs."""
    return [assignment.num_slots(rank) for rank in range(world_size)]


def _shards(world: World, size: int, reduction: str) -> Shards:
    if reduction in BASELINES:
        return shards_for(reduction, size, world.size)
    return Shards.of(size, world.size, kernels.BLOCK_SIZE, num_cells=1 if world.num_nodes == 1 else None)
