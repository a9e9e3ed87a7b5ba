"""Two ways to bring the sum over all nodes to each shard's owner, bucket by bucket.

Each is a generator: what stands before its first `yield` starts the bucket's exchange; each `yield` gives a collective
that has to be over before the generator goes on. All ranks start the same buckets in the same order, on communicators
of the starting's own (`Lanes.start`); what comes after the first `yield` uses others (`Lanes.end`), since ranks may
reach it at other times. The rows of the node are complete when a bucket is started.

`ordered` (float32 sums in the tree's order; with wire "float32" the same bits on any number of ranks):

1. *local sum*: for each shard of another node that is its duty, a rank adds up its node's rows over the bucket's
   piece of that shard, as far as the tree allows, straight into the message.
2. *reduce_scatter*: one all-to-all carries the messages to the owners. That of the last bucket also carries the
   counters of the node's partitions, so the owner knows the divisor and every partition's loss before it updates.
3. The owner adds its own node's rows and the received ones in the tree's order, into its sum.

`mpi` (whatever the site's MPI does best; float32; not bit-stable):

1. *local sum*: on every node the ranks of the shortest node's local ranks share the shards of all ranks out among
   them, and add up all rows of the node over those shards' pieces, in any order.
2. *reduce_scatter*: MPI_Reduce_scatter among the ranks of one local rank. The sum goes straight into the owner's
   segment, which may be another rank's of the node.
3. With the last bucket, an allgather of the counters and, where nodes differ in size, a node barrier: every rank of
   the node has then written its sums. Gradients travel as float32 whatever the wire is.

If a rank stops in between, the others wait in a collective until the job is aborted; nothing has been written to the
weights yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.assignment import Addends, Assignment, RowPlan
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Bucket, Exchange
from mpidl.parameters.feedback import ErrorFeedback
from mpidl.parameters.scratch import Scratch
from mpidl.parameters.team import Team
from mpidl.parameters.wire import Wire
from mpidl.runtime import Pending, World

Float32Array = NDArray[np.float32]
AnyArray = NDArray[Any]
Steps = Generator[Pending, None, None]


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Communicators for exchanges that go on side by side."""

    start: World
    end: World


@dataclasses.dataclass
class Job:
    """One vector's reduction in one iteration."""

    exchange: Exchange
    assignment: Assignment
    plan: RowPlan
    wire: Wire
    lanes: Lanes
    scratch: Scratch
    team: Team
    feedback: ErrorFeedback | None = None
    local_sum_s: float = 0.0
    """Seconds spent adding rows up."""

    @contextlib.contextmanager
    def summing(self) -> Iterator[None]:
        """Count the block's time."""
        begin = time.perf_counter()
        yield
        self.local_sum_s += time.perf_counter() - begin

    @contextlib.contextmanager
    def rooms(self, number: int, sizes: Sequence[int]) -> Iterator[list[list[Float32Array]]]:
        """So many rooms for values, as the wire wants them for pieces of these sizes, for each thread of the team."""
        num_threads, size = self.team.num_threads, min(self.wire.max_size or 0, max(sizes, default=0))
        with self.scratch.borrow(num_threads * number * size, np.float32) as room:
            yield [list(each) for each in room.reshape(num_threads, number, size)]


class Reduction(Protocol):
    """Brings one bucket of the sum to the owners of its shards. Collective."""

    def __call__(self, job: Job, bucket: Bucket, counters: Counters | None) -> Steps:
        """See the module's text; `counters`, given with the last bucket, are complete afterwards."""
        ...


def ordered(job: Job, bucket: Bucket, counters: Counters | None) -> Steps:
    """All-to-all of tree rows. Collective."""
    outgoing, incoming = _outgoing(job, bucket, counters), _incoming(job, bucket, counters)
    with (
        job.scratch.borrow(sum(outgoing.counts), job.wire.dtype) as send,
        job.scratch.borrow(sum(incoming.counts), job.wire.dtype) as received,
    ):
        with job.summing():
            _pack(job, bucket, counters, send)
        yield job.lanes.start.start_alltoall_varying(
            send, outgoing.counts, outgoing.offsets, received, incoming.counts, incoming.offsets
        )
        with job.summing():
            _add_received(job, bucket, counters, incoming, received)


