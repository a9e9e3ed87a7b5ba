"""Some ranks of a job working as a smaller job, while the others wait.

1. *split*: all ranks make communicators of the first ranks and of their nodes; the part is a `World` like any other.
2. *work*: the part's ranks run a function of it. The others wait in 3 with one non-blocking barrier, at which they look
   every 50 ms at the most, so that they take no core from those that work.
3. *join*: when the last of the part has come, rank 0, which is in every part, tells all ranks whether the work failed.

An error that the part's ranks have agreed on becomes one of all ranks. Anything else that one rank raises leaves this
module on that rank alone and ends the job, as everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from mpidl.errors import MpidlError
from mpidl.runtime import faults, ulfm
from mpidl.runtime.waiting import Patience
from mpidl.runtime.world import World

Result = TypeVar("Result")

_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 1e-3, 5e-2


def run_on_first(world: World, num_ranks: int, work: Callable[[World], Result]) -> Result | None:
    """Let the first ranks work as a world of their own; the others wait. Collective.

    Args:
        world: all ranks.
        num_ranks: how many work, at least 1; ranks are numbered node by node, so the first nodes' come first.
        work: called on those ranks only, with their world; what it makes of the world's communicators it also frees.

    Returns:
        What `work` returned; None on ranks that waited.

    Raises:
        MpidlError: on every rank, what `work` raised on all of its ranks.
    """
    part = _split(world, num_ranks)
    result, failure = None, None
    if part is not None:
        try:
            result = work(part)
        except MpidlError as error:
            if not faults.is_on_all_ranks(error):
                raise  # the others of the part may wait for this rank
            failure = error
    _join(world)
    if part is not None:
        part.free()
    told = world.broadcast_object(None if failure is None else (type(failure), str(failure)))
    if told is not None:
        raise faults.on_all_ranks(failure or told[0](told[1]))
    return result


def _split(world: World, num_ranks: int) -> World | None:
    """The first ranks as a world; None on the others. Collective."""
    from mpi4py import MPI

    is_in = world.rank < num_ranks
    node_of = world.node_of[:num_ranks]
    smallest = min(node_of.count(node) for node in set(node_of))
    comm: Any = world.comm.Split(0 if is_in else MPI.UNDEFINED, world.rank)
    node_comm: Any = world.node_comm.Split(0 if is_in else MPI.UNDEFINED, world.rank)
    if not is_in:
        return None
    in_column = node_comm.rank < smallest
    for each in (comm, node_comm):
        ulfm.guard(each)
    column_comm: Any = comm.Split(node_comm.rank if in_column else MPI.UNDEFINED, world.rank)
    if in_column:
        ulfm.guard(column_comm)
    return dataclasses.replace(
        world,
        comm=comm,
        node_comm=node_comm,
        column_comm=column_comm if in_column else None,
        node_of=node_of,
        hostnames=world.hostnames[:num_ranks],
        calls=world.calls.apart(),
    )


def _join(world: World) -> None:
    """Wait for all ranks, and take no core meanwhile. Collective."""
    everyone = world.start_barrier()
    patience = Patience(yields=0, first_s=_FIRST_SLEEP_S, longest_s=_LONGEST_SLEEP_S)
    with world.activity.waiting():
        while not everyone.is_over():
            patience.pause()
            world.activity.beat()  # the others may take as long as they need
