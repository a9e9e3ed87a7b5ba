"""The pictures of runs, by matplotlib, which the extra `mpidl[bench]` brings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.report_page import panels, series
from mpidl.report_page.panels import COLOURS, DASHES
from mpidl.report_page.runs import Group, Point, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "figure.figsize": (5.6, 3.4), "figure.constrained_layout.use": True, "font.size": 9.5, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e3e3e3", "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "legend.frameon": False, "legend.fontsize": 8.5, "savefig.facecolor": "white",
    "text.parse_math": False,  # a run's name may hold dollars
    "svg.fonttype": "path", "svg.hashsalt": "mpidl",
}  # fmt: skip

_LINES_OF_RANKS = 8
"""More ranks are drawn as a map."""

_PHASE_NAMES = {
    "load": "waiting for data", "loader_start": "start of the loader", "wait": "waiting for ranks",
    "local_sum": "local sum", "reduce_scatter": "reduce-scatter",
}  # fmt: skip
_PHASE_COLOURS = {
    "compute": "#0072b2", "load": "#e69f00", "wait": "#d55e00", "local_sum": "#56b4e9", "reduce_scatter": "#009e73",
    "update": "#cc79a7", "allgather": "#f0e442", "loader_start": "#1a1a1a", "other": "#bdbdbd",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture, with what is to be seen on it."""

    name: str
    """Of its file, without the ending."""
    caption: str
    figure: Figure


def compared(names: Sequence[str], runs: Sequence[Run]) -> Iterator[Chart]:
    """All runs together: loss, metrics and throughput.

    Args:
        names: of the runs.
        runs: as many.
    """
    named = [(name, run) for name, run in zip(names, runs, strict=True) if run.groups or run.validations]
    if not named:
        return
    for axis_name in ("iterations", "seconds"):
        yield _over(named, axis_name, "loss", "training (line) and validation (dots)")
    metrics = sorted({name for _, run in named for point in run.validations for name in point.values} - {"loss"})
    for metric in metrics:
        for axis_name in ("iterations", "seconds"):
            yield _over(named, axis_name, metric, "validation")
    if any(run.groups for _, run in named):
        yield _throughput(named)


def of_run(name: str, run: Run) -> Iterator[Chart]:
    """One run: phases, ranks, groups, partitions. Nothing before its first group has ended."""
    if not run.groups:
        return
    binned = series.bins(run.groups)
    yield _phases(name, run, binned)
    yield _group_size(name, run, binned)
    if series.most_ranks(binned) > 1:
        if not np.isnan(series.paces(binned)).all():
            yield _paces(name, run, binned)
        yield _partitions(name, run, binned)


def _plot(name: str, title: str, x: str, y: str, caption: str, draw: Callable[[Figure, Axes], None]) -> Chart:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    draw(figure, axes)
    return Chart(name, caption, figure)


def _over(named: Sequence[tuple[str, Run]], x: str, measure: str, what: str) -> Chart:
    """A measure of all runs over iterations or seconds."""

    def draw(_: Figure, axes: Axes) -> None:
        handles = [_curve(axes, index, run, x, measure) for index, (_, run) in enumerate(named)]
        panels.legend(axes, handles, [name for name, _ in named])
        if measure == "loss":
            panels.log_where_it_falls(axes)
        if x == "iterations":
            panels.epochs_on_top(axes, [run for _, run in named])
            panels.iterations_below(axes)

    unit = f"{measure}, %" if _is_share(measure) else measure
    label = "iterations" if x == "iterations" else "seconds of running"
    caption = f"{measure.capitalize()} over {label}: {what}."
    return _plot(f"{measure}-{x}", f"{measure.capitalize()} over {x}", label, unit, caption, draw)


def _curve(axes: Axes, index: int, run: Run, x: str, measure: str) -> Any:
    """A run's curve; returns what the legend shows of it."""
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    shown = None
    if measure == "loss" and run.groups:
        binned = series.bins(run.groups)
        at = [groups[-1].iteration if x == "iterations" else groups[-1].at_s for groups in binned]
        (shown,) = axes.plot(at, series.losses(binned), dashes, color=colour, linewidth=1.2, alpha=0.9)
    points = [point for point in run.validations if measure in point.values]
    at = [_place(point, x) for point in points]
    values = [point.values[measure] * (100 if _is_share(measure) else 1) for point in points]
    style = "o" if measure == "loss" else f"o{dashes}"
    few = len(points) <= 60
    (dots,) = axes.plot(at, values, style, color=colour, markersize=4 if few else 2, markeredgecolor="white",
                        markeredgewidth=0.5 if few else 0)  # fmt: skip
    return shown or dots


def _place(point: Point, x: str) -> float:
    return point.iteration if x == "iterations" else point.at_s


def _is_share(measure: str) -> bool:
    return "accuracy" in measure


