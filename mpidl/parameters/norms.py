"""Norms of whole tensors that lie in pieces on several ranks: what a layer-wise optimizer asks for in each step.

The flat vector is cut into *segments*: at every block and at every tensor's bounds. Shards are cut at blocks, so each
segment has one owner, who adds up its squares in float64 in an order that depends on its length only. One allgather
brings the sums of all segments to all ranks, and each adds up, exactly rounded, those of the tensors that it holds
pieces of. So a norm is the same to the last bit on any number of ranks and nodes. Over the whole tensor, as ordinary
PyTorch has it, squares are added in another order: the norms differ by some 1e-16 of their value, and the ratios, which
torch rounds to float32, nearly never.

Each step of the optimizer is one such allgather, also on ranks that own nothing: two float64 a segment, 1/1024 of the
weights' bytes. If a rank stops, the others wait in it until the job is aborted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.optimizers import LayerWise, Pairs
from mpidl.parameters.layout import FlatLayout, Piece, Shards
from mpidl.parameters.update import ShardOptimizer
from mpidl.runtime import World

Int64Array = NDArray[np.int64]


def use_norms_over_shards(update: ShardOptimizer, world: World, layout: FlatLayout, shards: Shards) -> None:
    """Let a layer-wise optimizer measure whole tensors instead of its pieces; other optimizers stay as they are.

    Not collective, but every rank must do it: from then on the optimizer's steps are.
    """
    if isinstance(update.optimizer, LayerWise):
        update.optimizer.norms = ShardNorms(world, layout, shards, update.cut_at_tensors(layout))


@dataclasses.dataclass(frozen=True)
class Segments:
    """Runs of elements that lie in one tensor and in one block, in the order of the flat vector. Pure."""

    starts: Int64Array
    """(num_segments,): the first element of each."""
    stops: Int64Array
    """(num_segments,): the element behind its last one."""
    firsts: Int64Array
    """(num_tensors + 1,): tensor i has the segments [firsts[i], firsts[i + 1])."""

    @classmethod
    def of(cls, layout: FlatLayout) -> Segments:
        """Cut the tensors of a layout."""
        cuts = []
        for slot in layout.slots:
            block = slot.offset // kernels.BLOCK_SIZE + 1
            inside = np.arange(block * kernels.BLOCK_SIZE, slot.stop, kernels.BLOCK_SIZE, dtype=np.int64)
            cuts.append(np.unique(np.concatenate([[slot.offset], inside, [slot.stop]]).astype(np.int64)))
        return cls(
            np.concatenate([each[:-1] for each in cuts]),
            np.concatenate([each[1:] for each in cuts]),
            np.cumsum([0, *(len(each) - 1 for each in cuts)], dtype=np.int64),
        )

    def owners(self, shards: Shards, rank: int, world_size: int) -> Int64Array:
        """Whose sums a rank takes for each segment, int64, (num_segments,): the owner's; its own, if all own all."""
        if shards.is_replicated:
            return np.full(self.starts.size, rank)
        runs = sorted((start, rank) for rank in range(world_size) for start, _ in shards.runs(rank))
        starts, ranks = np.array(runs, np.int64).reshape(-1, 2).T
        return ranks[np.searchsorted(starts, self.starts, side="right") - 1]

    def cuts_in(self, piece: Piece) -> tuple[slice, Int64Array]:
        """The segments of a piece of one tensor, and where they are cut, from the piece's start on."""
        first, last = np.searchsorted(self.starts, piece)
        return slice(int(first), int(last)), np.append(self.starts[first:last], piece[1]) - piece[0]


class ShardNorms:
    """The norms of whole tensors for one rank's optimizer. Each call is collective, unless every rank owns all.

    Args:
        world: all ranks.
        layout: of the whole vector.
        shards: who owns what of it.
        pieces: the [start, stop) of each of the optimizer's tensors, of one parameter each.
    """

    def __init__(self, world: World, layout: FlatLayout, shards: Shards, pieces: Mapping[torch.Tensor, Piece]) -> None:
        self._world = world
        segments = Segments.of(layout)
        owners = segments.owners(shards, world.rank, world.size)
        self._counts = np.bincount(owners, minlength=world.size).tolist()
        self._is_replicated = shards.is_replicated
        self._firsts = segments.firsts
        self._order = np.argsort(owners, kind="stable")
        """Where in the vector the segments are that come from rank 0, from rank 1, ..."""
        by_rank = owners[self._order]
        position = np.empty_like(self._order)
        position[self._order] = np.arange(by_rank.size) - np.searchsorted(by_rank, by_rank)
        self._places = {tensor: _place(segments, piece, position) for tensor, piece in pieces.items()}

    def __call__(self, pairs: Pairs) -> list[tuple[float, float]]:
        """The norms of each pair over the whole tensors that the pieces are of; as `Norms` has it. Collective."""
        own = np.zeros((2, self._counts[self._world.rank]))
        tensors = []
        for weights, measured in pairs:
            place = self._places[weights]
            kernels.segment_squares(_array(weights), place.cuts, own[0, place.own])
            kernels.segment_squares(_array(measured), place.cuts, own[1, place.own])
            tensors.append(place.tensor)
        sums = own.T.reshape(-1)
        if not self._is_replicated:
            sums = self._world.allgather_varying(sums, [2 * count for count in self._counts])
        squares = np.empty((2, self._order.size))
        squares[:, self._order] = sums.reshape(-1, 2).T
        norms = {tensor: self._norms_of(tensor, squares) for tensor in set(tensors)}
        return [norms[tensor] for tensor in tensors]

    def _norms_of(self, tensor: int, squares: NDArray[np.float64]) -> tuple[float, float]:
        of_weights, of_measured = squares[:, self._firsts[tensor] : self._firsts[tensor + 1]].tolist()
        return math.sqrt(math.fsum(of_weights)), math.sqrt(math.fsum(of_measured))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one of the optimizer's tensors is."""

    tensor: int
    """The parameter's place in the layout."""
    own: slice
    """Its segments among this rank's."""
    cuts: Int64Array


def _place(segments: Segments, piece: Piece, position: Int64Array) -> _Place:
    inside, cuts = segments.cuts_in(piece)
    tensor = int(np.searchsorted(segments.firsts, inside.start, side="right")) - 1
    first = int(position[inside.start])
    return _Place(tensor, slice(first, first + inside.stop - inside.start), cuts)


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array
