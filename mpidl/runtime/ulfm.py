"""Going on without ranks that were lost, where MPI can: Open MPI's ULFM (`mpirun --with-ft ulfm`), MPI 5's draft.

Without it a launcher ends the job when a rank dies. With it nobody does; every call of the others that needs the lost
rank fails. Of those that do not need it, nobody knows, so whoever finds a loss makes all others fail too, and all meet:

1. *revoke*: every communicator of the job, so that all that others wait in, or call later, fails there as well.
2. *settle*: all agree on "not done": whoever was in `commit`, whose agreement this is, learns that not all have come.
3. *shrink*: a new communicator of those that live, in their old order.
4. *tell*: each one's rank before, and whether it wants the job to end, and with which code.
5. *agree* that 4 was complete everywhere. If not, since one more has died meanwhile, again from 3.

What if. A rank dies inside 1 to 5: 3 to 5 are repeated. A rank computes: it comes when it makes its next call, and all
wait for it that long. A rank never makes one: the watchdog kills it, and it is lost as well. A rank leaves with a code
other than 0 and without MPI_Finalize: MPI does not notice, so the watchdog does.

A rank that wants to end the job (MPI_Abort ends only its caller here, and tells nobody) meets the others with a wish in
4; so those find out in the same place whether to go on without somebody, or to leave with the code of the wish. If they
do not come in time, or if it is not the main thread that wants to end, the launcher of this machine is asked to.

The calls that failed with a loss do not always say so (non-blocking collectives say "other error"), so every error
counts as one if, within some time, a communicator is revoked or a rank has failed. Requests that were under way when
their communicator was revoked are over; communicators are not freed any more. The main thread makes all calls: with
more, Open MPI 5.0 locks itself out when a connection breaks, so MPI is started for one thread only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpidl.errors import RankLostError

if TYPE_CHECKING:
    from mpi4py import MPI

Member = tuple[int, str]
"""A rank's number and host, as they were told last."""

_NOTICED_WITHIN_S = 2.0
"""How long after a failed call its reason may become known."""
_OTHERS_COME_S = 3.0
"""How long a rank that ends the job waits for the others before it asks the launcher."""
_LAUNCHERS = ("prterun", "prted", "mpirun", "mpiexec", "orted")
_SWITCH = "OMPI_MCA_mpi_ft_enable"
"""What `--with-ft ulfm` sets for the ranks."""
_ENVIRONMENT = {
    "OMPI_MCA_async_mpi_finalize": "1",  # else MPI_Finalize may wait for the dead
    "OMPI_MCA_osc": "^ucx",  # no windows are used here, and this component warns of what it cannot do
}


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What those who live have found out together."""

    comm: MPI.Intracomm
    """Of them, in the order before."""
    lost: tuple[Member, ...]
    code: int
    """Other than 0: somebody wants all to end with this code."""


class _Group:
    """The ranks that would meet, and all of their communicators."""

    def __init__(self, comm: MPI.Intracomm, members: Sequence[Member]) -> None:
        self.comm = comm
        self.members = list(members)
        self.comms: list[MPI.Intracomm] = []
        self.is_settled = False
        """Whether step 2 is done: in `commit`."""


_group: _Group | None = None
_has_ended = False


def prepare() -> None:
    """Set what has to be set before MPI starts, where the launcher says that this job can lose ranks."""
    if os.environ.get(_SWITCH) == "1":
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def begin(comm: MPI.Intracomm, members: Sequence[Member]) -> None:
    """From now on these ranks meet if one is lost; what was guarded before is forgotten. Not collective.

    Args:
        comm: all ranks.
        members: who they are, in its order.
    """
    global _group
    _group = _Group(comm, members)
    guard(comm)


def begin_anew(members: Sequence[Member]) -> None:
    """Call the same ranks so from now on. Not collective."""
    assert _group is not None, "nobody can be lost"
    _group.members = list(members)


def is_on() -> bool:
    """Whether a lost rank does not end the job."""
    return _group is not None


def has_ended() -> bool:
    """Whether this rank has met the others to end: nobody waits for anybody any more."""
    return _has_ended


def guard(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Let a new communicator be revoked when somebody is lost; returns it. Not collective."""
    if _group is not None:
        from mpi4py import MPI

        comm.Set_errhandler(MPI.ERRORS_RETURN)
        _group.comms.append(comm)
    return comm


