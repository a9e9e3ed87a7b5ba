"""`mpidl bench simulate`: iterations on machines that are not there, from 16 to 4,096 nodes, by `mpidl.simulation`.

One rank simulates. Every point (model, network, rate of links, number of nodes) is simulated for both reductions and
several bucket sizes; what is told is the best one, as `bucket_mb` finds it. Compute times, and how fast a rank's sums
and updates are, are those of `bench step` (`--step FILE ...`, which has to have all models), or reckoned from
`--tflops` and `--memory-gbytes`; the notes tell which is from where. How the wire is simulated:

- `--method aggregated`: from the most loaded link, nothing else.
- `--method exchange` (the default): the same, and up to 256 nodes one exchange of each kind, or the first rounds of it,
  is simulated flow by flow as well; what it takes longer than the most loaded link says makes all of its kind longer.
- `--method flows`: whole iterations flow by flow, beside the aggregated ones; up to 64 nodes.

With `--measured FILE ...` nothing of this: what `jobs/waits.py` has measured on hosts is simulated, and compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

from mpidl import simulation
from mpidl.bench import simulate_tables, slow_node
from mpidl.bench.report import Report, Row
from mpidl.bench.simulate_points import machine_of, meta_model, overheads_of
from mpidl.bench.simulated import compare
from mpidl.bench.step_figures import StepFigures
from mpidl.bench.workload import Machine, Workload
from mpidl.errors import ConfigError
from mpidl.runtime import World
from mpidl.simulation import Collective, FluidWire, Outside, Overheads, Platform

NETWORKS: dict[str, Callable[..., Platform]] = {
    "fat_tree": simulation.fat_tree,
    "dragonfly": simulation.dragonfly,
    "adaptive_dragonfly": functools.partial(simulation.dragonfly, is_adaptive=True),
}
CELLS = (1, 2, 4, 8, 16)
"""Cells of a bucket that are tried."""

_MOST_NODES, _MOST_FLOWS = 256, 12_000
"""Of an exchange that is simulated flow by flow; a longer one's first rounds are."""

