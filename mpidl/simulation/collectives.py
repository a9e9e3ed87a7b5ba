"""The messages of an exchange between nodes, round by round, as MPICH sends them. Pure.

Nodes are numbered; the ranks of one column (one of each node) exchange at the same time as those of the others, so
what is told here are the bytes of whole nodes. Sources: MPICH 5.0, src/mpi/coll: ialltoallv (blocked), ireduce_scatter
(recursive halving below 512 KiB, else pairwise), iallgatherv (recursive doubling, Bruck or ring).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

THROTTLE = 32
"""Ranks that MPICH's all-to-all sends to at a time (MPIR_CVAR_ALLTOALL_THROTTLE); 0: to all."""

LONG_REDUCTION_BYTES = 524_288
"""From here on a reduce-scatter is pairwise (MPIR_CVAR_REDUCE_SCATTER_COMMUTATIVE_LONG_MSG_SIZE)."""

SHORT_GATHER_BYTES, LONG_GATHER_BYTES = 81_920, 524_288
"""MPIR_CVAR_ALLGATHER_SHORT_MSG_SIZE and MPIR_CVAR_ALLGATHER_LONG_MSG_SIZE."""


@dataclasses.dataclass(frozen=True)
class Round:
    """What every node sends before it waits: so many bytes to each of some others.

    Node r sends to (r - d) mod n for each distance d, or to r xor d.
    """

    distances: tuple[int, ...]
    num_bytes: float
    """To each of them."""
    is_xor: bool = False
    busiest_bytes: float = 0.0
    """What the node with most gets from each of as many others, where they do not all get as much."""

    def target(self, node: int, distance: int, num_nodes: int) -> int:
        """Whom a node sends to at a distance."""
        return node ^ distance if self.is_xor else (node - distance) % num_nodes


@dataclasses.dataclass(frozen=True)
class Overheads:
    """What software adds to messages, in seconds."""

    message_s: float = 1e-6
    """Of a rank's core, for each message."""
    round_s: float = 1e-4
    """Until a thread that looks now and then sees that a round is over and starts the next."""
    add_s_per_byte: float = 0.0
    """Of the library's own additions, where it makes them."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of all nodes."""

    kind: str
    """"alltoall", "reduce_scatter" or "allgather"."""
    num_nodes: int
    num_bytes: float
    """What a node sends to each other one, or the part of the whole that each has, or gets, in the end."""
    peers: int = THROTTLE
    """Nodes that an all-to-all sends to at a time; 0: to all."""
    num_rounds: int | None = None
    """Only the first ones; None: all."""
    busiest_bytes: float = 0.0
    """Of an all-to-all in which owners are fewer than nodes, and `num_bytes` a mean: what each of them gets from each
    other node, or sends. Flow by flow all send the mean."""

    def rounds(self) -> Iterator[Round]:
        """The messages, in order; nothing on one node."""
        if self.num_nodes > 1:
            yield from itertools.islice(_ROUNDS[self.kind](self), self.num_rounds)

    @property
    def whole_bytes(self) -> float:
        """Of all nodes' parts together."""
        return self.num_nodes * self.num_bytes

    @property
    def is_added(self) -> bool:
        """Whether the library adds what is received."""
        return self.kind == "reduce_scatter"


def _alltoall(of: Collective) -> Iterator[Round]:
    peers = of.peers or of.num_nodes
    for first in range(0, of.num_nodes, peers):
        distances = tuple(range(max(first, 1), min(first + peers, of.num_nodes)))
        if distances:
            yield Round(distances, of.num_bytes, busiest_bytes=of.busiest_bytes)


def _reduce_scatter(of: Collective) -> Iterator[Round]:
    if of.whole_bytes >= LONG_REDUCTION_BYTES:
        for distance in range(1, of.num_nodes):
            yield Round((distance,), of.num_bytes)
        return
    power = _power_below(of.num_nodes)
    if power < of.num_nodes:  # those above the power of two hand everything over before, and get their part after
        yield Round((power,), of.whole_bytes)
    distance = power // 2
    while distance:
        yield Round((distance,), of.whole_bytes * distance / power, is_xor=power == of.num_nodes)
        distance //= 2
    if power < of.num_nodes:
        yield Round((power,), of.num_bytes)


def _allgather(of: Collective) -> Iterator[Round]:
    is_power = _power_below(of.num_nodes) == of.num_nodes
    if (is_power and of.whole_bytes < LONG_GATHER_BYTES) or of.whole_bytes < SHORT_GATHER_BYTES:
        distance = 1  # recursive doubling, or Bruck's: whole pieces of 1, 2, 4, ... nodes
        while distance < of.num_nodes:
            yield Round((distance,), of.num_bytes * min(distance, of.num_nodes - distance), is_xor=is_power)
            distance *= 2
    else:
        for _ in range(of.num_nodes - 1):
            yield Round((of.num_nodes - 1,), of.num_bytes)  # a ring, to the next node


def _power_below(number: int) -> int:
    return 1 << int(math.log2(number))


_ROUNDS = {"alltoall": _alltoall, "reduce_scatter": _reduce_scatter, "allgather": _allgather}