def release(comm: MPI.Intracomm) -> None:
    """Forget a communicator that is going to be freed. Not collective."""
    if _group is not None:
        _group.comms = [each for each in _group.comms if each is not comm]


def is_loss(error: BaseException) -> bool:
    """Whether a call of MPI failed since a rank is lost, or the others have found one. Not collective; may wait."""
    if _group is None or _has_ended:
        return False
    if _group.is_settled:
        return True
    from mpi4py import MPI

    if not isinstance(error, MPI.Exception):
        return False
    deadline = time.monotonic() + _NOTICED_WITHIN_S
    while True:
        if any(comm.Is_revoked() for comm in _group.comms) or _group.comm.Get_failed().size:
            return True
        if time.monotonic() > deadline:
            return False
        MPI.COMM_SELF.Iprobe()  # lets MPI take notice
        time.sleep(0.005)


def meet(wish: int = 0) -> Meeting:
    """Find out with all that live who that is, and whether all end. Collective over those that live.

    Args:
        wish: the code to end with; 0: to go on.
    """
    from mpi4py import MPI

    assert _group is not None, "nobody can be lost"
    members, own = _group.members, _group.comm.rank
    comm: Any = _group.comm
    for each in _group.comms:
        with contextlib.suppress(MPI.Exception):
            each.Revoke()
    if not _group.is_settled:
        _agree(comm, False)
    while True:
        comm = comm.Shrink()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        told: list[tuple[int, int]] = []
        try:
            told = comm.allgather((own, wish))
        except MPI.Exception:
            comm.Revoke()
        if _agree(comm, bool(told)):
            break
    present = {rank for rank, _ in told}
    lost = tuple(member for rank, member in enumerate(members) if rank not in present)
    begin(comm, [members[rank] for rank, _ in told])
    return Meeting(comm, lost, max(code for _, code in told))


def _agree(comm: MPI.Intracomm, holds: bool) -> bool:
    """Whether it holds on all ranks, and all live; the same on all. Collective."""
    from mpi4py import MPI

    try:
        return comm.Agree(int(holds)) == 1
    except MPI.Exception:  # on every rank that lives: another one has died
        return False


def commit() -> None:
    """Return only where all ranks have come here and live. Collective.

    A barrier would not do: some ranks would have passed it, and others not, when one is lost.

    Raises:
        RankLostError: on every rank that lives: one is lost. Behind this call a loss concerns nobody here.
    """
    if _group is not None and not _agree(_group.comm, True):
        _group.is_settled = True
        raise RankLostError("a rank was lost when the others had come to the end")


def meet_to_end(code: int) -> Meeting:
    """The same as `meet`, where this rank ends in any case: if others do not come in time, the launcher ends all."""
    global _has_ended
    patience = threading.Timer(_OTHERS_COME_S, ask_launcher)
    patience.daemon = True
    patience.start()
    meeting = meet(code)
    patience.cancel()
    _has_ended = True
    return meeting


def end_all(code: int) -> None:
    """End every rank of the job: the others leave with this code when they come to their next call of MPI.

    Not collective. Returns where this rank may leave with a code of its own.
    """
    if threading.current_thread() is threading.main_thread():
        meet_to_end(code)
    else:
        ask_launcher()


def leave() -> None:
    """All have met to end: nobody waits for this rank any more."""
    global _has_ended
    _has_ended = True


def ask_launcher() -> None:
    """Let the launcher on this machine end the job; where there is none above this process, end this rank only."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        if pathlib.Path(f"/proc/{parent}/comm").read_text().strip() in _LAUNCHERS:
            os.kill(parent, signal.SIGTERM)
            return
    os.kill(os.getpid(), signal.SIGKILL)
