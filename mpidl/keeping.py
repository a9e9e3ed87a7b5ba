"""What a training keeps on its nodes for `mpidl launch`, which starts it again where the launcher has ended all ranks.

`mpidl launch --restarts N` announces a folder (`local_folder.py`); the ranks keep the starts of groups there
(`checkpoint/local.py`), and the next start goes on from the newest one, where that is newer than the newest checkpoint.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

from mpidl import checkpoint, local_folder
from mpidl.checkpoint import Found, LocalFiles
from mpidl.guard import ENDS
from mpidl.parameters import ParameterManager
from mpidl.progress import Checkpoints
from mpidl.runtime import SharedMemoryError, World, warn
from mpidl.settings import Settings
from mpidl.start import Start


class Keeping:
    """The nodes' files of one training, or that there are none. Construction is collective.

    Args:
        settings: of the training.
        world: all ranks.
        manager: of the parameters.
        start: where the training begins.
    """

    def __init__(self, settings: Settings, world: World, manager: ParameterManager, start: Start) -> None:
        self._world, self._run_dir = world, settings.run_dir
        self._num_nodes, self._iteration = world.num_nodes, 0
        self._is_restart = start.loss is not None
        if start.loss is not None:
            self._remember()
        self.files: LocalFiles | None = None
        """Where starts are kept; None: they need not outlive the ranks."""
        announced = self._announced() if settings.outlives() and start.replay is None else None
        if announced is None:
            self._remove_stale()
            return
        try:
            self.files = LocalFiles(world, announced, manager)
        except SharedMemoryError as error:
            warn(f"nothing is kept for a restart, which will take the newest checkpoint: {error}")
            return
        self._is_restart |= announced.is_restart
        is_begun = start.resume or start.found is not None
        self.files.clear(only_of_others=is_begun)

    def find(self, checkpoints: Checkpoints, tell: Callable[..., None]) -> Found | None:
        """What is newer than the newest checkpoint, told in a line; None: the checkpoint is. Collective."""
        if self.files is None:
            return None
        newest = checkpoints.newest_iteration()
        found = checkpoint.find_in_files(self.files, newest, checkpoints.fits)
        if isinstance(found, str):
            if not self._is_restart:  # then nobody expects anything there
                return None
            where = f"goes on from the newest checkpoint, after iteration {newest}" if newest else "has no checkpoint"
            tell("restart", iteration=newest, source="a checkpoint", message=f"{where}: {found}")
            return None
        self._iteration = max(found.iteration, self._iteration)
        beside = f"the newest checkpoint is of iteration {newest}" if newest else "there is no checkpoint"
        message = f"goes on from what the nodes have kept, after iteration {found.iteration}; {beside}"
        tell("restart", iteration=found.iteration, source="nodes", message=message)
        return found

    def began(self) -> None:
        """Let `mpidl launch` know what is kept, and where this start began."""
        if self.files is not None:
            self._tell(self._num_nodes)

    def close(self) -> None:
        """Nothing needs to be kept any more: it has ended, or a checkpoint has it all. Collective."""
        if self.files is not None:
            self.files.close()
            self.files = None
            self._tell(0 if self._num_nodes == self._world.num_nodes else self._num_nodes)

    def _tell(self, num_nodes: int) -> None:
        if self._world.rank == 0 and self._run_dir is not None:
            kept = local_folder.Kept(num_nodes, platform.node(), self._iteration)
            local_folder.tell_kept(kept, self._run_dir / ENDS)

    def _announced(self) -> local_folder.Announced | None:
        """What `mpidl launch` says, if it has started these ranks; rank 0's word counts."""
        announced: local_folder.Announced | None = self._world.broadcast_object(local_folder.announced)
        return announced

    def _remember(self) -> None:
        """What was told before ranks were lost: files lie on their nodes still, and the restart was worth as much."""
        kept = local_folder.read_kept(self._run_dir / ENDS) if self._run_dir is not None else None
        if kept is not None:
            self._num_nodes, self._iteration = max(kept.num_nodes, self._num_nodes), kept.iteration

    def _remove_stale(self) -> None:
        """What an earlier training in this run directory has left, which was killed with its `mpidl launch`."""
        if self._run_dir is not None and self._world.local_rank == 0:
            local_folder.remove(local_folder.name_of(self._run_dir))
