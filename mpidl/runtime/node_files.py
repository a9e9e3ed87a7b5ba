"""How the watchdogs of several nodes tell each other that nothing moves: through files in the run directory.

A node's file `hang/node-00003.json` has the job's key, a count that grows with every writing, whether the node has an
alarm, for how long nothing has moved there, and what its ranks do. Only a file whose count has grown since `listen`
counts as heard: what an earlier alarm, or another job, has left says nothing. Clocks of hosts are not compared. A
file system that fails makes a node silent, nothing else; one that blocks keeps its watchdog from telling as well.

`hang/lost-00007.json` is of rank 7's guard (`mpidl/guard.py`): the rank was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mpidl.errors import MALFORMED
from mpidl.guard import HANG
from mpidl.runtime.activity import RankState

LOOK_S, TELL_S = 5.0, 3.0
"""How often the folder is looked for, and a file is written anew."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What a node has told."""

    count: int
    has_alarm: bool
    quiet_s: float
    """For how long nothing had moved there."""
    states: list[RankState]


class NodeFiles:
    """The files of all nodes, as one node's speaker uses them.

    Args:
        run_dir: where the folder is.
        key: the job's.
        node: the own one.
        num_nodes: of the job.
    """

    def __init__(self, run_dir: pathlib.Path, key: str, node: int, num_nodes: int) -> None:
        self.run_dir = run_dir
        self._key, self._node, self._num_nodes = key, node, num_nodes
        self._count = 0
        self._told_at = self._looked_at = float("-inf")
        self._sees_alarm = False
        self._counts: dict[int, int] = {}
        self._looked_for_lost_at = float("-inf")
        self._lost: dict[int, int] = {}

    def _path(self, node: int) -> pathlib.Path:
        return self.run_dir / HANG / f"node-{node:05}.json"

    def see_alarm(self) -> bool:
        """Whether another node has an alarm; looked up every LOOK_S only."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._sees_alarm = self._path(0).parent.is_dir() and any(
                told.has_alarm for told in self._read_others().values()
            )
        return self._sees_alarm

    def lost(self, *, at_once: bool = False) -> dict[int, int]:
        """Ranks of this job that were killed, rank -> signal, by the word of their guards.

        Args:
            at_once: look now; else it is looked up every LOOK_S.
        """
        now = time.monotonic()
        if at_once or now - self._looked_for_lost_at >= LOOK_S:
            self._looked_for_lost_at = now
            for file in self._path(0).parent.glob("lost-*.json"):
                with contextlib.suppress(OSError, *MALFORMED):
                    facts = json.loads(file.read_text(encoding="utf-8"))
                    if facts["job"] == self._key:
                        self._lost[int(facts["rank"])] = -int(facts["code"])
                    else:
                        file.unlink()  # of an earlier job: a run directory is one job's at a time
        return self._lost

    def tell(self, quiet_s: float, has_alarm: bool, states: Callable[[], Sequence[RankState]]) -> None:
        """Write the own file, unless it was written just now."""
        now = time.monotonic()
        if now - self._told_at < TELL_S:
            return
        self._told_at = now
        self._count += 1
        own = Told(self._count, has_alarm, quiet_s, list(states()))
        path = self._path(self._node)
        temporary = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps({"job": self._key, **dataclasses.asdict(own)}), encoding="utf-8")
            temporary.replace(path)

    def listen(self) -> None:
        """From now on only what is written anew counts."""
        self._counts = {node: told.count for node, told in self._read_others().items()}

    def heard(self) -> dict[int, Told]:
        """What other nodes have told since `listen`."""
        return {node: told for node, told in self._read_others().items() if told.count > self._counts.get(node, 0)}

    def withdraw(self) -> None:
        """Take the own file away."""
        if self._count:
            self._count = 0
            with contextlib.suppress(OSError):
                self._path(self._node).unlink(missing_ok=True)

    def _read_others(self) -> dict[int, Told]:
        found = {}
        for node in range(self._num_nodes):
            told = None if node == self._node else self._read(node)
            if told is not None:
                found[node] = told
        return found

    def _read(self, node: int) -> Told | None:
        """None: nothing of this job."""
        try:
            document: Any = json.loads(self._path(node).read_text(encoding="utf-8"))
            if document.pop("job") != self._key:
                return None
            states = [_checked(RankState(**state)) for state in document["states"]]
            return _checked(Told(**{**document, "states": states}))
        except (OSError, *MALFORMED):
            return None


Read = TypeVar("Read")


def _checked(value: Read) -> Read:
    """Raise TypeError unless the fields of a dataclass are of their types."""
    for name, hint in typing.get_type_hints(type(value)).items():
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (typing.get_origin(hint) or hint,)
        if not isinstance(getattr(value, name), (*kinds, int) if float in kinds else kinds):
            raise TypeError(name)
    return value
