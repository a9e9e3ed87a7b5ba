"""What a rank keeps, way by way: weights, gradients and optimizer state of VGG-16 with Adam.

Reckoned from sizes, and measured as the growth of the process's proportional set size: what is its own, and of what
processes share its part.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpidl.bench import horovod
from mpidl.bench.cases import OPTIMIZERS, Exchanged, shapes_of_model
from mpidl.bench.exchange_ways import WAYS, RankBytes
from mpidl.bench.report import Row, Table, mib, row
from mpidl.runtime import World

_MODEL, _OPTIMIZER = "vgg16_32", "adam"


def measure(world: World, names: Sequence[str]) -> list[Row]:
    """Make each way alone, let it do two steps, and see how much the process has grown. Collective."""
    shapes, optimizer = shapes_of_model(_MODEL), OPTIMIZERS[_OPTIMIZER]
    exchanged = Exchanged.of(_MODEL, shapes, optimizer, world.rank)
    rows = []
    for name in names:
        before = _mean_size(world)
        way = WAYS[name](world, exchanged)
        for _ in range(2):
            way.prepare()
            world.barrier()
            way.run()
        own = way.kept()
        parts = np.array([own.weights, own.gradients, own.state])
        after, kept = _mean_size(world), RankBytes(*(world.allreduce(parts) / world.size).tolist())
        rows.append(
            row(
                world, f"kept by a rank: {exchanged.name}", name, bytes=kept.total, weights_bytes=kept.weights,
                gradients_bytes=kept.gradients, state_bytes=kept.state,
                measured_bytes=None if before is None or after is None else after - before,
            )
        )  # fmt: skip
        way.close()
        del way
        horovod.stop()
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows of `measure` for people."""
    columns = ("weights_bytes", "gradients_bytes", "state_bytes", "bytes", "measured_bytes")
    texts = [(r["way"], *[mib(r[column]) for column in columns]) for r in rows]
    return Table(f"{rows[0]['case']}, MiB", ("way", "weights", "gradients", "state", "reckoned", "measured"), texts)


def _mean_size(world: World) -> float | None:
    """The ranks' mean proportional set size in bytes; None where the system does not tell (not Linux). Collective."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps what the way before has freed
        libc.malloc_trim(0)
    world.barrier()
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        own = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        own = float("nan")
    mean = float(world.allreduce(np.array([own]))[0]) / world.size
    world.barrier()
    return None if np.isnan(mean) else mean
