"""Pieces of a group's control at the sizes of jobs that are larger than this machine: for the model of its cost."""

from __future__ import annotations

import time

import numpy as np

from mpidl.parameters import Assignment
from mpidl.runtime import World
from mpidl.scheduling import GroupPlan

_REPETITIONS = 20


class Piece:
    """Something that is done again and again and is no whole way."""

    group_size = partitions = calls_per_group = None
    iterations = _REPETITIONS
    name: str
    case: str
    num_bytes: float

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> None:
        """Do it so many times."""
        began = time.perf_counter()
        for _ in range(self.iterations):
            self.once()
        self._seconds = time.perf_counter() - began

    def once(self) -> None:
        """What is timed."""
        raise NotImplementedError

    def take(self) -> tuple[float, float]:
        """Seconds of the last run, of which nothing is a wait."""
        return self._seconds, 0.0


class Messages(Piece):
    """A broadcast and a gather of so many bytes in all."""

    PLAN_PART = 16
    """The report of a large job has about so many times the bytes of its plan."""

    def __init__(self, world: World, num_bytes: int) -> None:
        self.name, self.case, self.num_bytes = "messages", f"{num_bytes} bytes", num_bytes
        self._world = world
        self._plan = np.zeros(max(1, num_bytes // self.PLAN_PART), np.uint8)
        self._report = np.zeros(max(1, num_bytes // world.size), np.uint8)

    def once(self) -> None:
        """One of both."""
        self._world.broadcast(self._plan)
        self._world.gather(self._report)


class Entries(Piece):
    """A plan for so many ranks, written and read; every rank does both, as rank 0 has to."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._plan = GroupPlan(0, 0, 0, Assignment.even(num_ranks, num_ranks), ((0, num_ranks),), ((0.1,),))
        self.name, self.case, self.num_bytes = "entries", f"{num_ranks} ranks in a plan", len(self._plan.encode())

    def once(self) -> None:
        """One plan."""
        GroupPlan.decode(self._plan.encode())
