"""The Numba kernels against NumPy: float32 additions in the order given, true division, squares by blocks."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl import kernels
from mpidl.kernels import BLOCK_SIZE, add_rows, sum_rows
from tests.launch import run

SIZES = [0, 1, 7, 8, 9, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 100_000]

Float32Array = npt.NDArray[np.float32]


def make_rows(num_rows: int, size: int, seed: int = 0) -> list[Float32Array]:
    """Separate arrays of many magnitudes, each followed by a guard that must not change."""
    generator = np.random.default_rng(seed)
    shape = (num_rows, size + 1)
    values = (generator.standard_normal(shape) * np.exp2(generator.integers(-10, 10, shape))).astype(np.float32)
    values[:, size] = 12345.0
    return [row.copy() for row in values]


def addresses(rows: list[Float32Array], offset: int = 0) -> npt.NDArray[np.int64]:
    return np.array([row.ctypes.data + 4 * offset for row in rows], dtype=np.int64)


def as_pairs(pairs: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def numpy_adds(rows: list[Float32Array], pairs: list[tuple[int, int]]) -> list[Float32Array]:
    copies = [row[:-1].copy() for row in rows]
    for into, other in pairs:
        copies[into] = copies[into] + copies[other]
    return copies


def run_sum(rows: list[Float32Array], pairs: list[tuple[int, int]], divisor: float) -> tuple[Float32Array, Any]:
    size = rows[0].size - 1
    out = np.full(size, np.nan, np.float32)
    squares = np.full(-(-size // BLOCK_SIZE), np.nan)
    sum_rows(addresses(rows), as_pairs(pairs), divisor, out, squares)
    return out, squares


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (2, 3), (0, 2), (0, 4)], [(3, 4), (2, 3), (1, 2), (0, 1)]])
def test_rows_get_the_bits_of_numpy_s_float32_additions_in_that_order(size: int, pairs: list[tuple[int, int]]) -> None:
    rows = make_rows(5, size)
    expected = numpy_adds(rows, pairs)
    add_rows(addresses(rows), as_pairs(pairs), size)
    assert [row[:-1].tobytes() for row in rows] == [row.tobytes() for row in expected]
    assert all(row[-1] == 12345.0 for row in rows)


def test_another_order_gives_other_bits() -> None:
    # Else the test above could not fail.
    rows = make_rows(5, 1000)
    one, other = numpy_adds(rows, [(0, 1), (2, 3), (0, 2)]), numpy_adds(rows, [(0, 1), (0, 2), (0, 3)])
    assert one[0].tobytes() != other[0].tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("divisor", [1.0, 3.0, 97.0, 0.1])
def test_the_mean_is_numpy_s_float32_sum_truly_divided(size: int, divisor: float) -> None:
    rows = make_rows(4, size)
    pairs = [(0, 1), (2, 3), (0, 2)]
    total = numpy_adds(rows, pairs)[0]
    out, squares = run_sum(rows, pairs, divisor)
    assert out.tobytes() == (total / np.float32(divisor)).tobytes()
    assert all(row[-1] == 12345.0 for row in rows)
    for block, square in enumerate(squares):
        values = out[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].astype(np.float64)
        assert square == pytest.approx(math.fsum(values * values), rel=1e-13)


def test_true_division_is_not_a_product_with_the_reciprocal() -> None:
    row = make_rows(1, 1000)[0][:-1]
    assert (row / np.float32(3)).tobytes() != (row * (np.float32(1) / np.float32(3))).tobytes()


@settings(max_examples=25)
@given(blocks=st.lists(st.integers(0, 6), max_size=4), rest=st.integers(0, BLOCK_SIZE), seed=st.integers(0, 99))
def test_sums_and_squares_do_not_depend_on_cuts_at_block_multiples(blocks: list[int], rest: int, seed: int) -> None:
    size = 5 * BLOCK_SIZE + rest
    pairs = [(1, 2), (0, 1)]
    whole, whole_squares = run_sum(make_rows(3, size, seed), pairs, 7.0)
    rows = make_rows(3, size, seed)
    out, squares = np.full(size, np.nan, np.float32), np.full(-(-size // BLOCK_SIZE), np.nan)
    cuts = [0, *(min(size, block * BLOCK_SIZE) for block in sorted(blocks)), size]
    for start, stop in itertools.pairwise(cuts):
        own = squares[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)] if start < stop else squares[:0]
        sum_rows(addresses(rows, start), as_pairs(pairs), 7.0, out[start:stop], own)
    assert out.tobytes() == whole.tobytes()
    assert squares.tobytes() == whole_squares.tobytes()


def test_not_a_number_and_infinity_arrive_where_they_were() -> None:
    rows = make_rows(2, BLOCK_SIZE + 3)
    rows[1][2], rows[1][BLOCK_SIZE] = np.nan, np.inf
    out, squares = run_sum(rows, [(0, 1)], 2.0)
    assert np.flatnonzero(~np.isfinite(out)).tolist() == [2, BLOCK_SIZE]
    assert np.isnan(squares[0])
    assert np.isinf(squares[1])


def test_squares_of_large_and_small_values_neither_overflow_nor_vanish() -> None:
    row = np.array([3e30, 2e-30, 1.0], np.float32)
    for values in (row[:1], row[1:2]):
        _, squares = run_sum([np.append(values, np.float32(12345.0))], [], 1.0)
        assert squares[0] == float(values[0]) ** 2


def test_a_division_by_zero_is_no_error() -> None:
    out, _ = run_sum(make_rows(1, 3), [], 0.0)
    assert np.isinf(out).all()


def compiled() -> list[Any]:
    """What each kernel has been compiled for, and how often since the start."""
    dispatchers: list[Any] = [add_rows, sum_rows]
    return [(kernel.signatures, len(kernel.stats.cache_misses)) for kernel in dispatchers]


def test_calls_of_any_size_compile_nothing() -> None:
    before = compiled()
    for size in (0, 5, 5000):
        for rows in (1, 3):
            run_sum(make_rows(rows, size), [(0, rows - 1)] if rows > 1 else [], 2.0)
            add_rows(addresses(make_rows(rows, size)), as_pairs([]), size)
    assert before == compiled()
    assert [len(signatures) for signatures, _ in before] == [1, 1]


def test_arrays_of_another_type_are_refused_and_not_compiled_for() -> None:
    rows = make_rows(1, 8)
    with pytest.raises(TypeError):
        sum_rows(addresses(rows), as_pairs([]), 1.0, np.zeros(8), np.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        add_rows(addresses(rows), np.zeros((2, 4), np.int64)[:, ::2], 8)


REPORT = """
import json
from mpidl.kernels import add_rows, sum_rows
kernels = (add_rows, sum_rows)
print(json.dumps([[sum(k.stats.cache_hits.values()), sum(k.stats.cache_misses.values())] for k in kernels]))
"""


@pytest.mark.launches
def test_a_second_process_reads_the_kernels_that_the_first_compiled(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        done = run([sys.executable, "-c", REPORT], env={"NUMBA_CACHE_DIR": str(tmp_path)}).check()
        found.append(json.loads(done.stdout))
    assert found == [[[0, 1], [0, 1]], [[1, 0], [1, 0]]]


def test_the_package_s_kernels_are_the_files_beside_it() -> None:
    link = Path(__file__).parents[2] / "mpidl" / "kernels"
    assert kernels.__file__ is not None
    assert Path(kernels.__file__).resolve().parent == link.resolve()
