"""Bringing updated shards of the weights to the other nodes' copies, bucket by bucket.

Generators like those of `reduction.py`: what stands before the first `yield` starts the bucket's exchange.

- `exact`: each piece travels from the owner's node's copy into the others', in place.
- `rounded`: the owner keeps float32 masters of its shard; their rounded values go into its own node's copy and to the
  others, so that every rank computes with the same weights.
"""

from __future__ import annotations

import itertools

from mpidl.parameters.exchange import Bucket, Exchange, Float32Array
from mpidl.parameters.layout import Slice
from mpidl.parameters.reduction import Steps
from mpidl.parameters.scratch import Scratch
from mpidl.parameters.team import Team
from mpidl.parameters.wire import AnyArray, Wire
from mpidl.runtime import World


def exact(exchange: Exchange, lane: World, bucket: Bucket) -> Steps:
    """One all-to-all a cell, in place. Collective."""
    yield from exchange.start_spread(lane, bucket)


def rounded(
    exchange: Exchange, lane: World, bucket: Bucket, wire: Wire, masters: Float32Array, scratch: Scratch, team: Team
) -> Steps:
    """One all-to-all of words. Collective.

    Args:
        exchange: whose result is written.
        lane: whose communicators to use.
        bucket: which part of it.
        wire: that rounds.
        masters: float32, (shard size,); this rank's.
        scratch: for the messages.
        team: of those who convert.
    """
    world = exchange.world
    own = exchange.pieces(bucket, world.rank)
    own_size = sum(piece.size for piece in own)
    send_counts, receive_counts, offsets, total = [0] * world.size, [0] * world.size, [0] * world.size, 0
    for node in range(world.num_nodes):
        if node != world.node:
            send_counts[exchange.duty_rank(world.rank, node)] = own_size
    senders = [shard for shard in exchange.duties() if world.node_of[shard] != world.node]
    for shard in senders:
        receive_counts[shard] = sum(piece.size for piece in exchange.pieces(bucket, shard))
        offsets[shard] = total
        total += receive_counts[shard]
    with scratch.borrow(own_size, wire.dtype) as words, scratch.borrow(total, wire.dtype) as received:
        _round(exchange, bucket, wire, masters, words, team)
        _place(exchange, bucket, world.rank, wire, words, team)
        yield lane.start_alltoall_varying(words, send_counts, [0] * world.size, received, receive_counts, offsets)
        for shard in senders:
            words_of_shard = received[offsets[shard] : offsets[shard] + receive_counts[shard]]
            _place(exchange, bucket, shard, wire, words_of_shard, team)


def _round(exchange: Exchange, bucket: Bucket, wire: Wire, masters: Float32Array, words: AnyArray, team: Team) -> None:
    """Write this rank's weights into a message."""
    pieces, offsets = _pieces(exchange, bucket, exchange.world.rank)

    def write(thread: int, index: int, start: int, stop: int) -> None:
        values = masters[pieces[index].own][start:stop]
        wire.write(values, words[offsets[index] + start : offsets[index] + stop])

    team.run([piece.size for piece in pieces], write)


def _place(exchange: Exchange, bucket: Bucket, shard: int, wire: Wire, words: AnyArray, team: Team) -> None:
    """Write a shard's words into the node's copy."""
    pieces, offsets = _pieces(exchange, bucket, shard)

    def read(thread: int, index: int, start: int, stop: int) -> None:
        first = pieces[index].start
        wire.read(words[offsets[index] + start : offsets[index] + stop], exchange.result[first + start : first + stop])

    team.run([piece.size for piece in pieces], read)


def _pieces(exchange: Exchange, bucket: Bucket, shard: int) -> tuple[list[Slice], list[int]]:
    """A shard's pieces of a bucket, and where each begins in a message."""
    pieces = exchange.pieces(bucket, shard)
    return pieces, [0, *itertools.accumulate(piece.size for piece in pieces)]
