"""The coordinator: rank 0's second role. It makes the plans and learns from the reports.

The report of group k shapes plan k + 2, because plan k + 1 is already under way when group k ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mpidl.errors import ConfigError
from mpidl.parameters import Assignment
from mpidl.scheduling.group_size import GroupSize
from mpidl.scheduling.partitions import batch_span
from mpidl.scheduling.plan import GroupPlan
from mpidl.scheduling.triggers import Triggers

ScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class LearningRates:
    """The learning rate of every iteration, by torch's own schedulers, one step an iteration.

    The scheduler works on an optimizer of the run's own kind over one empty tensor per param group.

    Args:
        factory: the run's optimizer factory.
        groups: each param group's options.
        schedule: from an optimizer to a torch scheduler; None: constant.

    Raises:
        ConfigError: the schedule changes more than learning rates, which is all that a plan carries.
    """

    def __init__(
        self,
        factory: Callable[[Any], torch.optim.Optimizer],
        groups: Sequence[Mapping[str, Any]],
        schedule: ScheduleFactory | None,
    ) -> None:
        empty = [{**options, "params": [torch.nn.Parameter(torch.empty(0))]} for options in groups]
        self._optimizer = factory(empty)
        self._options = [dict(group) for group in self._optimizer.param_groups]
        self._scheduler = schedule(self._optimizer) if schedule else None
        self._next = 0
        self._check()

    @property
    def num_groups(self) -> int:
        """The number of param groups."""
        return len(self._optimizer.param_groups)

    def at(self, iteration: int) -> tuple[float, ...]:
        """The rates of an iteration; iterations are asked for in ascending order."""
        while self._next < iteration:
            self._advance()
        return tuple(float(group["lr"]) for group in self._optimizer.param_groups)

    def _advance(self) -> None:
        self._next += 1
        if self._scheduler is not None:
            self._optimizer.step()  # torch warns about schedulers that move before their optimizer
            self._scheduler.step()
            self._check()

    def _check(self) -> None:
        for group, before in zip(self._optimizer.param_groups, self._options, strict=True):
            changed = {key for key, value in before.items() if key not in ("lr", "params") and group[key] != value}
            # Torch's cycles announce themselves by this key, even while the momentum still is what it was.
            changed |= {"momentum"} & {key.removeprefix("max_") for key in group.keys() - before.keys()}
            if changed:
                raise ConfigError(
                    f"the schedule changes {', '.join(sorted(changed))}; it may change the learning rate only; pass "
                    "cycle_momentum=False to torch's OneCycleLR and CyclicLR"
                )


LONGEST_TRIAL = 100_000
"""Iterations for which a schedule is tried before the training begins: about a second."""


def check_schedule(
    factory: Callable[[Any], torch.optim.Optimizer],
    groups: Sequence[Mapping[str, Any]],
    schedule: ScheduleFactory | None,
    total_iterations: int,
) -> None:
    """Walk a schedule through the training, so that one that fails does so before the first iteration.

    Raises:
        ConfigError: it cannot be made, or be stepped once an iteration.
    """
    if schedule is None:
        return
    last = max(0, min(total_iterations, LONGEST_TRIAL) - 1)
    try:
        LearningRates(factory, groups, schedule).at(last)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the schedule does not serve {total_iterations} iterations, one step each: {type(error).__name__}: {error}"
        ) from error


class Coordinator:
    """Makes one plan after the other; lives on rank 0 only.

    Args:
        num_samples: samples of the training set.
        batch_size: samples of a full batch.
        assignment: who computes which partitions of a full batch.
        triggers: what is due when.
        group_size: iterations of a group.
        learning_rates: of every iteration.
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
        first_iteration: int = 0,
    ) -> None:
        self.group_size = group_size
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._assignment = assignment
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
        plan = GroupPlan(
            index=self._next_index,
            epoch=first // per_epoch,
            first_iteration=first,
            assignment=self._assignment,
            spans=tuple(spans),
            learning_rates=tuple(self._learning_rates.at(i) for i in range(first, stop)),
            actions=self._triggers.actions_after(stop),
        )
        self._next_iteration, self._next_index = stop, self._next_index + 1
        return plan

    def observe(self, plan: GroupPlan, seconds: float) -> None:
        """Learn from the report of a group."""
        self.group_size.observe(plan.num_iterations, seconds)
