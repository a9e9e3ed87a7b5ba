"""Ranks that get ready beside those that train, and take their place: how a training goes on with another number.

`mpidl launch` starts them while the others train (`launching/course.py`), with a gate in their command line, two files
in the run directory's folder `ends`:

1. *ready*: each new rank has started MPI and loaded torch and mpidl; data and model come later. It touches nothing
   that is the training's. When all have, their rank 0 makes the gate's first file.
2. `mpidl launch` stops the others, which write a checkpoint and leave, and judges how they have ended.
3. *word*: it makes the second file. Rank 0 reads it and sends it on: GO, and they go on from the checkpoint, as every
   resumed training does; LEAVE, where there is nothing to go on with, and they end well.

Waiting ranks sleep, rank 0 between looks at the file, the others between looks at MPI: the cores are the training's.

What if. A rank that gets ready fails: its launcher ends the rest; its guard says nothing of a lost rank, which would
be the training's; `mpidl launch` says that nothing is changed. It fails after the others have left, and before it has
taken the run directory: the number that was there before starts again. It fails later: as every training. A rank of
the training is lost, or the training ends: those who stand by are told to leave. The word cannot be written: `mpidl
launch` ends them. `mpidl launch` is killed: the system ends their launcher, as any.

Importing this loads nothing large.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pathlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpidl.runtime import Pending, World

FLAG = "--standby"
"""Of `mpidl train`, not in its help: takes a `Gate`'s path."""
GO, LEAVE = "go", "leave"
_LOOK_S = 0.02


@dataclasses.dataclass(frozen=True)
class Gate:
    """Where new ranks wait."""

    path: pathlib.Path

    @property
    def _ready(self) -> pathlib.Path:
        return self.path.with_suffix(".ready")

    @property
    def _word(self) -> pathlib.Path:
        return self.path.with_suffix(".word")

    def tell_ready(self) -> None:
        """All new ranks are; for their rank 0."""
        self._ready.touch()

    def is_ready(self) -> bool:
        """Whether they are."""
        return self._ready.exists()

    def say(self, word: str) -> bool:
        """GO or LEAVE, for `mpidl launch`; returns whether it could be written."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(word)
            new.rename(self._word)  # so that it is there whole
            return True
        return False

    def said(self) -> str | None:
        """GO, LEAVE, or None: nothing yet."""
        with contextlib.suppress(OSError):
            return self._word.read_text()
        return None


def wait(world: World, gate: Gate) -> bool:
    """Wait for the word, or for a signal to stop; returns whether to go on. Collective."""
    import numpy as np

    from mpidl.runtime import signals

    importlib.import_module("torch._dynamo")  # for seconds; torch does it when the first optimizer is made
    _sleep_through(world.start_barrier())
    word = np.zeros(1, np.uint8)
    if world.rank == 0:
        gate.tell_ready()
        while gate.said() is None and signals.received() is None:
            time.sleep(_LOOK_S)
        word[0] = gate.said() == GO
    _sleep_through(world.start_broadcast(word))
    return bool(word[0])


def _sleep_through(pending: Pending) -> None:
    while not pending.is_over():
        time.sleep(_LOOK_S)
