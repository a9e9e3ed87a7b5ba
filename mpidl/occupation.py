"""One job at a time trains in a run directory: whoever trains there holds a lock on its file LOCK.

Rank 0 takes it before it writes anything, and holds it until the job ends; the system gives it back where the rank is
killed, so no lock is left behind, only the file. A job that finds it taken waits: a job that is being ended, or whose
node the file system has lost sight of, needs a while. Nobody is kept out where the file system has no locks, or where
rank 0 was lost and others go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from mpidl.errors import ConfigError, OccupiedError
from mpidl.runtime import signals, warn

LOCK_FILE = "LOCK"
PATIENCE_S = 120.0
"""How long a job waits for another one to leave."""
_SAYS_AFTER_S = 2.0
_LOOK_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system says that has none."""


def occupy(run_dir: Path, name: str = LOCK_FILE, patience_s: float = PATIENCE_S) -> Callable[[], None] | None:
    """Keep other jobs out of a run directory; for rank 0.

    Args:
        run_dir: which is there.
        name: of the file.
        patience_s: how long to wait for another job's end.

    Returns:
        To be called when the job ends; None: a signal to stop came first.

    Raises:
        OccupiedError: another job trains there, and goes on doing so.
        ConfigError: the directory cannot be written.
    """
    path = run_dir / name
    began, has_said = time.monotonic(), False
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot write the run directory {run_dir}: {error.strerror}; check its permissions"
            ) from None
        if _takes(descriptor, path):
            break
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if signals.received() is not None:
            return None
        waited_s = time.monotonic() - began
        if waited_s >= patience_s:
            raise OccupiedError(
                f"another job trains in {run_dir} ({holder}); wait for its end, or end it; where it is gone remove "
                f"{path}"
            )
        if waited_s >= _SAYS_AFTER_S and not has_said:
            has_said = True
            warn(f"another job trains in {run_dir} ({holder}); waits up to {patience_s:g} s for its end")
        time.sleep(_LOOK_S)
    with contextlib.suppress(OSError):  # a full disk: it is only for the message
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def leave() -> None:
        if _is(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)

    return leave


def _takes(descriptor: int, path: Path) -> bool:
    """Try to take the lock, which no process inherits, of the file that is there now; yes where there are no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return _is(descriptor, path)


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that is there now."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
