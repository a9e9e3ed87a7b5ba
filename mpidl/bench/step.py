"""`mpidl bench step`: whole iterations of a model on random images, and where their time goes.

Compute alone is plain torch training on every rank at the same time, its local update included, without any exchange.
*Exposed* is what an iteration takes longer than that, *more CPU* the processor time of a rank (all its threads) beyond
that of compute alone. The limit is compute alone, or what the wire between nodes needs, whichever is more.

All ways start from the same weights, and see the same batches and the same random numbers in the same iterations. The
losses of their first iterations must agree, the first to five digits, or to 5 % where what travels is rounded.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mpidl.bench import gloo, horovod, limits, report
from mpidl.bench.cases import OPTIMIZERS, SEED, batch_for, build_model, chosen
from mpidl.bench.measuring import Timing, time_in_turn
from mpidl.bench.report import Report, Row, Table, milliseconds, row, spread
from mpidl.bench.step_ways import ALONE, PHASES, ROUNDING, WAYS, Alone, Clock, Way
from mpidl.errors import DisagreementError
from mpidl.losses import WithAuxiliary
from mpidl.runtime import World, on_all_ranks

_CHECKED_ITERATIONS = 5
_LOSS = WithAuxiliary(torch.nn.functional.cross_entropy)
_FIVE_DIGITS = 2e-5
_GROWTH = 3
"""From one iteration to the next: a deep net's training amplifies what another order of additions has rounded."""
_ROUNDED = 5e-2


