"""How `mpidl doctor` looks at a job: who sends what when, and how long anybody waits.

1. Every process looks at its own software and asks the library for its name in a child process. Where library and
   launcher do not belong together MPI is not started: the first process, by the launcher's word, reports, the others
   leave. A process that cannot load the library, though others may, says so itself a little later.
2. MPI starts under a guard (`guard.py`): a process that does not get through says so, and is killed.
3. Rank 0 writes a file into the folder and broadcasts its path; every rank looks for it for `shared_folder.LIMIT_S`.
4. Every rank sends what it has found to rank 0, which collects for ANSWER_LIMIT_S and then knows who is missing. If
   none is, it tells all to go on; else it reports at once and aborts the job.
5. Neighbours measure their links (`speed.py`, two seconds), every wait with a deadline, and send rank 0 their figures,
   who failed too. Rank 0 collects, reports, and aborts the job if anybody was silent.

No collective is used after the broadcast, so nobody waits for a rank that stops, but for rank 0, whose job's end is
theirs. A rank that raises ends all, as everywhere (`runtime.faults`); the guard bounds what is left: 90 seconds after
MPI has started every rank has gone.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.doctor import speed
from mpidl.doctor.facts import Facts, Link, Surroundings
from mpidl.doctor.guard import Guard
from mpidl.doctor.software import detect_launcher, family_of, find_mpirun, probe_library
from mpidl.doctor.surroundings import look
from mpidl.errors import LaunchError
from mpidl.runtime import World, abilities, init, launched_rank
from mpidl.runtime.diagnosis import own_facts, own_versions
from mpidl.runtime.launcher import mpi_packages
from mpidl.runtime.shared_folder import Mark, make_mark
from mpidl.runtime.threads import default_threads, own_cores

START_LIMIT_S = 60.0
REST_LIMIT_S = 90.0
ANSWER_LIMIT_S = 30.0
_FIRST_TELLS_S = 3.0
"""How long a process that cannot load MPI leaves it to the first one to say so."""
_TAG = 70
_unfinished: list[BaseException] = []
"""Errors whose frames hold the buffers of messages that MPI may still write to."""


def examine(folder: Path, show: Callable[[Facts], int]) -> int:
    """Look at everything, on all ranks. Collective where MPI can be started.

    Args:
        folder: that all nodes should share.
        show: reports, and returns the exit code; called by one process.

    Returns:
        The exit code of this process.
    """
    launcher, (library, error) = detect_launcher(), probe_library()
    number = launched_rank()
    is_first = number in (None, 0)
    gpu = abilities.takes_gpu_memory() if is_first else "no GPU"
    mpirun, mpirun_family = find_mpirun() if is_first else (None, None)
    facts = Facts(
        versions=own_versions(), mpi_packages=mpi_packages(), library=library, library_error=error, mpirun=mpirun,
        mpirun_family=mpirun_family, launcher=launcher, thread_level=None, ranks={}, folder=str(folder.absolute()),
    )  # fmt: skip
    if library is not None and launcher.family in ("any", "unknown", family_of(library)):
        guard = Guard(number or 0, f"rank {number or 0} on {platform.node()}")
        guard.begin(
            "starting MPI",
            START_LIMIT_S,
            "see that every rank's command starts, and that nodes reach each other (names, firewall)",
        )
        try:
            world = init(is_strict=False)
        except LaunchError as failure:
            facts = replace(facts, library_error=str(failure))
        else:
            guard.begin(
                "looking around", REST_LIMIT_S, f"look at the file systems: {folder}, /dev/shm, temporary files"
            )
            return _examine_ranks(world, facts, gpu, folder, show)
        guard.end()
    if is_first:
        return show(_alone(facts, gpu, folder))
    return 0 if library is not None else _tell_own(number, error)


def _alone(facts: Facts, gpu: str, folder: Path) -> Facts:
    """What one process sees where MPI was not started."""
    own = own_facts(0, default_threads(own_cores(), [own_cores()]), None, facts.library)
    mark = make_mark(folder)
    mark.remove()
    return replace(facts, ranks={0: replace(look(own, gpu), folder_s=0.0)}, folder_reason=mark.reason)


def _tell_own(number: int | None, error: str) -> int:
    """Say what keeps only this process from starting; if the first one has the same trouble, it has ended the job."""
    time.sleep(_FIRST_TELLS_S)
    told = f"problem: rank {number} on {platform.node()} cannot load MPI: {error}"
    print(
        f"{told}\n    fix: give all ranks one environment, in a folder that all nodes share",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _examine_ranks(world: World, facts: Facts, gpu: str, folder: Path, show: Callable[[Facts], int]) -> int:
    """What is left to do once MPI has started."""
    mark: Mark = world.broadcast_object(make_mark(folder) if world.rank == 0 else None)
    own = own_facts(world.node, world.threads_per_rank, None, world.library)
    mine = replace(look(own, gpu), folder_s=mark.seen_after())
    if world.rank != 0:
        _send(world, mine)
        _receive_word(world)
        _send(world, _measured(world))
        return 0
    ranks, silent = collect(world, mine, "what they see")
    mark.remove()
    links: list[Link] = []
    if not silent:
        _send_word(world)
        measured, silent = collect(world, _measured(world), "what they measured")
        links = [link for found, _ in measured.values() for link in found]
        silent = silent or next((failure for _, failure in measured.values() if failure), "")
    code = show(
        replace(
            facts, thread_level=abilities.thread_level(), ranks=ranks, num_ranks=world.size, silent=silent,
            survives_lost_ranks=abilities.survives_lost_ranks(), folder_reason=mark.reason, links=tuple(links),
        )
    )  # fmt: skip
    if silent:
        world.abort(code)
    return code


def _measured(world: World) -> tuple[list[Link], str]:
    """This rank's links, and who did not answer it."""
    try:
        return speed.measure(world), ""
    except speed.SilentError as error:
        _unfinished.append(error)
        return [], str(error)


def collect(world: World, mine: Any, what: str, limit_s: float | None = None) -> tuple[dict[int, Any], str]:
    """Every rank's object, on rank 0, and in words who has not sent one in time.

    Args:
        world: all ranks.
        mine: rank 0's own.
        what: is collected, for the message.
        limit_s: how long; default: ANSWER_LIMIT_S.
    """
    limit_s = ANSWER_LIMIT_S if limit_s is None else limit_s
    found, missing = {0: mine}, set(range(1, world.size))
    deadline = time.monotonic() + limit_s
    while missing and time.monotonic() < deadline:
        for rank in sorted(missing):
            if world.comm.iprobe(source=rank, tag=_TAG):
                found[rank] = world.comm.recv(source=rank, tag=_TAG)
        missing -= found.keys()
        time.sleep(1e-3)
    names = [f"rank {rank} on {world.hostnames[rank]}" for rank in sorted(missing)]
    several = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)
    silent = f"{several} did not say within {limit_s:g} s {what}" if missing else ""
    return dict(sorted(found.items())), silent


def _send(world: World, value: Surroundings | tuple[list[Link], str]) -> None:
    world.comm.send(value, dest=0, tag=_TAG)


def _send_word(world: World) -> None:
    """Tell the others to go on."""
    requests = [world.comm.Isend(np.ones(1, np.uint8), dest=rank, tag=_TAG) for rank in range(1, world.size)]
    for request in requests:
        request.Wait()


def _receive_word(world: World) -> None:
    """Wait for it, without taking a core. If rank 0 has nothing to say it ends the job."""
    request = world.comm.Irecv(np.empty(1, np.uint8), source=0, tag=_TAG)
    while not request.Test():
        os.sched_yield()
        time.sleep(1e-4)
