"""`mpidl bench scaling`: throughput over 1, 2, 4, ... or chosen numbers of nodes of this run, for each strategy.

1. *compute*: rank 0 trains alone on every batch size that comes up, and takes the layers' times (`waits.py`).
2. *sizes*: for each size, the first nodes (on one node: the first ranks) train as a job of their own while the others
   wait without taking a core (`runtime.run_on_first`). There, all strategies run in turn, weak and strong. Their
   first losses must agree; then the parameter manager finds its bucket size, and only then are they timed,
   from one step to another: what the next forward overlaps with counts neither twice nor not at all.
3. *efficiency* is a rank's throughput to that of the first way (mpidl's own, unless left out) on the smallest size.

With `--waits` compute is replaced by waits of the measured length, so there are no losses to compare; and all ranks
give their cores away while they wait for messages, as emulated hosts share cores without knowing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence

from torch import nn

from mpidl.bench import limits, scaling_report, step
from mpidl.bench.cases import OPTIMIZERS, Batches, build_model, chosen, samples_for
from mpidl.bench.measuring import Timing, time_in_turn
from mpidl.bench.report import Report, Row, baseline, row
from mpidl.bench.scaling_sizes import Size, check_global_batch, check_node_counts, cut, sizes_of, with_efficiency
from mpidl.bench.step_ways import MPIDL, Mpidl
from mpidl.bench.waits import Course, Waiting, measure_course, seconds_of
from mpidl.errors import ConfigError
from mpidl.parameters import WIRES
from mpidl.runtime import World, run_on_first
from mpidl.telemetry import Console

STRATEGIES = "mpidl-ordered,mpidl-driver,mpidl-tree,mpidl-allreduce"
"""What is measured unless `--ways` says otherwise."""

Courses = Mapping[int, Course]
"""Batch size -> its layers' times."""


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Measure compute, then all strategies on every size. Collective.

    Raises:
        ConfigError: on every rank: unknown ways or models, batches that do not fit, nodes that are not there.
        DisagreementError: on every rank: two strategies do not train alike.
    """
    with world.agreed("choosing ways and model"):
        names = chosen(parsed.ways or STRATEGIES, MPIDL, {})
        check_global_batch(parsed.global_batch, parsed.modes, world.size)
        check_node_counts(parsed.node_counts, world.num_nodes)
        build_model(parsed.model_name)
    of_all = parsed.global_batch or parsed.batch * world.size
    sizes = sizes_of(world.node_sizes, parsed.modes, parsed.batch, of_all, parsed.node_counts)
    batches = sorted({batch for size in sizes for mode in parsed.modes for batch in size.batches(mode)})
    courses: Courses = world.broadcast_object(run_on_first(world, 1, functools.partial(_courses, parsed, batches)))
    waits = bool(parsed.waits or parsed.compute_ms)
    if waits:
        world = dataclasses.replace(world, shares_cores=True)
    found: list[Row] = []
    console = Console()
    for size in sizes:
        work = functools.partial(_measure_size, parsed, size, names, courses, waits)
        rows = run_on_first(world, size.ranks, work) or []
        if world.rank == 0:
            console.print(scaling_report.progress(rows))
        found += rows
    rows = with_efficiency(world.broadcast_object(found), baseline(names))
    tables = [scaling_report.table([each for each in rows if each["case"] == mode]) for mode in parsed.modes]
    return Report(
        [*_compute_rows(world, parsed, courses), *rows],
        tables,
        scaling_report.notes(parsed, courses, rows),
        draw=functools.partial(scaling_report.draw, rows=rows),
    )


def _courses(parsed: argparse.Namespace, batches: Sequence[int], alone: World) -> Courses:
    """Layers' times for every batch size, measured on this rank or made of `--compute-ms`. Collective.

    Raises:
        ConfigError: the model cannot train on so few samples.
    """
    model = build_model(parsed.model_name)
    courses = {}
    with alone.agreed("measuring compute"):
        for batch in [parsed.batch] if parsed.compute_ms else batches:
            try:
                courses[batch] = measure_course(model, step.LOSS, samples_for(model, batch, 0))
            except ValueError as error:  # BatchNorm's, of a single value
                raise ConfigError(f"{parsed.model_name} does not train on {batch} sample(s) a rank: {error}") from error
    if not parsed.compute_ms:
        return courses
    course = courses[parsed.batch]
    for_sample = parsed.compute_ms / 1e3 / parsed.batch / seconds_of(course)
    return {batch: tuple(layer.scaled(for_sample * batch) for layer in course) for batch in batches}


def _measure_size(
    parsed: argparse.Namespace, size: Size, names: Sequence[str], courses: Courses, waits: bool, part: World
) -> list[Row]:
    """All strategies in all modes on one size. Collective over the part."""
    run = _Run(parsed, size, names, courses, waits, part)
    run.warm_up()
    rows = run.rows()
    run.close()
    return rows


class _Run:
    """One size: a model for each strategy, and a loop for each and each global batch. All calls are collective."""

    def __init__(
        self,
        parsed: argparse.Namespace,
        size: Size,
        names: Sequence[str],
        courses: Courses,
        waits: bool,
        part: World,
    ) -> None:
        self._parsed, self._size, self._courses, self._waits, self._part = parsed, size, courses, waits, part
        optimizer = OPTIMIZERS[parsed.optimizer_name]
        self._ways = {
            name: Mpidl(part, self._model(), optimizer, **MPIDL[name], bucket_mb=parsed.bucket_mib) for name in names
        }
        self._loops = {
            (samples, name): self._loop(samples, way)
            for samples in dict.fromkeys(size.samples.values())
            for name, way in self._ways.items()
        }

    def _model(self) -> nn.Module:
        """What trains, or waits."""
        model = build_model(self._parsed.model_name)
        return Waiting(model, self._courses) if self._waits else model

    def _loop(self, samples: int, way: Mpidl) -> step.Loop:
        own = cut(samples, self._part.size, self._part.rank)
        batches = Batches(way.module, own, self._part.rank)
        share = own * self._part.size / samples
        return step.Loop(self._part, way, batches, self._parsed.iterations, share=share)

    def warm_up(self) -> None:
        """See that all strategies train alike, and let buckets find their size."""
        samples = next(iter(self._size.samples.values()))
        loops = {name: self._loops[samples, name] for name in self._ways}
        if not self._waits:
            step.check(self._part, loops)
        for name, loop in loops.items():
            while not self._ways[name].manager.is_settled:
                loop.iterate()
        self._rest()

    def rows(self) -> list[Row]:
        """Time all loops in turn."""
        keys = {f"{name}, {samples} samples": (samples, name) for samples, name in self._loops}
        loops = {text: self._loops[key] for text, key in keys.items()}
        timings = time_in_turn(self._part, loops, self._parsed.repeats, after=self._rest)
        of_loops = {key: timings[text].divided(self._parsed.iterations) for text, key in keys.items()}
        phases = {key: step.mean_phases(self._part, loop) for key, loop in self._loops.items()}
        wire_gbit = _wire_gbit(self._part, self._parsed.wire_gbit)
        return [
            self._row(mode, name, of_loops[samples, name], wire_gbit) | {"phases": phases[samples, name]}
            for mode, samples in self._size.samples.items()
            for name in self._ways
        ]

    def _rest(self) -> None:
        """Complete what is under way."""
        for way in self._ways.values():
            way.manager.wait()

    def _row(self, mode: str, name: str, timing: Timing, wire_gbit: float | None) -> Row:
        manager, part, parsed = self._ways[name].manager, self._part, self._parsed
        settings, samples = MPIDL[name], self._size.samples[mode]
        _, batch = self._size.batches(mode)
        compute_s = seconds_of(self._courses[batch])
        num_bytes = limits.FLOAT_BYTES * manager.layout.size
        wire_s = None
        if wire_gbit is not None:
            narrow = 2 if WIRES[settings["wire"]].rounds else 1
            wire_s = limits.wire_bytes(part, manager.layout.size) / narrow / (1e9 / 8 * wire_gbit)
        return row(
            part, mode, name, seconds=timing.seconds, spread=timing.spread, cpu_seconds=timing.cpu_seconds,
            limit_seconds=max(compute_s, wire_s or 0.0), bytes=num_bytes, model=parsed.model_name,
            optimizer=parsed.optimizer_name, strategy=settings["reduction"], wire=settings["wire"],
            bucket_bytes=manager.bucket_bytes, batch=batch, global_batch=samples,
            samples_per_s=samples / timing.seconds, compute_seconds=compute_s, is_waited=self._waits,
            exposed_seconds=timing.seconds - compute_s, wire_gbit=wire_gbit, wire_limit_seconds=wire_s,
        )  # fmt: skip

    def close(self) -> None:
        """Let models and batches go."""
        for loop in self._loops.values():
            loop.close()


def _wire_gbit(part: World, given: float | None) -> float | None:
    """Gbit/s of a node's link, given or measured; None on one node. Collective."""
    if part.num_nodes == 1:
        return None
    return given or limits.wire_bandwidth(part) * 8 / 1e9


def _compute_rows(world: World, parsed: argparse.Namespace, courses: Courses) -> list[Row]:
    """What one rank needs alone, for each batch size."""
    return [
        row(
            world, scaling_report.COMPUTE, "alone", ranks=1, nodes=1, seconds=seconds_of(course), batch=batch,
            model=parsed.model_name, forward_seconds=sum(layer.forward_s for layer in course),
            backward_seconds=sum(layer.backward_s for layer in course),
            layers=[dataclasses.asdict(layer) for layer in course],
        )
        for batch, course in courses.items()
    ]  # fmt: skip
