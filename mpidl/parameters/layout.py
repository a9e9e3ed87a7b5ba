"""Where each tensor lies in a flat vector, and how vectors are cut into shards. Pure.

Offsets depend on the tensors only, never on the number of ranks. Every tensor begins at a multiple of 16 elements
(64 bytes, the alignment that torch gives its own tensors, on which MKL's bits may depend); the gaps hold zeros and
stay zero. Pieces are cut at multiples of `BLOCK_SIZE` elements, so a block's square sum never depends on the cut and
no vectorised optimizer meets an unaligned end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

ALIGNMENT = 16
"""Elements (float32) that every tensor's offset is a multiple of: one cache line."""

Piece = tuple[int, int]
"""Elements [start, stop) of a flat vector."""


@dataclasses.dataclass(frozen=True)
class TensorSlot:
    """One tensor's place: `size` elements from `offset` of the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def stop(self) -> int:
        """The element behind the tensor's last one."""
        return self.offset + self.size


@dataclasses.dataclass(frozen=True)
class FlatLayout:
    """The slots of named tensors in one flat vector, in the order given."""

    slots: tuple[TensorSlot, ...]
    size: int
    """Elements of the vector, gaps included: a multiple of ALIGNMENT."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Sequence[int]]]) -> FlatLayout:
        """Lay out (name, shape) pairs one behind the other."""
        slots = []
        offset = 0
        for name, shape in tensors:
            size = math.prod(shape)
            slots.append(TensorSlot(name, tuple(shape), offset, size))
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(tuple(slots), offset)

    @property
    def num_elements(self) -> int:
        """Elements of all tensors, gaps left out."""
        return sum(slot.size for slot in self.slots)

    def tensors_in(self, piece: Piece) -> Iterator[tuple[TensorSlot, int, int]]:
        """Each tensor that overlaps a piece, with the overlap's [start, stop) in the flat vector."""
        for slot in self.slots:
            start, stop = max(slot.offset, piece[0]), min(slot.stop, piece[1])
            if start < stop:
                yield slot, start, stop

    def unpadded(self, piece: Piece) -> Piece:
        """The piece's [start, stop) in the vector without gaps, as checkpoints hold it."""
        start = sum(max(0, min(slot.stop, piece[0]) - slot.offset) for slot in self.slots)
        return start, start + sum(stop - first for _, first, stop in self.tensors_in(piece))

    def digest(self) -> str:
        """A hash of names, shapes and offsets, equal on ranks that hold the same model."""
        return hashlib.sha256(repr((self.slots, self.size)).encode()).hexdigest()


def shards(size: int, world_size: int, block_size: int) -> list[Piece]:
    """Cut [0, size) into one contiguous piece per rank, at multiples of `block_size`.

    Sizes differ by at most one block; with fewer blocks than ranks some ranks hold nothing.
    """
    num_blocks = -(-size // block_size)
    cuts = [min(size, block_size * (-(-num_blocks * rank // world_size))) for rank in range(world_size + 1)]
    return list(itertools.pairwise(cuts))


MIN_CELL_SIZE = 1 << 18
"""Elements of the smallest cell, unless it would give some rank less than one block: 1 MiB."""

MAX_CELLS = 128


@dataclasses.dataclass(frozen=True)
class Slice:
    """A run of elements that one rank owns."""

    start: int
    stop: int
    offset: int
    """Where the run begins in the rank's shard, whose slices stand one behind the other."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.stop - self.start

    @property
    def own(self) -> slice:
        """The run in the rank's shard."""
        return slice(self.offset, self.offset + self.size)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Who owns which elements: the vector is dealt out cell by cell, one piece of each cell to every rank.

    What is exchanged together, a bucket, is a run of cells; so every rank owns a piece of every bucket, and buckets of
    another length change nobody's shard. Pieces are cut at multiples of `block_size`.
    """

    cells: tuple[Piece, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    """Each rank's piece of each cell; (x, x) where it has none."""

    @classmethod
    def of(cls, size: int, world_size: int, block_size: int, *, num_cells: int | None = None) -> Shards:
        """Deal [0, size) out.

        Args:
            size: elements of the vector.
            world_size: number of ranks.
            block_size: what cuts are multiples of.
            num_cells: 1 gives everyone one contiguous piece; None: as many as buckets may be wanted.
        """
        if num_cells is None:
            wanted = max(MIN_CELL_SIZE, -(-size // MAX_CELLS))
            cell_size = _round_up(wanted, world_size * block_size)  # so all pieces but the last cell's are alike
        else:
            cell_size = _round_up(max(1, -(-size // num_cells)), block_size)
        cells = tuple((start, min(size, start + cell_size)) for start in range(0, size, cell_size)) or ((0, 0),)
        dealt = [
            [(start + low, start + high) for low, high in shards(stop - start, world_size, block_size)]
            for start, stop in cells
        ]
        return cls(cells, tuple(zip(*dealt, strict=True)))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank owns everything, instead of a part."""
        return len(self.pieces) > 1 and all(pieces == self.cells for pieces in self.pieces) and self.cells[-1][1] > 0

    def size_of(self, rank: int) -> int:
        """Elements of a rank's shard."""
        return sum(stop - start for start, stop in self.pieces[rank])

    def runs(self, rank: int) -> list[Piece]:
        """A rank's shard in as few pieces as it takes; none is empty."""
        return merge_pieces(self.pieces[rank])

    def slices(self, rank: int, max_size: int) -> list[Slice]:
        """A rank's shard in slices of at most `max_size` elements, each in one cell, cut at multiples of it."""
        found, offset = [], 0
        for start, stop in self.pieces[rank]:
            for first in range(start, stop, max_size):
                last = min(first + max_size, stop)
                found.append(Slice(first, last, offset))
                offset += last - first
        return found


def blocks_of(piece: Piece, block_size: int) -> range:
    """The numbers of a piece's blocks; it begins at one."""
    return range(piece[0] // block_size, -(-piece[1] // block_size))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def merge_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Join pieces that touch; the pieces come in order and do not overlap."""
    merged: list[Piece] = []
    for start, stop in pieces:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged


def clip(piece: Piece, bounds: Piece) -> Piece:
    """The part of a piece inside bounds; (x, x) when there is none."""
    start = min(max(piece[0], bounds[0]), bounds[1])
    return start, max(start, min(piece[1], bounds[1]))
