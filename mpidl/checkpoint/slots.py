"""Where the images of shards are kept that a lost rank would leave (`memory.py`): on its node, and on the next one.

Each rank writes its image into a *slot*, one of two, of its own segment of node-shared memory. Where there are several
nodes, a copy goes to the rank's *buddy*: the rank of the same place on the next node (on a smaller node several share
one), the last node's next being the first. So a rank keeps the images of its *wards* too, in memory of its own.

- *write*: the slot's iteration is set to NONE, the content is written, the iteration is set. So a slot is never torn,
  whenever its owner dies. The owner alone writes.
- *pass on*: each rank opens the slots of its wards, starts receiving into them, starts sending its own image, vector by
  vector and the iteration last, and waits for all of it. A ward's iteration is set when everything before has come. A
  rank sends in any case: an image that is not complete travels as one, so that no buddy waits.

What if. A rank dies while it passes its image on: the calls of its buddy fail, the slot that they were to fill stays
NONE, and the other slot has the start before. Which start all can go on from is `memory.py`'s concern.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl.runtime import Pending, World, share

Float32Array = NDArray[np.float32]

NUM_SLOTS = 2
NONE = -1
_PAGE = 4096
_GROUP_BYTES = 1024
"""For each param group's scalars, which are a text behind a slot's numbers."""


class Slot:
    """One image of one rank's shard.

    Args:
        content: uint8, (head_bytes + 4 * size * len(keys) or more,), aligned to 8 bytes.
        keys: of the vectors.
        size: elements of each vector.
        head_bytes: before the vectors: two numbers and a text.
    """

    def __init__(self, content: NDArray[np.uint8], keys: Sequence[str], size: int, head_bytes: int) -> None:
        self._numbers = content[:16].view(np.int64)
        """The iteration, and the length of the text."""
        self._text = content[16:head_bytes]
        vectors = content[head_bytes : head_bytes + 4 * size * len(keys)].view(np.float32).reshape(len(keys), size)
        self.vectors: dict[str, Float32Array] = dict(zip(keys, vectors, strict=True))

    @property
    def iteration(self) -> int:
        """Iterations that were done then; NONE: it is not complete."""
        return int(self._numbers[0])

    def open(self) -> None:
        """It is going to be written."""
        self._numbers[0] = NONE

    def close(self, iteration: int, scalars: Sequence[Mapping[str, Any]]) -> None:
        """It is complete, unless the scalars are longer than they have ever been thought to be."""
        text = json.dumps(list(scalars)).encode()
        if len(text) <= self._text.size:
            self._text[: len(text)] = np.frombuffer(text, np.uint8)
            self._numbers[1] = len(text)
            self._numbers[0] = iteration

    def send(self, world: World, to: int) -> list[Pending]:
        """Start sending all of it; it is not written until that is over."""
        return [world.start_send(each, to) for each in [*self._rest(), self._numbers]]

    def receive(self, world: World, source: int) -> Callable[[], None]:
        """Start receiving what `send` sends; the result waits for it and closes the slot as the other one is."""
        self.open()
        numbers = np.empty_like(self._numbers)
        pending = [world.start_receive(each, source) for each in [*self._rest(), numbers]]

        def complete() -> None:
            for each in pending:
                each.wait()
            self._numbers[1] = numbers[1]
            self._numbers[0] = numbers[0]

        return complete

    def _rest(self) -> list[NDArray[Any]]:
        """All but the numbers."""
        return [*self.vectors.values(), self._text]

    def scalars(self) -> list[dict[str, Any]]:
        """As `close` was given them."""
        found: list[dict[str, Any]] = json.loads(self._text[: self._numbers[1]].tobytes())
        return found


class Store:
    """The slots that a rank can read, for certain vectors. Construction is collective.

    Args:
        world: all ranks.
        keys: of the vectors.
        sizes: of each rank's vectors, in elements.
        num_groups: param groups, whose scalars are kept too.

    Raises:
        SharedMemoryError: on every rank: there is no room.
    """

    def __init__(self, world: World, keys: Sequence[str], sizes: Sequence[int], num_groups: int) -> None:
        self.keys = list(keys)
        head_bytes = _pages(16 + num_groups * _GROUP_BYTES)
        lengths = [head_bytes + _pages(4 * size * len(keys)) for size in sizes]
        first = world.first_rank_of(world.node)
        segments = share(world, NUM_SLOTS * lengths[world.rank])
        ranks = range(first, first + len(segments)) if len(segments) > 1 else [world.rank]
        self._world, self._buddy = world, buddy_of(world.rank, world.node_sizes)
        self._wards = [rank for rank in range(world.size) if buddy_of(rank, world.node_sizes) == world.rank]
        copies = [np.zeros(NUM_SLOTS * lengths[rank], np.uint8) for rank in self._wards]
        self.slots: dict[int, list[Slot]] = {}
        """By rank, of this node's ranks and of the wards."""
        for rank, segment in zip([*ranks, *self._wards], [*segments, *copies], strict=True):
            halves = segment.reshape(NUM_SLOTS, lengths[rank])
            self.slots[rank] = [Slot(half, keys, sizes[rank], head_bytes) for half in halves]
        for rank in (world.rank, *self._wards):
            for slot in self.slots[rank]:
                slot.open()
        world.node_barrier()  # nobody reads what is not opened

    def pass_on(self, number: int) -> None:
        """Give this rank's slot of this number to its buddy, and take the wards'. Collective."""
        if self._buddy is None:
            return
        world = self._world
        wards = [self.slots[rank][number].receive(world, rank) for rank in self._wards]
        for each in self.slots[world.rank][number].send(world, self._buddy):
            each.wait()
        for complete in wards:
            complete()


def buddy_of(rank: int, node_sizes: Sequence[int]) -> int | None:
    """Who keeps another copy of a rank's image, on the next node; None: there is no other node."""
    if len(node_sizes) == 1:
        return None
    firsts = [0, *itertools.accumulate(node_sizes)]
    node = bisect.bisect_right(firsts, rank) - 1
    after = (node + 1) % len(node_sizes)
    return firsts[after] + (rank - firsts[node]) % node_sizes[after]


def _pages(num_bytes: int) -> int:
    """So many bytes, in whole pages."""
    return -(-num_bytes // _PAGE) * _PAGE
