"""Is there a person's terminal at the end of this rank's standard output, and how wide is it?

Under `mpirun` a rank's standard output says little: MPICH's hydra gives it a pipe even if the user sits at a
terminal, Open MPI a pseudo-terminal even if `mpirun` writes to a file. The truth is where the launcher's
own output goes. It forwards our bytes unchanged, so what is drawn for that terminal arrives there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mpidl import runtime

# The launchers whose process is an ancestor of the ranks on the node where it was started.
_LAUNCHERS = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "prun", "orterun"}

LOG_WIDTH = 100


class Terminal:
    """A terminal, open for asking its size; nothing is written through it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def width(self) -> int:
        """Columns now; the user may have resized the window."""
        return max(os.get_terminal_size(self._descriptor).columns or 80, 40)


def find_terminal() -> Terminal | None:
    """The terminal that shows this process's standard output, or None for a log, a pipe or a remote rank."""
    if os.environ.get("TERM") == "dumb":
        return None
    try:
        if runtime.launched_rank() is None:
            return Terminal(1) if sys.stdout.isatty() else None
        launcher = _launcher_process(Path("/proc"))
        if launcher is None:
            return None
        output = Path(f"/proc/{launcher}/fd/1")
        # Only a device is opened: the reading end of a pipe, held here, would keep its writer alive.
        if not str(output.readlink()).startswith("/dev/"):
            return None
        # O_NOCTTY: asking for the size must not make it our controlling terminal.
        descriptor = os.open(output, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        if os.isatty(descriptor):
            return Terminal(descriptor)
        os.close(descriptor)
    except (OSError, ValueError):
        pass  # no /proc, another user's launcher: plain lines are always right
    return None


def _launcher_process(proc: Path) -> int | None:
    """The process id of the nearest ancestor that is an MPI launcher."""
    process = os.getppid()
    while process > 1:
        name = (proc / str(process) / "comm").read_text().strip()
        if name in _LAUNCHERS:
            return process
        # "pid (name) state ppid ...": the name may hold spaces and brackets.
        process = int((proc / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return None
