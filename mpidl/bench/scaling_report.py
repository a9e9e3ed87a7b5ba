"""The tables of `mpidl bench scaling`, and the talk's graph: throughput against nodes, beside the ideal line.

Source of the graph: "Accelerating deep learning on Apache Spark using BigDL with coarse-grained scheduling", Strata
2018.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpidl.bench.report import Row, Table, milliseconds, spread
from mpidl.bench.waits import Course, seconds_of

COMPUTE = "compute"
"""The case of rows that tell what one rank needs alone."""
_STYLES = {
    "mpidl-ordered": ("mpidl: parameter manager", "o-", "tab:blue"),
    "mpidl-bfloat16": ("the same, bfloat16", "o--", "tab:cyan"),
    "mpidl-mpi": ("the same, summed by MPI", "s-", "tab:purple"),
    "mpidl-allreduce": ("allreduce", "^-", "tab:green"),
    "mpidl-tree": ("tree", "v-", "tab:orange"),
    "mpidl-driver": ("driver", "x-", "tab:red"),
}
"""Label, line and colour of each way."""


def unit_of(rows: Sequence[Row]) -> str:
    """What is scaled over: "nodes", or "ranks" where there is one node only."""
    return "nodes" if any(row["nodes"] > 1 for row in rows) else "ranks"


def progress(rows: Sequence[Row]) -> str:
    """A line for a size that has been measured: what a job that ends too early has found so far."""
    told = ", ".join(f"{row['way']} {milliseconds(row['seconds'])}" for row in rows if row["case"] == rows[0]["case"])
    return f"{rows[0]['nodes']} node(s), {rows[0]['ranks']} rank(s), {rows[0]['case']}, ms: {told}"


def table(rows: Sequence[Row]) -> Table:
    """Of one mode."""
    first = rows[0]
    batch = f"{first['batch']} samples a rank" if first["case"] == "weak" else f"{first['global_batch']} samples in all"
    title = f"bench scaling: {first['case']}, {first['model']}, {batch}; efficiency to {first['baseline']}"
    headers = ("nodes", "ranks", "way", "batch", "ms", "quartiles", "samples/s", "efficiency", "exposed ms")
    texts = [
        (
            str(r["nodes"]), str(r["ranks"]), r["way"].removeprefix("mpidl-"), str(r["batch"]),
            milliseconds(r["seconds"]), spread(r["spread"]), f"{r['samples_per_s']:,.1f}",
            f"{100 * r['efficiency']:.0f} %", milliseconds(r["exposed_seconds"]),
        )
        for r in rows
    ]  # fmt: skip
    return Table(title, headers, texts)


def notes(parsed: argparse.Namespace, courses: Mapping[int, Course], rows: Sequence[Row]) -> list[str]:
    """What the figures stand on."""
    told = ", ".join(f"{batch} samples {milliseconds(seconds_of(course))} ms" for batch, course in courses.items())
    if parsed.compute_ms:
        lines = [f"waits in place of compute, as --compute-ms says, in the layers' measured proportions: {told}"]
    elif parsed.waits:
        lines = [f"waits in place of compute, as long as one rank alone needed, layer by layer: {told}"]
    else:
        lines = [f"compute of one rank alone: {told}"]
    lines.append("exposed: what an iteration takes longer than that")
    links = {row["nodes"]: row["wire_gbit"] for row in rows if row["wire_gbit"] is not None}
    if links:
        measured = ", ".join(f"{gbit:.3g} on {nodes} nodes" for nodes, gbit in links.items())
        lines.append(f"a node's link, Gbit/s: {f'{parsed.wire_gbit:g}, given' if parsed.wire_gbit else measured}")
    return lines


def draw(path: Path, title: str, *, rows: Sequence[Row]) -> None:
    """Draw throughput against nodes (or ranks), a panel a mode, with the ideal line through the baseline's first point.

    Args:
        path: file, whose ending is the format.
        title: of the whole.
        rows: of all modes, sizes and ways.
    """
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["case"] for row in rows))
    unit = unit_of(rows)
    figure = Figure(figsize=(5.5 * len(modes), 5), layout="constrained")
    for axis, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        _panel(axis, [row for row in rows if row["case"] == mode], unit)
    figure.suptitle("\n".join(textwrap.wrap(title, 60 * len(modes))), fontsize="small")
    figure.savefig(path)


def _panel(axis: Any, rows: Sequence[Row], unit: str) -> None:
    """The curves of one mode."""
    points = {row[unit]: row for row in rows if row["way"] == row["baseline"]}
    base = points[min(points)]
    ideal = [base["samples_per_s"] * row["ranks"] / base["ranks"] for row in points.values()]
    axis.plot(list(points), ideal, ":", color="gray", label="ideal")
    ways = dict.fromkeys(row["way"] for row in rows)
    for way in [name for name in _STYLES if name in ways]:
        label, line, colour = _STYLES[way]
        own = [row for row in rows if row["way"] == way]
        axis.plot([row[unit] for row in own], [row["samples_per_s"] for row in own], line, color=colour, label=label)
    what = f"{base['batch']} samples a rank" if base["case"] == "weak" else f"{base['global_batch']} samples in all"
    axis.set_title(f"{base['case']} scaling, {what}", loc="left", fontsize="medium")
    axis.set_xticks(list(points))
    axis.set_xlabel(unit)
    axis.set_ylabel("samples a second")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
