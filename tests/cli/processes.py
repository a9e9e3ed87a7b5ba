"""Finding what a job left behind: its processes, by a variable of their environment, and its files."""

from __future__ import annotations

import time
from pathlib import Path

from tests.launch import Completed

MARK = "MPIDL_TEST_JOB"

PATIENCE_S = 10.0
"""How long processes may take to be gone after the launcher has ended."""


class Watched:
    """A job's own folders and mark, so that other jobs of this machine are not taken for it.

    Attributes:
        env: to start the job with.
    """

    def __init__(self, folder: Path) -> None:
        self._mark = f"{MARK}={folder}".encode()
        self._folders = [folder / "shared memory", folder / "temporary"]
        for path in self._folders:
            path.mkdir()
        shared, temporary = map(str, self._folders)
        self.env = {MARK: str(folder), "MPIDL_SHM_DIR": shared, "TMPDIR": temporary}

    def processes(self) -> list[int]:
        """The ids of the job's processes, ranks and loader workers alike."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                # A process that has ended and is not yet reaped has nothing here.
                if self._mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def check_nothing_is_left(self, ended: Completed) -> None:
        """Fail unless all processes end soon, and no file lies in shared memory or the temporary folder."""
        deadline = time.monotonic() + PATIENCE_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.processes(), ended.output
        left = [path for folder in self._folders for path in folder.glob("mpidl*")]
        assert not left, ended.output
