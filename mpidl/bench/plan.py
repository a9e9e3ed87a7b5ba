"""`mpidl bench plan`: what it costs to tell ranks what to compute; group plans beside a centralised scheduler.

The compute is left out, or replaced by waits whose time is taken off again; *share* is of an iteration of a given
length. mpidl's way is `control.py`, the other one `central.py`. What is told is the median over repetitions of the
slowest rank's time. How it grows with ranks takes several runs, whose figures `--with` joins; a model fitted to all of
them (`cost_model.py`) says what it would be on 1,000 and 10,000 ranks.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpidl.bench import cost_model, curves, plan_tables
from mpidl.bench.central import Central
from mpidl.bench.control import ControlOnly, Groups
from mpidl.bench.cost_model import Models
from mpidl.bench.measuring import quartiles, time_in_turn
from mpidl.bench.pieces import Entries, Messages
from mpidl.bench.report import Report, Row, row
from mpidl.errors import ConfigError
from mpidl.runtime import World
from mpidl.runtime.threads import own_cores

GROUP_SIZE, PARTITIONS = 50, 256
"""Where both are compared."""
MESSAGE_BYTES, RANKS_IN_PLAN = (2**10, 2**16, 2**20), (10, 10_000)
LARGE_JOBS = (1_000, 10_000)
_NUM_GROUPS, _NUM_TASKS = 20, 2048
_NUM_GROUPS_OF_WAITS, _ITERATIONS_OF_WAITS = 2, 3
MODEL = "model"
"""The case of rows that were not measured."""
_NEEDED = {"case", "way", "ranks", "seconds", "bytes", "group_size", "partitions", "ranks_per_core", "entries"}

Way = Groups | Central | Messages | Entries


class Taken:
    """A way, and what each of its runs took."""

    def __init__(self, way: Way) -> None:
        self.way, self.prepare = way, way.prepare
        self.seconds: list[tuple[float, float]] = []
        """Of each run: seconds, and this rank's waits among them."""

    def run(self) -> None:
        """Run it."""
        self.way.run()
        self.seconds.append(self.way.take())


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Time both, join what was measured earlier, and fit the model. Collective.

    Raises:
        ConfigError: on every rank: files that are none of this benchmark's, fewer partitions than ranks.
    """
    earlier: list[Row] = []
    with world.agreed("reading earlier figures"):
        partitions = _at_least(world.size, parsed.partition_counts)
        if world.rank == 0:
            earlier = [row for file in parsed.with_files for row in read_rows(Path(file))]
    joined = [_shared(row, parsed) for row in world.broadcast_object(earlier)]
    at = compared(parsed.group_sizes, partitions)
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) if world.rank == 0 else None
        trainers = [ControlOnly(world, number, events) for number in partitions]
        ways = [Taken(way) for way in _make_ways(world, parsed, trainers, at)]
        time_in_turn(world, {str(index): way for index, way in enumerate(ways)}, parsed.repeats)
        for trainer in trainers:
            trainer.close()
    rows = _rows(world, parsed, ways)
    joined = sorted([*joined, *rows], key=lambda row: (row["ranks"], row["partitions"] or 0, row["group_size"] or 0))
    models = Models.of(joined)
    said = [] if models is None else [_shared(row, parsed) for row in predictions(models, at[0])]
    return Report(
        [*rows, *said],
        plan_tables.tables(joined, said, at),
        plan_tables.notes(parsed, models),
        draw=functools.partial(curves.draw, joined=joined, compared=at),
    )


def _shared(row: Row, parsed: argparse.Namespace) -> Row:
    """A row with its share of the iteration that this run is asked about."""
    return row | {"share": 1e3 * row["seconds"] / parsed.iteration_ms, "iteration_seconds": parsed.iteration_ms / 1e3}


def compared(group_sizes: Sequence[int], partitions: Sequence[int]) -> tuple[int, int]:
    """The group size and the number of partitions at which the others are varied: the usual ones, else the largest."""
    usual = ((group_sizes, GROUP_SIZE), (partitions, PARTITIONS))
    first, second = (number if number in given else max(given) for given, number in usual)
    return first, second


def _at_least(num_ranks: int, partitions: Sequence[int]) -> list[int]:
    """Those numbers of partitions of which every rank gets one."""
    fitting = [number for number in partitions if number >= num_ranks]
    if not fitting:
        raise ConfigError(f"{num_ranks} ranks but at most {max(partitions)} partitions; give --partitions more")
    return fitting


def _make_ways(
    world: World, parsed: argparse.Namespace, trainers: Sequence[ControlOnly], at: tuple[int, int]
) -> Iterator[Way]:
    """Those of mpidl at every group size and at every number of partitions, the other one, and pieces for the model."""
    wait_s = parsed.iteration_ms / 1e3 if parsed.waits else 0.0
    num_groups = _NUM_GROUPS_OF_WAITS if parsed.waits else _NUM_GROUPS
    group_size, partitions = at
    for trainer in trainers:
        for size in parsed.group_sizes:
            if size == group_size or trainer.partitions == partitions:
                yield Groups(trainer, size, num_groups, wait_s)
        number = trainer.partitions
        yield Central(world, number, _ITERATIONS_OF_WAITS if parsed.waits else max(3, _NUM_TASKS // number), wait_s)
    for num_bytes in MESSAGE_BYTES:
        yield Messages(world, num_bytes)
    for num_ranks in RANKS_IN_PLAN:
        yield Entries(num_ranks)


def _rows(world: World, parsed: argparse.Namespace, ways: Sequence[Taken]) -> list[Row]:
    """What was measured, the same on all ranks. Collective."""
    slowest = world.allreduce(np.array([way.seconds for way in ways]), "max")[:, 1:]  # the first run warms up
    num_bytes = world.allreduce(np.array([float(way.way.num_bytes) for way in ways]), "max")  # central's rank 0 counts
    crowd = _ranks_per_core(world)
    rows = []
    for way, size, (wall, waits) in zip([w.way for w in ways], num_bytes, slowest.transpose(0, 2, 1), strict=True):
        seconds, spread = quartiles((wall - waits) / way.iterations)
        made = row(
            world, way.case, way.name, seconds=seconds, spread=spread, bytes=float(size), partitions=way.partitions,
            group_size=way.group_size, calls_per_group=way.calls_per_group, ranks_per_core=crowd, waits=parsed.waits,
            entries=way.num_ranks if isinstance(way, Entries) else None,
        )  # fmt: skip
        rows.append(_shared(made, parsed))
    return rows


def _ranks_per_core(world: World) -> float:
    """How many ranks share a core, at least 1; of the fullest node. Collective."""
    cores = {core for others in world.node_allgather_object(own_cores()) for core in others}
    return float(world.allreduce(np.array([max(1.0, world.local_size / len(cores))]), "max")[0])


def predictions(models: Models, group_size: int) -> list[Row]:
    """What the models say of large jobs."""
    rows: list[Row] = []
    for ranks in LARGE_JOBS:
        of_plans = models.group.seconds(cost_model.terms_of_group(ranks, group_size)) / group_size
        of_tasks = models.central.seconds(cost_model.terms_of_tasks(ranks))
        for way, seconds, size in (("mpidl", of_plans, group_size), ("central", of_tasks, None)):
            empty = dict.fromkeys(("nodes", "spread", "limit_seconds", "bytes"))
            found = {"case": MODEL, "way": way, "ranks": ranks, "partitions": ranks, "seconds": seconds}
            rows.append(empty | found | {"group_size": size})
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows that were measured by an earlier run.

    Raises:
        ConfigError: the file cannot be read, or is not this benchmark's.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--with {path} cannot be read: {error}") from None
    rows = document.get("rows") if isinstance(document, dict) and document.get("bench") == "plan" else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _NEEDED for row in rows):
        raise ConfigError(f"--with {path} is no file that `mpidl bench plan --json` wrote; give one of those")
    return [row for row in rows if row["case"] != MODEL]