_EXCHANGE_BYTES, _EXCHANGE_RATE, _EXCHANGE_LATENCY_S = 2**22, 1e9, 1e-6
"""What a node sends to each other one in it, and the links' bytes a second and latency."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a model is simulated."""

    model: str
    network: str
    gbit: float
    nodes: int


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Simulate. Collective, but of one rank.

    Raises:
        ConfigError: more ranks than one, unknown models or networks, networks that cannot be built, files that cannot
            be read or lack a model, no SimGrid.
    """
    with world.agreed("checking the simulation"):
        if world.size > 1:
            raise ConfigError(f"bench simulate runs on one rank, not on {world.size}; start it without mpirun")
        if parsed.method != "aggregated":
            simulation.check()
        if parsed.measured:
            return compare(parsed)
        figures = StepFigures(parsed.step_files, parsed.batch) if parsed.step_files else None
        workloads = {name: _workload(name, parsed, figures) for name in parsed.models}
        machine = machine_of(parsed, figures.speeds() if figures and parsed.memory_gbytes is None else None)
        if parsed.method == "flows" and "adaptive_dragonfly" in parsed.networks:
            raise ConfigError(
                "SimGrid knows no adaptive routes: give --method exchange or aggregated, or other networks"
            )
        if parsed.slow_factor < 1:
            raise ConfigError(
                f"--slow-factor {parsed.slow_factor:g} is below 1: give how much longer one node computes"
            )
        platforms = {point: _platform(point, parsed) for point in _points(parsed)}
    simulator = Simulator(parsed, workloads, machine)
    rows = [row for point, platform in platforms.items() for row in simulator.rows(point, platform)]
    best = simulate_tables.best_rows(rows)
    return Report(
        rows,
        simulate_tables.tables(best, parsed),
        simulate_tables.notes(parsed, machine, figures.told if figures else [], simulator.told),
        draw=functools.partial(simulate_tables.draw, rows=best),
    )


def _points(parsed: argparse.Namespace) -> Iterator[Point]:
    for found in itertools.product(parsed.models, parsed.networks, parsed.gbits, parsed.nodes):
        yield Point(*found)


def _platform(point: Point, parsed: argparse.Namespace) -> Platform:
    rate = parsed.wire_share * 1e9 / 8 * point.gbit
    return NETWORKS[point.network](point.nodes, rate, 1e-6 * parsed.latency_us, taper=parsed.taper)


def _workload(name: str, parsed: argparse.Namespace, figures: StepFigures | None) -> Workload:
    model = meta_model(name)
    if figures is not None:
        return Workload.of(model, *figures.compute(name))
    forward_s = 2 * Workload.of(model, 1.0, 1.0).operations * parsed.batch / (1e12 * parsed.tflops)
    return Workload.of(model, forward_s, 2 * forward_s)


class Simulator:
    """Simulates points, and keeps what several of them need."""

    def __init__(self, parsed: argparse.Namespace, workloads: dict[str, Workload], machine: Machine) -> None:
        self._parsed, self._workloads, self._machine = parsed, workloads, machine
        self.told: list[str] = []
        """What was simulated how."""
        self._overheads = overheads_of(machine)
        self._iteration = functools.lru_cache(maxsize=None)(self._make_iteration)
        self._factors = functools.lru_cache(maxsize=None)(self._make_factors)

    def rows(self, point: Point, platform: Platform) -> Iterator[Row]:
        """Each reduction with each bucket size; the first of them with a slow node too."""
        parsed, machine = self._parsed, self._machine
        wire = functools.partial(FluidWire, platform, self._overheads, self._factors(point.network, point.nodes))
        workload = self._workloads[point.model]
        num_cells = workload.num_cells(point.nodes, machine)
        best: Row | None = None
        for reduction in parsed.reductions:
            for cells in [number for number in CELLS if number == 1 or 4 * number <= num_cells]:
                iteration = self._iteration(point.model, point.nodes, reduction, cells)
                phases = simulation.simulate(iteration, wire())
                row = self._row(point, reduction, cells, phases)
                if parsed.method == "flows":
                    found = Outside(platform, self._overheads, parsed.limit_s).iteration(iteration)
                    row["flow_seconds"] = None if found is None else found.seconds
                if reduction == parsed.reductions[0] and (best is None or row["seconds"] < best["seconds"]):
                    best = row
                yield row
        if best is not None and parsed.slow_factor > 1 and point.nodes > 1:
            make = functools.partial(
                workload.iteration, point.nodes, machine, reduction=best["way"], wire=parsed.wire,
                cells_per_bucket=best["cells"],
            )  # fmt: skip
            best |= slow_node.costs(workload, machine, point.nodes, parsed.slow_factor, best["seconds"], make, wire)

    def _make_iteration(self, model: str, nodes: int, reduction: str, cells: int) -> simulation.Iteration:
        return self._workloads[model].iteration(
            nodes, self._machine, reduction=reduction, wire=self._parsed.wire, cells_per_bucket=cells
        )

    def _row(self, point: Point, reduction: str, cells: int, phases: simulation.Phases) -> Row:
        workload, parsed = self._workloads[point.model], self._parsed
        ranks = point.nodes * parsed.ranks_per_node
        alone_s = workload.forward_s + workload.backward_s
        return {
            "case": f"{point.model}, {point.network}, {point.gbit:g} Gbit/s", "way": reduction, "ranks": ranks,
            "nodes": point.nodes, "seconds": phases.seconds, "spread": None, "limit_seconds": alone_s,
            "bytes": 4 * workload.layout.size, "model": point.model, "network": point.network, "gbit": point.gbit,
            "cells": cells, "bucket_bytes": 4 * cells * workload.cell_size(point.nodes, self._machine),
            "wire": parsed.wire, "batch": parsed.batch, "samples_per_s": parsed.batch * ranks / phases.seconds,
            "efficiency": alone_s / phases.seconds, "phases": dataclasses.asdict(phases),
        }  # fmt: skip

    def _make_factors(self, network: str, nodes: int) -> dict[str, float]:
        """By kind, how much longer than its most loaded link an exchange takes flow by flow, at any rate."""
        if self._parsed.method == "aggregated" or nodes > _MOST_NODES or network == "adaptive_dragonfly" or nodes < 2:
            self.told.append(f"{network}, {nodes} nodes: aggregated")
            return {}
        factors: dict[str, float] = {}
        platform = NETWORKS[network](nodes, _EXCHANGE_RATE, _EXCHANGE_LATENCY_S, taper=self._parsed.taper)
        overheads = Overheads(message_s=0.0, round_s=0.0)
        for kind in ("alltoall", *["reduce_scatter"] * ("mpi" in self._parsed.reductions)):
            whole = Collective(kind, nodes, _EXCHANGE_BYTES, self._machine.peers)
            rounds = first_rounds(whole, _MOST_FLOWS)
            part = dataclasses.replace(whole, num_rounds=rounds)
            found = Outside(platform, overheads, self._parsed.limit_s).alone(part)
            what = f"{network}, {nodes} nodes: {kind}, {rounds} of {len(list(whole.rounds()))} rounds"
            if found is None:
                self.told.append(f"{what} flow by flow: no result in {self._parsed.limit_s:g} s: aggregated")
                continue
            waits, load = simulation.alone_s(platform, overheads, part)
            factors[kind] = (found - waits) / load
            self.told.append(f"{what} flow by flow: {100 * (factors[kind] - 1):+.1f} % to the aggregated")
        return factors


def first_rounds(collective: Collective, most_flows: int) -> int:
    """How many rounds have no more flows than that; one at least."""
    flows, rounds = 0, 0
    for each in collective.rounds():
        flows += collective.num_nodes * len(each.distances)
        if rounds and flows > most_flows:
            break
        rounds += 1
    return max(rounds, 1)
