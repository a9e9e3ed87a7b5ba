"""Reading the stack of another process of this job, whatever it does.

Each process lets `faulthandler` write its stack into a file without a name when SIGNAL comes: that needs neither the
interpreter nor the process's help. Whoever wants it sends the signal and reads the file through /proc. A process that
is stopped, or sleeps in the kernel where no signal reaches it, writes nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import IO

SIGNAL = signal.SIGRTMIN + 9
"""A real-time signal that nobody else is known to use."""

_WRITTEN_WITHIN_S = 0.5
_MOST_LINES = 40

_file: IO[bytes] | None = None


def listen() -> int | None:
    """Let others read this process's stack; returns the descriptor of the file, None where that is not possible."""
    global _file
    if _file is None and signal.getsignal(SIGNAL) == signal.SIG_DFL:
        with contextlib.suppress(OSError, RuntimeError):
            file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
            faulthandler.register(SIGNAL, file, all_threads=False)
            _file = file
    return None if _file is None else _file.fileno()


def own_stack() -> str:
    """The main thread's stack, innermost call last, asked from another thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "" if frame is None else "".join(traceback.format_stack(frame)[-_MOST_LINES:]).rstrip()


def stack_of(pid: int, descriptor: int) -> str:
    """The stack of another process of this machine that listens; empty where none comes.

    Args:
        pid: of the process.
        descriptor: what its `listen` returned.
    """
    path = pathlib.Path(f"/proc/{pid}/fd/{descriptor}")
    try:
        before = path.stat().st_size
        os.kill(pid, SIGNAL)
        written = b""
        deadline = time.monotonic() + _WRITTEN_WITHIN_S
        while time.monotonic() < deadline:
            time.sleep(0.05)
            with path.open("rb") as file:
                file.seek(before)
                newer = file.read()
            if newer and newer == written:  # no longer growing
                break
            written = newer
    except OSError:
        return ""
    return innermost_last(written.decode(errors="replace"))


def innermost_last(dump: str) -> str:
    """What `faulthandler` wrote, in the order and the form of a traceback."""
    lines = [line.rstrip() for line in dump.splitlines() if line.startswith("  File ")]
    return "\n".join(lines[:_MOST_LINES][::-1])


def process_state(pid: int) -> str:
    """Tell "dead" (or a zombie), "stopped", or "" for a process that runs, or one that cannot be seen from here."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except FileNotFoundError:
        return "dead"
    except OSError:
        return ""
    letter = text.rpartition(")")[2].split()[0]
    return {"Z": "dead", "X": "dead", "T": "stopped", "t": "stopped"}.get(letter, "")
