"""`mpidl bench kernels`: the sums and conversions of one rank, per byte moved, beside NumPy, torch and a plain copy.

The sum of k rows of N float32 reads k rows and writes one: 4 N (k + 1) bytes; to or from bfloat16 4 N + 2 N move. The
limit is what a plain copy takes for as many, in turn with the ways. mpidl's kernel divides the sum and adds up its
squares in the same pass; the others only add. All work with `threads_per_rank` threads, but for NumPy, which has one
(`OMP_NUM_THREADS=1` measures one core). Rank 0 works, the others wait.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.bench import limits
from mpidl.bench.measuring import Timed, Timing, time_in_turn
from mpidl.bench.report import Report, Row, Table, milliseconds, row, spread
from mpidl.errors import DisagreementError
from mpidl.parameters import Addends, Helpers, Team
from mpidl.runtime import World

Float32Array = NDArray[np.float32]
WordArray = NDArray[np.uint16]
Run = Callable[[], object]

NUM_ROWS = (2, 3, 4, 8)
_CHECKED_SIZE = 3 * kernels.BLOCK_SIZE + 5
_TOLERANCE = 1e-6
_COPY = "copy"


# --- sums -------------------------------------------------------------------------------------------------------------


def mpidl_sum(team: Team, rows: Sequence[Float32Array], out: Float32Array) -> Run:
    """The kernel of the manager, adding in the fixed tree."""
    addresses = np.array([each.ctypes.data for each in rows], dtype=np.int64)
    addends = Addends.of_all(len(rows))
    squares = np.empty(-(-out.size // kernels.BLOCK_SIZE))

    def work(thread: int, index: int, start: int, stop: int) -> None:
        blocks = slice(start // kernels.BLOCK_SIZE, -(-stop // kernels.BLOCK_SIZE))
        kernels.mean_rows(addresses + 4 * start, addends.steps, 1.0, out[start:stop], squares[blocks])

    return lambda: team.run([out.size], work)


def numpy_sum(team: Team, rows: Sequence[Float32Array], out: Float32Array) -> Run:
    """np.add of two rows, then of each further one."""

    def run() -> None:
        np.add(rows[0], rows[1], out=out)
        for other in rows[2:]:
            np.add(out, other, out=out)

    return run


def torch_sum(team: Team, rows: Sequence[Float32Array], out: Float32Array) -> Run:
    """torch.add of two rows, then of each further one."""
    tensors, total = [torch.from_numpy(each) for each in rows], torch.from_numpy(out)

    def run() -> None:
        torch.add(tensors[0], tensors[1], out=total)
        for other in tensors[2:]:
            total.add_(other)

    return run


WAYS: dict[str, Callable[[Team, Sequence[Float32Array], Float32Array], Run]] = {
    "mpidl": mpidl_sum,
    "numpy": numpy_sum,
    "torch": torch_sum,
}


# --- conversions ------------------------------------------------------------------------------------------------------


def mpidl_round(team: Team, values: Float32Array, words: WordArray) -> Run:
    """The kernel of the wire."""
    return lambda: team.run([words.size], lambda _, __, a, b: kernels.to_bfloat16(values[a:b], words[a:b]))


def mpidl_widen(team: Team, words: WordArray, values: Float32Array) -> Run:
    """The kernel of the wire."""
    return lambda: team.run([words.size], lambda _, __, a, b: kernels.from_bfloat16(words[a:b], values[a:b]))


def numpy_round(team: Team, values: Float32Array, words: WordArray) -> Run:
    """To nearest even by arithmetic on the bits, for numbers only."""
    bits, room = values.view(np.uint32), np.empty(values.size, np.uint32)

    def run() -> None:
        np.right_shift(bits, 16, out=room)
        np.bitwise_and(room, 1, out=room)
        np.add(room, 0x7FFF, out=room)
        np.add(room, bits, out=room)
        np.right_shift(room, 16, out=room)
        np.copyto(words, room, casting="unsafe")

    return run


def numpy_widen(team: Team, words: WordArray, values: Float32Array) -> Run:
    """The words as upper halves."""
    bits = values.view(np.uint32)

    def run() -> None:
        np.copyto(bits, words)
        np.left_shift(bits, 16, out=bits)

    return run


def torch_round(team: Team, values: Float32Array, words: WordArray) -> Run:
    """`.to(torch.bfloat16)`, into memory that is there."""
    source, target = torch.from_numpy(values), torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)
    return lambda: target.copy_(source)


def torch_widen(team: Team, words: WordArray, values: Float32Array) -> Run:
    """`.float()`, into memory that is there."""
    source, target = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16), torch.from_numpy(values)
    return lambda: target.copy_(source)


ROUNDINGS: dict[str, Callable[[Team, Float32Array, WordArray], Run]] = {
    "mpidl": mpidl_round,
    "numpy": numpy_round,
    "torch": torch_round,
}
WIDENINGS: dict[str, Callable[[Team, WordArray, Float32Array], Run]] = {
    "mpidl": mpidl_widen,
    "numpy": numpy_widen,
    "torch": torch_widen,
}


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to do, by each way."""

    name: str
    element_bytes: int
    """Bytes moved for each of N elements."""
    ways: Mapping[str, Run]


