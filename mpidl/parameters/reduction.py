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

import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.assignment import Addends, Assignment, RowPlan
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Bucket, Exchange
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
    local_sum_s: float = 0.0
    """Seconds spent adding rows up."""


class Reduction(Protocol):
    """Brings one bucket of the sum to the owners of its shards. Collective."""

    def __call__(self, job: Job, bucket: Bucket, counters: Counters | None) -> Steps:
        """See the module's text; `counters`, given with the last bucket, are complete afterwards."""
        ...


def ordered(job: Job, bucket: Bucket, counters: Counters | None) -> Steps:
    """All-to-all of tree rows. Collective."""
    exchange, plan, world = job.exchange, job.plan, job.exchange.world
    begin = time.perf_counter()
    send, send_counts, send_offsets = _pack(job, bucket, counters)
    own = exchange.pieces(bucket, world.rank)
    own_size = sum(piece.size for piece in own)
    counts, offsets, total = [0] * world.size, [0] * world.size, 0
    others = [node for node in range(world.num_nodes) if node != world.node]
    for node in others:
        sender = exchange.duty_rank(world.rank, node)
        offsets[sender], counts[sender] = total, plan.rows_of_node[node] * own_size
        if counters is not None:
            counts[sender] += _words(job, counters, node)
        total += counts[sender]
    received = np.empty(total, job.wire.dtype)
    job.local_sum_s += time.perf_counter() - begin
    yield job.lanes.start.start_alltoall_varying(send, send_counts, send_offsets, received, counts, offsets)
    begin = time.perf_counter()
    rows: list[Float32Array] = []
    for node in others:
        offset = offsets[exchange.duty_rank(world.rank, node)]
        if counters is not None:
            words = _words(job, counters, node)
            counters.unpack(received[offset : offset + words], *plan.partitions_of_node[node])
            offset += words
        for row in range(plan.rows_of_node[node]):
            rows.append(job.wire.to_values(received[offset + row * own_size : offset + (row + 1) * own_size]))
    position = 0
    for piece in own:
        addresses = exchange.addresses(plan.local, piece.start)
        addresses += [row.ctypes.data + 4 * position for row in rows]
        kernels.add_rows(_chosen(addresses, plan.total), plan.total.steps, exchange.sum[piece.own])
        position += piece.size
    job.local_sum_s += time.perf_counter() - begin


def _words(job: Job, counters: Counters, node: int) -> int:
    return counters.num_bytes(*job.plan.partitions_of_node[node]) // int(np.dtype(job.wire.dtype).itemsize)


def _chosen(addresses: Sequence[int], addends: Addends) -> NDArray[np.int64]:
    return np.array([addresses[i] for i in addends.rows], dtype=np.int64)


def _pack(job: Job, bucket: Bucket, counters: Counters | None) -> tuple[AnyArray, list[int], list[int]]:
    """Add up this node's rows over the pieces of other nodes that are this rank's duty, and lay the messages out."""
    exchange, plan, world = job.exchange, job.plan, job.exchange.world
    head = 0 if counters is None else _words(job, counters, world.node)
    shards = [shard for shard in exchange.duties() if world.node_of[shard] != world.node]
    pieces = {shard: exchange.pieces(bucket, shard) for shard in shards}
    sizes = {shard: head + len(plan.sent) * sum(piece.size for piece in pieces[shard]) for shard in shards}
    counts, offsets = [0] * world.size, [0] * world.size
    send = np.empty(sum(sizes.values()), job.wire.dtype)
    position = 0
    for shard in shards:
        offsets[shard], counts[shard] = position, sizes[shard]
        if counters is not None:
            send[position : position + head] = counters.pack(*plan.partitions_of_node[world.node]).view(job.wire.dtype)
            position += head
        for addends in plan.sent:
            for piece in pieces[shard]:
                addresses = _chosen(exchange.addresses(plan.local, piece.start), addends)
                job.wire.add_rows(addresses, addends.steps, send[position : position + piece.size])
                position += piece.size
    return send, counts, offsets


def mpi(job: Job, bucket: Bucket, counters: Counters | None) -> Steps:
    """MPI_Reduce_scatter between nodes. Collective."""
    exchange, world = job.exchange, job.exchange.world
    columns = min(world.node_sizes)
    if world.local_rank < columns:
        begin = time.perf_counter()
        shards = [s for s in range(world.size) if _local_rank(world, s) % columns == world.local_rank]
        pieces = {shard: exchange.pieces(bucket, shard) for shard in shards}
        send = np.empty(sum(piece.size for each in pieces.values() for piece in each), np.float32)
        counts, position = [0] * world.num_nodes, 0
        for shard in shards:
            for piece in pieces[shard]:
                _sum_in_any_order(job, piece.start, send[position : position + piece.size])
                counts[world.node_of[shard]] += piece.size
                position += piece.size
        received = np.empty(counts[world.node], np.float32)
        job.local_sum_s += time.perf_counter() - begin
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
    kernels.add_rows(addresses[list(first.rows)], first.steps, out)
    for addends in others:
        part = np.empty_like(out)
        kernels.add_rows(addresses[list(addends.rows)], addends.steps, part)
        out += part


REDUCTIONS: dict[str, Reduction] = {"ordered": ordered, "mpi": mpi}