@dataclasses.dataclass(frozen=True)
class _Messages:
    """Where in one array the words for, or of, each rank are."""

    counts: list[int]
    offsets: list[int]


def _outgoing(job: Job, bucket: Bucket, counters: Counters | None) -> _Messages:
    exchange, world = job.exchange, job.exchange.world
    counts = [0] * world.size
    head = _words(job, counters, world.node)
    for shard in _duties_elsewhere(exchange):
        counts[shard] = head + len(job.plan.sent) * sum(piece.size for piece in exchange.pieces(bucket, shard))
    return _Messages(counts, _offsets(counts))


def _incoming(job: Job, bucket: Bucket, counters: Counters | None) -> _Messages:
    exchange, world = job.exchange, job.exchange.world
    own_size = sum(piece.size for piece in exchange.pieces(bucket, world.rank))
    counts = [0] * world.size
    for node in _others(world):
        rows = job.plan.rows_of_node[node]
        counts[exchange.duty_rank(world.rank, node)] = _words(job, counters, node) + rows * own_size
    return _Messages(counts, _offsets(counts))


def _offsets(counts: list[int]) -> list[int]:
    return [0, *itertools.accumulate(counts[:-1])]


def _others(world: World) -> list[int]:
    return [node for node in range(world.num_nodes) if node != world.node]


def _duties_elsewhere(exchange: Exchange) -> list[int]:
    world = exchange.world
    return [shard for shard in exchange.duties() if world.node_of[shard] != world.node]


def _words(job: Job, counters: Counters | None, node: int) -> int:
    if counters is None:
        return 0
    return counters.num_bytes(*job.plan.partitions_of_node[node]) // int(np.dtype(job.wire.dtype).itemsize)


def _chosen(addresses: Sequence[int], addends: Addends) -> NDArray[np.int64]:
    return np.array([addresses[i] for i in addends.rows], dtype=np.int64)


def _pack(job: Job, bucket: Bucket, counters: Counters | None, send: AnyArray) -> None:
    """Add up this node's rows over the pieces of other nodes that are this rank's duty, and lay the messages out."""
    exchange, plan, world = job.exchange, job.plan, job.exchange.world
    head, position = _words(job, counters, world.node), 0
    for shard in _duties_elsewhere(exchange):
        if counters is not None:
            send[position : position + head] = counters.pack(*plan.partitions_of_node[world.node]).view(send.dtype)
            position += head
        size = sum(piece.size for piece in exchange.pieces(bucket, shard))
        for addends in plan.sent:
            _pack_row(job, bucket, shard, addends, send[position : position + size])
            position += size


def _pack_row(job: Job, bucket: Bucket, shard: int, addends: Addends, words: AnyArray) -> None:
    """Write the sum of some of this node's rows over a shard's pieces into a message."""
    exchange = job.exchange
    pieces = exchange.pieces(bucket, shard)
    sizes = [piece.size for piece in pieces]
    offsets = _offsets(sizes)
    addresses = [_chosen(exchange.addresses(job.plan.local, piece.start), addends) for piece in pieces]
    residuals = [None if job.feedback is None else job.feedback.of(shard, piece) for piece in pieces]

    def pack(thread: int, index: int, start: int, stop: int) -> None:
        own_words = words[offsets[index] + start : offsets[index] + stop]
        residual = residuals[index]
        own_residual = None if residual is None else residual[start:stop]
        room = rooms[thread][0][: stop - start]
        job.wire.add_rows(addresses[index] + 4 * start, addends.steps, own_words, room, own_residual)

    with job.rooms(1, sizes) as rooms:
        job.team.run(sizes, pack, job.wire.max_size)


