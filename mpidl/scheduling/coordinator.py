"""The coordinator: rank 0's second role. It makes the plans and learns from the reports.

The report of group k shapes plan k + 2, because plan k + 1 is already under way when group k ends. Where learning rates
depend on validations, the plan of a group that ends with one has the action WAIT: the next plan is made only after
`validated` has told its result.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mpidl.parameters import Assignment
from mpidl.parameters.counters import STARTED
from mpidl.scheduling.balance import Balancer, Move
from mpidl.scheduling.dropping import DropBudget
from mpidl.scheduling.due import Triggers
from mpidl.scheduling.group_size import GroupSize
from mpidl.scheduling.learning_rates import LearningRates
from mpidl.scheduling.partitions import batch_span
from mpidl.scheduling.plan import Action, GroupPlan


class Coordinator:
    """Makes one plan after the other; lives on rank 0 only.

    Args:
        num_samples: samples of the training set.
        batch_size: samples of a full batch.
        assignment: who computes which partitions of a full batch.
        triggers: what is due when.
        group_size: iterations of a group.
        learning_rates: of every iteration.
        balancer: moves partitions; None: they stay.
        drop_budget: of an iteration; None: nothing is dropped.
        first_iteration: where a resumed run begins; else 0.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        assignment: Assignment,
        triggers: Triggers,
        group_size: GroupSize,
        learning_rates: LearningRates,
        balancer: Balancer | None = None,
        drop_budget: DropBudget | None = None,
        first_iteration: int = 0,
    ) -> None:
        self.group_size = group_size
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._assignment = assignment
        self._balancer = balancer
        self._drop_budget = drop_budget
        self._first_moved = 0
        """The first plan with the balancer's assignment."""
        self._triggers = triggers
        self._learning_rates = learning_rates
        self._next_iteration = first_iteration
        self._next_index = 0

    def next_plan(self) -> GroupPlan:
        """The plan of the next group; must not be called once a plan had the action END."""
        first = self._next_iteration
        stop = min(first + self.group_size.value, self._triggers.next_cut(first))
        per_epoch = self._triggers.iterations_per_epoch
        spans = [batch_span(self._num_samples, self._batch_size, i % per_epoch) for i in range(first, stop)]
        if self._balancer is not None:
            self._assignment = self._balancer.assignment
        plan = GroupPlan(
            index=self._next_index,
            epoch=first // per_epoch,
            first_iteration=first,
            assignment=self._assignment,
            spans=tuple(spans),
            learning_rates=tuple(self._learning_rates.at(i) for i in range(first, stop)),
            actions=self._foreseen_after(stop),
            budget_s=0.0 if self._drop_budget is None else self._drop_budget.value,
        )
        self._next_iteration, self._next_index = stop, self._next_index + 1
        return plan

    def _foreseen_after(self, completed: int) -> Action:
        actions = self._triggers.foreseen_after(completed)
        is_awaited = Action.VALIDATE in actions and Action.END not in actions
        return actions | Action.WAIT if is_awaited and self._learning_rates.metric is not None else actions

    def validated(self, completed: int, result: Mapping[str, float]) -> None:
        """Learn from the validation after `completed` iterations, before the plan behind it is made.

        A resumed training tells the results of earlier validations again, in their order: the learning rates are a
        function of them.
        """
        if self._learning_rates.metric is not None:
            self._learning_rates.observe(completed, result)

    def observe(self, plan: GroupPlan, seconds: float, coordination_s: float) -> None:
        """Learn from the report of a group: what its iterations took, and what plans and reports took meanwhile."""
        self.group_size.observe(plan.num_iterations, seconds, coordination_s)

    def note(self, table: NDArray[np.float64]) -> None:
        """Learn from an iteration: float64, (partitions, 6), `counters.FIELDS` of every partition."""
        if self._drop_budget is not None and self._drop_budget.value == 0:
            self._drop_budget.observe(table[:, STARTED])

    @property
    def balances(self) -> bool:
        """Whether partitions may move."""
        return self._balancer is not None

    def balance(self, plan: GroupPlan, paces: NDArray[np.float64], seconds: Mapping[str, float]) -> Move | None:
        """Learn how fast the ranks were in a group, and decide who computes what from the plan on that is made next.

        Args:
            plan: as it was run.
            paces: float64, (ranks, 3): PACE_FIELDS of each rank.
            seconds: by phase, of the rank that waited least for others.

        Returns:
            The move, if there is one.
        """
        if self._balancer is None:
            return None
        if plan.index >= self._first_moved and plan.assignment != self._balancer.assignment:
            self._balancer.confine(plan.assignment)
        move = self._balancer.observe(
            plan.assignment,
            paces,
            samples=self._batch_size / plan.assignment.num_partitions,
            local_sum_s=seconds["local_sum"] / plan.num_iterations,
            reduce_scatter_s=seconds["reduce_scatter"] / plan.num_iterations,
        )
        if move is not None:
            self._first_moved = self._next_index
        return move
