"""The figures as bars, by matplotlib, which the extra `mpidl[bench]` brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mpidl.bench.report import Row, milliseconds
from mpidl.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")


def check(file: str) -> None:
    """See to it that `draw` can work.

    Raises:
        ConfigError: matplotlib is not installed, or the file's ending names no format.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--picture {file} needs matplotlib: pip install matplotlib; or leave --picture out")
    if Path(file).suffix not in FORMATS:
        raise ConfigError(f"--picture {file}: the name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw one panel a case: a bar a way with its quartiles, and the limit as a dashed line."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["seconds"] is not None]
    cases = {case: [row for row in timed if row["case"] == case] for case in dict.fromkeys(r["case"] for r in timed)}
    heights = [len(group) + 2 for group in cases.values()]
    figure = Figure(figsize=(9, 0.5 + 0.35 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (case, group) in zip(axes, cases.items(), strict=True):
        times = [1e3 * row["seconds"] for row in group]
        errors = [[abs(1e3 * row["spread"][side] - t) for row, t in zip(group, times, strict=True)] for side in (0, 1)]
        colours = ["tab:blue" if row["way"].startswith("mpidl") else "lightgray" for row in group]
        bars = axis.barh([row["way"] for row in group], times, xerr=errors, color=colours, capsize=3)
        axis.bar_label(bars, fmt="{:,.3g}", padding=4)
        limit = group[0]["limit_seconds"]
        if limit is not None:
            axis.axvline(1e3 * limit, color="tab:red", linestyle="--")
            case = f"{case} (dashed: the limit, {milliseconds(limit)} ms)"
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.set_title(case, loc="left", fontsize="medium")
        axis.set_xlabel("milliseconds")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path)
