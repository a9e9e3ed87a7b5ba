"""Ends a rank that is stuck where nothing in it can notice: in MPI_Init, or in a file system that does not answer.

A child process, made before MPI starts, holds one end of a pipe. The rank writes a line for each thing it begins, with
a limit; if the next line does not come in time, the child says what the rank was doing and kills it, which ends the
job. When the rank is gone, however it went, the pipe ends and so does the child. The child has nothing open but that
pipe and standard error, so a launcher that waits for its ranks' sockets does not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import NoReturn

_OTHERS_S = 5.0
"""How much later than the first rank the others give up: one message is enough."""


class Guard:
    """The rank's end of the pipe. To be made before MPI and any thread starts.

    Args:
        rank: this process's, by the launcher's word.
        name: how the rank is named in what the child says.
    """

    def __init__(self, rank: int, name: str) -> None:
        self._later_s = 0.0 if rank == 0 else _OTHERS_S
        sys.stderr.flush()
        incoming, self._outgoing = os.pipe()
        parent, self._child = os.getpid(), os.fork()
        if self._child == 0:
            _watch(incoming, parent, name)
        os.close(incoming)

    def begin(self, what: str, limit_s: float, fix: str) -> None:
        """Allow so many seconds from now until the next call; what the rank does, and what mends it if it is stuck."""
        with contextlib.suppress(OSError):
            os.write(self._outgoing, f"{limit_s + self._later_s}\t{what}\t{fix}\n".encode())

    def end(self) -> None:
        """Let the child go."""
        os.close(self._outgoing)
        os.waitpid(self._child, 0)


def _watch(incoming: int, parent: int, name: str) -> NoReturn:
    """The child's whole life: reads lines, each of which sets a new limit."""
    os.dup2(incoming, 0)
    os.dup2(2, 1)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a job that is told to end ends its ranks, and then the pipe ends
    limit, what, fix = "60", "starting", ""
    while select.select([0], [], [], float(limit))[0]:
        text = os.read(0, 1 << 16).decode(errors="replace")
        if not text:
            os._exit(0)
        limit, what, fix = text.splitlines()[-1].split("\t")
    told = f"problem: {name} is stuck: {what} took more than {float(limit):g} s\n    fix: {fix}\n"
    os.write(2, told.encode())
    os.kill(parent, signal.SIGKILL)
    os._exit(0)
