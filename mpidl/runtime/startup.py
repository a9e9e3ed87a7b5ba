"""Starting a job: MPI, the ranks' nodes, threads and instruction set, and the hooks that end it.

A rank whose launcher says that it is one of several, and whose MPI says that it is alone, stops here. For tests,
`MPIDL_EMULATED_NODES=2` (or explicit sizes, `3,1`) splits one machine's ranks into nodes that share nothing.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mpidl import guard
from mpidl.errors import ConfigError, LaunchError
from mpidl.runtime import abilities, diagnosis, faults, launcher, threads, ulfm
from mpidl.runtime.activity import FIELDS
from mpidl.runtime.shared import SharedMemoryError, forget_names_of_mpi, share
from mpidl.runtime.waiting import completes_within
from mpidl.runtime.watchdog import ON_HANG, Watchdog
from mpidl.runtime.watchdog import Settings as WatchSettings
from mpidl.runtime.world import World

_world: World | None = None
_watchdog: Watchdog | None = None


def init(threads_per_rank: int | None = None, *, is_strict: bool = True) -> World:
    """Start MPI, find the nodes, settle threads and instruction set; the same `World` on every later call.

    Collective over MPI_COMM_WORLD at the first call.

    Args:
        threads_per_rank: torch threads; default: OMP_NUM_THREADS, else the cores that this rank really has, the
            lowest over all ranks.
        is_strict: whether ranks that do not fit together are refused; `mpidl doctor` looks at them instead.

    Raises:
        LaunchError: the launcher's number of processes is not MPI's (the wrong mpirun or --mpi), a rank's MPI cannot
            load, two packages bring one, ranks have different versions, or fewer cores than their Slurm job asked for.
    """
    global _world, _watchdog
    if _world is None:
        _world = _start(threads_per_rank, is_strict)
        _watchdog = _watch(_world)
        atexit.register(_end_watching)  # before the ranks leave together: what was registered last is called first
        threads.set_threads(_world.threads_per_rank)
    elif threads_per_rank is not None and threads_per_rank != _world.threads_per_rank:
        _world = dataclasses.replace(_world, threads_per_rank=threads_per_rank)
        threads.set_threads(threads_per_rank)
    return _world


def watch(
    hang_seconds: float,
    on_hang: str,
    run_dir: str | pathlib.Path | None = None,
    *,
    is_training: bool = False,
    survives: bool = False,
) -> None:
    """Say what the watchdog does about a rank that keeps the others waiting; `watchdog.py` says how it notices.

    Not collective, but all ranks should say the same. Without it a hang is told after 900 seconds and nothing is ended.

    Args:
        hang_seconds: after which, if nothing moves, a hang is certain; a first report may come earlier. 0: never.
        on_hang: "end" (with code 76) or "warn".
        run_dir: a folder that all nodes see, through which they tell each other; made where it is not there. Without
            one, a job on several nodes ends where the rank to blame is seen by others of its own node, else when the
            ranks of a node have waited twice hang_seconds.
        is_training: whether it is a hang, too, where nothing moves and nobody waits.
        survives: whether the others go on without a lost rank, so that who hangs is killed instead of the job.

    Raises:
        ConfigError: a value is none of these, or the folder cannot be made.
    """
    check_watch(hang_seconds, on_hang)
    init()
    folder = None if run_dir is None else pathlib.Path(run_dir).absolute()
    if folder is not None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}; give another run_dir") from None
    assert _watchdog is not None, "init starts it"
    _watchdog.settings = WatchSettings(hang_seconds, on_hang, folder, is_training, survives)


def check_watch(hang_seconds: float, on_hang: str) -> None:
    """Raise ConfigError where `watch` would."""
    if not 0 <= hang_seconds < float("inf"):
        raise ConfigError(f"hang_seconds is {hang_seconds}; it must be a number of seconds, or 0 for never")
    if on_hang not in ON_HANG:
        raise ConfigError(f"on_hang is {on_hang!r}; it must be {' or '.join(map(repr, ON_HANG))}")


def restart(meeting: ulfm.Meeting) -> World:
    """The world of those who live, after ranks were lost: all communicators anew, ranks numbered anew, in their order.

    Collective over them. What was made of the world before is not used any more. Each keeps its node and its threads.

    Raises:
        MPI.Exception: one more is lost.
    """
    global _world, _watchdog
    assert _world is not None, "there is one before"
    from mpi4py import MPI

    before, comm = _world, meeting.comm
    node_comm: Any = comm.Split(before.node, comm.rank)
    facts = comm.allgather((before.node, before.hostname, threads.own_cores()))
    nodes = sorted({fact[0] for fact in facts})
    node_of = tuple(nodes.index(fact[0]) for fact in facts)
    beside = [fact[2] for fact in facts if fact[1] == before.hostname]
    made = dataclasses.replace(
        before,
        comm=comm,
        node_comm=ulfm.guard(node_comm),
        column_comm=_column(MPI, comm, node_comm, node_of),
        node_of=node_of,
        hostnames=tuple(fact[1] for fact in facts),
        shares_cores=len(beside) > len({core for cores in beside for core in cores}),
    )
    faults.move(made.rank, made.size, made.abort, _leaving(MPI, comm))
    ulfm.begin_anew(list(enumerate(made.hostnames)))
    settings = None if _watchdog is None else _watchdog.settings
    if _watchdog is not None:
        _watchdog.retire()
    _world, _watchdog = made, _watch(made)
    if settings is not None:
        _watchdog.settings = settings
    return made


def _end_watching() -> None:
    if _watchdog is not None:
        _watchdog.end()


def _watch(world: World) -> Watchdog:
    """Let the ranks of each node see what the others do. Collective."""
    own = [np.zeros(len(FIELDS))]
    try:
        rows = [segment.view(np.float64) for segment in share(world, own[0].nbytes)]
    except SharedMemoryError:
        rows = own  # without shared memory every rank is a node of its own
    local = world.local_rank if len(rows) > 1 else 0
    world.activity.move_to(rows[local])
    ranks = [rank for rank in range(world.size) if world.node_of[rank] == world.node] if len(rows) > 1 else [world.rank]
    key = world.broadcast_object(os.urandom(8).hex())
    guard.tell(job=key)
    world.node_barrier()  # all rows are filled
    watchdog = Watchdog(dict(zip(ranks, rows, strict=True)), world, key)
    watchdog.start()
    return watchdog


def _start(threads_per_rank: int | None, is_strict: bool) -> World:
    if both := launcher.two_libraries(launcher.mpi_packages()):
        raise faults.told_once(LaunchError("; ".join(both)))
    if wrong := launcher.wrong_mpirun(launcher.mpi_packages()):
        raise faults.told_once(LaunchError(wrong))
    ulfm.prepare()
    MPI = _import_mpi()
    library = " ".join(MPI.Get_library_version().splitlines()[0].strip("\x00").split())
    message = launcher.mismatch(launcher.launched_size(), MPI.COMM_WORLD.size, library)
    if message:
        raise faults.told_once(LaunchError(message))
    machine = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    comm, node_comm, node_of = _split_nodes(MPI, machine)
    if abilities.survives_lost_ranks():
        ulfm.begin(comm, [])
        ulfm.guard(node_comm)
    cores = machine.allgather(threads.own_cores())
    own_threads = threads_per_rank or threads.default_threads(cores[machine.rank], cores)
    own = diagnosis.own_facts(node_of[comm.rank], own_threads, threads_per_rank, library)
    facts = comm.allgather((own, threads.instruction_set(), _takes_threads(MPI)))
    ranks = [fact[0] for fact in facts]
    warning = threads.limit_instruction_set([fact[1] for fact in facts])
    world = World(
        comm=comm,
        node_comm=node_comm,
        column_comm=_column(MPI, comm, node_comm, node_of),
        node_of=node_of,
        threads_per_rank=min(rank.threads for rank in ranks),
        shares_cores=threads.crowd(cores) is not None,
        library=library,
        hostnames=tuple(rank.hostname for rank in ranks),
        takes_threads=all(fact[2] for fact in facts),
    )
    if ulfm.is_on():
        ulfm.begin_anew(list(enumerate(world.hostnames)))
    all_leave = _leaving(MPI, comm)
    right = _right_to_print(machine, key=comm.bcast(os.urandom(8).hex(), root=0))
    faults.install(world.rank, world.size, world.abort, all_leave, right)
    if is_strict:
        _judge(ranks)
    if warning:
        faults.warn(warning)
    machine.Free()
    return world


def _judge(ranks: list[diagnosis.RankFacts]) -> None:
    """Refuse, on all ranks, what cannot go well, and warn of what is wrong besides."""
    findings = diagnosis.of_ranks(ranks)
    if stop := next((finding for finding in findings if finding.stops), None):
        raise faults.on_all_ranks(LaunchError(f"{stop.what}; {stop.fix}"))
    for finding in findings:
        if finding.level == "error":
            faults.warn(f"{finding.what}; {finding.fix}")


def _takes_threads(MPI: Any) -> bool:
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE) and not ulfm.is_on()


def _leaving(MPI: Any, comm: Any) -> Callable[[float], bool]:
    """A barrier for the ranks' ends, apart from whatever the others may wait in. Collective."""
    apart = ulfm.guard(comm.Dup())

    def all_leave(limit_s: float) -> bool:
        if MPI.Is_finalized() or ulfm.has_ended():
            return True
        try:
            return completes_within(apart.Ibarrier(), limit_s)
        except MPI.Exception:
            if ulfm.is_on():  # one is lost, and nobody will come whom this rank could wait for
                return True
            raise

    return all_leave


def _right_to_print(machine: Any, key: str) -> int | None:
    """A file that all ranks of this machine have open and that has no name any more. Collective over the machine."""
    path, right = faults.open_right(key)
    machine.Barrier()
    path.unlink(missing_ok=True)
    forget_names_of_mpi()
    return right


def _import_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"MPI cannot be loaded: {error}; install one with `pip install mpich`, or load the site's MPI "
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
    return ulfm.guard(column) if in_column else None


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
