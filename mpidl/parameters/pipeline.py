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
   its last backward, and nobody reads weights until 5. The changes of the model's buffers, a vector of their own, are
   reduced as one bucket before it.
4. *update* (main, `synchronizer.py`): the mean of the changes, then each bucket of this rank's shard, in the order in
   which forward needs it, then a node barrier: its ranks have all ended their reductions, and rows may be written.
5. *publish* (driver): first the changes, for which the main thread waits before it updates, then the weights bucket by
   bucket, at last the squares: each goes from its owners to the other nodes' copies; a node barrier says that it is
   complete on this node. A rank may read a bucket's weights from here on.

Buffers: a message's is borrowed (`scratch.py`) from before its exchange to its end; only the driver knows it. Sums
belong to their owner from `collect` to the next iteration's first announcement.

*Announced too early.* A bucket is announced when its gradients have been added as often as in the iteration before.
Where one is added once more, or changed, or thrown away afterwards (another graph, a second backward, an exception that
the user caught, `zero_grad`), the rank says so in its counters, every rank sees it, and all reduce once more: the rows
are only read, so nothing is lost but time.

If a rank stops, the others wait in step 2 or 5 until the launcher or the abort hook ends them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters import publication
from mpidl.parameters.assignment import Assignment, row_plan
from mpidl.parameters.counters import Counters
from mpidl.parameters.driver import Awaited, Course, Driver, Flag, ThreadDriver
from mpidl.parameters.errands import MAX_UNDER_WAY, Errand, two_stage
from mpidl.parameters.exchange import Bucket, Exchange
from mpidl.parameters.feedback import ErrorFeedback
from mpidl.parameters.layout import Slice
from mpidl.parameters.reduction import Job, Lanes, Reduction, Steps
from mpidl.parameters.scratch import Scratch
from mpidl.parameters.team import Team
from mpidl.parameters.wire import WIRES, Wire
from mpidl.runtime import Pending, World
from mpidl.runtime.spans import READY

CHANGES, SQUARES = -1, -2
"""What is exchanged beside the buckets, by numbers like theirs."""

_REDUCING, _PUBLISHING = ("local sum", "reduce-scatter", "addition"), ("start", "allgather", "node barrier")

Share = Callable[[World], Steps]
"""Brings something from its owners to all nodes, by a lane."""


