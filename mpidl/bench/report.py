"""What a benchmark tells: tables for people, rows for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mpidl._version import __version__
from mpidl.runtime import World

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts in rows and columns."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found: on rank 0 as on all others."""

    rows: list[Row]
    """With "case", "way", "ranks", "nodes", "seconds" (median), "spread" (its quartiles), "limit_seconds", "bytes" and
    what the benchmark adds; None where there is no such figure."""
    tables: list[Table]
    notes: list[str]
    draw: Callable[[Path, str], None] | None = None
    """Draws the picture; None: the usual one, of bars."""


def row(world: World, case: str, way: str, **figures: Any) -> Row:
    """A row with what all rows have; figures that are left out are None."""
    empty = dict.fromkeys(("seconds", "spread", "limit_seconds", "bytes"))
    return {"case": case, "way": way, "ranks": world.size, "nodes": world.num_nodes, **empty, **figures}


def milliseconds(seconds: float) -> str:
    """With three significant digits: 0.123, 1.23, 12.3, 123."""
    number = 1e3 * seconds
    decimals = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2 if abs(number) >= 1 else 3
    return f"{number:,.{decimals}f}"


def spread(bounds: tuple[float, float]) -> str:
    """`12.1 to 13.4`, in milliseconds."""
    return f"{milliseconds(bounds[0])} to {milliseconds(bounds[1])}"


def mib(num_bytes: float | None) -> str:
    """Bytes in MiB."""
    return "-" if num_bytes is None else f"{num_bytes / 2**20:,.1f}"


def title(bench: str, row: Row) -> str:
    """Of a table whose ratios are to one of the ways."""
    return f"bench {bench}: {row['case']}, {row['ranks']} ranks on {row['nodes']} node(s); ratio to {row['baseline']}"


def baseline(ways: Sequence[str]) -> str:
    """The way that the others are compared with: mpidl's first."""
    return next((way for way in ways if way.startswith("mpidl")), ways[0])


def machine(world: World) -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ("numba", "numpy", "torch")
    return {
        "hosts": list(dict.fromkeys(world.hostnames)),
        "ranks": world.size,
        "nodes": world.num_nodes,
        "threads_per_rank": world.threads_per_rank,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": platform.platform(),
        "mpi": world.library,
        "versions": {"mpidl": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_json(path: Path, bench: str, machine: dict[str, Any], command: str, rows: Sequence[Row]) -> None:
    """Write `{"bench", "machine", "command", "rows"}`."""
    document = {"bench": bench, "machine": machine, "command": command, "rows": rows}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
