"""The executor: what every rank does with a plan.

For each iteration of the group, this rank runs its own partitions, one after the other, and then all ranks
synchronise (`ParameterManager.synchronize`). No other message passes inside a group. A partition's numbers depend on
the partition alone: its samples, its random stream (seed, iteration, partition), the iteration's weights and buffers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mpidl.data import Batch, Loader, partition_seed, seed_everything
from mpidl.errors import DataError, NonFiniteLossError, TooManyDroppedError
from mpidl.parameters import PHASES, Assignment, ParameterManager
from mpidl.parameters.counters import DROPPED, FLAGS, WEIGHT
from mpidl.runtime import activity, on_all_ranks
from mpidl.runtime.spans import MAIN
from mpidl.scheduling.dropping import most_dropped
from mpidl.scheduling.forward import LossFunction, call_model, loss_sum, split_batch
from mpidl.scheduling.pace import Pace
from mpidl.scheduling.partitions import assignment_for, num_partitions, partition_span
from mpidl.scheduling.plan import GroupPlan

REPORT_FIELDS = ("load", "compute", "loader_start", *PHASES)
"""Seconds that each rank reports for a group; `load` is waiting for data, but for the run's first batch, for which the
workers have to start: `loader_start`; waiting for weights is not part of `compute`."""


class Executor:
    """Runs plans on this rank.

    Args:
        manager: the parameters of `model`.
        model: what is trained.
        loss_fn: from (outputs, targets) to the mean loss, or (sum, weight).
        loader: of the training set; this rank's requests only.
        batch_size: samples of a full batch.
        seed: of the run.
        stop_flags: reasons to stop that this rank has seen, as `StopReason`s: they go to all ranks.
        drop_share: at most this share of an iteration's partitions may be dropped.
        drops: of a replay: the partitions to drop, by the number of iterations that are done with that one; None: the
            plans' budgets say.
    """

    def __init__(
        self,
        manager: ParameterManager,
        model: nn.Module,
        loss_fn: LossFunction,
        loader: Loader,
        *,
        batch_size: int,
        seed: int,
        stop_flags: Callable[[], int] = lambda: 0,
        drop_share: float = 0.0,
        drops: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._manager = manager
        self._model = model
        self._loss_fn = loss_fn
        self._loader = loader
        self._batch_size = batch_size
        self._seed = seed
        self._activity = manager.world.activity
        self._stop_flags = stop_flags
        self._began = time.perf_counter()
        self._unchecked: int | None = None
        """The iteration whose gradient may not be finite."""
        self._seconds = dict.fromkeys(REPORT_FIELDS, 0.0)
        self._pace = Pace()
        self._drop_share = drop_share
        self._recorded_drops = drops
        self._is_first = True
        self._has_data = False
        self.drops: NDArray[np.float64] = np.zeros(2)
        """So far, the same on all ranks: partitions that were dropped, iterations that were repeated."""
        self._batches: list[Batch | None] = []
        """What the iteration has taken from the loader; kept where it may be repeated."""
        self._next_batch = 0
        self._iteration_began = self._began
        self._ready = manager.assignment
        """The last assignment that there was room for."""

    @property
    def began(self) -> float:
        """When its clock was zero."""
        return self._began

    def go_on_from(self, began: float, drops: NDArray[np.float64]) -> None:
        """Let the clock and the counts go on of one that a loss has ended."""
        self._began, self.drops = began, drops

    @property
    def may_drop(self) -> bool:
        """Whether partitions may be dropped."""
        return self._drop_share > 0

    def accept(self, plan: GroupPlan) -> GroupPlan:
        """Make ready for a plan that was received, and ask the loader for its samples. Collective.

        Returns:
            The plan, or one with the assignment before it if there is no room for the rows of this one.
        """
        if not self._manager.reserve(plan.assignment):
            plan = dataclasses.replace(plan, assignment=self._ready)
        self._ready = plan.assignment
        self.request(plan)
        return plan

    def assignment(self, plan: GroupPlan, index: int) -> Assignment:
        """Who computes what in the plan's iteration `index`."""
        start, stop = plan.spans[index]
        partitions = num_partitions(stop - start, self._batch_size, plan.assignment.num_partitions)
        return assignment_for(plan.assignment, partitions)

    def request(self, plan: GroupPlan) -> None:
        """Ask the loader for all samples of this rank in a group, so that reading runs ahead of computing."""
        for index, span in enumerate(plan.spans):
            assignment = self.assignment(plan, index)
            for partition in range(*assignment.range_of(self._manager.world.rank)):
                self._loader.request(plan.epoch, *partition_span(span, assignment.num_partitions, partition))

    def iterate(self, plan: GroupPlan, index: int) -> NDArray[np.float64]:
        """Run one iteration of a group whose samples were requested. Collective.

        Returns:
            float64, (partitions, 6): `counters.FIELDS` of every partition.

        Raises:
            NonFiniteLossError: on every rank at the same iteration: a loss (the weights are those before it) or the
                gradient, of this iteration or of the one before (they are not), is not finite.
        """
        with self._activity.spans.within(MAIN, f"iteration {plan.first_iteration + index + 1}"):
            return self._iterate(plan, index)

    def _iterate(self, plan: GroupPlan, index: int) -> NDArray[np.float64]:
        iteration = plan.first_iteration + index
        is_last = index == plan.num_iterations - 1  # what is due after the group reads the weights
        try:
            budget_s = math.inf if self._is_first else plan.budget_s or math.inf
            self._is_first = False
            table = self._attempt(plan, index, budget_s, wait=is_last)
        except TooManyDroppedError:
            self.drops[1] += 1
            table = self._attempt(plan, index, math.inf, wait=is_last)
        self._forget_batches(self.assignment(plan, index))
        self.drops[0] += np.count_nonzero(table[:, FLAGS].astype(int) & DROPPED)
        self._unchecked = iteration
        if is_last or not self._manager.runs_ahead:
            self._check_gradient()
        if table[:, WEIGHT].sum() == 0:
            self._manager.wait()
            raise on_all_ranks(NonFiniteLossError(f"all weights of iteration {iteration + 1} are zero: no mean loss"))
        return table

    def _attempt(self, plan: GroupPlan, index: int, budget_s: float, *, wait: bool) -> NDArray[np.float64]:
        """Compute this rank's partitions, or as many as the budget allows, and synchronise. Collective."""
        assignment = self.assignment(plan, index)
        most = most_dropped(self._drop_share, assignment.num_partitions)
        iteration = plan.first_iteration + index
        self._manager.begin(assignment)
        self._next_batch, self._iteration_began = 0, time.perf_counter()
        first, stop = assignment.range_of(self._manager.world.rank)
        try:
            for partition in range(first, stop):
                started = time.perf_counter() - self._iteration_began
                if most and partition > first and self._is_dropped(iteration, partition, started > budget_s):
                    self._manager.drop_partition(assignment, partition, self._stop_flags(), self._now(), started)
                else:
                    self._compute(assignment, plan, index, partition)
        except Exception:
            self._check_gradient()  # weights that are not finite are the reason, whatever the model made of them
            raise
        self._pace.end_iteration(counts=assignment is plan.assignment)
        for group, rate in zip(self._manager.param_groups, plan.learning_rates[index], strict=True):
            group["lr"] = rate
        self._check_gradient()
        try:
            return self._manager.synchronize(assignment, wait=wait, most_dropped=most)
        except NonFiniteLossError as error:
            raise on_all_ranks(NonFiniteLossError(f"{error} in iteration {iteration + 1}")) from None

    def _is_dropped(self, iteration: int, partition: int, is_late: bool) -> bool:
        if self._recorded_drops is None:
            return is_late
        return partition in self._recorded_drops.get(iteration + 1, ())

    def _take_batch(self, keeps: bool) -> Batch:
        """The iteration's next batch, also where it is repeated."""
        if self._next_batch < len(self._batches):
            batch = self._batches[self._next_batch]
        else:
            batch = self._loader.next()
            self._batches.append(batch if keeps else None)
        self._next_batch += 1
        return batch

    def _forget_batches(self, assignment: Assignment) -> None:
        """The iteration is over: what it did not take from the loader is not wanted any more."""
        start, stop = assignment.range_of(self._manager.world.rank)
        for _ in range(stop - start - len(self._batches)):
            self._loader.skip()
        self._batches.clear()

    def _now(self) -> float:
        """This rank's clock."""
        return time.perf_counter() - self._began

    def settle(self) -> None:
        """Complete the weights, for whoever reads them between two iterations of a group. Not collective.

        Raises:
            NonFiniteLossError: on every rank: the gradient of the last iteration is not finite.
        """
        self._manager.wait()
        self._check_gradient()

    def _check_gradient(self) -> None:
        """Raise on all ranks if the last iteration's gradient was not finite.

        Where weights are still under way, asked when the next one has computed: the norm comes after them.
        """
        iteration, self._unchecked = self._unchecked, None
        if iteration is not None and not math.isfinite(self._manager.grad_norm):  # the same number on every rank
            self._manager.wait()
            self._manager.reset_buffers()
            raise on_all_ranks(NonFiniteLossError(f"the gradient is not finite in iteration {iteration + 1}"))

    def _compute(self, assignment: Assignment, plan: GroupPlan, index: int, partition: int) -> None:
        iteration = plan.first_iteration + index
        start, stop = partition_span(plan.spans[index], assignment.num_partitions, partition)
        begin, waited_s = time.perf_counter(), self._manager.waited_s
        self._activity.enter(activity.DATA, iteration + 1)
        inputs, targets = split_batch(self._take_batch(keeps=plan.budget_s > 0))
        loaded = time.perf_counter()
        self._activity.enter(activity.COMPUTE)
        self._manager.begin_partition(assignment, partition)
        seed_everything(partition_seed(self._seed, iteration, partition))
        outputs = call_model(self._model, inputs)
        try:
            total, weight = loss_sum(self._loss_fn, outputs, targets, stop - start)
        except IndexError as error:  # torch's for a label that the model has no output for
            raise DataError(
                f"the loss of iteration {iteration + 1}, partition {partition}, does not take the targets: {error}"
            ) from error
        turned = time.perf_counter()
        total.backward()
        self._manager.end_partition(
            assignment, partition, float(total.detach()), weight, stop - start, self._stop_flags(), self._now(),
            begin - self._iteration_began,
        )  # fmt: skip
        waited_s = self._manager.waited_s - waited_s  # forward waits for weights of other nodes
        done = time.perf_counter()
        self._seconds["load" if self._has_data else "loader_start"] += loaded - begin
        self._has_data = True
        self._seconds["compute"] += done - loaded - waited_s
        self._pace.add(done - begin - waited_s, stop - start)
        if self._activity.spans.is_on:
            times = (begin, loaded, turned, done)
            for name, began, ended in zip(("data", "forward", "backward"), times, times[1:], strict=False):
                self._activity.spans.add(MAIN, name, began, ended)

    def take_pace(self) -> NDArray[np.float64]:
        """How fast this rank computed since the last call: PACE_FIELDS."""
        return self._pace.take()

    def take_seconds(self) -> NDArray[np.float64]:
        """This rank's seconds since the last call, in the order of REPORT_FIELDS."""
        self._seconds.update(self._manager.take_times())
        taken = np.array([self._seconds[field] for field in REPORT_FIELDS])
        self._seconds = dict.fromkeys(REPORT_FIELDS, 0.0)
        return taken
