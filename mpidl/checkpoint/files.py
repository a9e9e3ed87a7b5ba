"""Directories that appear whole or not at all, and the names inside a run directory.

All of it is made of what POSIX, NFS and Lustre promise alike: what fsync returned for is on disk; rename is atomic, for
those who look from other hosts too; a directory's entries are on disk when the directory was synced. Nothing relies on
locks, on links, or on seeing other hosts' files at once.

Names beside the checkpoints, all cleared away by the next run: `.new-NAME` is being written; `.old-NAME` was there
before a checkpoint of the same name, and goes back where that one did not arrive; `.gone-NAME` is being removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

from mpidl.checkpoint.manifest import MANIFEST

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"epoch-(\d{6})(?:\+(\d{6,}))?")


Position = tuple[int, int]
"""Whole epochs, and iterations of the epoch behind them."""


def checkpoint_path(run_dir: pathlib.Path, epoch: int, iterations: int = 0) -> pathlib.Path:
    """Where the checkpoint after `epoch` epochs, and `iterations` iterations of the next, stands."""
    within = f"+{iterations:06d}" if iterations else ""
    return run_dir / CHECKPOINTS / f"epoch-{epoch:06d}{within}"


def position_of(path: pathlib.Path) -> Position | None:
    """What a checkpoint's name says; None: it is none."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def list_checkpoints(run_dir: pathlib.Path) -> list[tuple[Position, pathlib.Path]]:
    """The checkpoints of a run directory that arrived, oldest first."""
    return list_in(run_dir / CHECKPOINTS)


def list_in(directory: pathlib.Path) -> list[tuple[Position, pathlib.Path]]:
    """The same for the folder that holds them."""
    found = []
    for path in directory.glob("epoch-*"):
        position = position_of(path)
        if position is not None and (path / MANIFEST).is_file():
            found.append((position, path))
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one is complete."""

    last: int | None = None
    """The newest ones; None: all."""
    every: int | None = None
    """And each of which the number, counted from the run's first, can be divided by this; None: no others."""

    def gone(self, numbers: Mapping[Position, int], written: Position) -> list[Position]:
        """Those that may go, oldest first; never the one just written, nor what is behind it.

        What is behind it was there when the run went on from an earlier one: it is damaged, and will be replaced.

        Args:
            numbers: of all checkpoints.
            written: which one has just become complete.
        """
        if self.last is None:
            return []
        older = sorted(position for position in numbers if position <= written)[: -self.last]
        return [position for position in older if not self.every or numbers[position] % self.every]


def sync(path: pathlib.Path) -> None:
    """Have a file's content, or a directory's entries, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems sync directories by themselves
            raise
    finally:
        os.close(descriptor)


def usual_mode(path: pathlib.Path) -> None:
    """Give a file the mode that the user's umask says; safetensors makes it the owner's only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Write a JSON file and have it on disk."""
    path.write_text(json.dumps(value, indent=1) + "\n")
    sync(path)


def publish(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Make a finished directory, whose files are on disk, appear under its name at once.

    Where there is one of that name, it goes aside first: if the machine stops between the two steps, the next run
    puts it back.
    """
    sync(temporary)
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        remove(old)
        final.rename(old)
        try:
            temporary.rename(final)
        except OSError:
            old.rename(final)
            raise
        sync(final.parent)
        clear(old)
    else:
        temporary.rename(final)
    sync(final.parent)


def discard(path: pathlib.Path) -> None:
    """Remove a whole checkpoint: it is gone at once, or there."""
    gone = path.with_name(f".gone-{path.name}")
    remove(gone)
    path.rename(gone)
    sync(path.parent)
    clear(gone)


def remove(path: pathlib.Path) -> None:
    """Remove a directory that may not be there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def clear(path: pathlib.Path) -> None:
    """Remove what nobody needs any more, as far as it can be: NFS keeps files that another process has open.

    What is left of it is tried again by the next run.
    """
    shutil.rmtree(path, ignore_errors=True)


def clear_left_overs(directory: pathlib.Path) -> None:
    """Take away what a killed run left half done, and put back what it had taken aside."""
    for path in directory.glob(".old-*"):
        final = path.with_name(path.name.removeprefix(".old-"))
        if (path / MANIFEST).is_file() and not final.exists():
            path.rename(final)
    for kind in (".new-*", ".old-*", ".gone-*"):
        for path in directory.glob(kind):
            clear(path)
