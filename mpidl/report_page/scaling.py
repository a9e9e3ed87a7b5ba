"""Throughput over sizes, from the rows of one benchmark file or several. Pure.

A case scales where a way was measured at two sizes or more; where those are runs of their own, as with `bench step`,
give all their files. Efficiency is a rank's throughput by that of the main way, mpidl's, at its smallest size; where
that one has an efficiency of its own, such as a simulation's smallest, that counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from mpidl.bench.report import Row, baseline, milliseconds
from mpidl.report_page.benches import Table
from mpidl.telemetry.tables import count

_WITHOUT_EXCHANGE = ("compute alone", "one process")


@dataclasses.dataclass(frozen=True)
class Size:
    """A way at a number of ranks and nodes."""

    nodes: int
    ranks: int
    seconds: float
    """Of an iteration."""
    samples_per_s: float
    speedup: float
    """By what the smallest size should give."""
    ideal: float
    """The speed-up where ranks add up."""

    @property
    def efficiency(self) -> float:
        """Of 1 where ranks add up."""
        return self.speedup / self.ideal


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A case that was measured at several sizes."""

    case: str
    unit: str
    """What sizes are told in: "nodes", or "ranks" where there is one node only."""
    ways: Mapping[str, Sequence[Size]]
    """By way, from the smallest size on."""
    main: str
    """The way that efficiency is relative to."""

    def units(self, size: Size) -> int:
        """Nodes or ranks."""
        return size.nodes if self.unit == "nodes" else size.ranks


def scalings(rows: Iterable[Row]) -> list[Scaling]:
    """The cases that were measured at several sizes."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("way") not in _WITHOUT_EXCHANGE and _throughput(row) and row.get("seconds") and row.get("ranks"):
            cases.setdefault(_case(row), []).append(row)
    return [made for case, own in cases.items() for made in [_scaling(case, own)] if made is not None]


def _case(row: Row) -> str:
    """In words; `bench scaling` calls its cases weak and strong only."""
    if row["case"] not in ("weak", "strong"):
        return str(row["case"])
    batch = f"{row.get('batch')} a rank" if row["case"] == "weak" else f"{row.get('global_batch')} in all"
    waits = ", waits in place of compute" if row.get("is_waited") else ""
    return f"{row['case']} scaling, {row.get('model')}, batch {batch}{waits}"


def _throughput(row: Row) -> float | None:
    found = row.get("samples_per_s")
    return None if found is None else float(found)


def _scaling(case: str, rows: Sequence[Row]) -> Scaling | None:
    """Of what was measured twice at a size, the fastest; None without a way at several sizes."""
    unit = "nodes" if len({row.get("nodes") for row in rows} - {None}) > 1 else "ranks"
    ways: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: _throughput(row) or 0.0):
        ways.setdefault(row["way"], {})[int(row[unit])] = row
    names = [way for way in dict.fromkeys(row["way"] for row in rows) if len(ways[way]) > 1]
    if not names:
        return None
    main = baseline(names)
    smallest = ways[main][min(ways[main])]
    should = (_throughput(smallest) or 0.0) / float(smallest.get("efficiency") or 1.0)
    sizes = {way: _sizes(ways[way], should, int(smallest["ranks"])) for way in names}
    return Scaling(case, unit, sizes, main)


def _sizes(rows: Mapping[int, Row], should: float, ranks: int) -> list[Size]:
    """In ascending order.

    Args:
        rows: by units.
        should: samples per second that `ranks` ranks should give.
        ranks: of the smallest size.
    """
    made = []
    for units in sorted(rows):
        row, found = rows[units], _throughput(rows[units]) or 0.0
        own, nodes = int(row["ranks"]), int(row.get("nodes") or 1)
        made.append(Size(nodes, own, float(row["seconds"]), found, found / should, own / ranks))
    return made


def efficiencies(scaling: Scaling) -> Table:
    """A row a size, a column a way."""
    found = {
        (size.nodes, size.ranks): {way: own.efficiency for way, sizes in scaling.ways.items() for own in sizes
                                   if (own.nodes, own.ranks) == (size.nodes, size.ranks)}
        for sizes in scaling.ways.values() for size in sizes
    }  # fmt: skip
    rows = [
        [count(nodes), count(ranks), *(f"{100 * own[way]:.1f}" if way in own else "-" for way in scaling.ways)]
        for (nodes, ranks), own in sorted(found.items())
    ]
    caption = f"{scaling.case}: efficiency in %, by {scaling.main} at its smallest size"
    return Table(caption, ["nodes", "ranks", *scaling.ways], rows)


def proposal(scaling: Scaling) -> Table:
    """All figures of the main way: what a proposal for computing time asks for."""
    rows = [
        [
            count(size.nodes), count(size.ranks), milliseconds(size.seconds), count(size.samples_per_s),
            f"{size.speedup:.2f}", f"{size.ideal:.2f}", f"{100 * size.efficiency:.1f}",
        ]
        for size in scaling.ways[scaling.main]
    ]  # fmt: skip
    headers = ["nodes", "ranks", "ms an iteration", "samples/s", "speed-up", "ideal speed-up", "efficiency, %"]
    return Table(f"{scaling.case}: {scaling.main}", headers, rows)
