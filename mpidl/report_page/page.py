"""The page: what is told of runs and benchmarks, in which order."""

from __future__ import annotations

import dataclasses
import datetime
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpidl._version import __version__
from mpidl.bench.report import Row
from mpidl.report_page import bench_charts, benches, charts, html, scaling, series
from mpidl.report_page.benches import Bench, Table
from mpidl.report_page.charts import Chart
from mpidl.report_page.runs import Event, Run
from mpidl.telemetry import tables

_RANKS_TOLD = 16
"""Of more ranks, the slowest are told."""

_EVENTS_TOLD = 60
_DOTS_PER_INCH = 200


def build(runs: Sequence[Run], benches_: Sequence[Bench], png_dir: Path | None = None) -> str:
    """The page's text; its pictures go to `png_dir` as well.

    Args:
        runs: to tell of, and to compare.
        benches_: likewise.
        png_dir: a folder that is there; None: no files.

    Raises:
        OSError: a file cannot be written.
    """
    import matplotlib

    names = names_of([run.run_dir for run in runs])
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **charts.STYLE}  # whatever the user's own settings are
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a run's name
        drawn = _Drawn(png_dir)
        sections = [
            *_of_runs(drawn, names, runs),
            *_of_scalings(drawn, [row for bench in benches_ for row in bench.rows]),
            *(_of_bench(drawn, number, bench) for number, bench in enumerate(benches_, 1)),
        ]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    top = [html.heading(1, "mpidl report"), html.paragraph(f"Made {now} by mpidl {__version__}.", "faint")]
    links = html.contents([(section.anchor, section.title) for section in sections])
    return html.page("mpidl report", [*top, links, *(section.html for section in sections)])


@dataclasses.dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    html: str


def _section(anchor: str, title: str, parts: Sequence[str], style: str = "") -> _Section:
    return _Section(anchor, title, html.section([html.heading(2, title, anchor), *parts], style))


class _Drawn:
    """Turns charts into pieces of the page, and files where they are asked for."""

    def __init__(self, png_dir: Path | None) -> None:
        self._png_dir = png_dir

    def __call__(self, drawn: Iterable[Chart]) -> str:
        return html.figures([self._one(chart) for chart in drawn])

    def _one(self, chart: Chart) -> str:
        svg = io.BytesIO()
        chart.figure.savefig(svg, format="svg", dpi=_DOTS_PER_INCH, metadata={"Date": None})
        if self._png_dir is not None:
            chart.figure.savefig(self._png_dir / f"{chart.name}.png", dpi=_DOTS_PER_INCH)
        return html.picture(svg.getvalue(), chart.caption)


def names_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names; numbered, with the whole path where names are the same."""
    resolved = [path.resolve().name or str(path) for path in paths]
    named = [name if resolved.count(name) == 1 else str(path) for name, path in zip(resolved, paths, strict=True)]
    return named if len(named) < 2 else [f"{number}. {name}" for number, name in enumerate(named, 1)]


def _file_name(*parts: object) -> str:
    """Parts as a file's name: ASCII letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(map(str, parts))).strip("-").lower()


# --- runs -------------------------------------------------------------------------------------------------------------


def _of_runs(drawn: _Drawn, names: Sequence[str], runs: Sequence[Run]) -> list[_Section]:
    if not runs:
        return []
    parts = [_table(summary(names, runs)), _table(differences(names, runs)), drawn(charts.compared(names, runs))]
    first = _section("runs", "Runs" if len(runs) > 1 else "The training", parts)
    return [first, *(_of_run(drawn, n, name, run) for n, (name, run) in enumerate(zip(names, runs, strict=True), 1))]


def summary(names: Sequence[str], runs: Sequence[Run]) -> Table:
    """A row a run."""
    metrics = sorted({name for run in runs for point in run.validations for name in point.values} - {"loss"})
    headers = ["run", "status", "ranks", "nodes", "iterations", "time", "samples/s", "training loss", "validation loss"]
    rows = []
    for name, run in zip(names, runs, strict=True):
        last = run.validations[-1].values if run.validations else {}
        seconds = sum(group.seconds for group in run.groups)
        rows.append([
            name, run.status, tables.count(run.start["ranks"]), tables.count(run.start["nodes"]),
            f"{tables.count(run.iteration)} of {tables.count(run.start['total_iterations'])}",
            tables.duration(run.seconds),
            tables.count(sum(group.samples for group in run.groups) / seconds) if seconds else "-",
            tables.measure("loss", run.epochs[-1].values["loss"]) if run.epochs else "-",
            *(tables.measure(key, last[key]) if key in last else "-" for key in ("loss", *metrics)),
        ])  # fmt: skip
    return Table("", [*headers, *(f"validation {name}" for name in metrics)], rows)


