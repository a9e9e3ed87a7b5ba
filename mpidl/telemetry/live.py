"""The live view of a run on a terminal: for the rank that trains, and for `mpidl top`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mpidl.telemetry import tables
from mpidl.telemetry.console import Console
from mpidl.telemetry.status import Fields, Status

DRAW_EVERY_S = 0.5
"""Drawing takes milliseconds of the rank that shows it, so less than 1 % of its time."""

_COLORS = {
    "compute": "green", "waiting for data": "red", "loader start": "bright_red", "wait": "yellow",
    "local sum": "cyan", "reduce scatter": "blue", "update": "magenta", "allgather": "bright_blue",
}  # fmt: skip


class LiveView:
    """Shows how a run stands in some lines that are drawn again and again; messages and validations stay above them.

    Nothing is drawn from a thread of its own: it would compete with the compute threads of this rank. So it is drawn
    when something happens, which is at each group's end.

    Args:
        console: with a terminal.
        clock: seconds since the epoch; for tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self._console = console
        self._clock = clock
        self._status = Status()
        self._live: RichLive | None = None
        self._drawn_at = float("-inf")

    def show(self, event: str, fields: Fields) -> None:
        """Take an event."""
        self._status.apply(event, fields, self._clock())
        if event == "start":
            if not fields.get("goes_on"):
                self._console.print_table("mpidl train", tables.of_start(fields))
            if self._live is None:
                self._begin()
        elif event == "validation":
            self._console.print(validation_line(fields, self._status))
        elif event in ("warning", "straggler", "recovery", "restart"):
            self._console.print(f"mpidl: {'warning: ' if event == 'warning' else ''}{fields['message']}")
        is_last = self._status.iteration == self._status.total_iterations or event == "end"
        if self._live is not None and (is_last or self._clock() - self._drawn_at >= DRAW_EVERY_S):
            self._draw()
        if event == "end":
            self.close()
            self._console.print_table("result", tables.of_end(fields))

    def close(self) -> None:
        """Leave the last picture and the terminal in order; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _begin(self) -> None:
        self._live = RichLive(console=self._console.out, auto_refresh=False, vertical_overflow="crop")
        self._live.start()
        # A killed run would leave the user's terminal without its cursor.
        self._console.out.show_cursor(True)

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn_at = self._clock()
        self._console.fit()
        self._live.update(frame(self._status, self._drawn_at), refresh=True)


def validation_line(fields: Fields, status: Status) -> str:
    """`epoch  3/20  validation  loss 0.25  accuracy 97.50 %`, with the iteration where it is within an epoch."""
    text = tables.measures(fields, leave_out=("epoch", "iteration", "seconds", "samples"))
    within = fields["iteration"] % max(status.start.get("iterations_per_epoch", 1), 1)
    place = f"  iteration {tables.count(fields['iteration'])}" if within else ""
    return f"{of_epochs(fields, status)}{place}  validation  {text}"


def of_epochs(fields: Fields, status: Status) -> str:
    """`epoch  3/20`."""
    epochs = str(status.start.get("epochs", "?"))
    return f"epoch {fields['epoch']:>{len(epochs)}}/{epochs}"


def frame(status: Status, now: float) -> RenderableType:
    """The lines of the view.

    Args:
        status: of the run.
        now: seconds since the epoch.
    """
    lines: list[RenderableType] = [_progress(status), _numbers(status, now)]
    phases = status.group.get("phases", {})
    if any(phases.values()):
        lines += [PhaseBar(tables.shares({**phases, "total": status.group["seconds"]}))]
    for pieces in (_slowest(status), _kept(status), _lost(status)):
        if pieces:
            lines.append(Pieces([Text(piece, style="dim") for piece in pieces], "   "))
    if status.note:
        lines.append(Text(status.note, style="dim"))
    return Group(*lines)


def _progress(status: Status) -> RenderableType:
    done, total = status.iteration, max(status.total_iterations, 1)
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(
        Text(f"epoch {status.epoch}/{status.epochs}", style="bold"),
        ProgressBar(total=total, completed=min(done, total)),
        Text(f"{tables.count(done)}/{tables.count(total)}  {100 * done // total} %"),
    )
    return row


def _numbers(status: Status, now: float) -> RenderableType:
    group, left = status.group, status.seconds_left(now)
    texts = [("loss", f"{float(group['loss']):.4f}"), ("lr", f"{float(group['lr']):.4g}")] if group else []
    texts += [("", f"{tables.count(float(group['samples_per_s']))} samples/s")] if group else []
    texts += [("elapsed", tables.duration(max((status.at if status.end else now) - status.started_at, 0)))]
    texts += [("left", tables.duration(left))] if left is not None and not status.end else []
    named = [Text.assemble((f"{name} " if name else "", "dim"), (value, "bold")) for name, value in texts]
    return Pieces(named, "   ")


def _slowest(status: Status) -> list[str]:
    found = status.slowest
    if found is None or len(status.paces) < 2:
        return []
    rank, pace = found
    return [f"slowest: {status.name_of(rank)}, {pace:.2f} times the median's time a sample"]


def _kept(status: Status) -> list[str]:
    texts = []
    if status.validation:
        told = tables.measures(status.validation, leave_out=("epoch", "iteration", "seconds", "samples"))
        texts.append(f"validation after {tables.count(status.validation['iteration'])}: {told}")
    if status.checkpoint:
        texts.append(f"checkpoint after {tables.count(status.checkpoint['iteration'])}")
    return texts


def _lost(status: Status) -> list[str]:
    return [f"lost: {tables.lost_ranks(status.lost)}"] if status.lost else []


class Pieces:
    """Texts side by side, in as many lines as they need; none is broken that fits into a line.

    Args:
        texts: in their order.
        between: two of them in one line.
    """

    def __init__(self, texts: Sequence[Text], between: str) -> None:
        self._texts = texts
        self._between = between

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Lay them out in the width there is."""
        lines: list[Text] = []
        for text in self._texts:
            if lines and lines[-1].cell_len + len(self._between) + text.cell_len <= options.max_width:
                lines[-1].append(self._between).append_text(text)
            else:
                lines.append(text.copy())
        yield from lines


class PhaseBar:
    """Where the time of the last group went: a line of coloured pieces, and their names below.

    Args:
        shares: percent by name, largest first.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = shares

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Draw it in the width there is."""
        block, width, drawn, sum_share = "#" if options.ascii_only else "█", options.max_width, 0, 0.0
        legend: list[Text] = []
        for name, share in self._shares.items():
            color, sum_share = _COLORS.get(name, "white"), sum_share + share
            stop = min(round(width * sum_share / 100), width)
            if stop > drawn:
                yield Segment(block * (stop - drawn), Style(color=color))
            drawn = max(stop, drawn)
            legend.append(Text.assemble((name, color), f" {tables.percent(share)}"))
        yield Segment.line()
        yield Pieces(legend, ", ")
