"""Where each tensor lies in a flat vector, and how vectors are cut into shards. Pure.

Offsets depend on the tensors only, never on the number of ranks. Every tensor begins at a multiple of 16 elements
(64 bytes, the alignment that torch gives its own tensors, on which MKL's bits may depend); the gaps hold zeros and
stay zero. Shards are cut at multiples of `BLOCK_SIZE` elements, so a block's square sum never depends on the cut and
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
    """Cut [0, size) into one contiguous shard per rank, at multiples of `block_size`.

    Sizes differ by at most one block; with fewer blocks than ranks some ranks hold nothing.
    """
    num_blocks = -(-size // block_size)
    cuts = [min(size, block_size * (-(-num_blocks * rank // world_size))) for rank in range(world_size + 1)]
    return list(itertools.pairwise(cuts))


def block_pieces(pieces: Sequence[Piece], block_size: int) -> list[Piece]:
    """Each shard's [first, last) block numbers."""
    return [(start // block_size, -(-stop // block_size)) if start < stop else (0, 0) for start, stop in pieces]


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
