"""Several commands behind one launch, and finding what a job left behind, processes and files."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.launch import Completed, launch

MARK = "MPIDL_TEST_JOB"

PATIENCE_S = 10.0
"""How long processes may take to be gone after the launcher has ended."""


class Watched:
    """A job's own folders and mark, so that other jobs of this machine are not taken for it.

    Attributes:
        env: to start the job with.
        folders: what it has of its own: in shared memory, and for temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self._mark = f"{MARK}={folder}".encode()
        self.folders = [folder / "shared memory", folder / "temporary"]
        for path in self.folders:
            path.mkdir()
        shared, temporary = map(str, self.folders)
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
        left = [path for folder in self.folders for path in folder.glob("mpidl*")]
        assert not left, ended.output


def run_commands(
    n: int, folder: Path, lines: Mapping[str, Sequence[str]]
) -> tuple[Completed, dict[str, tuple[list[int], str]]]:
    """Run `mpidl` commands one after the other on the same ranks: starting takes longer than most of them.

    Args:
        n: number of ranks.
        folder: for the list of commands.
        lines: name -> arguments of the command.

    Returns:
        The whole job, and name -> (exit code of each rank, what the command printed on standard error).
    """
    file = folder / "commands.json"
    file.write_text(json.dumps(lines))
    ended = launch(n, [sys.executable, Path(__file__).parent / "jobs" / "commands.py", file]).check()
    parts = re.split(r"^=== (.*)\n", ended.stderr, flags=re.MULTILINE)
    names, errors, codes, between = parts[1::4], parts[2::4], parts[3::4], parts[0::4]
    assert names == list(lines), ended.output
    assert not any(between), f"printed after a command had ended: {ended.output}"
    told = [(json.loads(text.removeprefix("codes ")), printed) for text, printed in zip(codes, errors, strict=True)]
    return ended, dict(zip(names, told, strict=True))
