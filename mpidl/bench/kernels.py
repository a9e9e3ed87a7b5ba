"""`mpidl bench kernels`: the sums of one rank, per byte moved, beside NumPy, torch and a plain copy.

The sum of k rows of N float32 reads k rows and writes one: 4 N (k + 1) bytes. The limit is what a plain copy takes for
as many, in turn with the ways. mpidl's kernel divides the sum and adds up its squares in the same pass; the others only
add. Rank 0 works, the others wait.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.bench import limits
from mpidl.bench.measuring import Timed, Timing, time_in_turn
from mpidl.bench.report import Report, Row, Table, milliseconds, row, spread
from mpidl.errors import DisagreementError
from mpidl.parameters import Addends
from mpidl.runtime import World

Float32Array = NDArray[np.float32]

NUM_ROWS = (2, 3, 4, 8)
_CHECKED_SIZE = 3 * kernels.BLOCK_SIZE + 5
_TOLERANCE = 1e-6
_COPY = "copy"


def mpidl_sum(rows: Sequence[Float32Array], out: Float32Array) -> Callable[[], None]:
    """The kernel of the manager, adding in the fixed tree."""
    addresses = np.array([each.ctypes.data for each in rows], dtype=np.int64)
    addends = Addends.of_all(len(rows))
    squares = np.empty(-(-out.size // kernels.BLOCK_SIZE))
    return lambda: kernels.mean_rows(addresses, addends.steps, 1.0, out, squares)


def numpy_sum(rows: Sequence[Float32Array], out: Float32Array) -> Callable[[], None]:
    """np.add of two rows, then of each further one."""

    def run() -> None:
        np.add(rows[0], rows[1], out=out)
        for other in rows[2:]:
            np.add(out, other, out=out)

    return run


def torch_sum(rows: Sequence[Float32Array], out: Float32Array) -> Callable[[], None]:
    """torch.add of two rows, then of each further one."""
    tensors, total = [torch.from_numpy(each) for each in rows], torch.from_numpy(out)

    def run() -> None:
        torch.add(tensors[0], tensors[1], out=total)
        for other in tensors[2:]:
            total.add_(other)

    return run


WAYS: dict[str, Callable[[Sequence[Float32Array], Float32Array], Callable[[], None]]] = {
    "mpidl": mpidl_sum,
    "numpy": numpy_sum,
    "torch": torch_sum,
}


class Sum:
    """One way to add rows into `out`."""

    def __init__(self, way: str, rows: Sequence[Float32Array], out: Float32Array) -> None:
        self.run = WAYS[way](rows, out)

    def prepare(self) -> None:
        """Nothing."""


class Idle:
    """What the other ranks do."""

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> None:
        """Nothing."""


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Check that all ways add right, and time them on rank 0. Collective.

    Raises:
        DisagreementError: a sum is not the expected one.
    """
    size = max(1, round(1e6 * parsed.millions))
    names = [_COPY, *map(_name, itertools.product(WAYS, NUM_ROWS))]
    if world.rank == 0:
        check()
        ways = _ways(world, size)
    else:
        ways = dict.fromkeys(names, Idle())
    timings = time_in_turn(world, ways, parsed.repeats)
    copy_s = timings[_COPY].seconds
    rows = [_row(world, f"copy, {parsed.millions:g} million", _COPY, timings[_COPY], 2, size, copy_s)]
    for num_rows, way in itertools.product(NUM_ROWS, WAYS):
        case = f"sum of {num_rows} rows, {parsed.millions:g} million"
        rows.append(_row(world, case, way, timings[_name((way, num_rows))], num_rows + 1, size, copy_s))
    return Report(rows, [_table(rows)], [])


def check() -> None:
    """Compare every way with float64, in small.

    Raises:
        DisagreementError: a way's sum is wrong.
    """
    for way, num_rows in itertools.product(WAYS, NUM_ROWS):
        generator = np.random.default_rng(num_rows)
        rows = [generator.random(_CHECKED_SIZE, np.float32) for _ in range(num_rows)]
        expected = np.sum(rows, axis=0, dtype=np.float64)
        out = np.full(_CHECKED_SIZE, np.nan, np.float32)
        WAYS[way](rows, out)()
        error = float(np.max(np.abs(out - expected)))
        if not error <= num_rows * _TOLERANCE:
            raise DisagreementError(f"{way}'s sum of {num_rows} rows is {error:.3g} from float64's; it adds wrongly")


def _name(sum_of: tuple[str, int]) -> str:
    way, num_rows = sum_of
    return f"{way}, {num_rows} rows"


def _ways(world: World, size: int) -> Mapping[str, Timed]:
    most = [np.ones(size, np.float32) for _ in range(max(NUM_ROWS))]
    out = np.zeros(size, np.float32)
    sums = {_name((way, n)): Sum(way, most[:n], out) for way, n in itertools.product(WAYS, NUM_ROWS)}
    return {_COPY: limits.Copy(world, 2.0 * limits.FLOAT_BYTES * size * world.local_size), **sums}


def _row(world: World, case: str, way: str, timing: Timing, vectors: int, size: int, copy_s: float) -> Row:
    num_bytes, limit_s = vectors * limits.FLOAT_BYTES * size, copy_s * vectors / 2
    return row(
        world, case, way, seconds=timing.seconds, spread=timing.spread, limit_seconds=limit_s, bytes=num_bytes,
        gb_per_s=num_bytes / timing.seconds / 1e9, of_copy=limit_s / timing.seconds,
    )  # fmt: skip


def _table(rows: Sequence[Row]) -> Table:
    texts = [
        (
            r["case"], r["way"], milliseconds(r["seconds"]), spread(r["spread"]), f"{r['gb_per_s']:.1f}",
            f"{100 * r['of_copy']:.0f} %",
        )
        for r in rows
    ]  # fmt: skip
    return Table("bench kernels, on one rank", ("case", "way", "ms", "quartiles", "GB/s", "of copy"), texts)
