"""Shows a run to people: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import console as rich_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mpidl.telemetry import tables
from mpidl.telemetry.terminal import LOG_WIDTH, Terminal, find_terminal

LINE_EVERY_S = 10.0
_DRAW_EVERY_S = 0.1

Fields = Mapping[str, Any]


class Console:
    """Prints events as they come.

    Nothing is drawn from a thread of its own: it would compete with the compute threads of this rank.

    Args:
        terminal: where the output ends up; None, the default, finds out.
        clock: seconds; for tests.
    """

    def __init__(self, terminal: Terminal | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal or find_terminal()
        self._clock = clock
        self._out = rich_console.Console(
            file=sys.stdout,
            force_terminal=self._terminal is not None,
            # On a terminal one column stays free: a full line would make some of them wrap.
            width=LOG_WIDTH if self._terminal is None else self._terminal.width() - 1,
            highlight=False,
            emoji=False,
        )
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._start: Fields = {}
        self._started_at = self._shown_at = clock()
        self._balance_shown_at: float | None = None
        self._samples = 0
        self._loss = float("nan")

    def show(self, event: str, fields: Fields) -> None:
        """Show one event; unknown ones are left out."""
        action = getattr(self, f"_show_{event}", None)
        if action is not None:
            action(fields)

    def print(self, text: str) -> None:
        """Print text as it is: a line stays one line, however narrow the log is taken to be."""
        self._out.print(text, markup=False, soft_wrap=True)

    def print_table(self, title: str, rows: Sequence[tuple[str, ...]], headers: Sequence[str] = ()) -> None:
        """Print a table, as wide as its content and no wider than the output."""
        self._out.print(tables.table(title, rows, headers))

    def close(self) -> None:
        """Take the bar away; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show_start(self, fields: Fields) -> None:
        self._start = fields
        self._started_at = self._shown_at = self._clock()
        self.print_table("mpidl train", tables.of_start(fields))
        if self._terminal is None:
            return
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} samples/s"),
            TimeRemainingColumn(compact=True),
            console=self._out,
            auto_refresh=False,
            expand=True,
        )
        first = fields.get("first_iteration", 0)
        self._task = self._progress.add_task(
            "", total=fields["total_iterations"], completed=first, epochs=fields["epochs"],
            epoch=1 + first // max(fields["iterations_per_epoch"], 1), loss="-", speed="-",
        )  # fmt: skip
        self._progress.start()
        # A killed run would leave the user's terminal without its cursor.
        self._out.show_cursor(True)

    def _show_group(self, fields: Fields) -> None:
        self._samples += fields["samples"]
        self._loss = fields["loss"]
        now = self._clock()
        if self._progress is None:
            # The line of an epoch's last group would stand right above the epoch's own.
            ends_epoch = fields["iteration"] % max(self._start.get("iterations_per_epoch", 1), 1) == 0
            if now - self._shown_at >= LINE_EVERY_S and not ends_epoch:
                self._line(fields, fields["samples_per_s"])
            return
        self._progress.update(
            self._task, completed=fields["iteration"], epoch=fields["epoch"],
            loss=f"{fields['loss']:.4f}", speed=tables.count(fields["samples_per_s"]),
        )  # fmt: skip
        is_last = fields["iteration"] == self._start.get("total_iterations")
        if is_last or now - self._shown_at >= _DRAW_EVERY_S:
            self._draw(now)

    def _show_epoch(self, fields: Fields) -> None:
        if self._progress is None:
            self._loss = fields["loss"]
            self._line(fields, fields["samples_per_s"])

    def _show_validation(self, fields: Fields) -> None:
        told = ("epoch", "iteration", "seconds", "samples")
        text = tables.measures(fields, leave_out=told)
        within = fields["iteration"] % max(self._start.get("iterations_per_epoch", 1), 1)
        place = f"  iteration {tables.count(fields['iteration'])}" if within else ""
        self.print(f"epoch {self._of_epochs(fields)}{place}  validation  {text}")

    def _show_balance(self, fields: Fields) -> None:
        """A few lines tell what goes on; all of them are in the metrics."""
        now = self._clock()
        if self._balance_shown_at is None or now - self._balance_shown_at >= LINE_EVERY_S:
            self._balance_shown_at = now
            self.print(f"iteration {tables.count(fields['iteration'])}  {fields['message']}")

    def _show_warning(self, fields: Fields) -> None:
        self.print(f"mpidl: warning: {fields['message']}")

    def _show_end(self, fields: Fields) -> None:
        self.close()
        self.print_table("result", tables.of_end(fields))

    def _line(self, fields: Fields, samples_per_s: float) -> None:
        self._shown_at = self._clock()
        self.print(
            f"epoch {self._of_epochs(fields)}  iteration {tables.count(fields['iteration'])}"
            f"  {tables.count(self._samples)} samples"
            f"  {tables.duration(self._shown_at - self._started_at)}"
            f"  {tables.count(samples_per_s)} samples/s  loss {self._loss:.4f}"
        )

    def _of_epochs(self, fields: Fields) -> str:
        epochs = str(self._start.get("epochs", "?"))
        return f"{fields['epoch']:>{len(epochs)}}/{epochs}"

    def _draw(self, now: float) -> None:
        assert self._progress is not None
        self._shown_at = now
        if self._terminal is not None:
            self._out.width = self._terminal.width() - 1
        self._progress.refresh()