class Loop:
    """The iterations of one way, one after the other."""

    def __init__(self, world: World, way: Way, batch: tuple[Tensor, Tensor], iterations: int) -> None:
        self.way = way
        self.phases: list[dict[str, float]] = []
        """Seconds by phase of every `run`, of one iteration."""
        self._rank, self._batch, self._iterations = world.rank, batch, iterations
        self._clock = Clock()
        self._iteration = 0

    def iterate(self) -> float:
        """One iteration; returns this rank's loss."""
        # The same dropout in every way, another one on each rank and in each iteration.
        torch.manual_seed(SEED + 1_000_003 * self._rank + self._iteration)
        self._iteration += 1
        images, classes = self._batch
        self._clock.start()
        loss = _LOSS(self.way.module(images), classes)
        self._clock.lap("forward")
        loss.backward()
        self._clock.lap("backward")
        self.way.finish(self._clock)
        return float(loss.detach())

    def prepare(self) -> None:
        """Get the way ready, and forget the phases of iterations that are not timed."""
        self.way.prepare()
        self._clock.take()

    def run(self) -> None:
        """So many iterations."""
        for _ in range(self._iterations):
            self.iterate()
        self.way.end()
        self.phases.append({phase: s / self._iterations for phase, s in self._clock.take().items()})


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Check that all ways train alike, and time them. Collective.

    Raises:
        ConfigError: on every rank: unknown ways or models.
        DisagreementError: on every rank: the losses differ.
    """
    optimizer = OPTIMIZERS[parsed.optimizer_name]
    with world.agreed("choosing ways and model"):
        names = chosen(parsed.ways, WAYS, horovod.unusable())
        model = build_model(parsed.model_name)
    batch = batch_for(model, parsed.batch, world.rank)
    size = sum(parameter.numel() for parameter in model.parameters())
    with gloo.group(world):
        loops = {ALONE: Loop(world, Alone(world, model, optimizer), batch, parsed.iterations)}
        for name in names:
            way = WAYS[name](world, build_model(parsed.model_name), optimizer)
            loops[name] = Loop(world, way, batch, parsed.iterations)
        check(world, loops)
        timings = time_in_turn(world, loops, parsed.repeats, after=horovod.stop)
        wire_s = limits.wire_seconds(world, size, parsed.wire_gbit)
        rows = _rows(world, parsed, size, loops, {n: t.divided(parsed.iterations) for n, t in timings.items()}, wire_s)
        for loop in loops.values():
            loop.way.close()
        loops.clear()
    notes = [] if wire_s is None else [f"wire limit {milliseconds(wire_s)} ms: {limits.WIRE_FORMULA}"]
    return Report(rows, [_table(rows), _phase_table(rows)], notes)


def check(world: World, loops: Mapping[str, Loop]) -> None:
    """Run the first iterations of every way and compare the mean losses of all ranks. Collective.

    Compute alone has no common weights after the first update: its first loss is compared only.

    Raises:
        DisagreementError: on every rank, with both traces.
    """
    own = np.empty((len(loops), _CHECKED_ITERATIONS))
    for index, loop in enumerate(loops.values()):
        loop.prepare()
        own[index] = [loop.iterate() for _ in range(_CHECKED_ITERATIONS)]
        horovod.stop()
    traces = dict(zip(loops, (world.allreduce(own) / world.size).tolist(), strict=True))
    first = next((name for name in loops if name != ALONE), ALONE)
    for name, trace in traces.items():
        pairs = list(zip(trace, traces[first], strict=True))[: 1 if name == ALONE else None]
        tolerance = _ROUNDED if name in ROUNDING else _FIVE_DIGITS
        if not all(math.isclose(*pair, rel_tol=tolerance * _GROWTH**i) for i, pair in enumerate(pairs)):
            told = [" ".join(f"{loss:.6g}" for loss in losses) for losses in zip(*pairs, strict=True)]
            raise on_all_ranks(
                DisagreementError(
                    f"the first losses of {name} are {told[0]}, those of {first} {told[1]}; they must agree to "
                    f"{tolerance:.0e}, each to {_GROWTH} times as much as the one before, or the two do not do the "
                    "same work"
                )
            )


def _rows(
    world: World,
    parsed: argparse.Namespace,
    size: int,
    loops: Mapping[str, Loop],
    timings: Mapping[str, Timing],
    wire_s: float | None,
) -> list[Row]:
    alone = timings[ALONE]
    limit_s = max(alone.seconds, wire_s or 0.0)
    first = report.baseline([name for name in loops if name != ALONE])
    case = f"{parsed.model_name}, batch {parsed.batch} a rank, {parsed.optimizer_name}"
    return [
        row(
            world, case, name, seconds=timing.seconds, spread=timing.spread, limit_seconds=limit_s,
            bytes=limits.FLOAT_BYTES * size, wire_limit_seconds=wire_s, cpu_seconds=timing.cpu_seconds,
            images_per_s=parsed.batch * world.size / timing.seconds, baseline=first,
            times_baseline=timing.seconds / timings[first].seconds, times_alone=timing.seconds / alone.seconds,
            exposed_seconds=timing.seconds - alone.seconds,
            more_cpu_seconds=timing.cpu_seconds - alone.cpu_seconds, phases=_mean_phases(world, loops[name]),
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _mean_phases(world: World, loop: Loop) -> dict[str, float]:
    """Medians over repetitions, the first one left out, averaged over ranks. Collective."""
    own = np.median([[run[phase] for phase in PHASES] for run in loop.phases[1:]], axis=0)
    return dict(zip(PHASES, (world.allreduce(own) / world.size).tolist(), strict=True))


def _table(rows: Sequence[Row]) -> Table:
    title = report.title("step", rows[0])
    headers = ("way", "ms", "quartiles", "images/s", "x alone", "ratio", "exposed ms", "more CPU ms")
    texts = [
        (
            r["way"], milliseconds(r["seconds"]), spread(r["spread"]), f"{r['images_per_s']:,.1f}",
            f"{r['times_alone']:.3f}", f"{r['times_baseline']:.3f}", milliseconds(r["exposed_seconds"]),
            milliseconds(r["more_cpu_seconds"]),
        )
        for r in rows
    ]  # fmt: skip
    return Table(title, headers, texts)


def _phase_table(rows: Sequence[Row]) -> Table:
    texts = [(r["way"], *[milliseconds(r["phases"][phase]) for phase in PHASES]) for r in rows]
    return Table("phases of an iteration, ms", ("way", *PHASES), texts)
