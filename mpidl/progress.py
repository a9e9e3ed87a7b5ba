"""How far a training has come, and the checkpoints that it is kept in."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl import checkpoint
from mpidl.errors import CheckpointError, ConfigError
from mpidl.parameters import ParameterManager
from mpidl.runtime import World, init, on_all_ranks
from mpidl.settings import Settings

ONLY_AT_END = "only_at_end"
"""Key of a validation that was due because the training ended there: one that goes on would not have had it."""


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

    @property
    def newest_validation(self) -> dict[str, Any]:
        """Its numbers; empty before the first."""
        return self.validations[-1] if self.validations else {}


class Checkpoints:
    """The checkpoints of one training in its run directory. All methods are collective.

    Args:
        settings: of the training.
        world: all ranks.
        manager: whose weights and optimizer state.
        num_samples: of the training set.
        iterations_per_epoch: of the training.
    """

    def __init__(
        self, settings: Settings, world: World, manager: ParameterManager, num_samples: int, iterations_per_epoch: int
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

    def save(self, progress: Progress) -> dict[str, Any]:
        """Write one; returns the fields of the "checkpoint" event."""
        run_dir = self._settings.run_dir
        assert run_dir is not None, "checkpoints are due only where there is a run directory"
        began = time.perf_counter()
        epoch, more = divmod(progress.iteration, self._iterations_per_epoch)
        path = checkpoint.checkpoint_path(run_dir, epoch, more)
        kept = {
            "epoch": epoch,
            "iteration": progress.iteration,
            "epoch_sums": progress.epoch_sums.tolist(),
            "validations": progress.validations,
            "ended_by": progress.ended_by,
            **self._identity(),
        }
        size = checkpoint.save(self._manager, path, kept)
        self.last, self.last_iteration = path, progress.iteration
        seconds = time.perf_counter() - began
        return {"epoch": epoch, "iteration": progress.iteration, "path": str(path), "bytes": size, "seconds": seconds}

    def load_newest(self) -> Progress | None:
        """Go on from the newest one; None where there is none.

        Raises:
            ConfigError, CheckpointError: on every rank: it does not fit, or is damaged.
        """
        run_dir = self._settings.run_dir
        if run_dir is None:
            raise on_all_ranks(ConfigError("resume needs a run_dir to resume from"))
        found = checkpoint.list_checkpoints(run_dir) if self._world.rank == 0 else []
        path = self._world.broadcast_object(found[-1][1] if found else None)
        if path is None:
            return None
        kept = checkpoint.load(self._manager, path)
        self._world = init(kept["threads_per_rank"]).for_purpose("checkpoint")
        for name, value in self._identity().items():
            if kept[name] != value:
                raise on_all_ranks(
                    CheckpointError(
                        f"{path} was written with {name} {kept[name]}, this run has {value}; resume with the same"
                    )
                )
        self.last, self.last_iteration = path, int(kept["iteration"])
        return Progress(self.last_iteration, np.array(kept["epoch_sums"]), kept["validations"], kept["ended_by"])

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
