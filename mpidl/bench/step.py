"""`mpidl bench step`: whole iterations of a model on random samples, and where their time goes.

Compute alone is plain torch training on every rank at the same time, its local update included, without any exchange;
one process is the same on rank 0 while the others wait.
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

from mpidl.bench import gloo, horovod, limits, report
from mpidl.bench.cases import OPTIMIZERS, SEED, Batches, build_model, chosen
from mpidl.bench.measuring import Timing, time_in_turn
from mpidl.bench.report import Report, Row, Table, mib, milliseconds, row, spread
from mpidl.bench.step_ways import (
    ALONE,
    LOCAL_SUM,
    ONE,
    ORDERED,
    PHASES,
    ROUNDING,
    WAYS,
    Alone,
    Clock,
    MakesWay,
    Way,
    num_elements,
)
from mpidl.errors import DisagreementError
from mpidl.losses import WithAuxiliary
from mpidl.runtime import World, on_all_ranks

_CHECKED_ITERATIONS = 5
LOSS = WithAuxiliary(torch.nn.functional.cross_entropy)
_FIVE_DIGITS = 2e-5
_GROWTH = 3
"""From one iteration to the next: a deep net's training amplifies what another order of additions has rounded."""
_ROUNDED = 5e-2


class Loop:
    """The iterations of one way, one after the other.

    Args:
        world: all ranks.
        way: what is trained how.
        batches: of this rank.
        iterations: in one `run`.
        num_ranks: how many of the ranks run; default: all.
        share: what this rank's mean loss is multiplied by: where ranks have batches of different sizes, its batch's
            size to the mean one.
    """

    def __init__(
        self,
        world: World,
        way: Way,
        batches: Batches,
        iterations: int,
        num_ranks: int | None = None,
        share: float = 1.0,
    ) -> None:
        self.way = way
        self.num_ranks = world.size if num_ranks is None else num_ranks
        self.phases: list[dict[str, float]] = []
        """Seconds by phase of every `run`, of one iteration."""
        self._rank, self._batches, self._iterations, self._share = world.rank, batches, iterations, share
        self._clock = Clock()
        self._iteration = 0

    def iterate(self) -> float:
        """One iteration; returns this rank's loss."""
        # The same dropout in every way, another one on each rank and in each iteration.
        torch.manual_seed(SEED + 1_000_003 * self._rank + self._iteration)
        self._iteration += 1
        self._clock.start()
        inputs, targets = self._batches.next()
        self._clock.lap("data")
        loss = LOSS(self.way.module(inputs), targets)
        self._clock.lap("forward")
        (loss * self._share).backward()
        self._clock.lap("backward")
        self.way.finish(self._clock)
        return float(loss.detach())

    def prepare(self) -> None:
        """Iterate once, untimed, so that the run begins, as it ends, with weights under way."""
        self.way.prepare()
        if self._rank < self.num_ranks:
            self.iterate()
        self._clock.take()

    def run(self) -> None:
        """So many iterations. What is under way in the end is completed by `rest`."""
        if self._rank < self.num_ranks:
            for _ in range(self._iterations):
                self.iterate()
        self.phases.append({phase: s / self._iterations for phase, s in self._clock.take().items()})

    def rest(self) -> None:
        """Complete what is under way, so that nothing of it falls into another loop's time."""
        if self._rank < self.num_ranks:
            self.way.end()

    def close(self) -> None:
        """Let way and batches go. Collective."""
        self.way.close()
        self._batches.close()


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
    size = num_elements(model)
    with gloo.group(world):

        def loop(make: MakesWay, num_ranks: int = world.size) -> Loop:
            way = make(world, build_model(parsed.model_name), optimizer)
            return Loop(world, way, Batches(model, parsed.batch, world.rank), parsed.iterations, num_ranks)

        loops = {ALONE: loop(Alone)} | ({ONE: loop(Alone, num_ranks=1)} if world.size > 1 else {})
        loops |= {name: loop(WAYS[name]) for name in names}
        check(world, loops)

        def rest() -> None:
            for each in loops.values():
                each.rest()
            horovod.stop()

        timings = time_in_turn(world, loops, parsed.repeats, after=rest)
        wire_s = limits.wire_seconds(world, size, parsed.wire_gbit)
        rows = _rows(world, parsed, size, loops, {n: t.divided(parsed.iterations) for n, t in timings.items()}, wire_s)
        for each in loops.values():
            each.close()
        loops.clear()
    notes = [] if wire_s is None else [f"wire limit {milliseconds(wire_s)} ms: {limits.WIRE_FORMULA}"]
    return Report(rows, [_table(rows), _cost_table(rows), _phase_table(rows)], notes)


