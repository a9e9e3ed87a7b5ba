"""Signals that ask a training to stop: it ends its iteration, writes a checkpoint and leaves.

The handler only takes a note. A second signal of the same kind has its usual effect, which is to end the process.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from mpidl.runtime.launcher import launched_rank

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""What Slurm sends before the time is up (`--signal`), what it and people send to end a job, and what Ctrl-C sends."""

_UNSET = (signal.SIG_DFL, signal.default_int_handler)

_INTERRUPTED = b"\nmpidl: interrupted: stopping after this iteration; Ctrl-C again ends at once\n"

_received: list[signal.Signals] = []


def listen() -> None:
    """Take note of the signals from now on; a handler that somebody else has set stays. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) in _UNSET:
            signal.signal(number, _note)


def received() -> str | None:
    """The name of the first signal that came since `listen`."""
    return _received[0].name if _received else None


def is_ended() -> bool:
    """Whether somebody wants this process to end (SIGTERM), since `listen`."""
    return signal.SIGTERM in _received


def stop_listening() -> None:
    """Give the signals their usual effect back, and forget those that came."""
    was_interrupted = signal.SIGINT in _received
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is _note or (number is signal.SIGINT and was_interrupted):
            # Python's own raises KeyboardInterrupt, which whoever goes on after a stopped training expects of Ctrl-C.
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
    signal.signal(number, signal.SIG_DFL)
    if number == signal.SIGINT and launched_rank() in (None, 0):
        os.write(2, _INTERRUPTED)  # print is not safe here: the handler may have come in the middle of another one
