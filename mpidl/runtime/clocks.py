"""Comparing the clocks of hosts by messages there and back, as NTP does.

The first rank of every other node exchanges messages with rank 0, node by node: rank 0 sends, the other answers with
its clock, which it has read about when half of the time was over. Of several exchanges the fastest counts, as it waited
for nobody; its offset is wrong by half of the time it took, at most. Ranks of one node share a clock. If a rank stops,
rank 0, or who waits for it, waits until the launcher or the abort hook ends them.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from mpidl.runtime.world import World

_ROUNDS = 20


def offsets(world: World) -> NDArray[np.float64]:
    """How far each rank's `time.perf_counter` is ahead of rank 0's. Collective.

    Returns:
        float64, (ranks, 2): the offset, and its largest error, in seconds; on rank 0. Zeros elsewhere.
    """
    found = np.zeros((world.size, 2))
    for node in range(1, world.num_nodes):
        other = world.first_rank_of(node)
        if world.rank == 0:
            found[np.array(world.node_of) == node] = _ask(world, other)
        elif world.rank == other:
            _answer(world)
    return found


def _ask(world: World, other: int) -> tuple[float, float]:
    theirs, found = np.zeros(1), []
    for _ in range(_ROUNDS):
        sent = time.perf_counter()
        world.send(theirs, other)
        world.receive(theirs, other)
        back = time.perf_counter()
        found.append(((back - sent) / 2, float(theirs[0]) - (sent + back) / 2))
    error, offset = min(found)
    return offset, error


def _answer(world: World) -> None:
    own = np.zeros(1)
    for _ in range(_ROUNDS):
        world.receive(own, 0)
        own[0] = time.perf_counter()
        world.send(own, 0)
