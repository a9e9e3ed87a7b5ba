"""A recorded run's plans once more.

A replay gives every rank the plans again, one after the other, through the same broadcasts; what was done when is known
to all ranks from the beginning. It ends where the recorded run ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpidl.parameters import Assignment
from mpidl.scheduling.plan import Action, GroupPlan
from mpidl.scheduling.recording import Recording


class Replay:
    """Gives the recorded plans one after the other, in the coordinator's place.

    Args:
        recording: of the run that is repeated.
        world_size: ranks of this one.
    """

    def __init__(self, recording: Recording, world_size: int) -> None:
        self._groups = list(recording.groups)
        self._world_size = world_size
        self._next = 0

    def next_plan(self) -> GroupPlan:
        """The next plan, as far as it was carried out; the last one has the action END."""
        group, index = self._groups[self._next], self._next
        self._next += 1
        assignment = group.plan.assignment
        if len(assignment.starts) != self._world_size + 1:  # of a part that other ranks have run
            assignment = Assignment.even(assignment.num_partitions, self._world_size)
        actions = group.plan.actions & ~Action.END
        return dataclasses.replace(
            group.plan,
            index=index,
            assignment=assignment,
            spans=group.plan.spans[: group.done],
            learning_rates=group.plan.learning_rates[: group.done],
            actions=actions if self._next < len(self._groups) else actions & ~Action.WAIT | Action.END,
        )

    def validated(self, completed: int, result: Mapping[str, float]) -> None:
        """Nothing: the plans are made."""

    def observe(self, plan: GroupPlan, *report: Any) -> None:
        """Nothing: the plans are made."""

    def note(self, table: Any) -> None:
        """Nothing: the plans are made."""

    def balance(self, plan: GroupPlan, *report: Any) -> None:
        """Nothing: the plans are made."""
