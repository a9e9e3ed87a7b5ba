"""The state as it is now, where it can be read when its owner has died: what is done already is not done again.

The weights are in node-shared memory anyway. Here the optimizers' element-wise state is too: a rank's own lies in a
segment that the other ranks of its node can read, and there its optimizer updates it; nothing is copied for it.

- *move in*: when a start of a group is kept (`memory.py`), each rank moves the state that its optimizer has by then
  into its segment. It was made by the optimizer's first step, so this is so from the second start on.
- *mark*: a rank's segment says how many iterations its shard has; NONE while its optimizer updates it. The optimizer's
  scalars are written before the mark.
- *which*: nobody updates in an iteration before all have computed it, and nobody begins the next one before all have
  updated. So where all marks say k, and each rank that lives has done all that was due behind iteration k, the shards
  are what they were then, and the weights of each node are whole: the training goes on from there. Where they do not
  (a rank died while it updated, or another one had not come through with what was due, a report or a plan), it goes on
  from the start that was kept.

Not for a wire that rounds: there weights that nobody else can read are what is updated. Where optimizers make state
anew, or more of it, the mark stays NONE, and the starts have to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl.checkpoint.slots import Slot, head_bytes_for, slot_bytes
from mpidl.checkpoint.snapshot import Compaction
from mpidl.parameters import ParameterManager
from mpidl.parameters.update import ShardOptimizer
from mpidl.runtime import World, share

Float32Array = NDArray[np.float32]


class LiveImage:
    """One rank's shard as it is now, in the form of a slot: a copy without gaps.

    Args:
        vectors: by key, float32, (elements without gaps,).
        scalars: of the optimizer, by param group.
    """

    def __init__(self, vectors: Mapping[str, Float32Array], scalars: list[dict[str, Any]]) -> None:
        self.vectors = vectors
        self._scalars = scalars

    def scalars(self) -> list[dict[str, Any]]:
        """Of the optimizer, by param group."""
        return self._scalars


class Live:
    """The segments of a node's ranks; this rank's is the home of its optimizer's state. Construction is collective.

    Args:
        manager: of the parameters; its `updates_in_place` holds.
        world: all ranks, with their nodes.
        states: names of the optimizer's element-wise state, the same on all ranks.
        num_groups: param groups.
        iteration: iterations that are done; weights are complete.

    Raises:
        SharedMemoryError: on every rank: there is no room.
    """

    def __init__(
        self, manager: ParameterManager, world: World, states: Sequence[str], num_groups: int, iteration: int
    ) -> None:
        self._layout, self._weights = manager.layout, manager.weights
        self._optimizer: ShardOptimizer | None = manager.shard_optimizer
        self._iteration = iteration
        first, head_bytes = world.first_rank_of(world.node), head_bytes_for(num_groups)
        ranks = range(first, first + world.local_size)
        self._runs = {rank: manager.runs_of(rank) for rank in ranks}
        sizes = {rank: sum(stop - start for start, stop in runs) for rank, runs in self._runs.items()}
        segments = share(world, slot_bytes(head_bytes, sizes[world.rank], len(states)))
        self._slots = {
            rank: Slot(segment, states, sizes[rank], head_bytes) for rank, segment in zip(ranks, segments, strict=True)
        }
        self._own = self._slots[world.rank]
        self._own.open()
        self.vectors: Mapping[str, Float32Array] = self._own.vectors
        world.node_barrier()  # nobody reads what is not opened
        self._optimizer.move_into(self)
        if self._optimizer.is_in(self):
            self.close()

    def open(self) -> None:
        """This rank's shard is going to be updated."""
        self._own.open()
        self._iteration += 1

    def close(self) -> None:
        """It has been."""
        assert self._optimizer is not None, "frozen"
        self._own.close(self._iteration, self._optimizer.scalars())

    def freeze(self) -> None:
        """Nothing is updated any more: let go of the optimizer, which has memory of others."""
        self._optimizer = None

    def marks(self) -> dict[int, int]:
        """By rank of this node, how many iterations its shard has; NONE: it is torn, or not all here."""
        return {rank: slot.iteration for rank, slot in self._slots.items()}

    def image(self, rank: int) -> LiveImage:
        """A copy of a rank's shard, while nobody updates it."""
        runs, slot = self._runs[rank], self._slots[rank]
        compaction = Compaction(self._layout, runs)
        vectors = {"weights": _compact(compaction, (self._weights[start:stop] for start, stop in runs))}
        for state, values in slot.vectors.items():
            vectors[f"state.{state}"] = _compact(compaction, [values])
        return LiveImage(vectors, slot.scalars())


def _compact(compaction: Compaction, pieces: Iterable[Float32Array]) -> Float32Array:
    """The pieces that make a shard, one behind the other, without gaps."""
    found, start = np.empty(compaction.size, np.float32), 0
    for piece in pieces:
        compaction.copy(start, piece, found)
        start += piece.size
    return found
