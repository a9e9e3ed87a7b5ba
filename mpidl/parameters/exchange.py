"""One flat vector on all nodes: rows of gradients in, shards of the sum out, and the one copy per node back.

Who owns which memory:

- *rows*: each rank's segment of node-shared memory holds its `num_slots` rows. The rank alone writes them until the
  node barrier that begins the exchange; from there to the barrier that ends it, every rank of the node writes the
  slices of all rows that it has to sum, and no slice has two writers.
- *result*: one copy per node in node-shared memory. A rank writes its own shard; its node's duty rank for shard s
  receives shard s from its owner. Everyone may read it from the barrier that ends the exchange to the one that begins
  the next.

Shard s belongs to rank s. On another node, it is the duty of the rank whose local rank is the owner's local rank
modulo that node's size: it sums shard s over its node's rows, sends the sums to the owner, and receives the result.

If a rank stops here, the others of its node wait in a node barrier and those of other nodes in the all-to-all: the
launcher or the abort hook ends them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.assignment import RowPlan
from mpidl.parameters.layout import Piece, shards
from mpidl.runtime import World, share

Float32Array = NDArray[np.float32]


class Exchange:
    """Rows and result of one flat vector of `size` float32. Construction is collective."""

    def __init__(self, world: World, size: int, num_slots: int) -> None:
        self.world = world
        self.size = size
        self.num_slots = num_slots
        self.shards = shards(size, world.size, kernels.BLOCK_SIZE)
        self._segments = [segment.view(np.float32) for segment in share(world, 4 * size * num_slots)]
        own = self._segments[world.local_rank]
        self.rows: list[Float32Array] = [own[slot * size : (slot + 1) * size] for slot in range(num_slots)]
        """This rank's rows, float32, (size,) each."""
        self.result: Float32Array = share(world, 4 * size if world.local_rank == 0 else 0)[0].view(np.float32)
        """The node's one copy, float32, (size,)."""

    @property
    def shard(self) -> Piece:
        """This rank's [start, stop) of the vector."""
        return self.shards[self.world.rank]

    def addresses(self, rows: tuple[tuple[int, int], ...], offset: int) -> NDArray[np.int64]:
        """Addresses of the element `offset` of (local rank, slot) rows of this node."""
        base = [self._segments[local].ctypes.data + 4 * (slot * self.size + offset) for local, slot in rows]
        return np.array(base, dtype=np.int64)

    def row_of(self, local_rank: int, slot: int) -> Float32Array:
        """A row of any rank of this node."""
        return self._segments[local_rank][slot * self.size : (slot + 1) * self.size]

    def duties(self) -> list[int]:
        """The shards, of all ranks, that this rank sums over its node's rows."""
        return [shard for shard in range(self.world.size) if self.duty_rank(shard, self.world.node) == self.world.rank]

    def duty_rank(self, shard: int, node: int) -> int:
        """The rank of a node whose duty a shard is."""
        world = self.world
        local = shard - world.first_rank_of(world.node_of[shard])
        return world.first_rank_of(node) + local % world.node_sizes[node]

    def merge_node_rows(self, plan: RowPlan, piece: Piece) -> None:
        """Add this node's rows over one piece, in place, as far as the tree allows."""
        kernels.add_rows(self.addresses(plan.local, piece[0]), plan.node_additions, piece[1] - piece[0])

    def distribute(self, array: NDArray[np.float32] | NDArray[np.float64], pieces: list[Piece]) -> None:
        """Bring every rank's piece of a node-shared array to all other nodes. Collective; no barrier at the end.

        Args:
            array: one-dimensional, one copy per node; each rank has written its piece.
            pieces: every rank's [start, stop) of the array.
        """
        world = self.world
        if world.num_nodes == 1:
            return
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
        world.alltoall_varying(array[start:stop], send_counts, nothing, array[base:], receive_counts, receive_offsets)
