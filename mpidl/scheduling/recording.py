"""The plans of an earlier run, read from its directory: `plan_log.py` says what stands there."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

from mpidl.errors import MALFORMED, ConfigError, PlanError
from mpidl.scheduling.due import Triggers
from mpidl.scheduling.plan import Action, GroupPlan
from mpidl.scheduling.plan_log import FILE_NAME, Group, Header
from mpidl.scheduling.triggers import Facts, Trigger


@dataclasses.dataclass(repr=False)
class _Recorded(Trigger):
    """Holds after the iterations after which something was done."""

    at: frozenset[int]
    is_foreseen = True
    word = "recorded"

    def holds(self, facts: Facts) -> bool:
        return facts.completed in self.at

    def next_after(self, completed: int, iterations_per_epoch: int) -> int | None:
        return min((each for each in self.at if each > completed), default=None)


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a replay has to know; the same on all ranks."""

    run_dir: pathlib.Path
    headers: Sequence[Header]
    """Of each run, where one went on from another's checkpoint."""
    groups: Sequence[Group]

    @property
    def largest_group(self) -> int:
        """Iterations of the longest group."""
        return max(group.done for group in self.groups)

    @property
    def drops(self) -> dict[int, tuple[int, ...]]:
        """The partitions that were dropped, by the number of iterations that were done with that one."""
        return {at: partitions for group in self.groups for at, partitions in group.drops}

    @property
    def has_ended(self) -> bool:
        """Whether the training had ended, and was not stopped."""
        return any(action is Action.END for _, action in self.groups[-1].acts)

    def check(self, given: Header, *, validates: bool) -> None:
        """Raise ConfigError where the plans were made for another run than this one.

        Args:
            given: this run's.
            validates: whether it has a validation set.
        """
        at = 0
        for group in self.groups:
            if group.plan.first_iteration != at:
                raise ConfigError(
                    f"the plans of {self.run_dir} lack the iterations {at + 1} to {group.plan.first_iteration}; "
                    "a run can be repeated from its first iteration only"
                )
            at = group.stop
        for header in self.headers:
            recorded = header.fixed()
            if header is not self.headers[-1] and header.is_free:
                del recorded["world_size"]  # another number of ranks has computed the same
            for name, value in recorded.items():
                if value != getattr(self.headers[-1], name):
                    raise ConfigError(
                        f"{self.run_dir} was resumed with another {name}; a run can be repeated that had one all along"
                    )
                if value != getattr(given, name):
                    raise ConfigError(
                        f"the plans of {self.run_dir} were made for {_described(name, value)}, this run has "
                        f"{getattr(given, name)}; repeat it with the same"
                    )
        for group in self.groups:
            if not _fits(group.plan, given):
                at = group.plan.first_iteration
                raise ConfigError(f"{self.run_dir / FILE_NAME}, the group of iteration {at} is not one of such a run")
        if given.error_feedback and given.drop_share:
            raise ConfigError("what error_feedback keeps after iterations that were repeated cannot be repeated")
        if not validates and any(act is Action.VALIDATE for group in self.groups for _, act in group.acts):
            raise ConfigError(f"the run in {self.run_dir} had validations; repeat it with its validation set")

    def triggers(self, iterations_per_epoch: int, epochs: int, *, keeps: bool) -> Triggers:
        """What is due when: what was done then; `keeps` is whether there is a run directory for checkpoints."""

        def done(action: Action, groups: Sequence[Group] = self.groups) -> set[int]:
            return {at for group in groups for at, act in group.acts if act is action}

        def recorded(found: set[int], without: Iterable[int] = ()) -> Trigger | None:
            return _Recorded(frozenset(found.difference(without))) if found else None

        return Triggers(
            iterations_per_epoch,
            epochs,
            validate=recorded(done(Action.VALIDATE), done(Action.ONLY_AT_END)),
            checkpoint=recorded(done(Action.CHECKPOINT)) if keeps else None,
            summarize=recorded(done(Action.SUMMARIZE)),
            end=recorded(done(Action.END, self.groups[-1:])),  # what went on afterwards had not ended
        )


_COUNTED = {"world_size": "ranks", "num_nodes": "nodes", "num_samples": "training samples"}


def _described(name: str, value: object) -> str:
    """`4 ranks`, `seed 7`."""
    return f"{value} {_COUNTED[name]}" if name in _COUNTED else f"{name} {value}"


def read_recording(run_dir: pathlib.Path) -> Recording:
    """The plans that led to where a run ended, one behind the other, from its run directory.

    What was run twice, since a run went on from a checkpoint, counts as it was run last.

    Raises:
        ConfigError: there are none, or they are damaged.
    """
    path = run_dir / FILE_NAME
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{run_dir} has no plans to read ({FILE_NAME}: {error.strerror})") from None
    headers, groups = list[Header](), list[Group]()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if "header" in value:
                headers.append(Header(**value["header"]))
                continue
            group = Group.from_json(value)
        except (*MALFORMED, PlanError) as error:
            if number == len(lines):
                break  # a killed run left it incomplete
            raise ConfigError(f"{path}, line {number} is damaged: {type(error).__name__} {error}") from None
        first = group.plan.first_iteration
        groups = [each.cut(first) for each in groups if each.plan.first_iteration < first]
        groups.append(group)
    if not headers or not any(group.done for group in groups):
        raise ConfigError(f"{path} holds no group that was carried out")
    return Recording(run_dir, headers, [group for group in groups if group.done])


def _fits(plan: GroupPlan, header: Header) -> bool:
    """Whether a plan's samples are those of a run."""
    return all(0 < stop - start <= header.batch_size and stop <= header.num_samples for start, stop in plan.spans)
