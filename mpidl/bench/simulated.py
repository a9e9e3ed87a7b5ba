"""`mpidl bench simulate --measured`: simulated beside measured iterations (`jobs/waits.py`), on hosts behind a switch.

What is taken from the measurement: how long forward and backward wait, the size of buckets, and the rate of all-to-alls
on the same hosts, as the links' rate. That was measured with the sleeps of the exchange's thread, between rounds and at
the end; so these are nothing here, whatever `--poll-us` says. The models that wait have no buffers. All else is
simulated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from mpidl.bench.report import Report, Row, Table, milliseconds
from mpidl.bench.simulate_points import Kind, machine_of, meta_model, overheads_of, read_rows
from mpidl.bench.workload import Workload
from mpidl.parameters import WIRES
from mpidl.simulation import FluidWire, Outside, simulate, switch

_LATENCY_S = 5e-5
"""Of a message between network namespaces of one machine, half of it."""

_KINDS: dict[str, Kind] = {
    "case": str, "way": ("ordered", "mpi"), "wire": tuple(WIRES), "ranks": int, "nodes": int,
    "exchange_bytes_per_s": float, "bucket_bytes": float,
    **dict.fromkeys(("seconds", "forward_seconds", "backward_seconds", "compute_seconds"), float),
}  # fmt: skip
"""What a row has to have."""


def compare(parsed: argparse.Namespace) -> Report:
    """Simulate what was measured.

    Raises:
        ConfigError: a file cannot be read, is none of `jobs/waits.py`, or a row is damaged.
    """
    rows = [_row(row, parsed) for file in parsed.measured for row in read_rows(Path(file), "waits", _KINDS)]
    rows.sort(key=lambda row: (row["way"], row["wire"], row["nodes"]))
    title = "bench simulate: measured and simulated iterations, compute replaced by waits"
    headers = (
        "model", "way", "wire", "nodes", "link Gbit/s", "measured ms", "aggregated ms", "error", "flow by flow ms",
        "error",
    )  # fmt: skip
    return Report(rows, [Table(title, headers, _texts(rows))], [])


def _row(measured: Row, parsed: argparse.Namespace) -> Row:
    workload = Workload.of(meta_model(measured["case"]), measured["forward_seconds"], measured["backward_seconds"])
    workload = dataclasses.replace(workload, changes_size=0)
    nodes = measured["nodes"]
    machine = dataclasses.replace(machine_of(parsed), ranks_per_node=measured["ranks"] // nodes, poll_s=0.0)
    cells = max(1, round(measured["bucket_bytes"] / 4 / workload.cell_size(nodes, machine)))
    iteration = workload.iteration(
        nodes, machine, reduction=measured["way"], wire=measured["wire"], cells_per_bucket=cells
    )
    platform = switch(nodes, measured["exchange_bytes_per_s"], _LATENCY_S)
    overheads = overheads_of(machine)
    aggregated_s = simulate(iteration, FluidWire(platform, overheads)).seconds
    flows = None
    if parsed.method != "aggregated":
        flows = Outside(platform, overheads, parsed.limit_s).iteration(iteration)
    return measured | {
        "simulated_seconds": aggregated_s,
        "error": aggregated_s / measured["seconds"] - 1,
        "flow_seconds": None if flows is None else flows.seconds,
        "limit_seconds": measured["compute_seconds"],
        "bytes": 4 * workload.layout.size,
    }


def _texts(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    percent = functools.partial("{:+.1f} %".format)
    found: list[tuple[str, ...]] = []
    for row in rows:
        flow_s = row["flow_seconds"]
        flows = ("-", "-") if flow_s is None else (milliseconds(flow_s), percent(100 * (flow_s / row["seconds"] - 1)))
        gbit = "-" if row.get("link_gbit") is None else f"{row['link_gbit']:g}"
        texts = milliseconds(row["seconds"]), milliseconds(row["simulated_seconds"]), percent(100 * row["error"])
        found.append((row["case"], row["way"], row["wire"], str(row["nodes"]), gbit, *texts, *flows))
    return found
