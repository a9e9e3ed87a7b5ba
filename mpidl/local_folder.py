"""The folder in a node's memory in which a run's state outlives its processes (`checkpoint/local.py`).

`mpidl launch` announces it to the ranks that it starts, in their command line: the folder's name, which is made of the
run directory and the user, and a key of its own. These ranks keep their state in files there, and take none that has
another key: what an earlier launch has left is another training's. Ranks that nothing is announced to keep nothing.

Importing this loads nothing large.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat

from mpidl.errors import MALFORMED

DIRECTORY = pathlib.Path(os.environ.get("MPIDL_SHM_DIR", "/dev/shm"))
"""Where a node's memory can be had as files."""

FLAG = "--announced"
"""Of `mpidl train`, not in its help: takes an `Announced`."""

_STATE = "kept.json"
_ANNOUNCED = re.compile(r"(?P<name>mpidl-(?P<user>[0-9]+)-[0-9a-f]{16})/(?P<key>[0-9a-f]{32})/(?P<is_restart>[01])")


@dataclasses.dataclass(frozen=True)
class Announced:
    """What `mpidl launch` has told its ranks."""

    name: str
    """Of the folder."""
    key: str
    """Of the launch."""
    is_restart: bool = False
    """Whether the launch has begun the training before."""

    def __str__(self) -> str:
        """A word of a command line."""
        return f"{self.name}/{self.key}/{int(self.is_restart)}"


announced: Announced | None = None
"""What this process, a rank, was told."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What ranks tell `mpidl launch`."""

    num_nodes: int
    """That have such a folder; 0: they have removed it."""
    host: str
    """Of rank 0."""
    iteration: int
    """Iterations that were done where the ranks began, if that came from there; else 0."""


def announcement(run_dir: pathlib.Path) -> Announced:
    """A launch's, with a key of its own."""
    return Announced(name_of(run_dir), secrets.token_hex(16))


def name_of(run_dir: pathlib.Path) -> str:
    """The folder's name for a run directory and this user."""
    return f"mpidl-{os.getuid()}-{hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:16]}"


def listen(word: str | None) -> None:
    """Take what was announced in the command line; None, or what is none of this user: nothing was."""
    global announced
    announced = None
    found = _ANNOUNCED.fullmatch(word or "")
    if found is not None and found["user"] == str(os.getuid()):
        announced = Announced(found["name"], found["key"], found["is_restart"] == "1")


def tell_kept(kept: Kept, ends: pathlib.Path) -> None:
    """Let `mpidl launch` know; for rank 0."""
    with contextlib.suppress(OSError):  # a full disk: it then knows of no other nodes
        new = (ends / _STATE).with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(kept)))
        new.rename(ends / _STATE)  # so that it is there whole


def read_kept(ends: pathlib.Path) -> Kept | None:
    """What ranks have told; None: nothing."""
    with contextlib.suppress(OSError, *MALFORMED):
        found = json.loads((ends / _STATE).read_text())
        return Kept(int(found["num_nodes"]), str(found["host"]), int(found["iteration"]))
    return None


def remove(name: str) -> None:
    """Remove the folder of this node, where there is one and it is this user's."""
    path = DIRECTORY / name
    with contextlib.suppress(OSError):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)
