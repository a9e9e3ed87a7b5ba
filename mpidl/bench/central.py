"""A centralised scheduler, built as Spark's is: what group plans are measured against.

For every partition of every iteration rank 0 sends a task, pickled, to the rank that has this partition; the rank
unpickles it, does it, and answers with its figures, pickled. The iteration ends when rank 0 has all answers. Rank 0 has
its share of the partitions too: the tasks that it gives itself are pickled, as Spark's local ones are, but no message.

All of an iteration's tasks are sent before the first answer is read, to the ranks in turn, and what rank 0 sends is not
waited for until all answers are in, so no two ranks wait for each other; after each task of its own, rank 0 lets MPI
deliver more. After the last iteration rank 0 sends everyone None. Whoever waits does so as everybody in mpidl: where
ranks share cores, he gives his away.
"""

from __future__ import annotations

import collections
import itertools
import pickle
import time
from typing import Any, NamedTuple

import numpy as np

from mpidl.bench.measuring import pause
from mpidl.errors import DisagreementError
from mpidl.parameters import Assignment
from mpidl.runtime import Pending, World

_LEARNING_RATE = 0.1
_LARGEST_MESSAGE = 4096


class Task(NamedTuple):
    """What an executor has to know about one partition of one iteration."""

    iteration: int
    epoch: int
    partition: int
    num_partitions: int
    start: int
    stop: int
    learning_rates: tuple[float, ...]


class Answer(NamedTuple):
    """What it tells when it has computed it."""

    iteration: int
    partition: int
    samples: int
    loss: float
    load_s: float
    compute_s: float


class Central:
    """A scheduler that sends every task of every iteration; what is timed is all iterations but the first.

    Args:
        world: all ranks.
        partitions: tasks of an iteration.
        iterations: that are timed.
        wait_s: how long the rank with the most tasks waits in an iteration, instead of computing.
    """

    name = "central"
    group_size = calls_per_group = None

    def __init__(self, world: World, partitions: int, iterations: int, wait_s: float) -> None:
        self._world, self.partitions, self.iterations = world, partitions, iterations
        self.case = f"{partitions} partitions"
        assignment = Assignment.even(partitions, world.size)
        ranges = [range(*assignment.range_of(rank)) for rank in range(world.size)]
        self._owners = [rank for rank, own in enumerate(ranges) for _ in own]
        in_turn = itertools.zip_longest(*ranges)
        self._order = [partition for turn in in_turn for partition in turn if partition is not None]
        self._task_s = wait_s / max(map(len, ranges))
        self._buffer = bytearray(_LARGEST_MESSAGE)
        self.num_bytes = 0.0
        """That rank 0 sends in an iteration; known to it alone."""

    def prepare(self) -> None:
        """Forget the last run."""
        self._seconds, self._sent_bytes = 0.0, 0
        self.answers: list[Answer] = []
        """All that rank 0 got in the last run."""

    def run(self) -> None:
        """Rank 0 drives, the others execute until they are sent None."""
        if self._world.rank > 0:
            while (task := self._receive()) is not None:
                self._wait([self._world.comm.Isend(self._do(task), dest=0)])
            return
        self._drive(0)
        began, self._sent_bytes = time.perf_counter(), 0
        for iteration in range(1, self.iterations + 1):
            self._drive(iteration)
        self._seconds = time.perf_counter() - began
        self.num_bytes = self._sent_bytes / self.iterations
        self._wait([self._world.comm.Isend(pickle.dumps(None), dest=rank) for rank in range(1, self._world.size)])
        self.check()

    def take(self) -> tuple[float, float]:
        """Seconds of the last run's iterations, and of the waits of each iteration's busiest rank; 0 but on rank 0."""
        waits = np.zeros((self.iterations + 1, self._world.size))
        for answer in self.answers:
            waits[answer.iteration, self._owners[answer.partition]] += answer.compute_s
        return self._seconds, float(waits[1:].max(axis=1).sum())

    def check(self) -> None:
        """Raise DisagreementError, on rank 0, unless every task was answered once."""
        expected = [(i, p) for i in range(self.iterations + 1) for p in range(self.partitions)]
        if sorted((answer.iteration, answer.partition) for answer in self.answers) != expected:
            raise DisagreementError("some task of the centralised scheduler was not answered exactly once")

    def _drive(self, iteration: int) -> None:
        """Rank 0's part of an iteration."""
        own, requests = [], []
        for partition in self._order:
            owner = self._owners[partition]
            message = pickle.dumps(self._task(iteration, partition))
            if owner == 0:
                own.append(message)
            else:
                requests.append(self._world.comm.Isend(message, dest=owner))
                self._sent_bytes += len(message)
        unsent = collections.deque(requests)
        for message in own:
            self.answers.append(pickle.loads(self._do(pickle.loads(message))))
            while unsent and unsent[0].Test():  # lets MPI deliver what it has room for, meanwhile
                unsent.popleft()
        for _ in requests:
            self.answers.append(self._receive())
        self._wait(requests)

    def _task(self, iteration: int, partition: int) -> Task:
        start = iteration * self.partitions + partition
        return Task(iteration, 0, partition, self.partitions, start, start + 1, (_LEARNING_RATE,))

    def _do(self, task: Task) -> bytes:
        """An executor's part: the answer to a task."""
        seconds = pause(self._task_s)
        return pickle.dumps(Answer(task.iteration, task.partition, task.stop - task.start, 1.0, 0.0, seconds))

    def _receive(self) -> Any:
        """The next message from anyone; a pickle knows its own end."""
        self._wait([self._world.comm.Irecv(self._buffer)])
        return pickle.loads(self._buffer)

    def _wait(self, requests: list[Any]) -> None:
        for request in requests:
            Pending(request, self._world.shares_cores).wait()
