"""Starting a job: MPI, the ranks' nodes, threads and instruction set, and the hooks that end it.

A rank whose launcher says that it is one of several, and whose MPI says that it is alone, stops here. For tests,
`MPIDL_EMULATED_NODES=2` (or explicit sizes, `3,1`) splits one machine's ranks into nodes that share nothing.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from typing import Any

from mpidl.errors import LaunchError
from mpidl.runtime import faults, launcher, threads
from mpidl.runtime.waiting import completes_within
from mpidl.runtime.world import World

_world: World | None = None


def init(threads_per_rank: int | None = None) -> World:
    """Start MPI, find the nodes, settle threads and instruction set; the same `World` on every later call.

    Collective over MPI_COMM_WORLD at the first call.

    Args:
        threads_per_rank: torch threads; default: OMP_NUM_THREADS, else the cores that this rank really has, the
            lowest over all ranks.

    Raises:
        LaunchError: the launcher's number of processes is not MPI's (the wrong mpirun), or a rank's MPI cannot load.
    """
    global _world
    if _world is None:
        _world = _start(threads_per_rank)
        threads.set_threads(_world.threads_per_rank)
    elif threads_per_rank is not None and threads_per_rank != _world.threads_per_rank:
        _world = dataclasses.replace(_world, threads_per_rank=threads_per_rank)
        threads.set_threads(threads_per_rank)
    return _world


def _start(threads_per_rank: int | None) -> World:
    MPI = _import_mpi()
    library = " ".join(MPI.Get_library_version().splitlines()[0].strip("\x00").split())
    message = launcher.mismatch(launcher.launched_size(), MPI.COMM_WORLD.size, library)
    if message:
        raise faults.told_once(LaunchError(message))
    machine = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    comm, node_comm, node_of = _split_nodes(MPI, machine)
    cores = machine.allgather(threads.own_cores())
    own_threads = threads_per_rank or threads.default_threads(cores[machine.rank], cores)
    shares_cores = machine.size > len({core for other in cores for core in other})
    facts = comm.allgather((own_threads, threads.instruction_set(), platform.node(), _takes_threads(MPI)))
    warning = threads.limit_instruction_set([fact[1] for fact in facts])
    world = World(
        comm=comm,
        node_comm=node_comm,
        column_comm=_column(MPI, comm, node_comm, node_of),
        node_of=node_of,
        threads_per_rank=min(fact[0] for fact in facts),
        shares_cores=shares_cores,
        library=library,
        hostnames=tuple(fact[2] for fact in facts),
        takes_threads=all(fact[3] for fact in facts),
    )
    all_leave = _leaving(MPI, comm)
    right = _right_to_print(machine, key=comm.bcast(os.urandom(8).hex(), root=0))
    faults.install(world.rank, world.size, world.abort, all_leave, right)
    if warning:
        faults.warn(warning)
    machine.Free()
    return world


def _takes_threads(MPI: Any) -> bool:
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def _leaving(MPI: Any, comm: Any) -> Callable[[float], bool]:
    """A barrier for the ranks' ends, apart from whatever the others may wait in. Collective."""
    apart = comm.Dup()

    def all_leave(limit_s: float) -> bool:
        return MPI.Is_finalized() or completes_within(apart.Ibarrier(), limit_s)

    return all_leave


def _right_to_print(machine: Any, key: str) -> int | None:
    """A file that all ranks of this machine have open and that has no name any more. Collective over the machine."""
    path, right = faults.open_right(key)
    machine.Barrier()
    path.unlink(missing_ok=True)
    return right


def _import_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"MPI cannot be loaded: {error}; install one with `pip install mpidl[mpich]`, or load the site's MPI "
            "module; see `mpidl doctor`"
        ) from error
    return MPI


def _split_nodes(MPI: Any, machine: Any) -> tuple[Any, Any, tuple[int, ...]]:
    """Communicators of all ranks, node by node, and of this node, and each rank's node."""
    emulated = _emulated_node(os.environ.get("MPIDL_EMULATED_NODES", ""), machine.rank, machine.size)
    node_comm = machine.Split(emulated, machine.rank)
    first = node_comm.bcast(MPI.COMM_WORLD.rank, root=0)
    comm = MPI.COMM_WORLD.Split(0, first * MPI.COMM_WORLD.size + node_comm.rank)
    firsts = comm.allgather(first)
    nodes = sorted(set(firsts))
    return comm, node_comm, tuple(nodes.index(entry) for entry in firsts)


def _column(MPI: Any, comm: Any, node_comm: Any, node_of: tuple[int, ...]) -> Any:
    """A communicator of one rank per node, for the local ranks that every node has."""
    smallest = min(node_of.count(node) for node in set(node_of))
    in_column = node_comm.rank < smallest
    column = comm.Split(node_comm.rank if in_column else MPI.UNDEFINED, comm.rank)
    return column if in_column else None


def _emulated_node(setting: str, rank: int, size: int) -> int:
    """The emulated node of a machine's rank: "" none, "2" that many nodes, "3,1" nodes of those sizes."""
    if not setting:
        return 0
    try:
        numbers = [int(part) for part in setting.split(",")]
    except ValueError:
        numbers = [0]
    if len(numbers) == 1 and 0 < numbers[0] <= size:
        return rank * numbers[0] // size
    if sum(numbers) != size or min(numbers) < 1:
        raise LaunchError(
            f"MPIDL_EMULATED_NODES={setting} does not fit {size} ranks; give a number of nodes of at most {size}, or "
            f"sizes that add up to {size}"
        )
    return next(node for node in range(len(numbers)) if rank < sum(numbers[: node + 1]))
