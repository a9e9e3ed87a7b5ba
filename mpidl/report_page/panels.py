"""What the panels of several charts share: colours, scales, legends, lines and maps of ranks.

Colours are Okabe and Ito's, which the colour-blind can tell apart and which stay apart in grey print.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.report_page.runs import Run
from mpidl.report_page.series import Float64Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a")
DASHES = ("-", "--", ":", "-.")
GREY = "#8c8c8c"

_LOG_RATIO = 30.0
"""Losses that fall by so much are drawn on a logarithmic axis."""


def whole(axis: Axis) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def lines_of_ranks(axes: Axes, table: Float64Array, edges: Float64Array) -> None:
    """A line a rank: `table` is (ranks, bins), `edges` the iterations between the bins."""
    handles = []
    for rank, values in enumerate(table):
        colour, dashes = COLOURS[rank % len(COLOURS)], DASHES[rank // len(COLOURS)]
        handles.append(axes.stairs(values, edges, color=colour, linestyle=dashes, linewidth=1.4, baseline=None))
    legend(axes, handles, [f"rank {rank}" for rank in range(len(table))], beside=True)
    iterations_below(axes)


def rank_map(
    figure: Figure, axes: Axes, table: Float64Array, edges: Float64Array, label: str,
    bounds: tuple[float, float],
) -> None:  # fmt: skip
    """Ranks as rows, iterations as columns, values as colours between the bounds."""
    low, high = bounds
    rows = np.arange(len(table) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, table, cmap="cividis", vmin=low, vmax=high, rasterized=True)
    axes.grid(visible=False)
    axes.invert_yaxis()
    whole(axes.yaxis)
    figure.colorbar(mesh, ax=axes, label=label)
    iterations_below(axes)


def legend(axes: Axes, handles: Sequence[Any], names: Sequence[str], *, beside: bool = False) -> None:
    """Names of the lines, where there are several; beside the panel where lines may be anywhere."""
    if len(handles) < 2:
        return
    if beside or len(handles) > 4:
        axes.legend(handles, names, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4)
    else:
        axes.legend(handles, names, loc="best")


def resumes(axes: Axes, run: Run) -> None:
    """A dotted line where later launches went on."""
    for iteration in run.resumed_at:
        axes.axvline(iteration, color=GREY, linestyle=":", linewidth=1)


def epochs_on_top(axes: Axes, runs: Sequence[Run]) -> None:
    """Epochs as a second scale, where they are as long in all runs and there are several."""
    lengths = {run.iterations_per_epoch for run in runs}
    if len(lengths) != 1 or max(run.iteration for run in runs) < 2 * min(lengths):
        return
    (length,) = lengths
    axes.spines["top"].set_visible(True)
    there, back = (lambda x: np.asarray(x, float) / length), (lambda x: np.asarray(x, float) * length)
    top = axes.secondary_xaxis("top", functions=(there, back))
    top.set_xlabel("epochs", fontsize=8.5)
    whole(top.xaxis)
    top.tick_params(labelsize=8.5)


def log_where_it_falls(axes: Axes) -> None:
    """A logarithmic vertical axis where values fall by much; losses below zero are possible, and stay linear."""
    from matplotlib.ticker import LogLocator

    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.zeros(1)])
    known = values[np.isfinite(values)]
    if known.size and known.min() > 0 and known.max() > _LOG_RATIO * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()


def cut_outliers(axes: Axes, values: Float64Array) -> None:
    """Let a first iteration that compiles not flatten all others; what is cut is said."""
    known = values[np.isfinite(values)]
    top = 1.6 * float(np.quantile(known, 0.95)) if known.size else 1.0
    axes.set_ylim(0, 1.08 * min(top, float(known.max())) if known.size else 1.0)
    if known.size and known.max() > top:
        axes.annotate(f"cut; up to {known.max():,.3g}", (0.01, 0.97), xycoords="axes fraction", va="top", fontsize=8,
                      color="#5c5c5c")  # fmt: skip


def thousands(axes: Axes) -> None:
    """Numbers with commas, up the vertical axis."""
    axes.yaxis.set_major_formatter("{x:,.0f}" if axes.get_ylim()[1] >= 20 else "{x:,g}")


def iterations_below(axes: Axes) -> None:
    """The horizontal axis counts iterations."""
    axes.set_xlabel("iterations")
    whole(axes.xaxis)
    axes.xaxis.set_major_formatter("{x:,.0f}")