def differences(names: Sequence[str], runs: Sequence[Run]) -> Table:
    """The settings that are not the same in all runs that have any."""
    known = [(name, run.settings) for name, run in zip(names, runs, strict=True) if run.settings]
    keys = dict.fromkeys(key for _, settings in known for key in settings if key != "run_dir")
    rows = [
        [key, *(str(settings.get(key, "-")) for _, settings in known)]
        for key in keys
        if len({str(settings.get(key)) for _, settings in known}) > 1
    ]
    return Table("Settings that differ", ["setting", *(name for name, _ in known)], rows)


def _of_run(drawn: _Drawn, number: int, name: str, run: Run) -> _Section:
    parts = [
        drawn(charts.of_run(_file_name("run", number, run.run_dir.resolve().name), run)),
        "" if run.groups else html.paragraph("No group has ended yet."),
        _table(slow_ranks(run)),
        html.heading(3, "What happened"),
        _table(happened(run)),
        html.heading(3, "How it was started"),
        html.table((), tables.of_start(run.start)),
    ]
    if run.end is not None:
        parts += [html.heading(3, "How it ended"), html.table((), tables.of_end(run.end))]
    return _section(f"run-{number}", name, parts, "run")


def slow_ranks(run: Run) -> Table:
    """How fast the last launch's ranks were; of many, the slowest."""
    paces = series.rank_paces(run)
    told = sorted(paces, key=lambda pace: -pace.times_median)[:_RANKS_TOLD] if len(paces) > _RANKS_TOLD else paces
    rows = [
        [
            f"{pace.rank}, slow" if pace.is_slow else str(pace.rank),
            f"{1e3 * pace.seconds_per_sample:.3g}",
            f"{pace.times_median:.2f}",
            f"{100 * pace.share_slowest:.0f}",
            *map(str, pace.counts),
        ]
        for pace in told
    ]
    of_many = f"; the {_RANKS_TOLD} slowest of {len(paces)}" if len(told) < len(paces) else ""
    headers = ["rank", "ms a sample", "x median rank", "slowest, % of groups", "partitions at first", "at last"]
    return Table(f"Work of each rank, medians over groups{of_many}", headers, rows)


def happened(run: Run) -> Table:
    """The events in order; checkpoints that follow each other are one row."""
    rows: list[list[str]] = []
    for events in _neighbours(run.events):
        first, last = events[0], events[-1]
        where = f"{first.iteration}" if len(events) == 1 else f"{first.iteration} to {last.iteration}"
        text = last.text if len(events) == 1 else f"{len(events)} of them; the last: {last.text}"
        rows.append([tables.duration(first.at_s), where, first.kind, text])
    if run.end is None:
        rows.append([tables.duration(run.seconds), str(run.iteration), "", "the last event so far"])
    left_out = len(rows) - _EVENTS_TOLD
    if left_out > 0:
        half = _EVENTS_TOLD // 2
        rows[half:-half] = [["", "", "", f"{left_out} more"]]
    return Table("", ["at", "iteration", "event", ""], rows)


def _neighbours(events: Sequence[Event]) -> list[list[Event]]:
    found: list[list[Event]] = []
    for event in events:
        if not (found and found[-1][0].kind == event.kind == "checkpoint"):
            found.append([])
        found[-1].append(event)
    return found


# --- benchmarks -------------------------------------------------------------------------------------------------------


def _of_scalings(drawn: _Drawn, rows: Sequence[Row]) -> list[_Section]:
    parts = []
    for number, found in enumerate(scaling.scalings(rows), 1):
        parts += [html.heading(3, found.case), drawn(bench_charts.of_scaling(f"scaling-{number}", found))]
        parts += [_table(scaling.proposal(found)), _table(scaling.efficiencies(found))]
    return [_section("scaling", "Scaling", parts, "run")] if parts else []


def _of_bench(drawn: _Drawn, number: int, bench: Bench) -> _Section:
    parts = [
        html.code(bench.command),
        html.table((), benches.machine_facts(bench.machine)),
        drawn(bench_charts.of_bench(_file_name("bench", number, bench.path.stem), bench)),
        *map(_table, benches.tables(bench)),
    ]
    return _section(f"bench-{number}", f"bench {bench.kind}: {bench.path.name}", parts, "run")


def _table(table: Table) -> str:
    return html.table(table.headers, table.rows, table.caption)