class Pipeline:
    """The exchange of gradients and weights, and of what goes with them, between nodes. Construction is collective.

    Args:
        exchange: of gradients and weights.
        changes: of the changes of the model's buffers.
        counters: of the partitions.
        reduction: how sums reach their owners.
        wire: what travels.
        team: of those who add up and convert.
        share_squares: brings the squares of all shards to all nodes; None where somebody else does.
        error_feedback: whether what rounding takes from a gradient is added to the next one.
    """

    def __init__(
        self,
        exchange: Exchange,
        changes: Exchange,
        counters: Counters,
        reduction: Reduction,
        wire: Wire,
        team: Team,
        share_squares: Share | None = None,
        *,
        error_feedback: bool = False,
    ) -> None:
        self.exchange = exchange
        self.changes = changes
        self._published: dict[int, Flag] = {}
        self.set_bucket_size(1)
        self._counters = counters
        self._reduction = reduction
        self._wire = wire
        self._share_squares = share_squares
        world = exchange.world
        self.masters = np.empty(exchange.sum.size, np.float32) if wire.rounds else None
        """Float32 weights of this rank's shard, where the node's copy holds rounded ones."""
        self._reducing = Lanes(world.duplicate(), world.duplicate())
        self._publishing = Lanes(world.duplicate(), world.duplicate())
        self._driver: Driver | ThreadDriver = ThreadDriver() if world.takes_threads else Driver()
        self._team = dataclasses.replace(team, is_free=self._driver.is_waited_for)
        self._feedback = ErrorFeedback(exchange) if error_feedback else None
        self._jobs: list[Job] = []
        self._ready: dict[int, Flag] = {}
        self._reduced = Flag()
        self._updated: dict[int, Flag] = {}

    def set_changes(self, changes: Exchange) -> None:
        """Exchange these from now on, between two iterations. Collective."""
        self._abandon()
        self.changes = changes

    def set_bucket_size(self, num_cells: int) -> None:
        """Make buckets of so many cells, between two iterations. Collective."""
        self.wait()
        self._scratch = Scratch()  # fits the new size
        self.buckets = self.exchange.buckets(num_cells)
        self.order = list(reversed(self.buckets))
        """In which buckets are reduced: backward ends with the first layers, whose gradients come last."""

    @property
    def exchange_bytes(self) -> dict[str, int]:
        """What the exchange takes, by what it is for: masters where there are any, messages as far as seen yet."""
        masters = 0 if self.masters is None else self.masters.nbytes
        residuals = 0 if self._feedback is None else self._feedback.num_bytes
        return {
            "summed gradient": self.exchange.sum.nbytes + masters,
            "message buffers": self._scratch.num_bytes,
            "error feedback": residuals,
        }

    # --- reduce -----------------------------------------------------------------------------------------------

    def begin(self, assignment: Assignment) -> bool:
        """Make ready for an iteration's announcements; returns whether none was made yet."""
        if self._jobs and self._jobs[0].assignment == assignment:
            return False
        self._abandon()
        world = self.exchange.world
        plan = row_plan(assignment, world.node_of, world.rank)
        lanes, scratch, team = self._reducing, self._scratch, self._team
        job = Job(self.exchange, assignment, plan, self._wire, lanes, scratch, team, self._feedback)
        job_of_changes = Job(self.changes, assignment, plan, WIRES["float32"], lanes, scratch, team)
        self._jobs = [job, job_of_changes]
        *others, last = self.order
        errands: list[Errand] = [(b.index, functools.partial(self._reduction, job, b, None)) for b in others]
        if self.changes.size:
            whole = self.changes.whole()
            errands.append((CHANGES, functools.partial(self._reduction, job_of_changes, whole, None)))
        errands.append((last.index, functools.partial(self._reduce_last, job, last)))
        self._ready, self._reduced = {index: Flag() for index, _ in errands}, Flag()
        self._driver.add(
            *two_stage(
                errands,
                self._start_reduction,
                self._end_reduction,
                self._reduced,
                functools.partial(self._trace, _REDUCING),
            )
        )
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
        with self.exchange.world.activity.waiting():
            self._driver.wait(self._reduced)
        jobs, self._jobs = self._jobs, []
        return sum(job.local_sum_s for job in jobs)

    def _abandon(self) -> None:
        """End an iteration that was left unfinished: its rows are of no use. Collective; all ranks have begun it."""
        if self._jobs:
            self.collect(self._jobs[0].assignment)

    def forget(self) -> None:
        """Forget what rounding has taken from gradients: they do not count. Collective."""
        if self._feedback is not None:
            self._abandon()
            self._feedback.forget()

    def _reduce_last(self, job: Job, bucket: Bucket) -> Steps:
        self._counters.read_node(self.exchange.world, job.assignment)
        yield from self._reduction(job, bucket, self._counters)

    def _start_reduction(self, errand: Errand) -> Generator[Awaited, None, Steps]:
        index, exchange = errand
        yield self._ready[index]
        activity, announced = self.exchange.world.activity, time.perf_counter()
        activity.at_bucket(index)
        yield self._reducing.start.start_node_barrier()
        if activity.spans.is_on:
            activity.spans.add(READY, _name_of(index), announced, time.perf_counter())
        return exchange()

    def _end_reduction(self, errand: Errand, steps: Steps) -> Course:
        yield from steps

    # --- update -----------------------------------------------------------------------------------------------

    def mean(self, piece: Slice, divisor: float, squares: NDArray[np.float64]) -> None:
        """Turn the sum over a slice of this rank's shard into the mean; `squares` as `kernels.mean_rows` has it."""
        kernels.divide(self.own_gradient(piece), divisor, squares)

    def own_gradient(self, piece: Slice) -> NDArray[np.float32]:
        """Where `mean` leaves a slice's gradient."""
        return self.exchange.sum[piece.own]

    # --- publish ----------------------------------------------------------------------------------------------

    def begin_publishing(self, *, weights_only: bool = False) -> None:
        """Make ready for an iteration's updated buckets."""
        self.wait()
        lane = self._publishing.start
        errands: list[Errand] = [(b.index, functools.partial(self._publication, b)) for b in self.order[::-1]]
        if self.changes.size and not weights_only:
            share = functools.partial(publication.exact, self.changes, lane, self.changes.whole())
            errands.insert(0, (CHANGES, share))
        if self._share_squares is not None and not weights_only:
            errands.append((SQUARES, functools.partial(self._share_squares, lane)))
        self._updated = {index: Flag() for index, _ in errands}
        self._published = {index: Flag() for index, _ in errands}
        self._driver.add(
            *two_stage(
                errands,
                self._start_publishing,
                self._end_publishing,
                Flag(),
                functools.partial(self._trace, _PUBLISHING),
            )
        )

    def publish(self, bucket: Bucket) -> None:
        """Say that this rank's shard of a bucket's weights is updated."""
        self._driver.say(self._updated[bucket.index])

    def publish_changes(self, assignment: Assignment, divisor: float) -> None:
        """Turn the sum of the changes into the mean, and begin to bring it to all nodes. Collective."""
        if not self.changes.size:
            return
        self.changes.divide_sum(divisor)
        self._driver.say(self._updated[CHANGES])

    def end_publishing(self) -> None:
        """All is updated; the driver goes on with what is left: see `wait`."""
        for flag in self._updated.values():
            self._driver.say(flag)

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Return when these (buckets, CHANGES, SQUARES; default: all) are complete on this node."""
        for index in list(self._published) if indices is None else indices:
            flag = self._published.get(index)  # none where nothing was updated yet
            if flag is not None and not flag.is_over():
                with self.exchange.world.activity.waiting():
                    self._driver.wait(flag)

    def complete(self, pending: Pending) -> None:
        """Wait for a collective of the main thread's, which others may not have begun while they wait for this one."""
        with self.exchange.world.activity.waiting():
            self._driver.complete(pending)

    def own_weights(self, piece: Slice) -> NDArray[np.float32]:
        """Where the optimizer updates a slice of this rank's shard: in the node's copy, or in the masters."""
        if self.masters is None:
            return self.exchange.result[piece.start : piece.stop]
        return self.masters[piece.own]

    def take_weights(self) -> None:
        """Make the node's copy the masters, and begin anew. Collective."""
        self.forget()
        if self.masters is not None:
            for piece in self.exchange.shards.slices(self.exchange.world.rank, max(self.exchange.size, 1)):
                self.masters[piece.own] = self.exchange.result[piece.start : piece.stop]

    def _publication(self, bucket: Bucket) -> Steps:
        lane = self._publishing.start
        if self.masters is None:
            return publication.exact(self.exchange, lane, bucket)
        masters, scratch = self.masters, self._scratch
        return publication.rounded(self.exchange, lane, bucket, self._wire, masters, scratch, self._team)

    def _start_publishing(self, errand: Errand) -> Generator[Awaited, None, Steps]:
        index, exchange = errand
        yield self._updated[index]
        return exchange()

    def _end_publishing(self, errand: Errand, steps: Steps) -> Course:
        yield from steps
        yield self._publishing.end.start_node_barrier()
        self._published[errand[0]].raise_flag()

    def close(self) -> None:
        """End the thread. Collective."""
        self._abandon()
        self.wait()
        self._driver.close()
        for lanes in (self._reducing, self._publishing):
            lanes.start.free()
            lanes.end.free()

    def _trace(self, stages: tuple[str, str, str], place: int, index: int, times: Sequence[float]) -> None:
        """Record the stages of an errand; of MAX_UNDER_WAY in a row each has another track."""
        spans = self.exchange.world.activity.spans
        if not spans.is_on:
            return
        for stage, began, ended in zip(stages, times, times[1:], strict=False):
            spans.add(f"buckets: {stages[1]} {place % MAX_UNDER_WAY + 1}", f"{_name_of(index)} {stage}", began, ended)


def _name_of(index: int) -> str:
    return {CHANGES: "buffers", SQUARES: "squares"}.get(index, f"bucket {index}")