def _add_received(job: Job, bucket: Bucket, counters: Counters | None, incoming: _Messages, received: AnyArray) -> None:
    """Add this node's rows and the received ones in the tree's order, into the owner's sum."""
    exchange, plan, world = job.exchange, job.plan, job.exchange.world
    own = exchange.pieces(bucket, world.rank)
    own_size = sum(piece.size for piece in own)
    rows: list[AnyArray] = []
    for node in _others(world):
        offset = incoming.offsets[exchange.duty_rank(world.rank, node)]
        if counters is not None:
            words = _words(job, counters, node)
            counters.unpack(received[offset : offset + words], *plan.partitions_of_node[node])
            offset += words
        for row in range(plan.rows_of_node[node]):
            rows.append(received[offset + row * own_size : offset + (row + 1) * own_size])
    sizes = [piece.size for piece in own]
    offsets = _offsets(sizes)

    def add(thread: int, index: int, start: int, stop: int) -> None:
        piece, first = own[index], offsets[index]
        addresses = exchange.addresses(plan.local, piece.start + start)
        for words_of_row, room in zip(rows, rooms[thread], strict=True):
            values = job.wire.values_of(words_of_row[first + start : first + stop], room[: stop - start])
            addresses.append(values.ctypes.data)
        kernels.add_rows(_chosen(addresses, plan.total), plan.total.steps, exchange.sum[piece.own][start:stop])

    with job.rooms(len(rows), sizes) as rooms:
        job.team.run(sizes, add, job.wire.max_size)


def mpi(job: Job, bucket: Bucket, counters: Counters | None) -> Steps:
    """MPI_Reduce_scatter between nodes. Collective."""
    exchange, world = job.exchange, job.exchange.world
    columns = min(world.node_sizes)
    if world.local_rank < columns:
        shards = [s for s in range(world.size) if _local_rank(world, s) % columns == world.local_rank]
        pieces = {shard: exchange.pieces(bucket, shard) for shard in shards}
        counts = [0] * world.num_nodes
        for shard in shards:
            counts[world.node_of[shard]] += sum(piece.size for piece in pieces[shard])
        with (
            job.scratch.borrow(sum(counts), np.float32) as send,
            job.scratch.borrow(counts[world.node], np.float32) as received,
        ):
            with job.summing():
                position = 0
                for piece in itertools.chain(*pieces.values()):
                    _sum_in_any_order(job, piece.start, send[position : position + piece.size])
                    position += piece.size
            yield job.lanes.start.start_column_reduce_scatter(send, received, counts)
            position = 0
            for shard in shards:
                if world.node_of[shard] == world.node:
                    for piece in pieces[shard]:
                        exchange.sums[_local_rank(world, shard)][piece.own] = received[position : position + piece.size]
                        position += piece.size
    else:
        yield job.lanes.start.nothing()
    if counters is not None:
        yield from counters.allgather(job.lanes.end, job.assignment)
        if columns < max(world.node_sizes):  # another rank may have written this one's sum
            yield job.lanes.end.start_node_barrier()


def _local_rank(world: World, rank: int) -> int:
    return rank - world.first_rank_of(world.node_of[rank])


def _sum_in_any_order(job: Job, start: int, out: Float32Array) -> None:
    """The sum of all of this node's rows over a piece; zeros when the node computed nothing."""
    addresses = np.array(job.exchange.addresses(job.plan.local, start), dtype=np.int64)
    if not job.plan.sent:
        out.fill(0)
        return
    first, *others = job.plan.sent
    _add_rows(job, addresses, first, out)
    for addends in others:
        with job.scratch.borrow(out.size, np.float32) as part:
            _add_rows(job, addresses, addends, part)
            out += part


def _add_rows(job: Job, addresses: NDArray[np.int64], addends: Addends, out: Float32Array) -> None:
    chosen = addresses[list(addends.rows)]
    job.team.run([out.size], lambda _, __, a, b: kernels.add_rows(chosen + 4 * a, addends.steps, out[a:b]))


REDUCTIONS: dict[str, Reduction] = {"ordered": ordered, "mpi": mpi}
