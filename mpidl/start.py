"""How a course of a training begins: anew, from a checkpoint, or from what a loss of ranks has left."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl.checkpoint import Found
from mpidl.data import Loader
from mpidl.scheduling import Group, Recording
from mpidl.telemetry import Telemetry


@dataclasses.dataclass(frozen=True)
class Loss:
    """Ranks that were lost before a course began."""

    lost: tuple[tuple[int, str], ...]
    """Each one's number and host."""
    noticed: float
    """When, by this rank's `time.perf_counter`."""


@dataclasses.dataclass(frozen=True)
class Left:
    """What a course that a loss has ended leaves to the next; nothing that would hold on to its memory."""

    loader: Loader
    validation_loader: Loader | None
    history: list[dict[str, Any]]
    began: float
    clock_began: float
    """The executor's."""
    drops: NDArray[np.float64]
    newest: tuple[pathlib.Path | None, int]
    """Checkpoint, and its iteration."""
    begun: int
    """The iteration of the checkpoint that was begun last, and perhaps not completed; -1: none was."""
    done: int
    """Iterations that were done."""
    groups: list[Group]
    """The last ones, as far as they were carried out."""
    telemetry: Telemetry | None
    """On rank 0, which stays rank 0 as long as it lives."""
    lost: list[dict[str, Any]]
    """Ranks that were lost before the course began, as `summary.describe_lost` has them."""

    def close(self) -> None:
        """End it all, where there is no next one."""
        self.loader.close()
        if self.validation_loader is not None:
            self.validation_loader.close()
        if self.telemetry is not None:
            self.telemetry.close()


@dataclasses.dataclass(frozen=True)
class Start:
    """How a course begins."""

    resume: bool = False
    """From the run directory's newest checkpoint."""
    replay: Recording | None = None
    found: Found | None = None
    """From the memory of the course before."""
    left: Left | None = None
    loss: Loss | None = None
