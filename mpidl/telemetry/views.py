"""The ways to show a run as it goes on: `--progress auto | live | plain | quiet | json`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from mpidl.errors import ConfigError
from mpidl.telemetry import tables
from mpidl.telemetry.console import Console
from mpidl.telemetry.live import LiveView, of_epochs, validation_line
from mpidl.telemetry.plain_json import to_line
from mpidl.telemetry.status import Fields, Status

PROGRESS = ("auto", "live", "plain", "quiet", "json")

LINE_EVERY_S, RARELY_S = 10.0, 60.0
"""A log gets a line so often at first, and so often when a run is ten minutes old; in between: a tenth of its age."""


class View(Protocol):
    """Shows events as they come."""

    def show(self, event: str, fields: Fields) -> None:
        """Show one; unknown ones are left out."""
        ...

    def close(self) -> None:
        """Leave the output in order; safe to call twice."""
        ...


def make_view(progress: str) -> View:
    """The view of a name of PROGRESS; "auto": live on a terminal, plain in a log."""
    if progress == "quiet":
        return QuietView()
    if progress == "json":
        return JsonView()
    console = Console(is_terminal=progress == "live")
    is_live = progress == "live" or (progress == "auto" and console.terminal is not None)
    return LiveView(console) if is_live else PlainView(console)


def check_progress(progress: str) -> None:
    """Raise ConfigError where it is no name of PROGRESS, or asks for a terminal that is not there."""
    if progress not in PROGRESS:
        raise ConfigError(f"progress is {progress!r}; it must be one of {', '.join(PROGRESS)}")


class PlainView:
    """Lines for a log: one an epoch, one a validation, and some within long epochs.

    Args:
        console: to print to.
        clock: seconds; for tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self._console = console
        self._clock = clock
        self._status = Status()
        self._shown_at = clock()
        self._balance_shown_at: float | None = None

    def show(self, event: str, fields: Fields) -> None:
        """Show one event; unknown ones are left out."""
        self._status.apply(event, fields, self._clock())
        action = getattr(self, f"_show_{event}", None)
        if action is not None:
            action(fields)

    def close(self) -> None:
        """Nothing is left to do."""

    def _show_start(self, fields: Fields) -> None:
        self._shown_at = self._clock()
        if not fields.get("goes_on"):
            self._console.print_table("mpidl train", tables.of_start(fields))

    def _show_group(self, fields: Fields) -> None:
        # The line of an epoch's last group would stand right above the epoch's own.
        ends_epoch = fields["iteration"] % max(self._status.start.get("iterations_per_epoch", 1), 1) == 0
        now = self._clock()
        wait_s = min(max(LINE_EVERY_S, (now - self._status.started_at) / 10), RARELY_S)
        if now - self._shown_at >= wait_s and not ends_epoch:
            self._line(fields)

    def _show_epoch(self, fields: Fields) -> None:
        self._line(fields)

    def _show_validation(self, fields: Fields) -> None:
        self._console.print(validation_line(fields, self._status))

    def _show_balance(self, fields: Fields) -> None:
        """A few lines tell what goes on; all of them are in the metrics."""
        now = self._clock()
        if self._balance_shown_at is None or now - self._balance_shown_at >= LINE_EVERY_S:
            self._balance_shown_at = now
            self._console.print(f"iteration {tables.count(fields['iteration'])}  {fields['message']}")

    def _show_straggler(self, fields: Fields) -> None:
        self._console.print(f"iteration {tables.count(fields['iteration'])}  {fields['message']}")

    def _show_trace(self, fields: Fields) -> None:
        self._console.print(f"iteration {tables.count(fields['iteration'])}  {fields['message']}")

    def _show_recovery(self, fields: Fields) -> None:
        self._console.print(f"mpidl: {fields['message']}")

    def _show_restart(self, fields: Fields) -> None:
        self._console.print(f"mpidl: {fields['message']}")

    def _show_warning(self, fields: Fields) -> None:
        self._console.print(f"mpidl: warning: {fields['message']}")

    def _show_end(self, fields: Fields) -> None:
        self._console.print_table("result", tables.of_end(fields))

    def _line(self, fields: Fields) -> None:
        """What BigDL's log has, too: epoch, iteration, records, wall clock, throughput, loss."""
        self._shown_at = self._clock()
        self._console.print(
            f"{of_epochs(fields, self._status)}  iteration {tables.count(fields['iteration'])}"
            f"  {tables.count(self._status.samples_at(fields['iteration']))} samples"
            f"  {tables.duration(self._shown_at - self._status.started_at)}"
            f"  {tables.count(fields['samples_per_s'])} samples/s  loss {fields['loss']:.4f}"
        )


class QuietView:
    """Nothing but warnings and losses, to standard error."""

    def show(self, event: str, fields: Fields) -> None:
        """Show a warning."""
        if event in ("warning", "recovery"):
            print(f"mpidl: warning: {fields['message']}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left to do."""


class JsonView:
    """The lines of `metrics.jsonl`, to standard output."""

    def show(self, event: str, fields: Fields) -> None:
        """Print one line."""
        print(to_line({"event": event, "time": time.time(), **fields}), flush=True)

    def close(self) -> None:
        """Nothing is left to do."""
