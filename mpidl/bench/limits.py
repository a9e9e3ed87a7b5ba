"""What memory and wire allow: the least bytes that have to move, and how fast bytes move here."""

from __future__ import annotations

import time

import numpy as np
import torch

from mpidl.parameters.baselines import BASELINES
from mpidl.runtime import Pending, World

FLOAT_BYTES = 4
_MESSAGE_BYTES = 16 * 2**20
_MESSAGES = 5

MEMORY_FORMULA = "4 N (L + 2 S / M + 1 / M + 1) bytes a node"
"""N parameters, L ranks a node, M nodes, S state tensors: each node reads its L rows of gradients, reads and writes the
state and reads the weights of its 1/M of the vector, and writes all weights. On one node 4 N (L + 2 S + 2)."""

WIRE_FORMULA = "2 * 4 N (M - 1) / M bytes from every node"
"""A reduce-scatter and an allgather between M nodes, each of which sends all but its own share once."""


def memory_bytes(world: World, size: int, num_states: int) -> float:
    """`MEMORY_FORMULA` for this rank's node, bytes read and bytes written together.

    Args:
        world: ranks and nodes.
        size: N, parameters.
        num_states: S, the optimizer's tensors as long as the parameters.
    """
    return FLOAT_BYTES * size * (world.local_size + (2 * num_states + 1) / world.num_nodes + 1)


def wire_bytes(world: World, size: int) -> float:
    """`WIRE_FORMULA`: bytes that a node has to send, and as many that it receives meanwhile."""
    return 2 * FLOAT_BYTES * size * (world.num_nodes - 1) / world.num_nodes


def ring_bytes(world: World, size: int) -> float:
    """Bytes that each rank sends in an allreduce of `size` float32 around a ring, which is the least.

    To one rank and back, or through a tree, is as much for an average rank.
    """
    return 2 * FLOAT_BYTES * size * (world.size - 1) / world.size


def sent_bytes(world: World, size: int, *, reduction: str, wire: str = "float32") -> float:
    """Bytes that an average rank of mpidl's sends for `size` parameters: of `WIRE_FORMULA` its part of the node's.

    Args:
        world: ranks and nodes.
        size: parameters.
        reduction: of the ParameterManager; the baselines share no memory.
        wire: of what travels.
    """
    if reduction in BASELINES:
        return ring_bytes(world, size)
    width = {"float32": 1.0, "bfloat16": 0.5}[wire]
    return width * wire_bytes(world, size) * world.num_nodes / world.size


class Copy:
    """The limit of memory: this rank's part of so many bytes, moved by a plain copy while all ranks copy.

    A copy of n bytes moves 2 n: it reads and writes them. Timed in turn with the ways, it meets the same machine.
    """

    def __init__(self, world: World, node_bytes: float) -> None:
        size = max(1, round(node_bytes / world.local_size / 2 / FLOAT_BYTES))
        self._source, self._target = torch.ones(size), torch.zeros(size)

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> None:
        """Copy."""
        self._target.copy_(self._source)


def wire_bandwidth(world: World) -> float:
    """Bytes a second from a node to the next while it receives as many: one rank of each node, in a ring. Collective.

    Messages of 16 MiB; the fastest of five rounds, each as long as on the slowest node.
    """
    leaders = [world.first_rank_of(node) for node in range(world.num_nodes)]
    sent, received = np.ones(_MESSAGE_BYTES, np.uint8), np.empty(_MESSAGE_BYTES, np.uint8)
    seconds = np.zeros(_MESSAGES)
    for index in range(_MESSAGES):
        world.barrier()
        if world.rank in leaders:
            begin = time.perf_counter()
            to, by = (leaders[(world.node + step) % world.num_nodes] for step in (1, -1))
            requests = world.comm.Irecv(received, source=by), world.comm.Isend(sent, dest=to)
            for request in requests:
                Pending(request, world.shares_cores).wait()
            seconds[index] = time.perf_counter() - begin
    return _MESSAGE_BYTES / float(world.allreduce(seconds, "max").min())


def wire_seconds(world: World, size: int, wire_gbit: float | None) -> float | None:
    """How long the wire needs at the least; None on one node. Collective.

    Args:
        world: ranks and nodes.
        size: N, parameters.
        wire_gbit: Gbit/s of a node's link; None: it is measured.
    """
    if world.num_nodes == 1:
        return None
    bandwidth = wire_bandwidth(world) if wire_gbit is None else 1e9 / 8 * wire_gbit
    return wire_bytes(world, size) / bandwidth
