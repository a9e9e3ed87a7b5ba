"""The pictures of benchmarks, by matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpidl.bench.report import Row, milliseconds
from mpidl.report_page.benches import Bench
from mpidl.report_page.charts import Chart
from mpidl.report_page.panels import COLOURS, GREY
from mpidl.report_page.scaling import Scaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_OTHERS = "#bdbdbd"


def of_bench(name: str, bench: Bench) -> Iterator[Chart]:
    """A picture a case: bars of the ways; where iterations were taken apart, their phases too; curves of plans.

    Args:
        name: what the files begin with.
        bench: the figures.
    """
    if bench.kind == "plan":
        yield _shares(f"{name}-share", bench.rows)
        return
    for number, (case, rows) in enumerate(bench.cases.items(), 1):
        timed = [row for row in rows if row["seconds"] is not None]
        # A way at several sizes is a line over them; a way of its own on fewer ranks (one process) is a bar too.
        if len({row["way"] for row in timed}) == len(timed) > 1:
            yield _bars(f"{name}-{number}", case, timed)
            if any(row.get("phases") for row in timed):
                yield _phases(f"{name}-{number}-phases", case, [row for row in timed if row.get("phases")])


def of_scaling(name: str, scaling: Scaling) -> Iterator[Chart]:
    """Throughput and efficiency over sizes, with the ideal line."""
    yield _scaled(name, scaling)
    yield _efficiency(f"{name}-efficiency", scaling)


def _figure(height: float = 3.4) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height))
    return figure, figure.subplots()


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, wrap=True)


def _bars(name: str, case: str, rows: Sequence[Row]) -> Chart:
    figure, axes = _figure(1.1 + 0.3 * len(rows))
    times = np.array([1e3 * row["seconds"] for row in rows])
    spreads = np.array([row.get("spread") or (row["seconds"], row["seconds"]) for row in rows]).T * 1e3
    errors = np.abs(spreads - times)
    colours = [COLOURS[0] if row["way"].startswith("mpidl") else _OTHERS for row in rows]
    bars = axes.barh(range(len(rows)), times, xerr=errors, color=colours, capsize=2.5, error_kw={"linewidth": 0.9})
    axes.set_yticks(range(len(rows)), [row["way"] for row in rows])
    axes.bar_label(bars, [milliseconds(row["seconds"]) for row in rows], padding=4, fontsize=8.5)
    axes.margins(x=0.16)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms")
    limit = rows[0].get("limit_seconds")
    caption = f"{case}: medians and quartiles; mpidl in blue."
    if limit is not None:
        axes.axvline(1e3 * limit, color=COLOURS[1], linestyle="--", linewidth=1.3)
        caption += f" Dashed: the limit, {milliseconds(limit)} ms."
    _title(axes, case)
    return Chart(name, caption, figure)


def _phases(name: str, case: str, rows: Sequence[Row]) -> Chart:
    phases = list(dict.fromkeys(phase for row in rows for phase in row["phases"]))
    figure, axes = _figure(1.4 + 0.3 * len(rows))
    left = np.zeros(len(rows))
    for index, phase in enumerate(phases):
        widths = np.array([1e3 * max(row["phases"].get(phase, 0.0), 0.0) for row in rows])
        axes.barh(range(len(rows)), widths, left=left, color=COLOURS[index % len(COLOURS)], label=phase)
        left += widths
    axes.set_yticks(range(len(rows)), [row["way"] for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms an iteration")
    figure.legend(loc="outside lower center", ncols=len(phases), fontsize=8, handlelength=1.0, columnspacing=1.0)
    _title(axes, f"Phases: {case}")
    return Chart(name, f"{case}: where an iteration's time goes.", figure)


def _shares(name: str, rows: Sequence[Row]) -> Chart:
    """What telling ranks what to compute takes, over the group size."""
    figure, axes = _figure()
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["seconds"] is not None and row.get("group_size") and row["way"] == "mpidl":
            curves.setdefault(f"{row['partitions']} partitions", []).append((row["group_size"], 1e3 * row["seconds"]))
    several = {label: sorted(points) for label, points in curves.items() if len(points) > 1}
    for index, (label, points) in enumerate(several.items()):
        axes.plot(*zip(*points, strict=True), marker=_MARKERS[index % 7], color=COLOURS[index % 7], label=label)
    central = [(row["partitions"], 1e3 * row["seconds"]) for row in rows if row["way"] == "central" and row["seconds"]]
    for partitions, ms in sorted(central)[-1:]:
        axes.axhline(ms, color=COLOURS[1], linestyle="--", label=f"central, {partitions} tasks")
    axes.set(xlabel="iterations of a group", ylabel="ms an iteration", xscale="log", yscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    if several or central:
        axes.legend()
    _title(axes, "Telling ranks what to compute")
    return Chart(name, "What control takes of an iteration, over the iterations that one broadcast plans.", figure)


def _scaled(name: str, scaling: Scaling) -> Chart:
    figure, axes = _figure(3.8)
    for index, (way, sizes) in enumerate(scaling.ways.items()):
        x = [scaling.units(size) for size in sizes]
        axes.plot(x, [size.samples_per_s for size in sizes], marker=_MARKERS[index % 7], color=COLOURS[index % 7],
                  markersize=5, label=way)  # fmt: skip
    sizes = scaling.ways[scaling.main]
    x, ideal = [scaling.units(size) for size in sizes], [size.samples_per_s / size.efficiency for size in sizes]
    axes.plot(x, ideal, color=GREY, linestyle="--", linewidth=1.2, label="ideal")
    _sizes_below(axes, scaling)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylabel("samples/s")
    axes.legend(loc="upper left")
    _title(axes, scaling.case)
    return Chart(name, f"{scaling.case}: throughput over {scaling.unit}; dashed: where ranks add up.", figure)


def _efficiency(name: str, scaling: Scaling) -> Chart:
    figure, axes = _figure(3.8)
    for index, (way, sizes) in enumerate(scaling.ways.items()):
        x = [scaling.units(size) for size in sizes]
        axes.plot(x, [100 * size.efficiency for size in sizes], marker=_MARKERS[index % 7],
                  color=COLOURS[index % 7], markersize=5, label=way)  # fmt: skip
    axes.axhline(100, color=GREY, linestyle="--", linewidth=1.2)
    _sizes_below(axes, scaling)
    axes.set_ylim(0, max(105.0, axes.get_ylim()[1]))
    axes.set_ylabel("efficiency, %")
    axes.legend(loc="lower left")
    _title(axes, scaling.case)
    return Chart(name, f"{scaling.case}: efficiency, by {scaling.main} at its smallest size.", figure)


def _sizes_below(axes: Axes, scaling: Scaling) -> None:
    """A tick at each size that was measured."""
    units = sorted({scaling.units(size) for sizes in scaling.ways.values() for size in sizes})
    axes.set_xscale("log", base=2)
    axes.set_xticks(units, [f"{number:,}" for number in units])
    axes.minorticks_off()
    axes.set_xlabel(scaling.unit)
