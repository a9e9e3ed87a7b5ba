"""Two ways to bring the sum over all nodes to each shard's owner.

`ordered` (float32 in the tree's order, the same bits on any number of ranks), phases:

1. *local sum*: for each shard of another node that is its duty, a rank merges its node's rows over that shard.
2. *exchange*: one all-to-all carries the merged rows to the owners, and with them the counters of the node's
   partitions, so the owner knows the divisor and every partition's loss before it updates.
3. The owner is left with rows, its own node's still unmerged, and sums them in the tree's order.

`mpi` (whatever the site's MPI does best; float32; not bit-stable), phases:

1. *local sum*: on every node the ranks of the shortest node's local ranks share the shards of all ranks out among
   them, and sum all rows of the node over those shards, in any order.
2. *exchange*: MPI_Reduce_scatter among the ranks of one local rank; the block of a node goes to its rank, which puts
   it into the node's first row; a node barrier; the counters follow in an allgather.
3. The owner reads its shard there.

If a rank stops between 1 and 3, the others wait in the collective until the job is aborted; nothing has been written
to the weights yet.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.assignment import Assignment, RowPlan
from mpidl.parameters.counters import Counters
from mpidl.parameters.exchange import Exchange

Float32Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What an owner adds up over its shard."""

    addresses: NDArray[np.int64]
    """Of float32 rows, at the shard's first element."""
    additions: NDArray[np.int64]
    """(k, 2) additions among them that leave the sum in row 0."""
    received: Float32Array | None
    """Keeps the memory alive that some addresses point into."""
    local_sum_s: float
    """Seconds spent in phase 1."""


class Reduction(Protocol):
    """Brings the rows of one vector to the owners of its shards. Collective."""

    def __call__(self, exchange: Exchange, assignment: Assignment, plan: RowPlan, counters: Counters | None) -> Rows:
        """Phases 1 and 2 for one vector; `counters`, when given, are complete afterwards."""
        ...


def ordered(exchange: Exchange, assignment: Assignment, plan: RowPlan, counters: Counters | None) -> Rows:
    """All-to-all of tree rows; see the module's text. Collective."""
    world = exchange.world
    own_start, own_stop = exchange.shard
    local = exchange.addresses(plan.local, own_start)
    if world.num_nodes == 1:
        return Rows(local[list(plan.order)], plan.additions, None, 0.0)
    begin = time.perf_counter()
    send, send_counts, send_offsets = _pack(exchange, assignment, plan, counters)
    local_sum_s = time.perf_counter() - begin
    receive_counts, receive_offsets, senders, total = [0] * world.size, [0] * world.size, [], 0
    for node in range(world.num_nodes):
        if node != world.node:
            sender = exchange.duty_rank(world.rank, node)
            senders.append((node, sender))
            receive_offsets[sender] = total
            receive_counts[sender] = plan.rows_of_node[node] * (own_stop - own_start)
            if counters is not None:
                receive_counts[sender] += counters.words(*plan.partitions_of_node[node])
            total += receive_counts[sender]
    received = np.empty(total, np.float32)
    world.alltoall_varying(send, send_counts, send_offsets, received, receive_counts, receive_offsets)
    addresses = list(local)
    for node, sender in senders:
        offset = receive_offsets[sender]
        if counters is not None:
            offset += counters.unpack(received[offset:], *plan.partitions_of_node[node])
        for row in range(plan.rows_of_node[node]):
            addresses.append(received.ctypes.data + 4 * (offset + row * (own_stop - own_start)))
    ordered_addresses = np.array([addresses[i] for i in plan.order], dtype=np.int64)
    return Rows(ordered_addresses, plan.additions, received, local_sum_s)


def _pack(
    exchange: Exchange, assignment: Assignment, plan: RowPlan, counters: Counters | None
) -> tuple[Float32Array, list[int], list[int]]:
    """Merge this node's rows over the shards of other nodes that are this rank's duty, and lay the messages out."""
    world = exchange.world
    counts, offsets, parts = [0] * world.size, [0] * world.size, []
    total = 0
    for shard in exchange.duties():
        if world.node_of[shard] == world.node:
            continue
        start, stop = exchange.shards[shard]
        exchange.merge_node_rows(plan, (start, stop))
        message = [] if counters is None else [counters.pack(*plan.partitions_of_node[world.node])]
        message += [exchange.row_of(*plan.local[i])[start:stop] for i in plan.node_rows]
        offsets[shard], counts[shard] = total, sum(part.size for part in message)
        total += counts[shard]
        parts += message
    return (np.concatenate(parts) if parts else np.empty(0, np.float32)), counts, offsets


def mpi(exchange: Exchange, assignment: Assignment, plan: RowPlan, counters: Counters | None) -> Rows:
    """MPI_Reduce_scatter between nodes; see the module's text. Collective."""
    world = exchange.world
    columns = min(world.node_sizes)
    begin = time.perf_counter()
    local_sum_s = 0.0
    if world.local_rank < columns:
        shards = [s for s in range(world.size) if _local_rank(exchange, s) % columns == world.local_rank]
        blocks = [_sum_in_any_order(exchange, plan, exchange.shards[s]) for s in shards]
        local_sum_s = time.perf_counter() - begin
        counts = [
            sum(block.size for shard, block in zip(shards, blocks, strict=True) if world.node_of[shard] == node)
            for node in range(world.num_nodes)
        ]
        received = np.empty(counts[world.node], np.float32)
        world.column_reduce_scatter(np.concatenate(blocks), received, counts)
        target, offset = exchange.row_of(0, 0), 0
        for shard in shards:
            if world.node_of[shard] == world.node:
                start, stop = exchange.shards[shard]
                target[start:stop] = received[offset : offset + stop - start]
                offset += stop - start
    world.node_barrier()
    if counters is not None:
        counters.allgather(world, assignment)
    address = exchange.addresses(((0, 0),), exchange.shard[0])
    return Rows(address, np.empty((0, 2), np.int64), None, local_sum_s)


def _local_rank(exchange: Exchange, rank: int) -> int:
    return rank - exchange.world.first_rank_of(exchange.world.node_of[rank])


def _sum_in_any_order(exchange: Exchange, plan: RowPlan, piece: tuple[int, int]) -> Float32Array:
    """The sum of all of this node's rows over a piece, in a new array; zeros when the node computed nothing."""
    start, stop = piece
    if not plan.local:
        return np.zeros(stop - start, np.float32)
    pairs = np.array([(0, i) for i in range(1, len(plan.local))], dtype=np.int64).reshape(-1, 2)
    kernels.add_rows(exchange.addresses(plan.local, start), pairs, stop - start)
    return exchange.row_of(*plan.local[0])[start:stop].copy()


REDUCTIONS: dict[str, Reduction] = {"ordered": ordered, "mpi": mpi}
