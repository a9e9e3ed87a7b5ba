"""Whether a folder is one and the same on all nodes: rank 0 writes a file, and all ranks look for it.

The file has a random name, which nobody has asked a file system for before: a network file system then has to ask its
server, whatever it keeps in its caches. Who looks gives up after LIMIT_S, so no rank waits for a node that does not
share; the file is gone when all have looked.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from mpidl.errors import LaunchError
from mpidl.runtime import faults
from mpidl.runtime.diagnosis import of_folder
from mpidl.runtime.world import World

LIMIT_S = 10.0
_PAUSE_S = 0.01


@dataclass(frozen=True)
class Mark:
    """What rank 0 has written."""

    path: Path
    reason: str = ""
    """Why nothing could be written."""

    def seen_after(self, limit_s: float = LIMIT_S) -> float | None:
        """Seconds until this process sees the file; None: not within so many."""
        begin = time.monotonic()
        while not self.reason:
            with contextlib.suppress(OSError):
                if self.path.read_text(encoding="utf-8") == self.path.name:
                    return time.monotonic() - begin
            if time.monotonic() - begin > limit_s:
                break
            time.sleep(_PAUSE_S)
        return None

    def remove(self) -> None:
        """Take the file away."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def make_mark(folder: Path) -> Mark:
    """Write the file; for rank 0."""
    path = folder.absolute() / f".mpidl-{os.urandom(8).hex()}"
    try:
        path.write_text(path.name, encoding="utf-8")
    except OSError as error:
        return Mark(path, f"{path.parent} cannot be written to: {error.strerror}")
    return Mark(path)


def check_shared(world: World, folder: Path) -> None:
    """Raise, on all ranks, unless all of them see the same folder. Collective.

    Raises:
        LaunchError: some node has another folder there, or none.
    """
    mark = world.broadcast_object(make_mark(folder) if world.rank == 0 else None)
    seen = world.allgather_object(mark.seen_after())
    if world.rank == 0:
        mark.remove()
    without = [world.hostnames[rank] for rank, seconds in enumerate(seen) if seconds is None]
    if finding := of_folder(str(folder), mark.reason, without, LIMIT_S):
        raise faults.on_all_ranks(LaunchError(f"{finding.what}; {finding.fix}"))
