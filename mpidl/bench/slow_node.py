"""What one slow node costs, while partitions stay and when they have moved as the balance would move them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mpidl import simulation
from mpidl.bench.report import Row
from mpidl.bench.workload import Machine, Workload
from mpidl.parameters import Assignment
from mpidl.scheduling import Balancer
from mpidl.simulation import FluidWire, Iteration

_GROUPS, _ITERATIONS = 6, 10
"""That are reported to the balance, in which it has to decide."""


def costs(
    workload: Workload,
    machine: Machine,
    num_nodes: int,
    factor: float,
    even_s: float,
    make: Callable[..., Iteration],
    wire: Callable[[], FluidWire],
) -> Row:
    """Seconds of an iteration in which the last node computes `factor` times as long as the others.

    Args:
        workload: of all ranks alike.
        machine: a node.
        num_nodes: in all.
        factor: above 1.
        even_s: an iteration without the slow node.
        make: an iteration, of an `assignment`.
        wire: makes a wire to simulate with.
    """
    even = make()
    world_size = num_nodes * machine.ranks_per_node
    stays = Assignment.even(machine.partitions_per_rank * world_size, world_size)
    slowness = np.ones(world_size)
    slowness[-machine.ranks_per_node :] = factor
    partition_s = (workload.forward_s + workload.backward_s) / machine.partitions_per_rank
    exposed_s = even_s - even.compute_s
    moved = _moved(stays, machine, partition_s * slowness, sum(p.pack_s + p.add_s for p in even.parts), exposed_s)
    stretch = float((np.diff(moved.starts) * slowness).max()) / machine.partitions_per_rank
    return {
        "slow_factor": factor,
        "slow_seconds": simulation.simulate(_stretched(even, factor), wire()).seconds,
        "balanced_seconds": simulation.simulate(_stretched(make(assignment=moved), stretch), wire()).seconds,
        "is_moved": moved != stays,
    }


def _moved(
    stays: Assignment, machine: Machine, partition_s: np.ndarray, local_sum_s: float, exposed_s: float
) -> Assignment:
    """What the balance makes of it; `stays` where it sees no gain."""
    world_size = len(partition_s)
    balancer = Balancer(stays, tuple(rank // machine.ranks_per_node for rank in range(world_size)))
    paces = np.stack([partition_s, np.zeros(world_size), np.full(world_size, float(_ITERATIONS))], axis=1)
    for _ in range(_GROUPS):
        if balancer.observe(stays, paces, local_sum_s=local_sum_s, reduce_scatter_s=max(exposed_s, 0.0)):
            break
    return balancer.assignment


def _stretched(iteration: Iteration, factor: float) -> Iteration:
    """The same with compute that takes longer; who waits for the slowest takes as long."""
    parts = [
        dataclasses.replace(part, ready_s=factor * part.ready_s, needed_s=factor * part.needed_s)
        for part in iteration.parts
    ]
    return dataclasses.replace(
        iteration, forward_s=factor * iteration.forward_s, backward_s=factor * iteration.backward_s, parts=tuple(parts)
    )
