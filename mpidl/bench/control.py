"""mpidl's way to tell ranks what to compute: a plan and a report for each group, and nothing for an iteration.

The course is that of a real training (`Training`: plans, their broadcast while the group runs, reports, events in a
file), whose executor neither loads nor computes nor exchanges; it may wait instead.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl.bench.measuring import pause
from mpidl.data import Batch
from mpidl.runtime import World
from mpidl.scheduling import REPORT_FIELDS, Executor, GroupPlan, capacity
from mpidl.start import Start
from mpidl.telemetry import Telemetry
from mpidl.trainer import Trainer
from mpidl.training import Training

CONTROL = ("plan", "report")
"""What calls of the control are for."""
_COUNTERS = np.array([[1.0, 1.0, 1.0, 0.0, 0.0]])  # loss, weight, samples; no flags, no time


class Samples:
    """A data set of which only the size is ever asked for."""

    needs_seeds = True  # nothing is read ahead

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def read(self, indices: NDArray[np.int64], seeds: Any) -> Batch:
        """Nothing ever reads."""
        raise AssertionError("control without compute reads no samples")


class Idle(Executor):
    """Does nothing in an iteration but wait for `wait_s`, and takes down how long control takes.

    That is the time between two iterations where something is said: from the end of a group to the next one's first
    iteration (the report, its record, the next plan is started), and from this one to the second (it is received).
    As in a training, all ranks wait for each other at the end of a group's last iteration; that wait is not control.
    """

    def __init__(self, *arguments: Any, wait_s: float, world: World, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._wait_s, self._world = wait_s, world.for_purpose("exchange")
        self._ended = time.perf_counter()
        self.control_s: list[float] = []
        """Of each group; the first one's has the start of the training."""
        self.num_calls: list[int] = []
        """For plans and reports, until the end of each group's iterations."""

    def request(self, plan: GroupPlan) -> None:
        """Nothing."""

    def iterate(self, plan: GroupPlan, index: int) -> NDArray[np.float64]:
        """No exchange, so no partition's counters came with it: one row, of a sample whose loss is 1."""
        since_last_s = time.perf_counter() - self._ended
        if index == 0:
            self.control_s.append(since_last_s)
        elif index == 1:
            self.control_s[-1] += since_last_s
        pause(self._wait_s)
        if index == plan.num_iterations - 1:
            self._world.barrier()
            self.num_calls.append(sum(self._world.calls.number_of(purpose) for purpose in CONTROL))
        self._ended = time.perf_counter()
        return _COUNTERS


class ControlOnly(Trainer):
    """A Trainer of so many partitions; makes courses of which nothing but the control is left."""

    def __init__(self, world: World, partitions: int, run_dir: Path | None) -> None:
        super().__init__(
            torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, functools.partial(torch.optim.SGD, lr=0.1),
            batch_size=partitions, partitions=partitions, group_size=1, threads_per_rank=world.threads_per_rank,
            telemetry=Telemetry(run_dir, quiet=True),
        )  # fmt: skip
        self.partitions = partitions

    def course(self, group_size: int, num_groups: int, wait_s: float) -> tuple[Training, Idle]:
        """A training of so many groups, and its executor. Collective."""
        made: list[Idle] = []

        def make(*arguments: Any, **settings: Any) -> Idle:
            made.append(Idle(*arguments, wait_s=wait_s, world=self.world, **settings))
            return made[0]

        self._settings = dataclasses.replace(self._settings, group_size=group_size)
        samples = Samples(self.partitions * group_size * num_groups)
        training = Training(
            self._settings, self.world, self._open_manager(), samples, None, epochs=1, start=Start(), make_executor=make
        )
        return training, made[0]


class Groups:
    """mpidl's way: a plan and a report for each group.

    What is timed is the control of `num_groups` groups: of each the report of the one before it, the start of the next
    plan, and its end.
    """

    def __init__(self, trainer: ControlOnly, group_size: int, num_groups: int, wait_s: float) -> None:
        self._trainer, self.group_size, self.partitions = trainer, group_size, trainer.partitions
        self.name, self.case = "mpidl", f"group size {group_size}, {trainer.partitions} partitions"
        self._num_groups, self._wait_s = num_groups, wait_s
        self.iterations = num_groups * group_size
        self.calls_per_group: float | None = None
        self.num_bytes = self.bytes_of(group_size, trainer.world.size) / group_size

    @staticmethod
    def bytes_of(group_size: int, num_ranks: int) -> int:
        """Bytes of a group's plan and report, where there is one param group."""
        return capacity(group_size, num_ranks, 1) + 8 * len(REPORT_FIELDS) * num_ranks

    def prepare(self) -> None:
        """A new training; one group before those that are timed, and one behind, which is sent no other plan."""
        self._training, self._executor = self._trainer.course(self.group_size, self._num_groups + 2, self._wait_s)

    def run(self) -> None:
        """Run all groups."""
        try:
            self._training.run()
        finally:
            self._training.close()
        calls = self._executor.num_calls
        self.calls_per_group = (calls[-2] - calls[0]) / self._num_groups

    def take(self) -> tuple[float, float]:
        """Seconds of control in the last run on this rank, and seconds of waits among them."""
        return sum(self._executor.control_s[1:-1]), 0.0
