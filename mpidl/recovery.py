"""A training that outlives its ranks: what goes on when some are lost is the same training, on those that are left.

A course (`Training`) keeps its state in memory whenever a group begins (`checkpoint/memory.py`), and what it has now
can mostly be read as well (`checkpoint/live.py`). When a rank is lost:

1. *meet*: each rank that lives comes to its next call of MPI, which fails, and all meet (`runtime/ulfm.py`). Where one
   has met to end the job, all leave.
2. *abandon*: each lets go of the course, without a message: hooks, threads, shared memory. What it writes of a
   checkpoint is finished first; whether that checkpoint is published is not known, and does not matter: it is whole, or
   the next course clears it away. Loaders, clocks and the memory stay.
3. *restart*: a new world of those that live, with new communicators, and new shared memory as it is needed.
4. *find* the newest state of which all can be read: behind the last iteration, else at the start of a group, else in
   the newest checkpoint.
5. *go on*: a new course begins there, as one that is resumed on fewer ranks: partitions are dealt out and shards cut
   anew, and since the result depends on the partitions only, its bits are those of an undisturbed run. The
   lowest rank that lives is rank 0 now, the coordinator, and records. A checkpoint that was begun and is not there is
   written here.

What if. One more rank is lost in 1: that is repeated. In 2 to 5: all begin again from 1, and find what they would have
found. In a checkpoint, a validation, or before the first group has ended: no difference. While the final weights are
written: all of it is done again; a training has ended where all ranks have agreed that it has (*commit*), and who is
lost then is missed by nobody. Before the first group has begun, nothing is kept, and the job ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mpidl import checkpoint
from mpidl.checkpoint import Memory
from mpidl.errors import RankLostError
from mpidl.runtime import World, faults, restart, ulfm
from mpidl.settings import Settings
from mpidl.start import Left, Loss, Start
from mpidl.training import Training

Begin = Callable[[World, Start], Training]


def run(begin: Begin, settings: Settings, world: World, start: Start) -> tuple[Training, list[dict[str, Any]]]:
    """Run a training to its end, on those ranks that live. Collective over them.

    Args:
        begin: makes a course on a world.
        settings: of the training; `survives` says whether it may lose ranks.
        world: all ranks.
        start: how the first course begins.

    Returns:
        The course that came to the end, which the caller closes, and the events of epochs and validations.

    Raises:
        RankLostError: on every rank that lives: they cannot go on.
    """
    loss: _Recovery | None = None
    course: Training | None = None
    survives = settings.survives(world) and start.replay is None
    while True:
        try:
            if loss is not None:
                world = restart(loss.meeting)
                start = loss.find(settings, world)
            course = begin(world, start)
            loss, start = None, Start()  # they hold memory that the course lets go of when it needs it no more
            history = course.run()
            ulfm.commit()
            return course, history
        except BaseException as error:
            if not (survives and ulfm.is_loss(error)):
                if course is not None:
                    course.close()
                elif loss is not None:
                    loss.close()
                raise
            loss = loss or _Recovery()
            loss.meet()
            if course is not None:
                loss.take(course)
                course = None


class _Recovery:
    """What is known of a loss, and left."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._lost: list[ulfm.Member] = []
        self._memory: Memory | None = None
        self._left: Left | None = None

    def meet(self) -> None:
        """Step 1."""
        if not self._lost:
            self._began = time.perf_counter()
        self.meeting = ulfm.meet()
        if self.meeting.code:
            raise faults.end_of_loss(self.meeting)
        self._lost += self.meeting.lost

    def take(self, course: Training) -> None:
        """Step 2."""
        self._memory = course.memory
        self._left = course.abandon()

    def close(self) -> None:
        """Nothing goes on: end what would have been taken over."""
        if self._left is not None:
            self._left.close()

    def find(self, settings: Settings, world: World) -> Start:
        """Step 4. Collective."""
        found = checkpoint.find(self._memory, world)
        if found is None:
            self._check_has_checkpoint(settings, world)
        loss = Loss(tuple(self._lost), self._began)
        return Start(resume=found is None, found=found, left=self._left, loss=loss)

    def _check_has_checkpoint(self, settings: Settings, world: World) -> None:
        run_dir = settings.run_dir
        has = run_dir is not None and world.rank == 0 and bool(checkpoint.list_checkpoints(run_dir))
        if not world.broadcast_object(has):
            kept = "and nobody else has its part of the training; there is no checkpoint either: start it again"
            raise faults.on_all_ranks(RankLostError(f"{faults.describe_lost(self._lost)}, {kept}"))
