"""How plans travel: one broadcast a group, begun while the group before it runs.

A plan that was received is a value of its own, so one buffer of fixed size serves: while group k runs, rank 0 has built
plan k + 1 into it and every rank has started the same broadcast; the buffer belongs to MPI until `receive`. A broadcast
that was started is completed on every rank, even when the run ends early and its content is dropped.

Where plan k has the action WAIT, plan k + 1 depends on the validation at the end of group k. Every rank knows this from
plan k alone: none starts the broadcast while the group runs, all start and complete it after the validation.
"""

from __future__ import annotations

import time

import numpy as np

from mpidl.runtime import Pending, World
from mpidl.runtime.spans import PLANS
from mpidl.scheduling.coordinator import Coordinator
from mpidl.scheduling.plan import GroupPlan, to_buffer
from mpidl.scheduling.replay import Replay


class PlanChannel:
    """Brings each plan from the coordinator to all ranks. All methods are collective.

    Args:
        world: all ranks.
        coordinator: on rank 0; None elsewhere.
        capacity: bytes of the largest plan.
    """

    def __init__(self, world: World, coordinator: Coordinator | Replay | None, capacity: int) -> None:
        self._world = world.for_purpose("plan")
        self._coordinator = coordinator
        self._buffer = np.zeros(capacity, np.uint8)
        self._pending: Pending | None = None
        self._started = 0.0

    def start(self) -> None:
        """Build the next plan on rank 0 and start its broadcast."""
        if self._coordinator is not None:
            to_buffer(self._coordinator.next_plan(), self._buffer)
        self._started = time.perf_counter()
        self._pending = self._world.start_broadcast(self._buffer)

    def receive(self) -> GroupPlan:
        """Complete the broadcast and read the plan."""
        self.drop()
        return GroupPlan.decode(self._buffer.tobytes())

    def drop(self) -> None:
        """Complete a broadcast that was started, if any, without reading it."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            spans = self._world.activity.spans
            if spans.is_on:
                spans.add(PLANS, "plan", self._started, time.perf_counter())
