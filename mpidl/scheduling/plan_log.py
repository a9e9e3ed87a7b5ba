"""The plans of a run, written down as they were carried out.

`plans.jsonl` in the run directory: each run, also one that goes on from a checkpoint, begins with a line about itself
(`Header`); behind it stands one line for each group: the plan, how many of its iterations were done, and what was done
after which of them. It is written when the group has ended, also where that was too early, and before each checkpoint
inside it as well: so what a checkpoint holds is always told, also of a run that was killed. A later line about the same
iterations counts in the place of an earlier one.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from mpidl._version import __version__
from mpidl.parameters import Assignment
from mpidl.runtime import warn
from mpidl.scheduling.plan import Action, GroupPlan
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
            PlanError, MALFORMED: it is not such a value.
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
        plan = GroupPlan(**given)
        if GroupPlan.decode(plan.encode()) != plan or not 0 <= done <= plan.num_iterations:
            raise ValueError("no plan could travel like this")
        return cls(plan, done, acts, drops)

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
