"""One flat vector on all nodes: rows of gradients in, shards of the sum out, and the one copy per node back.

Who owns which memory:

- *rows*: each rank's segments of node-shared memory hold its `num_slots` rows. The rank alone writes them; from the
  node barrier that says that a bucket of them is complete, to the one at the end of `Synchronizer.synchronize`, every
  rank of the node may read it. `grow` adds segments of more rows; those that are there stay where they are, so it may
  be called while an exchange over them is under way.
- *sums*: each rank's segment that receives the sum over its shard. Its owner alone reads it. With the reduction "mpi"
  on nodes of different sizes another rank of the node writes it.
- *result*: one copy per node in node-shared memory. A rank writes its own shard; its node's duty rank for shard s
  receives shard s from its owner.

Shard s belongs to rank s. On another node, it is the duty of the rank whose local rank is the owner's local rank
modulo that node's size: it sums shard s over its node's rows, sends the sums to the owner, and receives the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.layout import Piece, Shards, Slice
from mpidl.runtime import Pending, World, share

Float32Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A run of cells that is exchanged together."""

    index: int
    first_cell: int
    last_cell: int
    """The cell behind the bucket's last one."""
    span: Piece
    """Its elements [start, stop) of the vector."""


class Exchange:
    """Rows, sums and result of one flat vector of `size` float32. Construction is collective.

    Args:
        world: all ranks.
        size: elements of the vector.
        num_slots: rows of this rank.
        shards: who owns what; default: one contiguous piece for every rank.
        with_sums: whether there is memory for the sums.
    """

    def __init__(
        self, world: World, size: int, num_slots: int, shards: Shards | None = None, *, with_sums: bool = True
    ) -> None:
        self.world = world
        self.size = size
        self._pieces: dict[tuple[Bucket, int], list[Slice]] = {}
        self.shards = shards or Shards.of(size, world.size, kernels.BLOCK_SIZE, num_cells=1)
        self.num_slots = 0
        self.rows: list[Float32Array] = []
        """This rank's rows, float32, (size,) each."""
        self._segments: list[Float32Array] = []  # whom the addresses below belong to
        self._addresses: list[list[int]] = [[] for _ in range(world.local_size)]
        """Where the rows of this node's ranks begin, by local rank and slot."""
        self.grow(num_slots)
        sum_size = self.shards.size_of(world.rank) if with_sums else 0
        self.sums = [segment.view(np.float32) for segment in share(world, 4 * sum_size)]
        """The sums over the shards of this node's ranks, by local rank, float32, (shard size,)."""
        self.result: Float32Array = share(world, 4 * size if world.local_rank == 0 else 0)[0].view(np.float32)
        """The node's one copy, float32, (size,)."""

    def grow(self, num_slots: int) -> None:
        """Have at least so many rows on this rank. Collective.

        Raises:
            SharedMemoryError: on every rank: there is no room; the rows are what they were.
        """
        more = max(0, num_slots - self.num_slots)
        segments = [segment.view(np.float32) for segment in share(self.world, 4 * self.size * more)]
        own = segments[self.world.local_rank]
        self.rows += [own[slot * self.size : (slot + 1) * self.size] for slot in range(more)]
        for addresses, segment in zip(self._addresses, segments, strict=True):
            addresses += range(segment.ctypes.data, segment.ctypes.data + segment.nbytes, max(4 * self.size, 1))
        self._segments += segments
        self.num_slots += more

    @property
    def sum(self) -> Float32Array:
        """The sum over this rank's shard, float32, (shard size,)."""
        return self.sums[self.world.local_rank]

    def buckets(self, cells_per_bucket: int) -> list[Bucket]:
        """All cells, so many to a bucket."""
        cells = self.shards.cells
        firsts = range(0, len(cells), cells_per_bucket)
        lasts = [min(first + cells_per_bucket, len(cells)) for first in firsts]
        return [
            Bucket(index, first, last, (cells[first][0], cells[last - 1][1]))
            for index, (first, last) in enumerate(zip(firsts, lasts, strict=True))
        ]

    def whole(self) -> Bucket:
        """All cells in one bucket."""
        (bucket,) = self.buckets(len(self.shards.cells))
        return bucket

    def pieces(self, bucket: Bucket, rank: int) -> list[Slice]:
        """A rank's pieces of a bucket, none of them empty."""
        found = self._pieces.get((bucket, rank))
        if found is None:
            start, stop = bucket.span
            slices = self.shards.slices(rank, max(self.size, 1))
            found = self._pieces[bucket, rank] = [each for each in slices if start <= each.start < stop]
        return found

    def addresses(self, rows: Sequence[tuple[int, int]], offset: int) -> list[int]:
        """Addresses of the element `offset` of (local rank, slot) rows of this node."""
        return [self._addresses[local][slot] + 4 * offset for local, slot in rows]

    def duties(self) -> list[int]:
        """The shards, of all ranks, that this rank sums over its node's rows."""
        return [shard for shard in range(self.world.size) if self.duty_rank(shard, self.world.node) == self.world.rank]

    def duty_rank(self, shard: int, node: int) -> int:
        """The rank of a node whose duty a shard is."""
        world = self.world
        local = shard - world.first_rank_of(world.node_of[shard])
        return world.first_rank_of(node) + local % world.node_sizes[node]

    def divide_sum(self, divisor: float) -> None:
        """Write the mean over this rank's shard, whose sum is complete, into the result."""
        for piece in self.pieces(self.whole(), self.world.rank):
            unused = np.empty(-(-piece.size // kernels.BLOCK_SIZE))
            kernels.divide(self.sum[piece.own], divisor, unused)
            self.result[piece.start : piece.stop] = self.sum[piece.own]

    def start_spread(self, lane: World, bucket: Bucket) -> list[Pending]:
        """Begin to bring every rank's pieces of a bucket of the result to all other nodes. Collective.

        Args:
            lane: whose communicators to use.
            bucket: this rank has written its pieces of it.
        """
        cells = range(bucket.first_cell, bucket.last_cell)
        return [self._start_spread(lane, [pieces[cell] for pieces in self.shards.pieces]) for cell in cells]

    def _start_spread(self, lane: World, pieces: list[Piece]) -> Pending:
        world = self.world
        send_counts, receive_counts = [0] * world.size, [0] * world.size
        start, stop = pieces[world.rank]
        for node in range(world.num_nodes):
            if node != world.node:
                send_counts[self.duty_rank(world.rank, node)] = stop - start
        for shard in self.duties():
            if world.node_of[shard] != world.node:
                receive_counts[shard] = pieces[shard][1] - pieces[shard][0]
        # The two buffers may not begin at the same address. A rank without elements of its own sends an empty slice.
        base = stop if start == 0 else 0
        receive_offsets = [max(0, piece[0] - base) for piece in pieces]
        nothing = [0] * world.size
        array = self.result
        return lane.start_alltoall_varying(
            array[start:stop], send_counts, nothing, array[base:], receive_counts, receive_offsets
        )

    def spread(self) -> None:
        """Bring every rank's shard of the result to all other nodes. Collective; no barrier at the end."""
        if self.world.num_nodes > 1:
            for bucket in self.buckets(1):
                for pending in self.start_spread(self.world, bucket):
                    pending.wait()
