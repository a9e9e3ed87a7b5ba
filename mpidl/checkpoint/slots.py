"""Where the images of shards are kept that a lost rank would leave (`memory.py`): on its node, and on the next one.

Each rank writes its image into a *slot*, one of two, of its own segment of node-shared memory. Where there are several
nodes, a copy goes to the rank's *buddy*: the rank of the same place on the next node (on a smaller node several share
one), the last node's next being the first. So a rank keeps the images of its *wards* too, in memory of its own.

- *write*: the slot's iteration is set to NONE, the content is written, the iteration is set. So a slot is never torn,
  whenever its owner dies. The owner alone writes. Where slots lie in files that outlive all ranks (`local.py`), they
  have a checksum too, which is set before the iteration.
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
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from mpidl.parameters.layout import Piece
from mpidl.runtime import Pending, World, share

Float32Array = NDArray[np.float32]

NUM_SLOTS = 2
NONE = -1
_PAGE = 4096
NUMBERS_BYTES = 32
_GROUP_BYTES = 1024
"""For each param group's scalars, which are a text behind a slot's numbers."""


class Slot:
    """One image of one rank's shard.

    Args:
        content: uint8, (head_bytes + 4 * size * len(keys) or more,), aligned to 8 bytes.
        keys: of the vectors.
        size: elements of each vector.
        head_bytes: before the vectors: four numbers and a text.
        has_sum: whether it gets a checksum.
    """

    def __init__(
        self, content: NDArray[np.uint8], keys: Sequence[str], size: int, head_bytes: int, *, has_sum: bool = False
    ) -> None:
        self._numbers = content[:NUMBERS_BYTES].view(np.int64)
        """The iteration, the length of the text, and the halves of the checksum, or zeros."""
        self._text = content[NUMBERS_BYTES:head_bytes]
        self._content = content[head_bytes : head_bytes + 4 * size * len(keys)]
        vectors = self._content.view(np.float32).reshape(len(keys), size)
        self.vectors: dict[str, Float32Array] = dict(zip(keys, vectors, strict=True))
        self._has_sum = has_sum

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
            if self._has_sum:
                self._numbers[2:] = self._sum(iteration)
            self._numbers[0] = iteration

    def is_sound(self) -> bool:
        """Whether it is complete, and its checksum that of what it holds."""
        if self.iteration < 0 or not 0 <= self._numbers[1] <= self._text.size:
            return False
        return bool((self._numbers[2:] == self._sum(self.iteration)).all())

    def _sum(self, iteration: int) -> NDArray[np.int64]:
        found = xxhash.xxh3_128(iteration.to_bytes(8, "little"))
        found.update(self._text[: self._numbers[1]].data)
        found.update(self._content.data)
        return np.frombuffer(found.digest(), np.int64)

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
            self._numbers[1:] = numbers[1:]
            self._numbers[0] = numbers[0]

        return complete

    def _rest(self) -> list[NDArray[Any]]:
        """All but the numbers."""
        return [*self.vectors.values(), self._text]

    def scalars(self) -> list[dict[str, Any]]:
        """As `close` was given them."""
        found: list[dict[str, Any]] = json.loads(self._text[: self._numbers[1]].tobytes())
        return found


class Files(Protocol):
    """What makes the files of slots (`local.LocalFiles`)."""

    def share(
        self, series: str, keys: Sequence[str], runs: Sequence[Sequence[Piece]], head_bytes: int, wards: Sequence[int]
    ) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
        """The slots of this node's ranks, and those of the wards. Collective."""


class Store:
    """The slots that a rank can read, for certain vectors. Construction is collective.

    Args:
        world: all ranks.
        keys: of the vectors.
        runs: of each rank's shard: elements [start, stop) of the vector without gaps.
        num_groups: param groups, whose scalars are kept too.
        files: where slots are to outlive their ranks; None: they need not.

    Raises:
        SharedMemoryError: on every rank: there is no room.
    """

    def __init__(
        self,
        world: World,
        keys: Sequence[str],
        runs: Sequence[Sequence[Piece]],
        num_groups: int,
        files: Files | None = None,
    ) -> None:
        self.keys = list(keys)
        sizes = [sum(stop - start for start, stop in each) for each in runs]
        head_bytes = head_bytes_for(num_groups)
        lengths = [slot_bytes(head_bytes, size, len(keys)) for size in sizes]
        first = world.first_rank_of(world.node)
        self._world, self._buddy = world, buddy_of(world.rank, world.node_sizes)
        self._wards = [rank for rank in range(world.size) if buddy_of(rank, world.node_sizes) == world.rank]
        self.series: str = "" if files is None else world.broadcast_object(secrets.token_hex(8))
        """The name of its files."""
        if files is None:
            segments = share(world, NUM_SLOTS * lengths[world.rank])
            copies = [np.zeros(NUM_SLOTS * lengths[rank], np.uint8) for rank in self._wards]
        else:
            segments, copies = files.share(self.series, keys, runs, head_bytes, self._wards)
        ranks = range(first, first + len(segments)) if len(segments) > 1 else [world.rank]
        has_sum = files is not None
        self.slots: dict[int, list[Slot]] = {}
        """By rank, of this node's ranks and of the wards."""
        for rank, segment in zip([*ranks, *self._wards], [*segments, *copies], strict=True):
            halves = segment.reshape(NUM_SLOTS, lengths[rank])
            self.slots[rank] = [Slot(half, keys, sizes[rank], head_bytes, has_sum=has_sum) for half in halves]
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


def head_bytes_for(num_groups: int) -> int:
    """What a slot has before its vectors, for an optimizer of so many param groups."""
    return _pages(NUMBERS_BYTES + num_groups * _GROUP_BYTES)


def slot_bytes(head_bytes: int, size: int, num_vectors: int) -> int:
    """The length of a slot, in whole pages."""
    return head_bytes + _pages(4 * size * num_vectors)


def _pages(num_bytes: int) -> int:
    """So many bytes, in whole pages."""
    return -(-num_bytes // _PAGE) * _PAGE