class Repeated:
    """One way of one case."""

    def __init__(self, run: Run = lambda: None) -> None:
        self._run = run

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> None:
        """All of it once."""
        self._run()


def measure(world: World, parsed: argparse.Namespace) -> Report:
    """Check that all ways are right, and time them on rank 0. Collective.

    Raises:
        DisagreementError: a result is not the expected one.
    """
    size = max(1, round(1e6 * parsed.millions))
    helpers = Helpers(world.threads_per_rank - 1)
    is_working = world.rank == 0
    if is_working:
        check(Team(helpers))
    cases = list(cases_of(Team(helpers), size if is_working else 1))
    ways: dict[str, Timed] = {_COPY: Repeated()}
    if is_working:
        ways[_COPY] = limits.Copy(world, 2.0 * limits.FLOAT_BYTES * size * world.local_size)
    for case in cases:
        ways |= {_name(case, way): Repeated(run if is_working else lambda: None) for way, run in case.ways.items()}
    timings = time_in_turn(world, ways, parsed.repeats)
    helpers.close()
    suffix = f", {parsed.millions:g} million"
    row_of = functools.partial(_row, world, size=size, copy_s=timings[_COPY].seconds)
    rows = [row_of(f"copy{suffix}", _COPY, timings[_COPY], 2 * limits.FLOAT_BYTES)]
    for case in cases:
        for way in case.ways:
            rows.append(row_of(case.name + suffix, way, timings[_name(case, way)], case.element_bytes))
    return Report(rows, [_table(rows, world.threads_per_rank)], [])


def cases_of(team: Team, size: int) -> Iterator[Case]:
    """All cases over vectors of `size` elements, which they share."""
    rows = [np.ones(size, np.float32) for _ in range(max(NUM_ROWS))]
    out, words = np.zeros(size, np.float32), np.zeros(size, np.uint16)
    for num in NUM_ROWS:
        runs = {way: make(team, rows[:num], out) for way, make in WAYS.items()}
        yield Case(f"sum of {num} rows", limits.FLOAT_BYTES * (num + 1), runs)
    word_bytes = limits.FLOAT_BYTES + words.itemsize
    yield Case("to bfloat16", word_bytes, {way: make(team, rows[0], words) for way, make in ROUNDINGS.items()})
    yield Case("from bfloat16", word_bytes, {way: make(team, words, out) for way, make in WIDENINGS.items()})


def check(team: Team) -> None:
    """Compare every way with float64, in small.

    Raises:
        DisagreementError: a way's result is wrong.
    """
    generator = np.random.default_rng(1)
    rows = [generator.random(_CHECKED_SIZE, np.float32) for _ in range(max(NUM_ROWS))]
    for num_rows in NUM_ROWS:
        expected = np.sum(rows[:num_rows], axis=0, dtype=np.float64)
        for way, make_sum in WAYS.items():
            out = np.full(_CHECKED_SIZE, np.nan, np.float32)
            make_sum(team, rows[:num_rows], out)()
            error = float(np.max(np.abs(out - expected)))
            if not error <= num_rows * _TOLERANCE:
                raise DisagreementError(
                    f"{way}'s sum of {num_rows} rows is {error:.3g} from float64's; it adds wrongly"
                )
    for way in ROUNDINGS:
        _check_conversions(team, way, rows[0])


def _check_conversions(team: Team, way: str, values: Float32Array) -> None:
    words, back = np.zeros(values.size, np.uint16), np.full(values.size, np.nan, np.float32)
    ROUNDINGS[way](team, values, words)()
    exact = (words.astype(np.uint32) << 16).view(np.float32)
    digits = np.exp2(np.floor(np.log2(values.astype(np.float64))) - 7)  # bfloat16 has 8 of them
    error = float(np.max(np.abs(exact - values.astype(np.float64)) / digits))
    if not error <= 0.5:
        raise DisagreementError(f"{way}'s bfloat16 is {error:.3g} digits from float64's; it rounds wrongly")
    WIDENINGS[way](team, words, back)()
    if not np.array_equal(back, exact):
        raise DisagreementError(f"{way}'s float32 of bfloat16 words is not what they hold; it converts wrongly")


def _name(case: Case, way: str) -> str:
    return f"{way}, {case.name}"


def _row(world: World, case: str, way: str, timing: Timing, element_bytes: int, *, size: int, copy_s: float) -> Row:
    num_bytes = element_bytes * size
    limit_s = copy_s * element_bytes / (2 * limits.FLOAT_BYTES)
    return row(
        world, case, way, seconds=timing.seconds, spread=timing.spread, limit_seconds=limit_s, bytes=num_bytes,
        gb_per_s=num_bytes / timing.seconds / 1e9, of_copy=limit_s / timing.seconds,
    )  # fmt: skip


def _table(rows: Sequence[Row], num_threads: int) -> Table:
    texts = [
        (
            r["case"], r["way"], milliseconds(r["seconds"]), spread(r["spread"]), f"{r['gb_per_s']:.1f}",
            f"{100 * r['of_copy']:.0f} %",
        )
        for r in rows
    ]  # fmt: skip
    title = f"bench kernels, on one rank, {num_threads} {'thread' if num_threads == 1 else 'threads'}"
    return Table(title, ("case", "way", "ms", "quartiles", "GB/s", "of copy"), texts)
