"""The plans of a run, written down as they were carried out, read, and repeated.

`plans.jsonl` in the run directory: each run, also one that goes on from a checkpoint, begins with a line about itself
(`Header`); behind it stands one line for each group: the plan, how many of its iterations were done, and what was done
after which of them. It is written when the group has ended, also where that was too early, and before each checkpoint
inside it as well: so what a checkpoint holds is always told, also of a run that was killed. A later line about the same
iterations counts in the place of an earlier one.

A replay gives every rank the plans again, one after the other, through the same broadcasts; what was done when is known
to all ranks from the beginning. It ends where the recorded run ended.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from mpidl._version import __version__
from mpidl.errors import ConfigError
from mpidl.parameters import Assignment
from mpidl.runtime import warn
from mpidl.scheduling.plan import Action, GroupPlan
from mpidl.scheduling.triggers import Facts, Trigger, Triggers
from mpidl.telemetry import open_for_append

FILE_NAME = "plans.jsonl"


@dataclasses.dataclass(frozen=True)
class Header:
    """What a run's plans were made for: with the same, and the same model and data, they give the same numbers."""

    num_samples: int
    batch_size: int
    epochs: int
    partitions: int
    world_size: int
    num_nodes: int = 1
    seed: int = 0
    threads_per_rank: int = 1
    reduction: str = "ordered"
    wire: str = "float32"
    error_feedback: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    drop_share: float = 0.0
    mpidl: str = __version__

    @property
    def is_free(self) -> bool:
        """Whether the numbers are the same on any ranks and nodes."""
        return (self.reduction, self.wire, self.drop_share) == ("ordered", "float32", 0.0)

    def fixed(self) -> dict[str, Any]:
        """What must be the same in a replay."""
        free = {"mpidl", "epochs", "num_nodes"} if self.is_free else {"mpidl", "epochs"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


@dataclasses.dataclass(frozen=True)
class Group:
    """One group as it was carried out."""

    plan: GroupPlan
    done: int
    """Iterations of the plan that were done."""
    acts: tuple[tuple[int, Action], ...]
    """(iterations done in the training, what was done then), in that order."""
    drops: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(iterations done in the training, the partitions that the last of them dropped), where it dropped any."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        plan = {field.name: getattr(self.plan, field.name) for field in dataclasses.fields(GroupPlan)}
        return {
            **plan,
            "assignment": dataclasses.asdict(self.plan.assignment),
            "actions": _names(self.plan.actions),
            "done": self.done,
            "acts": [[at, _names(action)] for at, action in self.acts],
            "drops": [[at, list(partitions)] for at, partitions in self.drops],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Group:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not such a value.
        """
        given = dict(value)
        done, acts = int(given.pop("done")), tuple((int(at), _action(names)) for at, names in given.pop("acts"))
        drops = tuple((int(at), tuple(map(int, partitions))) for at, partitions in given.pop("drops"))
        assignment = Assignment(int(given["assignment"]["num_partitions"]), tuple(given["assignment"]["starts"]))
        given |= {
            "assignment": assignment,
            "spans": tuple((int(a), int(b)) for a, b in given["spans"]),
            "learning_rates": tuple(tuple(map(float, rates)) for rates in given["learning_rates"]),
            "actions": _action(given["actions"]),
        }
        return cls(GroupPlan(**given), done, acts, drops)

    @property
    def stop(self) -> int:
        """Iterations of the training that were done when it had ended."""
        return self.plan.first_iteration + self.done

    def cut(self, stop: int) -> Group:
        """The same up to `stop` iterations of the training."""
        return dataclasses.replace(
            self,
            done=min(self.done, stop - self.plan.first_iteration),
            acts=tuple(each for each in self.acts if each[0] <= stop),
            drops=tuple(each for each in self.drops if each[0] <= stop),
        )


def _names(action: Action) -> list[str]:
    return [each.name for each in Action if each and each in action and each.name]


def _action(names: Iterable[str]) -> Action:
    action = Action.NONE
    for name in names:
        action |= Action[name]
    return action


class PlanLog:
    """Writes a run's plans down; on rank 0. A group that is written again replaces what was written of it before.

    Args:
        run_dir: where `plans.jsonl` goes.
        header: of this run.
    """

    def __init__(self, run_dir: pathlib.Path, header: Header) -> None:
        self._path = run_dir / FILE_NAME
        self._file: TextIO | None = None
        try:
            self._file = open_for_append(self._path)
        except OSError as error:
            self._give_up(error)
        self._write({"header": dataclasses.asdict(header)})

    def write(self, group: Group) -> None:
        """Append a group, as far as it was carried out."""
        self._write(group.to_json())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, value: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(value) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A full disk must not end a training; nor may a file with holes be repeated, so nothing more is written."""
        warn(f"{self._path} cannot be written ({error.strerror}): this run can be repeated up to here only")
        self._file = None


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
                if value != getattr(given, name):
                    raise ConfigError(
                        f"the plans of {self.run_dir} were made for {name} {value}, this run has "
                        f"{getattr(given, name)}; repeat it with the same"
                    )
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


def read_recording(run_dir: pathlib.Path) -> Recording:
    """The plans that led to where a run ended, one behind the other, from its run directory.

    What was run twice, since a run went on from a checkpoint, counts as it was run last.

    Raises:
        ConfigError: there are none, or they are damaged.
    """
    path = run_dir / FILE_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # a killed run left it incomplete
            raise ConfigError(f"{path}, line {number} is damaged: {type(error).__name__} {error}") from None
        first = group.plan.first_iteration
        groups = [each.cut(first) for each in groups if each.plan.first_iteration < first]
        groups.append(group)
    if not headers or not any(group.done for group in groups):
        raise ConfigError(f"{path} holds no group that was carried out")
    return Recording(run_dir, headers, [group for group in groups if group.done])


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
