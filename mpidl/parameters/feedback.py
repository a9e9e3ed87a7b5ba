"""Error feedback: what rounding takes from a message is kept, and added to the next one.

Where gradients travel as bfloat16, a rank rounds the sums of its node's rows over the shards that are its duty. With
feedback it keeps, in float32, what that took from them, element by element, and adds it to what it rounds next: so what
all messages together carry is the sum of all gradients, less one residual.

- *Whose*: a residual belongs to one node's sum of one shard, so to the rank whose duty that is. Where the node sends
  several rows in an iteration, each takes over what the one before has left. So it does not matter which partitions a
  node computes, how many rows they make, or how buckets are cut; a node without partitions keeps what it has.
- *Who writes*: the thread that packs messages alone, from a bucket's announcement to the end of its packing.
- *Thrown away*: where messages were sent for nothing (announced too early; an iteration that ended in an error, or
  whose weight is 0), and where weights are loaded, all is forgotten: it is of no gradient that counts. Checkpoints do
  not hold it.
- *Weights* need none: the owner rounds its float32 masters anew each time, and forgets nothing.

Residuals are of sums, not of means: in an iteration of fewer samples what others have left weighs accordingly more.
"""

from __future__ import annotations

import numpy as np

from mpidl.parameters.exchange import Exchange, Float32Array
from mpidl.parameters.layout import Slice


class ErrorFeedback:
    """The residuals of one rank: as long as the shards of other nodes' ranks that are its duty.

    Args:
        exchange: of the vector whose sums are rounded.
    """

    def __init__(self, exchange: Exchange) -> None:
        world, size_of = exchange.world, exchange.shards.size_of
        others = [shard for shard in exchange.duties() if world.node_of[shard] != world.node]
        self._residuals = {shard: np.zeros(size_of(shard), np.float32) for shard in others}

    def of(self, shard: int, piece: Slice) -> Float32Array:
        """What is left of a shard's piece, float32, (piece.size,); written by whoever rounds."""
        return self._residuals[shard][piece.own]

    def forget(self) -> None:
        """Begin from nothing."""
        for each in self._residuals.values():
            each.fill(0)

    @property
    def num_bytes(self) -> int:
        """What the residuals take."""
        return sum(each.nbytes for each in self._residuals.values())
