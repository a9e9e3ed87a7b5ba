"""`mpidl top`: a running job, seen through its run directory from anywhere that sees it. Nothing is asked of the job.

It reads what is there anyway: the lines of `metrics.jsonl` as they come, and whether the files of a stop or of a
suspected hang are there. A line that is not complete yet is read the next time; one that is damaged is passed over.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

from rich import console as rich_console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mpidl.errors import MALFORMED, ConfigError
from mpidl.telemetry import tables
from mpidl.telemetry.console import Console
from mpidl.telemetry.events import FILE_NAME
from mpidl.telemetry.live import frame
from mpidl.telemetry.status import Status

LOOK_EVERY_S = 1.0
RANKS_SHOWN = 16
_LEFT_OUT = ("cores", "parts", "host")
"""Columns that a narrow table goes without, in this order."""
_HOST_WIDTH = 16
"""Of a host's name in a line of a narrow table."""

_SILENT_GROUPS, _SILENT_S = 10, 30.0
"""A run that has told nothing for so many of its groups, and so many seconds, is said to be silent."""


class Follower:
    """Reads a run's events as they are written.

    Args:
        run_dir: of the run.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._offset = 0
        self.status = Status()
        if not self._path.is_file():
            hint = "has not begun, or is no run directory" if run_dir.is_dir() else "does not exist"
            raise ConfigError(f"{run_dir} {hint}: there is no {FILE_NAME}; give the folder of a run")

    def read(self) -> Status:
        """The run's status after what was written since the last call."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self.status = 0, Status()  # another run's
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from None
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._offset += len(line)
            self._apply(line)
        return self.status

    def _apply(self, line: bytes) -> None:
        try:
            fields = json.loads(line)
            event, at = str(fields.pop("event")), float(fields.pop("time"))
            self.status.apply(event, fields, at)
        except MALFORMED:
            pass


def follow(run_dir: Path, *, once: bool) -> None:
    """Show a run until it ends, or Ctrl-C; or as it is now, once, also where there is no terminal.

    Raises:
        ConfigError: it is no run directory, or what its events say cannot be shown.
    """
    try:
        _follow(run_dir, once=once)
    except MALFORMED as error:
        if isinstance(error, ConfigError | UnicodeEncodeError):  # the latter: the terminal cannot show it
            raise
        raise ConfigError(f"{run_dir / FILE_NAME} is damaged: {type(error).__name__} {error}") from error


def _follow(run_dir: Path, *, once: bool) -> None:
    console, follower = Console(), Follower(run_dir)
    if once or console.terminal is None:
        console.out.print(picture(follower.read(), run_dir, time.time()))
        return
    try:
        with Live(console=console.out, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                status = follower.read()
                console.fit()
                live.update(picture(status, run_dir, time.time()), refresh=True)
                if status.end:
                    return
                time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        pass  # the usual way to leave


def picture(status: Status, run_dir: Path, now: float) -> RenderableType:
    """What `mpidl top` shows.

    Args:
        status: of the run.
        run_dir: of the run.
        now: seconds since the epoch.
    """
    state = str(status.end.get("status")) if status.end else _state(status, run_dir, now)
    start = status.start
    where = f"{tables.number(start['ranks'], 'rank')} on {tables.number(start['nodes'], 'node')}   " if start else ""
    lines: list[RenderableType] = [Text(f"{run_dir}   {where}{state}", style="bold")]
    if status.start:
        lines.append(frame(status, now))
    if rows := rank_rows(status):
        lines.append(RankTable(status, rows))
    return Group(*lines)


def _state(status: Status, run_dir: Path, now: float) -> str:
    if (run_dir / "STOP").exists():
        return "asked to stop"
    if any((run_dir / "hang").glob("node-*.json")):
        return "may hang: its nodes tell each other what they do"
    silent_s, group_s = now - status.at, float(status.group.get("seconds", 0))
    if silent_s > max(_SILENT_S, _SILENT_GROUPS * group_s):
        return f"silent for {tables.duration(silent_s)}: killed, hanging, or busy with what takes long"
    return "runs"


def rank_rows(status: Status) -> list[tuple[str, ...]]:
    """The last group rank by rank: where it runs, what it computes, its pace, and the shares of its time in percent.

    Of more than RANKS_SHOWN ranks the slowest.
    """
    told = status.group.get("rank_phases", {})
    ranks, names = told.get("ranks", []), _phases(status)
    places, paces, seconds = status.start.get("places", []), status.paces, float(status.group.get("seconds", 0)) or 1.0
    rows = []
    for index, rank in enumerate(ranks):
        place = places[rank] if rank < len(places) else {}
        pace = paces[rank] if rank < len(paces) else math.nan
        shares = [f"{100 * float(told[name][index]) / seconds:.0f}" for name in names]
        count = status.counts[rank] if rank < len(status.counts) else "?"
        row = (str(rank), str(place.get("host", "?")), str(place.get("cores", "?")), str(count))
        rows.append((pace, (*row, "-" if math.isnan(pace) else f"{pace:.2f}", *shares)))
    if len(rows) > RANKS_SHOWN:
        rows = sorted(rows, key=lambda row: -math.inf if math.isnan(row[0]) else row[0])[-RANKS_SHOWN:][::-1]
    return [row for _, row in rows]


def _phases(status: Status) -> list[str]:
    """Those that took time."""
    return [name for name, seconds in status.group.get("phases", {}).items() if float(seconds) > 0]


class RankTable:
    """The rows of `rank_rows` with their headers.

    Where the output is too narrow, it has no frame; then no cores, partitions and hosts either. No word
    is broken but hosts' names.
    """

    def __init__(self, status: Status, rows: list[tuple[str, ...]]) -> None:
        names = ["data" if name == "load" else name.replace("_", "\n") for name in _phases(status)]
        self._headers = ("rank", "host", "cores", "parts", "pace", *names)
        self._rows = rows
        first = status.iteration - int(status.group["iterations"]) + 1
        plural = "s" * (first < status.iteration)
        self._title = (
            f"iteration{plural} {tables.span(first, status.iteration)}, with the shares of their time in percent"
        )

    def __rich_console__(self, console: rich_console.Console, options: rich_console.ConsoleOptions) -> Iterator[Table]:
        def width(made: Table) -> int:
            return Measurement.get(console, options.update(max_width=tables.ANY_WIDTH), made).maximum

        made = self._made(())
        if width(made) > options.max_width:
            for number in range(len(_LEFT_OUT) + 1):
                made = self._made(_LEFT_OUT[:number])
                tables.unframe(made)
                for column in made.columns:
                    column.max_width = _HOST_WIDTH if column.header == "host" else None
                if width(made) <= options.max_width:
                    break
        yield made

    def _made(self, left_out: tuple[str, ...]) -> Table:
        kept = [index for index, header in enumerate(self._headers) if header not in left_out]
        rows = [tuple(row[index] for index in kept) for row in self._rows]
        made = tables.table(self._title, rows, [self._headers[index] for index in kept])
        for column in made.columns:
            column.justify, column.vertical, column.no_wrap = "right", "bottom", column.header != "host"
        return made
