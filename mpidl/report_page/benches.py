"""What a benchmark wrote with `--json`: read, and told as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpidl.bench.report import Row, mib, milliseconds, spread
from mpidl.errors import MALFORMED, ConfigError
from mpidl.telemetry.tables import count


@dataclasses.dataclass(frozen=True)
class Bench:
    """One file."""

    path: Path
    kind: str
    machine: Mapping[str, Any]
    command: str
    rows: Sequence[Row]

    @property
    def cases(self) -> dict[str, list[Row]]:
        """The rows by case, in the order of the file."""
        return {
            case: [r for r in self.rows if r["case"] == case] for case in dict.fromkeys(r["case"] for r in self.rows)
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts in rows and columns."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def _percent(value: float) -> str:
    return f"{100 * value:.3g}"


def _times(value: float) -> str:
    return f"{value:.2f}"


def _counts(values: Sequence[float]) -> str:
    return " ".join(map(count, values))


# Key of a row -> the column's header and how its values are told; columns without values are left out.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "way": ("way", str),
    "nodes": ("nodes", count),
    "ranks": ("ranks", count),
    "partitions": ("partitions", count),
    "group_size": ("group size", count),
    "seconds": ("ms", milliseconds),
    "spread": ("quartiles, ms", spread),
    "limit_seconds": ("limit, ms", milliseconds),
    "times_limit": ("x limit", _times),
    "times_baseline": ("x baseline", _times),
    "times_alone": ("x compute alone", _times),
    "exposed_seconds": ("beyond compute, ms", milliseconds),
    "cpu_seconds": ("CPU, ms", milliseconds),
    "samples_per_s": ("samples/s", count),
    "efficiency": ("efficiency, %", _percent),
    "share": ("share, %", _percent),
    "bytes": ("MiB", mib),
    "counts": ("partitions of each rank", _counts),
}


def read_bench(path: Path) -> Bench:
    """Read a file that `mpidl bench --json` wrote.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        rows = [_checked(row) for row in document["rows"]]
        found = Bench(path, str(document["bench"]), dict(document["machine"]), str(document["command"]), rows)
        tables(found), machine_facts(found.machine)  # so that damaged figures are found here
    except MALFORMED as error:
        raise ConfigError(
            f"{path} is no file that mpidl bench --json wrote, or is damaged ({type(error).__name__} {error}); give "
            "one of those, or a run directory"
        ) from None
    return found


def _checked(row: Mapping[str, Any]) -> Row:
    """The row, if it has what all rows have."""
    seconds = row["seconds"]
    return {
        **row,
        "case": str(row["case"]),
        "way": str(row["way"]),
        "seconds": None if seconds is None else float(seconds),
    }


def tables(bench: Bench) -> list[Table]:
    """One table a case: a row a way, a column for each figure that there is."""
    return [_table(case, rows) for case, rows in bench.cases.items()]


def _table(case: str, rows: Sequence[Row]) -> Table:
    keys = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    told = [["-" if row.get(key) is None else _COLUMNS[key][1](row[key]) for key in keys] for row in rows]
    baselines = {row["baseline"] for row in rows if row.get("baseline")}
    baseline = f"; the baseline is {', '.join(sorted(baselines))}" if baselines else ""
    return Table(f"{case}; medians{baseline}", [_COLUMNS[key][0] for key in keys], told)


def machine_facts(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the figures were measured on, as pairs of a name and a text."""
    versions = machine.get("versions") or {}
    facts = {
        "machine": ", ".join(map(str, machine.get("hosts") or [])),
        "processor": f"{machine.get('processor', '?')}, {machine.get('cores', '?')} cores",
        "ranks": f"{machine.get('ranks', '?')} on {machine.get('nodes', '?')} node(s), "
                 f"{machine.get('threads_per_rank', '?')} thread(s) each",
        "software": ", ".join([*(f"{name} {version}" for name, version in versions.items()),
                               str(machine.get("mpi", "")).split("\n")[0]]),
    }  # fmt: skip
    return [(name, text) for name, text in facts.items() if text]
