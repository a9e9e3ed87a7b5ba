"""Signals that ask a training to stop: it ends its iteration, writes a checkpoint and leaves.

The handler only takes a note. A second signal of the same kind has its usual effect, which is to end the process.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What Slurm sends before the time is up (`--signal`), and what it and people send to end a job."""

_received: list[signal.Signals] = []


def listen() -> None:
    """Take note of the signals from now on; a handler that somebody else has set stays. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _note)


def received() -> str | None:
    """The name of the first signal that came since `listen`."""
    return _received[0].name if _received else None


def stop_listening() -> None:
    """Give the signals their usual effect back, and forget those that came."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
    signal.signal(number, signal.SIG_DFL)
