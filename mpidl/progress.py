"""How far a training has come, and the checkpoints that it is kept in."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl import checkpoint
from mpidl.config import FINISHED
from mpidl.errors import CheckpointError, ConfigError, DamagedError
from mpidl.parameters import ParameterManager
from mpidl.runtime import World, init, on_all_ranks
from mpidl.settings import Settings

ONLY_AT_END = "only_at_end"
"""Key of a validation that was due because the training ended there: one that goes on would not have had it."""

_POSITION = ("iteration", "epoch_sums", "validations", "ended_by")
_TOLD_WAIT_S = 0.1
"""How long a checkpoint waits for the one before it until that is worth a warning."""


def mark_finished(run_dir: pathlib.Path, iterations: int) -> None:
    """Write the file FINISHED.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        (run_dir / FINISHED).write_text(f"{iterations} iterations\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {run_dir / FINISHED}: {error.strerror}") from None


@dataclasses.dataclass
class Progress:
    """What a training has to know to go on, beside weights and the optimizer's state."""

    iteration: int = 0
    """Iterations that are done."""
    epoch_sums: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(3))
    """loss_sum, weight, samples of the epoch so far."""
    validations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The results of all validations: learning rates and triggers may depend on them."""
    ended_by: str | None = None
    """The trigger that has ended the training before its last epoch; None: none has."""

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Progress:
        """What `Checkpoints.describe` told of."""
        sums, validations = np.array(kept["epoch_sums"]), list(kept["validations"])
        return cls(int(kept["iteration"]), sums, validations, kept["ended_by"])

    @property
    def newest_validation(self) -> dict[str, Any]:
        """Its numbers; empty before the first."""
        return self.validations[-1] if self.validations else {}


class Checkpoints:
    """The checkpoints of one training in its run directory. All methods but `poll` are collective.

    They are written while training goes on (`checkpoint/writer.py`). One that cannot be written is told loudly and does
    not end the training: a disk is full for an hour and training runs for a month; to stop would lose for certain what
    going on loses only if the run is killed before the next one. The last one counts: `finish` raises.

    Args:
        settings: of the training.
        world: all ranks.
        manager: whose weights and optimizer state.
        num_samples: of the training set.
        iterations_per_epoch: of the training.
        tell: takes an event and its fields when a checkpoint is complete, or something is wrong with one.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        manager: ParameterManager,
        num_samples: int,
        iterations_per_epoch: int,
        tell: Callable[..., None],
    ) -> None:
        self._settings = settings
        self._world = world
        self._manager = manager
        self._num_samples = num_samples
        self._iterations_per_epoch = iterations_per_epoch
        self.last: pathlib.Path | None = None
        """The newest one that this run wrote or began from."""
        self.last_iteration = -1
        """The number of iterations it holds."""
        self._tell = tell
        self._pending: dict[str, Any] = {}
        """What the event of the one under way will say."""
        self._error: str | None = None
        """Why the newest that was begun is not there."""
        self._has_waited = False
        self._writer: checkpoint.Writer | None = None
        if settings.run_dir is not None:
            keep = checkpoint.Keep(settings.keep_last, settings.keep_every)
            self._writer = checkpoint.Writer(manager, settings.run_dir / checkpoint.CHECKPOINTS, keep)

    def save(self, progress: Progress) -> None:
        """Begin to write one, after the one before is complete."""
        run_dir = self._settings.run_dir
        assert run_dir is not None, "checkpoints are due only where there is a run directory"
        assert self._writer is not None, "made where there is a run directory"
        waited_s = self._wait_for_the_one_before(progress.iteration)
        epoch, more = divmod(progress.iteration, self._iterations_per_epoch)
        path = checkpoint.checkpoint_path(run_dir, epoch, more)
        kept = self.describe(progress)
        self._pending = {"epoch": epoch, "iteration": progress.iteration, "path": str(path), "waited_s": waited_s}
        self._writer.begin(path, kept)

    def describe(self, progress: Progress) -> dict[str, Any]:
        """A training's position as JSON values, and what it is the position of; nobody changes it."""
        return {
            "epoch": progress.iteration // self._iterations_per_epoch,
            "iteration": progress.iteration,
            "epoch_sums": progress.epoch_sums.tolist(),
            "validations": list(progress.validations),
            "ended_by": progress.ended_by,
            **self._identity(),
        }

    def fits(self, kept: Mapping[str, Any]) -> bool:
        """Whether what `describe` gave is of this training; threads are taken as they were."""
        own = {name: value for name, value in self._identity().items() if name != "threads_per_rank"}
        return own.items() <= kept.items() and {"threads_per_rank", *_POSITION} <= kept.keys()

    def take_threads(self, kept: Mapping[str, Any]) -> None:
        """Go on with as many threads a rank as then: bits depend on them."""
        self._world = init(kept["threads_per_rank"]).for_purpose("checkpoint")

    def newest_iteration(self) -> int:
        """Iterations that the newest checkpoint holds, and remember it; 0: there is none. Collective."""
        run_dir = self._settings.run_dir
        found = checkpoint.list_checkpoints(run_dir)[-1:] if self._world.rank == 0 and run_dir is not None else []
        found = self._world.broadcast_object(found)
        for (epoch, more), path in found:
            self.last, self.last_iteration = path, epoch * self._iterations_per_epoch + more
        return max(0, self.last_iteration)

    @property
    def begun(self) -> int:
        """Iterations of the one that was begun last; -1: none was."""
        return int(self._pending.get("iteration", -1))

    def lacks(self, begun: int, iteration: int) -> bool:
        """Whether the one that was begun last, before a rank was lost, is not there, and will not be begun again.

        Args:
            begun: by this rank's `begun` of then; ranks may differ.
            iteration: where the training goes on.
        """
        last = int(self._world.allreduce(np.array([float(begun)]), "max")[0])
        lacks: bool = self._world.broadcast_object(self.newest_iteration() < last <= iteration)
        return self._settings.run_dir is not None and lacks

    def _wait_for_the_one_before(self, iteration: int) -> float:
        assert self._writer is not None
        self.poll()
        if not self._writer.is_busy:
            return 0.0
        began, before = time.perf_counter(), self._pending["iteration"]
        self.complete()
        waited_s = time.perf_counter() - began
        if waited_s >= _TOLD_WAIT_S and not self._has_waited:
            self._has_waited = True
            self._tell(
                "warning",
                message=f"the checkpoint after iteration {iteration} had to wait {waited_s:.3g} s until the one after "
                f"iteration {before} was on disk, and training with it; write them less often, or on a faster disk "
                "(told once; waited_s in the metrics has all)",
            )
        return waited_s

    def prepare(self) -> None:
        """Have memory for the first one; to be called after the first iteration."""
        if self._writer is not None:
            self._writer.prepare()

    def poll(self) -> None:
        """Find out, without waiting, whether the one under way is complete; to be called after every iteration."""
        self._note(None if self._writer is None else self._writer.poll())

    def complete(self) -> None:
        """Wait until the one under way is complete, or has failed."""
        self._note(None if self._writer is None else self._writer.complete())

    def finish(self) -> str | None:
        """Complete the last one and let go of what is needed to write; returns why the last one is not there."""
        self.complete()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._error is None:
            return None
        last = f"the last whole one is {self.last}" if self.last else "there is none before it"
        return f"{self._error}; {last}"

    def abandon(self) -> None:
        """Give up the one under way, after a rank was lost. Not collective."""
        if self._writer is not None:
            self._writer.abandon()

    def _note(self, outcome: checkpoint.Outcome | None) -> None:
        if outcome is None:
            return
        self._error = outcome.error
        if outcome.error is None:
            self.last, self.last_iteration = outcome.path, int(self._pending["iteration"])
            times = {"pause_s": outcome.pause_s, "seconds": outcome.seconds}
            self._tell("checkpoint", **self._pending, bytes=outcome.num_bytes, **times)
            return
        since = f"all since {self.last} is lost if this run ends now" if self.last else "there is none yet"
        message = f"CHECKPOINT NOT WRITTEN: {outcome.error}; {since}; training goes on and the next one is tried"
        self._tell("warning", message=message)

    def load_newest(self) -> Progress | None:
        """Go on from the newest one that is whole; None where there is none at all.

        Raises:
            ConfigError, CheckpointError: on every rank: it does not fit, or all are damaged.
        """
        run_dir = self._settings.run_dir
        if run_dir is None:
            raise on_all_ranks(ConfigError("resume needs a run_dir to resume from"))
        found = checkpoint.list_checkpoints(run_dir) if self._world.rank == 0 else []
        paths: list[pathlib.Path] = self._world.broadcast_object([path for _, path in reversed(found)])
        for path in paths:
            try:
                return self._load(path)
            except DamagedError as error:  # on every rank
                self._tell("warning", message=f"DAMAGED CHECKPOINT: {error}; the one before it is tried")
        if paths:
            raise on_all_ranks(CheckpointError(f"all checkpoints of {run_dir} are damaged, the newest is {paths[0]}"))
        return None

    def _load(self, path: pathlib.Path) -> Progress:
        kept = checkpoint.load(self._manager, path)
        missing = sorted({*_POSITION, *self._identity()} - kept.keys())
        if missing:
            raise on_all_ranks(ConfigError(f"{path} is not one of a training: it lacks {', '.join(missing)}"))
        self.take_threads(kept)
        for name, value in self._identity().items():
            if kept[name] != value:
                raise on_all_ranks(
                    ConfigError(
                        f"{path} was written with {name} {kept[name]}, this run has {value}; resume with the same"
                    )
                )
        self.last, self.last_iteration = path, int(kept["iteration"])
        return Progress.of(kept)

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a resumed run for the same numbers."""
        settings = self._settings
        return {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "partitions": settings.partitions,
            "train_samples": self._num_samples,
            "threads_per_rank": self._world.threads_per_rank,
        }
