"""The exchange between several nodes, bucket by bucket, while the ranks compute.

One iteration, as each rank sees it. The *main thread* computes and updates; the *driver* (`driver.py`: a thread of its
own where MPI allows) makes all MPI calls of the exchange. They talk by flags, each raised once:

1. *announce* (main): a bucket of this rank's rows is complete: every gradient in it has been added for the last time
   (a hook during the last backward, else `collect`). From here on the main thread writes nothing into the bucket.
2. *reduce* (driver), bucket by bucket, in an order that is the same on all ranks: a node barrier says that the bucket
   is complete on the whole node; then `reduction.py` starts its exchange, of which at most `MAX_UNDER_WAY` are under
   way; when one is over, the owner's sum is complete.
3. *collect* (main): writes the counters, announces what is left and waits for all reductions. The last bucket is never
   announced earlier, since the counters ride with it; so its node barrier says that every rank of the node has ended
   its last backward, and nobody reads weights until 5.
4. *update* (main, `synchronizer.py`): each bucket of this rank's shard, in the order in which forward needs it.
5. *publish* (driver), bucket by bucket: shards go to the other nodes' copies; a node barrier says that the bucket is
   complete on this node. A rank may read a bucket's weights from here on, and write its rows once any bucket is
   published: its node's ranks have then all ended their reductions.

Buffers: a message's belongs to MPI from the start of its exchange to its end; nobody else knows it. Sums belong to
their owner from `collect` to the next iteration's first announcement.

*Announced too early.* A bucket is announced when its gradients have been added as often as in the iteration before.
Where one is added once more, or changed, or thrown away afterwards (another graph, a second backward, an exception that
the user caught, `zero_grad`), the rank says so in its counters, every rank sees it, and all reduce once more: the rows
are only read, so nothing is lost but time.

If a rank stops, the others wait in step 2 or 5 until the launcher or the abort hook ends them.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters import publication
from mpidl.parameters.assignment import Assignment, row_plan
from mpidl.parameters.counters import Counters
from mpidl.parameters.driver import Awaited, Condition, Course, Driver, Flag, ThreadDriver
from mpidl.parameters.exchange import Bucket, Exchange
from mpidl.parameters.layout import Slice
from mpidl.parameters.reduction import Job, Lanes, Reduction, Steps
from mpidl.parameters.wire import Wire

MAX_UNDER_WAY = 4
"""Buckets that are exchanged at the same time: enough to keep the wire busy, few enough to cost no memory."""


Start = Generator[Awaited, None, tuple[Steps, Awaited]]


class Pipeline:
    """The exchange of one vector's buckets between nodes. Construction is collective."""

    def __init__(
        self, exchange: Exchange, counters: Counters, reduction: Reduction, wire: Wire, cells_per_bucket: int = 1
    ) -> None:
        self.exchange = exchange
        self.set_bucket_size(cells_per_bucket)
        self._counters = counters
        self._reduction = reduction
        self._wire = wire
        world = exchange.world
        self.masters = np.empty(exchange.sum.size, np.float32) if wire.rounds else None
        """Float32 weights of this rank's shard, where the node's copy holds rounded ones."""
        self._reducing = Lanes(world.duplicate(), world.duplicate())
        self._publishing = Lanes(world.duplicate(), world.duplicate())
        self._driver: Driver | ThreadDriver = ThreadDriver() if world.takes_threads else Driver()
        self._job: Job | None = None
        self._ready: dict[int, Flag] = {}
        self._reduced = Flag()
        self._updated: dict[int, Flag] = {}

    def set_bucket_size(self, num_cells: int) -> None:
        """Make buckets of so many cells, between two iterations and when all weights are published. Collective."""
        self.buckets = self.exchange.buckets(num_cells)
        self._published: dict[int, Flag] = {}
        self.order = list(reversed(self.buckets))
        """In which buckets are reduced: backward ends with the first layers, whose gradients come last."""

    @property
    def gradient_bytes(self) -> int:
        """What the summed gradient takes, and the masters where there are any."""
        return self.exchange.sum.nbytes + (0 if self.masters is None else self.masters.nbytes)

    # --- reduce -----------------------------------------------------------------------------------------------

    def begin(self, assignment: Assignment) -> bool:
        """Make ready for an iteration's announcements; returns whether none was made yet."""
        if self._job is not None:
            if self._job.assignment == assignment:
                return False
            self.collect(self._job.assignment)  # an exception ended that iteration on all ranks; its rows are of no use
        if self._published:
            self.wait([0])  # the first to be published: rows may be written from then on
        world = self.exchange.world
        plan = row_plan(assignment, world.node_of, world.rank)
        self._job = Job(self.exchange, assignment, plan, self._wire, self._reducing)
        self._ready = {bucket.index: Flag() for bucket in self.buckets}
        self._reduced = Flag()
        self._driver.add(*self._two_stage(self.order, self._start_reduction, self._end_reduction, self._reduced))
        return True

    def announce(self, index: int) -> None:
        """Say that a bucket of this rank's rows is complete; the last bucket waits for `collect`."""
        if index != self.order[-1].index:
            self._driver.say(self._ready[index])

    def collect(self, assignment: Assignment) -> float:
        """Wait until the sums over this rank's shard and the counters are complete. Collective.

        Returns:
            Seconds that adding rows up took.
        """
        self.begin(assignment)
        for flag in self._ready.values():
            self._driver.say(flag)
        self._driver.wait(self._reduced)
        assert self._job is not None
        job, self._job = self._job, None
        return job.local_sum_s

    def _start_reduction(self, bucket: Bucket) -> Start:
        """Up to where the bucket's messages are under way; returns what is left to do, and what it waits for."""
        assert self._job is not None
        job = self._job
        yield self._ready[bucket.index]
        yield self._reducing.start.start_node_barrier()
        is_last = bucket is self.order[-1]
        if is_last:
            self._counters.read_node(self.exchange.world, job.assignment)
        steps = self._reduction(job, bucket, self._counters if is_last else None)
        return steps, next(steps)

    def _end_reduction(self, bucket: Bucket, steps: Steps) -> Course:
        yield from steps

    # --- update -----------------------------------------------------------------------------------------------

    def mean(self, piece: Slice, divisor: float, squares: NDArray[np.float64]) -> None:
        """Turn the sum over a slice of this rank's shard into the mean; `squares` as `kernels.mean_rows` has it."""
        kernels.divide(self.own_gradient(piece), divisor, squares)

    def own_gradient(self, piece: Slice) -> NDArray[np.float32]:
        """Where `mean` leaves a slice's gradient."""
        return self.exchange.sum[piece.own]

    # --- publish ----------------------------------------------------------------------------------------------

    def begin_publishing(self) -> None:
        """Make ready for an iteration's updated buckets."""
        self.wait()
        self._updated = {bucket.index: Flag() for bucket in self.buckets}
        self._published = {bucket.index: Flag() for bucket in self.buckets}
        self._driver.add(*self._two_stage(self.order[::-1], self._start_publishing, self._end_publishing, Flag()))

    def publish(self, bucket: Bucket) -> None:
        """Say that this rank's shard of a bucket's weights is updated."""
        self._driver.say(self._updated[bucket.index])

    def end_publishing(self) -> None:
        """The driver goes on with it; see `wait`."""

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Return when the weights of these buckets (default: of all) are complete on this node."""
        for index in list(self._published) if indices is None else indices:
            flag = self._published.get(index)  # none where nothing was updated yet
            if flag is not None and not flag.is_over():
                self._driver.wait(flag)

    def own_weights(self, piece: Slice) -> NDArray[np.float32]:
        """Where the optimizer updates a slice of this rank's shard: in the node's copy, or in the masters."""
        if self.masters is None:
            return self.exchange.result[piece.start : piece.stop]
        return self.masters[piece.own]

    def take_weights(self) -> None:
        """Make the node's copy the masters. Not collective."""
        if self.masters is not None:
            for piece in self.exchange.shards.slices(self.exchange.world.rank, max(self.exchange.size, 1)):
                self.masters[piece.own] = self.exchange.result[piece.start : piece.stop]

    def _publication(self, bucket: Bucket) -> Steps:
        lane = self._publishing.start
        if self.masters is None:
            return publication.exact(self.exchange, lane, bucket)
        return publication.rounded(self.exchange, lane, bucket, self._wire, self.masters)

    def _start_publishing(self, bucket: Bucket) -> Start:
        yield self._updated[bucket.index]
        steps = self._publication(bucket)
        return steps, next(steps)

    def _end_publishing(self, bucket: Bucket, steps: Steps) -> Course:
        yield from steps
        yield self._publishing.end.start_node_barrier()
        self._published[bucket.index].raise_flag()

    def close(self) -> None:
        """End the thread. Collective."""
        if self._job is not None:  # an exception left the iteration unfinished; the ranks end it alike
            self.collect(self._job.assignment)
        self.wait()
        self._driver.close()
        for lanes in (self._reducing, self._publishing):
            lanes.start.free()
            lanes.end.free()

    # --- both -------------------------------------------------------------------------------------------------

    def _two_stage(
        self,
        buckets: list[Bucket],
        start: Callable[[Bucket], Start],
        end: Callable[[Bucket, Steps], Course],
        done: Flag,
    ) -> tuple[Course, Course]:
        """Two courses: one starts bucket after bucket, the other ends them in the same order."""
        under_way: collections.deque[tuple[Bucket, Steps, Awaited]] = collections.deque()

        def starting() -> Course:
            for bucket in buckets:
                yield Condition(lambda: len(under_way) < MAX_UNDER_WAY)
                steps, awaited = yield from start(bucket)
                under_way.append((bucket, steps, awaited))

        def ending() -> Course:
            for _ in buckets:
                yield Condition(lambda: bool(under_way))
                bucket, steps, awaited = under_way[0]
                yield awaited
                yield from end(bucket, steps)
                under_way.popleft()
            done.raise_flag()

        return starting(), ending()
