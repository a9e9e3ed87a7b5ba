"""`mpidl bench balance`: iterations with one slow rank, partitions staying and moving.

Two ways to make the last rank slow: with `--slow wait` all ranks wait in place of computing, the last one `--factor`
times as long; with `--slow busy` each rank computes on a core of its own, which the last one shares with a process that
never rests. The limit is the time of the slowest rank when partitions are spread in the best way for the speeds that
the ranks report in the same groups, so without the exchange.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpidl.bench.report import Report, Row, Table, milliseconds, row, spread
from mpidl.errors import ConfigError
from mpidl.runtime import World
from mpidl.scheduling import best_counts
from mpidl.telemetry import Telemetry
from mpidl.trainer import Trainer

WAIT_S = 0.002
"""Of a sample."""

_SETTLED = 3
"""Groups that are not timed: in them the coordinator learns and moves."""

_GROUP_SIZE = 10
_SAMPLES = 4
"""Of a partition."""
_WIDTH = 512


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Train with partitions staying and moving. Collective.

    Raises:
        ConfigError: on every rank: one rank only, fewer partitions than ranks, or fewer cores than ranks to share.
    """
    with world.agreed("checking the benchmark"):
        if world.size < 2:
            raise ConfigError("bench balance needs at least 2 ranks; start it with mpirun -n 2")
        if parsed.slow == "busy" and len(os.sched_getaffinity(0)) < world.local_size:
            raise ConfigError(
                f"--slow busy needs a core for each of {world.local_size} ranks, of which it binds them itself (start "
                f"with mpirun -bind-to none); this rank may use {len(os.sched_getaffinity(0))}"
            )
    rows = []
    with _slowed(world, parsed.slow):
        for way in ("stay", "move"):
            rows.append(_row(world, parsed, way, _groups_of(world, parsed, balance=way == "move")))
    table = Table(
        f"bench balance: {rows[0]['case']}, {world.size} ranks on {world.num_nodes} node(s)",
        ("partitions", "ms", "quartiles", "best", "x best", "of each rank"),
        [
            (r["way"], milliseconds(r["seconds"]), spread(r["spread"]), milliseconds(r["limit_seconds"]),
             f"{r['times_limit']:.2f}", " ".join(map(str, r["counts"])))
            for r in rows
        ],
    )  # fmt: skip
    note = f"medians of groups {_SETTLED + 1} to {_SETTLED + parsed.repeats}, of {_GROUP_SIZE} iterations each"
    return Report(rows, [table], [note])


def _groups_of(world: World, parsed: argparse.Namespace, *, balance: bool) -> list[dict[str, Any]]:
    """The "group" events of a run, the same on all ranks. Collective."""
    is_slow = world.rank == world.size - 1
    seconds = WAIT_S * (parsed.factor if is_slow else 1) if parsed.slow == "wait" else 0.0
    batch_size, groups = _SAMPLES * parsed.partitions, _SETTLED + parsed.repeats
    inputs = torch.zeros(batch_size * _GROUP_SIZE * groups, _WIDTH)
    kept = _Kept()
    torch.manual_seed(0)
    trainer = Trainer(
        _Work(seconds),
        nn.functional.mse_loss,
        functools.partial(torch.optim.SGD, lr=0.01),
        batch_size=batch_size,
        partitions=parsed.partitions,
        group_size=_GROUP_SIZE,
        balance=balance,
        telemetry=kept,
    )
    trainer.fit((inputs, inputs), epochs=1)
    trainer.close()
    events: list[dict[str, Any]] = world.broadcast_object(kept.events)
    return [event for event in events if event["event"] == "group"]


def _row(world: World, parsed: argparse.Namespace, way: str, groups: list[dict[str, Any]]) -> Row:
    timed = groups[_SETTLED:]
    each_s = [event["seconds"] / event["iterations"] for event in timed]
    low, median, high = (float(value) for value in np.quantile(each_s, (0.25, 0.5, 0.75)))
    partition_s = _SAMPLES * np.median([event["seconds_per_sample"] for event in timed], axis=0)
    best_s = max(n * s for n, s in zip(best_counts(partition_s, parsed.partitions), partition_s, strict=True))
    even = [parsed.partitions * rank // world.size for rank in range(world.size + 1)]
    starts = next((event["partition_starts"] for event in reversed(groups) if "partition_starts" in event), even)
    case = (
        f"the last rank waits {parsed.factor:g} times as long" if parsed.slow == "wait" else "the last core is shared"
    )
    return row(
        world, case, way, seconds=median, spread=(low, high), limit_seconds=float(best_s),
        times_limit=median / float(best_s),
        counts=[stop - start for start, stop in itertools.pairwise(starts)],
        partition_seconds=partition_s.tolist(), first_groups_seconds=[e["seconds"] for e in groups[:_SETTLED]],
    )  # fmt: skip


class _Kept(Telemetry):
    """Events in a list."""

    def __init__(self) -> None:
        super().__init__(None, quiet=True)
        self.events: list[dict[str, Any]] = []

    def record(self, event: str, **fields: object) -> None:
        self.events.append({"event": event, **fields})


class _Work(nn.Module):
    """Waits for every sample, or computes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.layers = nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH) for _ in range(1 if seconds else 16)])

    def forward(self, inputs: Tensor) -> Tensor:
        """Of (samples, width)."""
        time.sleep(self.seconds * len(inputs))
        outputs: Tensor = self.layers(inputs)
        return outputs


@contextlib.contextmanager
def _slowed(world: World, how: str) -> Iterator[None]:
    """With "busy", bind ranks to cores, and let another process share the last one's."""
    if how != "busy":
        yield
        return
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    own = {cores[world.local_rank]}
    busy = None
    os.sched_setaffinity(0, own)
    if world.rank == world.size - 1:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # inherits the core
    try:
        yield
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
        os.sched_setaffinity(0, before)