def _throughput(named: Sequence[tuple[str, Run]]) -> Chart:
    def draw(_: Figure, axes: Axes) -> None:
        handles = []
        for index, (name, run) in enumerate(named):
            binned = series.bins(run.groups, 120)
            if binned:
                (line,) = axes.step(series.ends(binned), series.throughputs(binned), where="pre",
                                    color=COLOURS[index % len(COLOURS)])  # fmt: skip
                handles.append((line, name))
        panels.legend(axes, [handle for handle, _ in handles], [name for _, name in handles])
        axes.set_ylim(bottom=0)
        panels.thousands(axes)
        panels.epochs_on_top(axes, [run for _, run in named])
        panels.iterations_below(axes)

    caption = "Throughput while iterating, without validations and checkpoints; means of neighbouring groups."
    return _plot("throughput", "Throughput", "iterations", "samples/s", caption, draw)


def _phases(name: str, run: Run, binned: Sequence[Sequence[Group]]) -> Chart:
    """Where an iteration's time goes, stacked."""

    def draw(_: Figure, axes: Axes) -> None:
        coarse = series.bins(run.groups, 120)
        found = series.phases(coarse)
        order = sorted(found, key=list(_PHASE_COLOURS).index) if found.keys() <= _PHASE_COLOURS.keys() else list(found)
        edges = series.edges(coarse)
        below = np.zeros(len(coarse))
        handles = []
        for index, phase in enumerate(order):
            above = below + 1e3 * found[phase]
            colour = _PHASE_COLOURS.get(phase, COLOURS[index % len(COLOURS)])
            handles.append(axes.stairs(above, edges, baseline=below, fill=True, color=colour, linewidth=0))
            below = above
        panels.cut_outliers(axes, below)
        panels.legend(axes, handles[::-1], [_PHASE_NAMES.get(phase, phase) for phase in reversed(order)], beside=True)
        panels.resumes(axes, run)
        panels.iterations_below(axes)

    caption = "Phases of an iteration, the mean over ranks; means of neighbouring groups."
    return _plot(f"{name}-phases", "Phases of an iteration", "iterations", "ms an iteration", caption, draw)


def _group_size(name: str, run: Run, binned: Sequence[Sequence[Group]]) -> Chart:
    def draw(_: Figure, axes: Axes) -> None:
        sizes = [np.mean([group.group_size for group in groups]) for groups in binned]
        axes.stairs(sizes, series.edges(binned), color=COLOURS[0], linewidth=1.4, baseline=None)
        axes.set_ylim(0, 1.15 * float(max(sizes)))
        panels.resumes(axes, run)
        panels.iterations_below(axes)
        panels.whole(axes.yaxis)

    caption = "Iterations that one broadcast plans."
    return _plot(f"{name}-group-size", "Group size", "iterations", "iterations a group", caption, draw)


def _paces(name: str, run: Run, binned: Sequence[Sequence[Group]]) -> Chart:
    """Who is slow: a line each for few ranks, else a map of times by the median rank's."""
    ranks = series.most_ranks(binned)
    title, y = "Work per sample, by rank", "ms a sample"
    if ranks <= _LINES_OF_RANKS:

        def draw(_: Figure, axes: Axes) -> None:
            coarse = series.bins(run.groups, 120)
            panels.lines_of_ranks(axes, 1e3 * series.paces(coarse), series.edges(coarse))
            panels.cut_outliers(axes, (1e3 * series.paces(coarse)).ravel())
            panels.resumes(axes, run)

        caption = "Computing and waiting for data, without waiting for other ranks: a higher line is a slower rank."
        return _plot(f"{name}-ranks", title, "iterations", y, caption, draw)

    def draw_map(figure: Figure, axes: Axes) -> None:
        table = series.times_median(series.paces(binned))
        most = max(2.0, float(np.nanquantile(table, 0.995)))
        bounds = (min(1.0, most / 2), most)
        panels.rank_map(figure, axes, table, series.edges(binned), "times the median rank's", bounds)

    caption = "Computing and waiting for data, by the median rank's: a bright row is a slow rank."
    return _plot(f"{name}-ranks", title, "iterations", "rank", caption, draw_map)


def _partitions(name: str, run: Run, binned: Sequence[Sequence[Group]]) -> Chart:
    table = series.counts(binned)
    title, caption = (
        "Partitions of each rank",
        "Partitions of an iteration that each rank computes; balance moves them.",
    )
    if len(table) <= _LINES_OF_RANKS:

        def draw(_: Figure, axes: Axes) -> None:
            # Ranks with as many partitions would hide each other.
            apart = table + 0.06 * (np.arange(len(table)) - (len(table) - 1) / 2)[:, None]
            panels.lines_of_ranks(axes, apart, series.edges(binned))
            axes.set_ylim(0, float(np.nanmax(table)) + 1)
            panels.whole(axes.yaxis)
            panels.resumes(axes, run)

        return _plot(f"{name}-partitions", title, "iterations", "partitions", caption, draw)

    def draw_map(figure: Figure, axes: Axes) -> None:
        panels.rank_map(figure, axes, table, series.edges(binned), "partitions", (0.0, float(np.nanmax(table))))

    return _plot(f"{name}-partitions", title, "iterations", "rank", caption, draw_map)
