"""The curves of `mpidl bench plan`, by matplotlib: the figure of BigDL's white paper, redrawn for this system.

Source: Dai et al., BigDL (SoCC 2019), on Drizzle: the share of scheduling in an iteration over the number of tasks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpidl.bench.report import Row


def draw(path: Path, title: str, *, joined: Sequence[Row], compared: tuple[int, int]) -> None:
    """Draw the share of control over partitions, without and with groups, and over the group size.

    Args:
        path: file, whose ending is the format.
        title: of the whole.
        joined: rows of one run or several.
        compared: the group size and the partitions at which the others are varied.
    """
    from matplotlib.figure import Figure

    group_size, partitions = compared
    groups = [row for row in joined if row["way"] == "mpidl"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _curves(left, [row for row in joined if row["way"] == "central"], "partitions", "central", "o--")
    _curves(left, [r for r in groups if r["group_size"] == group_size], "partitions", f"groups of {group_size}", "s-")
    left.set_xlabel("partitions = tasks of an iteration")
    left.set_ylabel(f"control, % of {1e3 * joined[0]['iteration_seconds']:g} ms of compute")
    _curves(right, [row for row in groups if row["partitions"] == partitions], "group_size", "mpidl", "s-")
    right.set_xlabel(f"iterations of a group ({partitions} partitions)")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.suptitle("\n".join(textwrap.wrap(title, 150)), fontsize="small")
    figure.savefig(path)


def _curves(axis: Any, rows: Iterable[Row], over: str, name: str, style: str) -> None:
    """A curve for each number of ranks, in a colour of its own."""
    of_ranks: dict[int, list[Row]] = {}
    for row in rows:
        of_ranks.setdefault(row["ranks"], []).append(row)
    for ranks, own in of_ranks.items():
        colour = f"C{ranks.bit_length() - 1}"
        label = f"{name}, {ranks} ranks"
        axis.plot([row[over] for row in own], [100 * row["share"] for row in own], style, color=colour, label=label)
