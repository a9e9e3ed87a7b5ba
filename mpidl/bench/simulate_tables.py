"""What `mpidl bench simulate` tells: a table for each question, over the number of nodes, and the curves."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mpidl.bench.report import Row, Table
from mpidl.bench.workload import Machine

ASSUMPTIONS = (
    "nodes are alike and compute at the same time; links carry nothing else",
    "messages are those of MPICH 5.0; another MPI sends them in another order",
    "efficiency is forward and backward by the whole iteration, the batch of a rank staying as it is (weak scaling)",
)


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """Of each point and reduction the one with the fastest bucket size."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = row["model"], row["network"], row["gbit"], row["nodes"], row["way"]
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    return list(best.values())


def tables(best: Sequence[Row], parsed: argparse.Namespace) -> list[Table]:
    """Efficiency, the other reduction, bucket sizes, a slow node; and flow by flow beside aggregated."""
    first = parsed.reductions[0]
    own = [row for row in best if row["way"] == first]
    found = [
        *_over_nodes(own, f"efficiency of {first}, %", lambda row: f"{100 * row['efficiency']:.0f}"),
        *_over_nodes(own, f"best bucket of {first}, MiB", lambda row: f"{row['bucket_bytes'] / 2**20:.3g}"),
    ]
    times = {(row["case"], row["nodes"]): row["seconds"] for row in own}
    for other in parsed.reductions[1:]:
        rows = [row for row in best if row["way"] == other]
        title = f"time of {other} to {first}"
        found += _over_nodes(rows, title, lambda row: f"{row['seconds'] / times[row['case'], row['nodes']]:.2f}")
    if parsed.slow_factor > 1:
        title = f"one node {parsed.slow_factor:g} times as slow: time to that without it, partitions staying / moving"
        found += _over_nodes([row for row in own if "slow_seconds" in row], title, _slow)
    if parsed.method == "flows":
        found += _over_nodes(own, "flow by flow to aggregated, %", _difference)
    return found


def _slow(row: Row) -> str:
    moved = f"{row['balanced_seconds'] / row['seconds']:.2f}" if row["is_moved"] else "stay"
    return f"{row['slow_seconds'] / row['seconds']:.2f} / {moved}"


def _difference(row: Row) -> str:
    return "-" if row["flow_seconds"] is None else f"{100 * (row['flow_seconds'] / row['seconds'] - 1):+.1f}"


def _over_nodes(rows: Sequence[Row], title: str, tell: Callable[[Row], str]) -> list[Table]:
    """A table for each network: a line for a model and a rate, a column for a number of nodes."""
    found = []
    nodes = sorted({row["nodes"] for row in rows})
    for network in dict.fromkeys(row["network"] for row in rows):
        lines: dict[tuple[str, float], dict[int, str]] = {}
        for row in rows:
            if row["network"] == network:
                lines.setdefault((row["model"], row["gbit"]), {})[row["nodes"]] = tell(row)
        texts = [
            (model, f"{gbit:g}", *[line.get(number, "-") for number in nodes]) for (model, gbit), line in lines.items()
        ]
        found.append(Table(f"{title}: {network}", ("model", "Gbit/s", *[f"{n:,} nodes" for n in nodes]), texts))
    return found


def notes(parsed: argparse.Namespace, machine: Machine, measured: Iterable[str], simulated: Iterable[str]) -> list[str]:
    """What was simulated how, from what was measured and what was taken for granted."""
    rank = f"{parsed.partitions_per_rank} partition(s) and batch {parsed.batch} a rank"
    node = f"{parsed.ranks_per_node} rank(s) a node, {rank}"
    memory = f"{machine.memory_bytes_s / 1e9:.3g} and {machine.update_bytes_s / 1e9:.3g} GB/s"
    rates = f"sums and updates {memory} a rank, {100 * parsed.wire_share:g} % of the links' rate"
    each = f"{node}; wire {parsed.wire}; {rates}"
    given = [] if parsed.step_files else [f"assumed: {parsed.tflops:g} TFLOP/s a rank"]
    if parsed.memory_gbytes is not None:
        given.append("given: how fast sums and updates are")
    elif not parsed.step_files:
        given.append("assumed: how fast sums and updates are")
    assumed = [f"assumed: {text}" for text in ASSUMPTIONS]
    return [each, *measured, *given, *assumed, *dict.fromkeys(simulated)]


def draw(path: Path, title: str, *, rows: Sequence[Row]) -> None:
    """Draw efficiency over nodes: a panel a model, a colour a rate, a style a network; of the first reduction."""
    from matplotlib.figure import Figure

    own = [row for row in rows if row["way"] == rows[0]["way"]]
    names = list(dict.fromkeys(row["model"] for row in own))
    rates, networks = sorted({row["gbit"] for row in own}), list(dict.fromkeys(row["network"] for row in own))
    figure = Figure(figsize=(4 * len(names), 4.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for number, rate in enumerate(rates):
            for network, style in zip(networks, ("o-", "s--", "^:"), strict=False):
                line = [r for r in own if (r["model"], r["gbit"], r["network"]) == (name, rate, network)]
                points = [row["nodes"] for row in line], [100 * row["efficiency"] for row in line]
                panel.plot(*points, style, color=f"C{number}", label=f"{rate:g} Gbit/s, {network}", markersize=4)
        panel.set_title(name)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("nodes")
        panel.set_ylim(0, 105)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(rates), fontsize="small")
    figure.suptitle("\n".join(textwrap.wrap(title, 60 * len(names))), fontsize="small")
    figure.savefig(path)
