"""What the ranks report at a group's end: to the coordinator, and for the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpidl.parameters import ParameterManager
from mpidl.parameters.counters import LOSS_SUM, SAMPLES, WEIGHT
from mpidl.runtime.spans import MAIN
from mpidl.scheduling import REPORT_FIELDS, Coordination, Coordinator, Executor, GroupPlan, GroupSize, Replay
from mpidl.scheduling.stragglers import Stragglers
from mpidl.summary import describe_move, describe_straggler

_MANY_REPEATED, _REPEATED_SHARE = 5, 0.1
"""Iterations that were repeated, and their share, from which on a warning is due."""


RANKS_TOLD = 64
"""The metrics have the phases of all ranks where there are so many at most, else of those with the most work."""


def rank_phases(times: NDArray[np.float64]) -> dict[str, list[Any]]:
    """Seconds of a group by phase and rank.

    Args:
        times: float64, (ranks, phases); of all ranks, in the order of REPORT_FIELDS.

    Returns:
        "ranks", ascending, and of each phase the seconds of these ranks.
    """
    work = times[:, :2].sum(axis=1)
    ranks = np.sort(np.argsort(work, kind="stable")[-RANKS_TOLD:])
    told = np.round(times[ranks], 6).T.tolist()
    return {"ranks": ranks.tolist(), **dict(zip(REPORT_FIELDS, told, strict=True))}


class Reports:
    """Gathers the ranks' times, lets the coordinator learn from them, and records them.

    Args:
        manager: of the parameters.
        executor: this rank's.
        coordinator: on rank 0; None elsewhere.
        group_size: of the groups.
        record: takes an event and its fields; rank 0's counts.
    """

    def __init__(
        self,
        manager: ParameterManager,
        executor: Executor,
        coordinator: Coordinator | Replay | None,
        group_size: GroupSize,
        record: Callable[..., None],
    ) -> None:
        self.coordination = Coordination()
        """What control takes."""
        self._world = manager.world.for_purpose("report")
        self._manager = manager
        self._executor = executor
        self._coordinator = coordinator
        self._group_size = group_size
        self._record = record
        self._told_starts = manager.assignment.starts  # the metrics have the ranges when they change
        self._told_drops: dict[str, NDArray[np.float64]] = {}
        self._sums = np.zeros(3)
        self._phase_seconds = np.zeros(len(REPORT_FIELDS) + 1)
        self._num_iterations = 0
        self._has_warned = False
        self._stragglers = Stragglers(manager.world.size)

    def add(self, table: NDArray[np.float64]) -> None:
        """Take the counters of an iteration of the group."""
        self._sums += table[:, [LOSS_SUM, WEIGHT, SAMPLES]].sum(axis=0)
        self._num_iterations += 1
        if self._coordinator is not None:
            self._coordinator.note(table)

    def gather(self, plan: GroupPlan, num_iterations: int, seconds: float) -> None:
        """The group's one gather. Collective.

        Args:
            plan: of the group.
            num_iterations: that were done of it.
            seconds: that they took.
        """
        with self.coordination.timed(), self._world.activity.spans.within(MAIN, "report"):
            own = np.concatenate([self._executor.take_seconds(), self._executor.take_pace()])
            report = self._world.gather(own)
            coordination_s = self.coordination.end_group(num_iterations, seconds)
            sums, self._sums = self._sums, np.zeros(3)
            if self._coordinator is None or report is None:
                return
            times, paces = np.split(report, [len(REPORT_FIELDS)], axis=1)
            self._coordinator.observe(plan, seconds, coordination_s)
            self._phase_seconds += [*times.mean(axis=0), seconds]
            told = self._describe(plan, times, paces)
            self._record(
                "group",
                epoch=plan.epoch + 1,
                iteration=plan.first_iteration + num_iterations,
                iterations=num_iterations,
                samples=int(sums[2]),
                loss=sums[0] / sums[1],
                lr=plan.learning_rates[num_iterations - 1][0],
                seconds=seconds,
                samples_per_s=sums[2] / seconds,
                coordination_s=coordination_s,
                **told,
            )
            self._balance(plan, num_iterations, times, paces)
            self._tell_stragglers(plan, num_iterations, paces[:, 0], seconds)
            self._warn_of_repetitions()

    def _warn_of_repetitions(self) -> None:
        """Say once that the budget is too small for what may be dropped."""
        repeated = int(self._executor.drops[1])
        if self._has_warned or repeated < _MANY_REPEATED or repeated < _REPEATED_SHARE * self._num_iterations:
            return
        self._has_warned = True
        self._record(
            "warning",
            message=f"{repeated} of {self._num_iterations} iterations were computed twice, since more partitions than "
            "drop_share allows had not started when the budget was spent; give a larger drop_budget_s or drop_share",
        )

    def _describe(self, plan: GroupPlan, times: NDArray[np.float64], paces: NDArray[np.float64]) -> dict[str, Any]:
        starts, self._told_starts = self._told_starts, plan.assignment.starts
        return {
            "group_size": plan.num_iterations,
            "coordination_share": self._group_size.share,
            "bucket_bytes": self._manager.bucket_bytes,
            "phases": dict(zip(REPORT_FIELDS, times.mean(axis=0).tolist(), strict=True)),
            "wait_s": float(times[:, REPORT_FIELDS.index("wait")].mean()),
            "slowest_rank": int(times[:, :2].sum(axis=1).argmax()),
            "seconds_per_sample": paces[:, 0].tolist(),
            "rank_phases": rank_phases(times),
            **self.drops("group"),
            **({} if plan.assignment.starts == starts else {"partition_starts": plan.assignment.starts}),
        }

    def _balance(
        self, plan: GroupPlan, num_iterations: int, times: NDArray[np.float64], paces: NDArray[np.float64]
    ) -> None:
        assert self._coordinator is not None
        least = dict(zip(REPORT_FIELDS, times.min(axis=0).tolist(), strict=True))
        move = self._coordinator.balance(plan, paces, least)
        if move is not None:
            iteration = plan.first_iteration + num_iterations
            self._record("balance", iteration=iteration, **describe_move(move, self._world.hostnames))

    def _tell_stragglers(
        self, plan: GroupPlan, num_iterations: int, seconds_per_sample: NDArray[np.float64], seconds: float
    ) -> None:
        """Name who is slow for good, and say what is done about it."""
        balances = isinstance(self._coordinator, Coordinator) and self._coordinator.balances
        for change in self._stragglers.observe(seconds_per_sample, seconds):
            told = describe_straggler(
                change, self._world.hostnames, plan.assignment, balances=balances, drops=self._executor.may_drop
            )
            self._record("straggler", iteration=plan.first_iteration + num_iterations, **told)

    def drops(self, event: str) -> dict[str, int]:
        """What was dropped since the last event of this name; nothing where nothing may be dropped."""
        if not self._executor.may_drop:
            return {}
        now = self._executor.drops.copy()
        dropped, repeated = now - self._told_drops.get(event, 0)
        self._told_drops[event] = now
        return {"dropped_partitions": int(dropped), "repeated_iterations": int(repeated)}

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of all groups, the mean over ranks, by phase, and "total"; on rank 0."""
        return dict(zip((*REPORT_FIELDS, "total"), self._phase_seconds.tolist(), strict=True))
