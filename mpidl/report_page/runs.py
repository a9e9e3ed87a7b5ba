"""A run as its directory tells it: `metrics.jsonl`, and `config.toml` where there is one.

A run directory may hold several launches, one "start" event each: a run that was stopped or killed and resumed. What a
later launch did again, since it went on from a checkpoint, counts as it was done last; the seconds that the first time
took stay counted. A last line that is incomplete belongs to a run that goes on, or was killed: it is left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpidl.config import CONFIG_FILE
from mpidl.errors import MALFORMED, ConfigError
from mpidl.telemetry import tables
from mpidl.telemetry.events import FILE_NAME

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Point:
    """Measures at a place of the training: of an epoch's end or of a validation."""

    iteration: int
    at_s: float
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """What was reported of one group."""

    iteration: int
    """Iterations of the training that were done at its end."""
    iterations: int
    at_s: float
    """Seconds of running at its end, over all launches, less the time between them."""
    samples: int
    loss: float
    seconds: float
    group_size: int
    phases: Mapping[str, float]
    """Seconds, the mean over ranks."""
    seconds_per_sample: tuple[float, ...]
    """Of each rank; not a number where nothing was measured."""
    counts: tuple[int, ...]
    """Partitions of each rank."""


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened, in words."""

    at_s: float
    iteration: int
    kind: str
    text: str


@dataclasses.dataclass
class Run:
    """One run directory."""

    run_dir: Path
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """From `config.toml`; empty where there is none, as with the Trainer."""
    starts: list[Fields] = dataclasses.field(default_factory=list)
    """The "start" events, one a launch."""
    groups: list[Group] = dataclasses.field(default_factory=list)
    epochs: list[Point] = dataclasses.field(default_factory=list)
    validations: list[Point] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)
    end: Fields | None = None
    """The last launch's "end" event; None: it goes on, or was killed."""
    seconds: float = 0.0
    """Of running, at the last event."""

    @property
    def start(self) -> Fields:
        """The last launch's."""
        return self.starts[-1]

    @property
    def iterations_per_epoch(self) -> int:
        """Of the last launch."""
        return int(self.start["iterations_per_epoch"])

    @property
    def iteration(self) -> int:
        """Iterations that are done, as far as it is told."""
        told = [done.iteration for done in self.groups[-1:]] + [done.iteration for done in self.epochs[-1:]]
        return max([int(self.start.get("first_iteration", 0)), *told])

    @property
    def resumed_at(self) -> list[int]:
        """The iterations after which later launches went on."""
        return [int(start.get("first_iteration", 0)) for start in self.starts[1:]]

    @property
    def status(self) -> str:
        """In words."""
        return "goes on, or was killed" if self.end is None else str(self.end["status"])


def read_run(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        ConfigError: it is none, or its files are damaged; names the file and line.
    """
    path = run_dir / FILE_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"{run_dir} is not a run directory ({FILE_NAME}: {error.strerror}); give the folder of a run, or a file "
            "that mpidl bench --json wrote"
        ) from None
    reader = _Reader(Run(run_dir, _settings(run_dir / CONFIG_FILE)))
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                reader.take(json.loads(line))
        except MALFORMED as error:
            if number == len(lines):  # whole lines end with a line feed
                break
            raise ConfigError(
                f"{path}, line {number} is damaged, or was written by another version of mpidl: {type(error).__name__} "
                f"{error}; leave this run out"
            ) from None
    if not reader.run.starts:
        raise ConfigError(f"{path} tells of no run yet: it has no start event; wait until the run has started")
    return reader.run


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


class _Reader:
    """Takes a run's events one after the other."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._offset_s = 0.0
        self._counts: tuple[int, ...] = ()

    def take(self, fields: Fields) -> None:
        """Take one event; those of unknown kinds count where they have a message."""
        kind, time = str(fields["event"]), float(fields["time"])
        if kind == "start":
            self._begin(fields, time)
            return
        run = self.run
        at_s = time + self._offset_s if run.starts else 0.0
        if kind in ("group", "epoch", "validation", "checkpoint", "end"):
            run.seconds = max(run.seconds, at_s)
        if kind == "group":
            run.groups.append(self._group(fields, at_s))
        elif kind == "epoch":
            run.epochs.append(_point(fields, at_s))
        elif kind == "validation":
            run.validations.append(_point(fields, at_s))
        elif kind == "checkpoint":
            size, seconds = tables.size(fields["bytes"]), float(fields["seconds"])
            self._add(at_s, int(fields["iteration"]), kind, f"{size}, {seconds:.2g} s")
        elif kind == "end":
            tables.of_end(fields)  # so that a damaged one is found here
            run.end = fields
            self._add(
                at_s, int(fields["iterations"]), kind, ": ".join(filter(None, [run.status, fields.get("message")]))
            )
        elif "message" in fields:
            self._add(at_s, int(fields.get("iteration", run.iteration)), kind, str(fields["message"]))

    def _add(self, at_s: float, iteration: int, kind: str, text: str) -> None:
        self.run.events.append(Event(at_s, iteration, kind, text))

    def _begin(self, fields: Fields, time: float) -> None:
        """Begin a launch: what it does again is forgotten, the seconds are not."""
        tables.of_start(fields)  # so that a damaged one is found here
        run, first, goes_on = self.run, int(fields.get("first_iteration", 0)), bool(fields.get("goes_on"))
        if run.starts and run.end is None and not goes_on:
            self._add(run.seconds, run.iteration, "no end", "killed, or the machine stopped: nothing more was written")
        self._offset_s = run.seconds - time
        # A launch may warn before its start: the time until then is not of running.
        run.events = [dataclasses.replace(event, at_s=min(event.at_s, run.seconds)) for event in run.events]
        run.starts.append(fields)
        run.end = None
        run.groups = [group for group in run.groups if group.iteration <= first]
        run.epochs = [point for point in run.epochs if point.iteration <= first]
        run.validations = [point for point in run.validations if point.iteration <= first]
        self._counts = tuple(int(stop) - int(start) for start, stop in fields["partition_ranges"])
        ranks, nodes = (f"{fields[name]} {name[:-1] if fields[name] == 1 else name}" for name in ("ranks", "nodes"))
        kind, after = ("resumed", f" after iteration {first}") if first else ("start", "")
        kind = "goes on" if goes_on else kind
        self._add(run.seconds, first, kind, f"on {ranks}, {nodes}{after}")

    def _group(self, fields: Fields, at_s: float) -> Group:
        if "partition_starts" in fields:  # told when they change
            self._counts = tuple(
                int(stop) - int(start) for start, stop in itertools.pairwise(fields["partition_starts"])
            )
        return Group(
            iteration=int(fields["iteration"]),
            iterations=int(fields["iterations"]),
            at_s=at_s,
            samples=int(fields["samples"]),
            loss=float(fields["loss"]),
            seconds=float(fields["seconds"]),
            group_size=int(fields["group_size"]),
            phases={str(name): float(seconds) for name, seconds in fields["phases"].items()},
            seconds_per_sample=tuple(map(float, fields.get("seconds_per_sample", ()))),
            counts=self._counts,
        )


def _point(fields: Fields, at_s: float) -> Point:
    leave_out = ("event", "time", "epoch", "iteration", "seconds", "samples", "samples_per_s")
    values = {name: _number(value) for name, value in fields.items() if name not in leave_out}
    return Point(int(fields["iteration"]), at_s, {name: value for name, value in values.items() if value is not None})


def _number(value: object) -> float | None:
    """A metric's value; JSON has those that are not finite as texts. None: it is no number."""
    if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
        return float(value)
    return None
