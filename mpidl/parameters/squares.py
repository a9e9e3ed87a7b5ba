"""The sums of squares of the mean gradient, of which its norm is the root.

They are over the blocks of the flat vector, so they do not depend on the shards. Whoever owns a block writes its sum as
he divides the gradient (`kernels.mean_rows`); between nodes an allgather brings everybody's to every node.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.parameters.layout import Shards, Slice, blocks_of
from mpidl.parameters.reduction import Steps
from mpidl.runtime import World, share


class Squares:
    """One number for each block, float64, in the node's shared memory. Construction is collective.

    Args:
        world: all ranks.
        shards: who owns which elements.
        size: elements of the flat vector.
    """

    def __init__(self, world: World, shards: Shards, size: int) -> None:
        self._world = world
        self._shards = shards
        num_blocks = -(-size // kernels.BLOCK_SIZE)
        self._values = share(world, 8 * num_blocks if world.local_rank == 0 else 0)[0].view(np.float64)

    def of(self, piece: Slice) -> NDArray[np.float64]:
        """Those of a slice, to be written by its owner."""
        blocks = blocks_of((piece.start, piece.stop), kernels.BLOCK_SIZE)
        return self._values[blocks.start : blocks.stop]

    def norm(self) -> float:
        """The L2 norm of the mean gradient; all squares have to be complete on this node."""
        return math.sqrt(float(self._values.sum()))

    def share(self, lane: World) -> Steps:
        """Bring the squares of all shards to all nodes; this node's are complete. Collective."""
        world = self._world
        own = self._values[self._blocks[world.rank]]
        gathered, pending = lane.start_allgather_varying(own, [blocks.size for blocks in self._blocks])
        yield pending
        if world.local_rank == 0:
            self._values[np.concatenate(self._blocks)] = gathered

    @functools.cached_property
    def _blocks(self) -> list[NDArray[np.int64]]:
        """The blocks of each rank's shard."""
        runs = self._shards.runs
        return [
            np.array([block for run in runs(rank) for block in blocks_of(run, kernels.BLOCK_SIZE)], dtype=np.int64)
            for rank in range(self._world.size)
        ]
