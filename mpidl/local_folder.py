"""The folder in a node's memory in which a run's state outlives its processes (`checkpoint/local.py`).

`mpidl launch` announces it, in the folder of the run directory that takes how ranks have ended: the folder's name,
which is made of the run directory and the user, and a key of its own. Ranks that find the note keep their state in
files there, and take none that has another key: what an earlier launch has left is another training's.

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

DIRECTORY = pathlib.Path(os.environ.get("MPIDL_SHM_DIR", "/dev/shm"))
"""Where a node's memory can be had as files."""

_NOTE, _STATE = "keep.json", "kept.json"
_NAME = re.compile(r"mpidl-\d+-[0-9a-f]{16}")
_KEY = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Announced:
    """What `mpidl launch` has told its ranks."""

    name: str
    """Of the folder."""
    key: str
    """Of the launch."""


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


def announce(announced: Announced, ends: pathlib.Path) -> None:
    """Write the note into a folder that is there.

    Raises:
        OSError: it cannot be written.
    """
    _write(ends / _NOTE, dataclasses.asdict(announced))


def read_announced(ends: pathlib.Path) -> Announced | None:
    """The note; None: there is none, or none of this user."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((ends / _NOTE).read_text())
        name, key = found["name"], found["key"]
        if _NAME.fullmatch(name) and _KEY.fullmatch(key) and name.split("-")[1] == str(os.getuid()):
            return Announced(name, key)
    return None


def tell_kept(kept: Kept, ends: pathlib.Path) -> None:
    """Let `mpidl launch` know; for rank 0."""
    with contextlib.suppress(OSError):  # a full disk: it then knows of no other nodes
        _write(ends / _STATE, dataclasses.asdict(kept))


def read_kept(ends: pathlib.Path) -> Kept | None:
    """What ranks have told; None: nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
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


def _write(path: pathlib.Path, value: dict[str, object]) -> None:
    """Write a file that is there whole or not at all."""
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").rename(path)