def check(world: World, loops: Mapping[str, Loop]) -> None:
    """Run the first iterations of every way and compare the mean losses of all ranks. Collective.

    Without an exchange there are no common weights after the first update: then the first losses only are compared.

    Raises:
        DisagreementError: on every rank, with both traces.
    """
    own = np.empty((len(loops), _CHECKED_ITERATIONS))
    for index, loop in enumerate(loops.values()):
        loop.way.prepare()
        own[index] = [loop.iterate() for _ in range(_CHECKED_ITERATIONS)]
        loop.rest()
        horovod.stop()
    traces = dict(zip(loops, (world.allreduce(own) / world.size).tolist(), strict=True))
    first = next((name for name in loops if name not in (ALONE, ONE)), ALONE)
    for name, trace in traces.items():
        pairs = list(zip(trace, traces[first], strict=True))[: 1 if name in (ALONE, ONE) else None]
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
    # Of those that run, while the others sleep.
    timings = {n: t.with_cpu_of(loops[n].num_ranks / world.size) for n, t in timings.items()}
    alone = timings[ALONE]
    limit_s = max(alone.seconds, wire_s or 0.0)
    first = report.baseline([name for name in loops if name not in (ALONE, ONE)])
    case = f"{parsed.model_name}, batch {parsed.batch} a rank, {parsed.optimizer_name}"
    return [
        row(
            world, case, name, seconds=timing.seconds, spread=timing.spread, limit_seconds=limit_s,
            bytes=loops[name].way.sent_bytes, wire_limit_seconds=wire_s, cpu_seconds=timing.cpu_seconds,
            samples_per_s=parsed.batch * loops[name].num_ranks / timing.seconds, baseline=first,
            times_baseline=timing.seconds / timings[first].seconds, times_limit=timing.seconds / limit_s,
            times_alone=timing.seconds / alone.seconds,
            exposed_seconds=timing.seconds - alone.seconds, more_cpu_seconds=timing.cpu_seconds - alone.cpu_seconds,
            phases=mean_phases(world, loops[name]), ranks=loops[name].num_ranks,
            nodes=1 if name == ONE else world.num_nodes, **_speeds(world, parsed, size, name, loops[name]),
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def mean_phases(world: World, loop: Loop, phases: Sequence[str] = PHASES) -> dict[str, float]:
    """Seconds of an iteration: medians over repetitions, averaged over the ranks that run. Collective.

    The first repetition is left out.
    """
    own = np.median([[run[phase] for phase in phases] for run in loop.phases[1:]], axis=0)
    return dict(zip(phases, (world.allreduce(own) / loop.num_ranks).tolist(), strict=True))


def _speeds(world: World, parsed: argparse.Namespace, size: int, name: str, loop: Loop) -> dict[str, float]:
    """Bytes a second that a rank's sums and its optimizer read and write, of `ORDERED` on one node. Collective.

    A rank reads the rows of all ranks over its shard and writes their sum; the optimizer reads that, and reads and
    writes weights and states. (What is in cache counts as well: bytes by seconds are what the simulation wants.)
    """
    seconds = mean_phases(world, loop, (LOCAL_SUM, "update"))
    if name != ORDERED or world.num_nodes > 1 or min(seconds.values()) <= 0:
        return {}
    own_bytes = limits.FLOAT_BYTES * size / world.size
    update_bytes = (3 + 2 * OPTIMIZERS[parsed.optimizer_name].num_states) * own_bytes
    return {
        "sum_bytes_per_s": (world.size + 1) * own_bytes / seconds[LOCAL_SUM],
        "update_bytes_per_s": update_bytes / seconds["update"],
    }


def _table(rows: Sequence[Row]) -> Table:
    title = report.title("step", rows[0])
    headers = ("way", "ms", "quartiles", "samples/s", "x limit", "ratio")
    texts = [
        (
            r["way"], milliseconds(r["seconds"]), spread(r["spread"]), f"{r['samples_per_s']:,.1f}",
            f"{r['times_limit']:.3f}", f"{r['times_baseline']:.3f}",
        )
        for r in rows
    ]  # fmt: skip
    return Table(title, headers, texts)


def _cost_table(rows: Sequence[Row]) -> Table:
    headers = ("way", "exposed ms", "more CPU ms", "MiB sent")
    texts = [
        (r["way"], milliseconds(r["exposed_seconds"]), milliseconds(r["more_cpu_seconds"]), mib(r["bytes"]))
        for r in rows
        if r["way"] not in (ALONE, ONE)
    ]
    return Table("what the exchange adds to a rank's iteration", headers, texts)


def _phase_table(rows: Sequence[Row]) -> Table:
    texts = [(r["way"], *[milliseconds(r["phases"][phase]) for phase in PHASES]) for r in rows]
    return Table("phases of an iteration, ms", ("way", *PHASES), texts)
