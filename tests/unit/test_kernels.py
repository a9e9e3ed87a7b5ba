"""The Numba kernels against NumPy: float32 additions in the order given, true division, squares by blocks, bfloat16."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl import kernels
from mpidl.kernels import (
    BLOCK_SIZE,
    MAX_OPERANDS,
    add_rows,
    divide,
    from_bfloat16,
    mean_rows,
    to_bfloat16,
    to_bfloat16_with_feedback,
)
from mpidl.kernels import wire as wire_kernels
from mpidl.kernels.summation import CHUNK_SIZE
from mpidl.kernels.summation import KINDS as DESCRIBED
from mpidl.parameters.assignment import Addends
from mpidl.parameters.tree import RowSum, cover, sums
from tests.launch import run
from tests.reference import KINDS, apply_steps, reference_sum

EDGES = [edge + rest for edge in (CHUNK_SIZE, BLOCK_SIZE) for rest in (-1, 0, 1)]
SIZES = [0, 1, 7, 8, 9, *EDGES, 100_000]

Float32Array = npt.NDArray[np.float32]

Steps = Sequence[tuple[int, ...]]

STEPS: dict[str, Steps] = {
    "one row": [(1, 5, 4)],
    "two": [(2, 5, 0, 1)],
    "left pair": [(3, 5, 0, 1, 2)],
    "right pair": [(5, 5, 2, 0, 1)],
    "four": [(4, 5, 0, 1, 2, 3)],
    "from right to left": [(2, 5, 3, 4), (2, 6, 2, 5), (2, 5, 1, 6), (2, 6, 0, 5)],
    "the tree over five": [(4, 5, 0, 1, 2, 3), (2, 6, 5, 4)],
    "scratch in every place": [(5, 5, 0, 1, 2), (3, 6, 3, 5, 4), (2, 5, 6, 0)],
}
"""Sums of five rows, or of some of them."""


def make_rows(num_rows: int, size: int, seed: int = 0) -> list[Float32Array]:
    """Separate arrays of many magnitudes, each followed by a guard that must not change."""
    generator = np.random.default_rng(seed)
    shape = (num_rows, size + 1)
    values = (generator.standard_normal(shape) * np.exp2(generator.integers(-10, 10, shape))).astype(np.float32)
    values[:, size] = 12345.0
    return [row.copy() for row in values]


def addresses(rows: Sequence[Float32Array], offset: int = 0) -> npt.NDArray[np.int64]:
    return np.array([row.ctypes.data + 4 * offset for row in rows], dtype=np.int64)


def as_array(steps: Steps) -> npt.NDArray[np.int64]:
    return Addends.of(RowSum((), tuple(steps))).steps


def numpy_sum(rows: list[Float32Array], steps: Steps) -> Float32Array:
    return apply_steps(RowSum(tuple(range(len(rows))), tuple(steps)), [row[:-1] for row in rows])


def run_add(rows: list[Float32Array], steps: Steps) -> Float32Array:
    out = np.full(rows[0].size, np.nan, np.float32)
    add_rows(addresses(rows), as_array(steps), out[:-1])
    assert np.isnan(out[-1])
    return out[:-1]


def run_mean(rows: list[Float32Array], steps: Steps, divisor: float) -> tuple[Float32Array, Any]:
    size = rows[0].size - 1
    out = np.full(size + 1, np.nan, np.float32)
    squares = np.full(-(-size // BLOCK_SIZE), np.nan)
    mean_rows(addresses(rows), as_array(steps), divisor, out[:-1], squares)
    assert np.isnan(out[-1])
    return out[:-1], squares


def test_the_kernel_s_page_names_the_kinds_that_there_are() -> None:
    assert set(DESCRIBED) == set(KINDS)
    assert max(kind.__code__.co_argcount for kind in KINDS.values()) == MAX_OPERANDS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", STEPS)
def test_the_mean_may_take_the_place_of_a_row(size: int, case: str) -> None:
    rows = make_rows(5, size)
    expected, expected_squares = run_mean(rows, STEPS[case], 3.0)
    for which in range(5):
        copies = [row.copy() for row in rows]
        squares = np.empty_like(expected_squares)
        mean_rows(addresses(copies), as_array(STEPS[case]), 3.0, copies[which][:-1], squares)
        assert copies[which][:-1].tobytes() == expected.tobytes()
        assert squares.tobytes() == expected_squares.tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", STEPS)
def test_rows_get_the_bits_of_numpy_s_float32_additions_in_that_order(size: int, case: str) -> None:
    rows = make_rows(5, size)
    kept = [row.copy() for row in rows]
    assert run_add(rows, STEPS[case]).tobytes() == numpy_sum(rows, STEPS[case]).tobytes()
    assert [row.tobytes() for row in rows] == [row.tobytes() for row in kept]


def test_eight_operands_are_added_in_pairs_and_may_be_scratch() -> None:
    steps = [
        (4, 16, 0, 1, 2, 3),
        (2, 17, 4, 5),
        (8, 18, 16, 17, 6, 7, 8, 9, 10, 11),
        (8, 16, *range(12, 16), 18, 0, 1, 2),
    ]
    rows = make_rows(16, 3 * CHUNK_SIZE + 5)
    assert run_add(rows, steps).tobytes() == numpy_sum(rows, steps).tobytes()


def test_another_order_gives_other_bits() -> None:
    # Else the tests above could not fail.
    rows = make_rows(5, 1000)
    found = [numpy_sum(rows, steps).tobytes() for steps in ([(3, 5, 0, 1, 2)], [(5, 5, 0, 1, 2)], [(3, 5, 2, 0, 1)])]
    assert len(set(found)) == 3


@pytest.mark.parametrize("totals", [range(1, 36), range(36, 71)])
def test_the_tree_s_steps_give_the_bits_of_the_recursion_for_any_number_of_partitions(totals: range) -> None:
    for total in totals:
        generator = random.Random(total)
        values = np.stack([row[:-1] for row in make_rows(total, CHUNK_SIZE + 9, seed=total)])
        expected = reference_sum(values)
        for parts in (total, generator.randint(1, total), generator.randint(1, 6)):
            cuts = sorted(generator.choices(range(total + 1), k=parts - 1)) if parts < total else range(1, total)
            ranges = [row for a, b in itertools.pairwise([0, *cuts, total]) for row in cover(total, a, b)]
            generator.shuffle(ranges)
            rows = [reference_sum(values[slice(*row)]) for row in ranges]
            (whole,) = sums(total, ranges)
            out = np.full(CHUNK_SIZE + 9, np.nan, np.float32)
            add_rows(addresses([rows[i] for i in whole.rows]), Addends.of(whole).steps, out)
            assert out.tobytes() == expected.tobytes(), (total, ranges)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("divisor", [1.0, 3.0, 97.0, 0.1])
def test_the_mean_is_numpy_s_float32_sum_truly_divided(size: int, divisor: float) -> None:
    rows, steps = make_rows(5, size), STEPS["the tree over five"]
    total = numpy_sum(rows, steps)
    out, squares = run_mean(rows, steps, divisor)
    assert out.tobytes() == (total / np.float32(divisor)).tobytes()
    assert all(row[-1] == 12345.0 for row in rows)
    for block, square in enumerate(squares):
        values = out[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].astype(np.float64)
        assert square == pytest.approx(math.fsum(values * values), rel=1e-13)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("divisor", [1.0, 3.0, 0.1])
def test_a_sum_divided_afterwards_has_the_bits_and_squares_of_the_mean(size: int, divisor: float) -> None:
    rows, steps = make_rows(5, size), STEPS["from right to left"]
    mean, mean_squares = run_mean(rows, steps, divisor)
    values = np.append(run_add(rows, steps), np.float32(12345.0))
    squares = np.full(-(-size // BLOCK_SIZE), np.nan)
    divide(values[:-1], divisor, squares)
    assert values[:-1].tobytes() == mean.tobytes()
    assert squares.tobytes() == mean_squares.tobytes()
    assert values[-1] == 12345.0


def test_true_division_is_not_a_product_with_the_reciprocal() -> None:
    row = make_rows(1, 1000)[0][:-1]
    assert (row / np.float32(3)).tobytes() != (row * (np.float32(1) / np.float32(3))).tobytes()


@settings(max_examples=25)
@given(blocks=st.lists(st.integers(0, 6), max_size=4), rest=st.integers(0, BLOCK_SIZE), seed=st.integers(0, 99))
def test_sums_and_squares_do_not_depend_on_cuts_at_block_multiples(blocks: list[int], rest: int, seed: int) -> None:
    size = 5 * BLOCK_SIZE + rest
    steps = [(5, 3, 0, 1, 2)]
    rows = make_rows(3, size, seed)
    whole, whole_squares = run_mean(rows, steps, 7.0)
    out, squares = np.full(size, np.nan, np.float32), np.full(-(-size // BLOCK_SIZE), np.nan)
    cuts = [0, *(min(size, block * BLOCK_SIZE) for block in sorted(blocks)), size]
    for start, stop in itertools.pairwise(cuts):
        own = squares[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)] if start < stop else squares[:0]
        mean_rows(addresses(rows, start), as_array(steps), 7.0, out[start:stop], own)
    assert out.tobytes() == whole.tobytes()
    assert squares.tobytes() == whole_squares.tobytes()


def test_not_a_number_and_infinity_arrive_where_they_were() -> None:
    rows = make_rows(2, BLOCK_SIZE + 3)
    rows[1][2], rows[1][BLOCK_SIZE] = np.nan, np.inf
    out, squares = run_mean(rows, [(2, 2, 0, 1)], 2.0)
    assert np.flatnonzero(~np.isfinite(out)).tolist() == [2, BLOCK_SIZE]
    assert np.isnan(squares[0])
    assert np.isinf(squares[1])


def test_squares_of_large_and_small_values_neither_overflow_nor_vanish() -> None:
    row = np.array([3e30, 2e-30, 1.0], np.float32)
    for values in (row[:1], row[1:2]):
        _, squares = run_mean([np.append(values, np.float32(12345.0))], [(1, 1, 0)], 1.0)
        assert squares[0] == float(values[0]) ** 2


def test_a_division_by_zero_is_no_error() -> None:
    out, _ = run_mean(make_rows(1, 3), [(1, 1, 0)], 0.0)
    assert np.isinf(out).all()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------

LOWER_HALVES = [0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xCAFE, 0xFFFF]
"""Exact ones, below, on and above a tie."""


def floats_of(lower: int) -> Float32Array:
    """A float32 of every upper half there is: all signs, exponents, infinities and values that are no number."""
    return ((np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(lower)).view(np.float32)


def words_of(values: Float32Array) -> npt.NDArray[np.uint16]:
    words = np.zeros(values.size + 1, np.uint16)
    to_bfloat16(values, words[:-1])
    assert words[-1] == 0
    return words[:-1]


@pytest.mark.parametrize("lower", LOWER_HALVES)
def test_every_upper_half_is_rounded_as_torch_rounds_it(lower: int) -> None:
    values = floats_of(lower)
    words = words_of(values)
    expected: npt.NDArray[np.uint16] = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    is_nan = np.isnan(values)
    assert np.array_equal(words[~is_nan], expected[~is_nan])
    back = np.zeros(values.size, np.float32)
    from_bfloat16(words, back)
    assert np.array_equal(np.isnan(back), is_nan)
    assert np.array_equal(np.signbit(back[is_nan]), np.signbit(values[is_nan]))
    assert is_nan.sum() == (254 if lower == 0 else 256)


def test_ties_go_to_even_and_carries_reach_the_exponent_and_infinity() -> None:
    bits = [0x3F808000, 0x3F818000, 0x3FFF8000, 0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF, 0x00007FFF, 0x00008001, 0x80000000]
    words = words_of(np.array(bits, np.uint32).view(np.float32))
    assert words.tolist() == [0x3F80, 0x3F82, 0x4000, 0x7F7F, 0x7F80, 0xFF80, 0x0000, 0x0001, 0x8000]


def test_words_are_widened_exactly() -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    values = np.full(words.size, np.nan, np.float32)
    from_bfloat16(words, values)
    assert values.tobytes() == floats_of(0).tobytes()
    is_number = ~np.isnan(values)
    assert np.array_equal(words_of(values)[is_number], words[is_number])


@pytest.mark.parametrize("size", SIZES)
def test_words_of_any_length_are_those_of_torch(size: int) -> None:
    values = make_rows(1, size)[0][:-1]
    expected = torch.from_numpy(values).bfloat16()
    back = np.zeros(size, np.float32)
    from_bfloat16(words_of(values), back)
    assert back.tobytes() == expected.float().numpy().tobytes()


def fed_back(values: Float32Array, residuals: Float32Array) -> tuple[npt.NDArray[np.uint16], Float32Array]:
    words, left = np.zeros(values.size, np.uint16), residuals.copy()
    kept = values.copy()
    to_bfloat16_with_feedback(values, left, words)
    assert values.tobytes() == kept.tobytes()
    return words, left


@pytest.mark.parametrize("size", SIZES)
def test_words_and_what_they_are_short_of_make_up_values_and_residuals(size: int) -> None:
    values, residuals = (row[:-1].copy() for row in make_rows(2, size))
    words, left = fed_back(values, residuals)
    back = np.zeros(size, np.float32)
    from_bfloat16(words, back)
    assert words.tobytes() == words_of(values + residuals).tobytes()
    assert np.array_equal(back.astype(np.float64) + left, (values + residuals).astype(np.float64))


@pytest.mark.parametrize("lower", LOWER_HALVES)
def test_a_word_that_is_not_finite_leaves_nothing(lower: int) -> None:
    values = floats_of(lower)
    words, left = fed_back(values, np.zeros_like(values))
    back = np.zeros_like(values)
    from_bfloat16(words, back)
    is_number = np.isfinite(back)
    assert np.array_equal(left[is_number], values[is_number] - back[is_number])
    assert not left[~is_number].any()
    assert np.isfinite(left).all()


# --- compiling --------------------------------------------------------------------------------------------------------

NAMES = ["add_rows", "mean_rows", "divide", "wire._round", "wire._widen", "to_bfloat16_with_feedback"]
DISPATCHERS: list[Any] = [
    add_rows, mean_rows, divide, wire_kernels._round, wire_kernels._widen, to_bfloat16_with_feedback,
]  # fmt: skip


def compiled() -> list[Any]:
    """What each kernel has been compiled for, and how often since the start."""
    return [(kernel.signatures, len(kernel.stats.cache_misses)) for kernel in DISPATCHERS]


def test_calls_of_any_size_compile_nothing() -> None:
    before = compiled()
    for size in (0, 5, 5000):
        for rows in (1, 3):
            steps = [(1, 1, 0)] if rows == 1 else [(3, 3, 0, 1, 2)]
            mean, squares = run_mean(make_rows(rows, size), steps, 2.0)
            run_add(make_rows(rows, size), steps)
            divide(mean, 3.0, squares)
            from_bfloat16(words_of(mean), mean)
            fed_back(mean, mean)
    assert before == compiled()
    assert [len(signatures) for signatures, _ in before] == [1] * len(NAMES)


def test_arrays_of_another_type_are_refused_and_not_compiled_for() -> None:
    rows, steps = make_rows(1, 8), as_array([(1, 1, 0)])
    before = compiled()
    refused: list[Any] = [
        lambda: mean_rows(addresses(rows), steps, 1.0, np.zeros(8), np.zeros(1)),  # type: ignore[arg-type]
        lambda: add_rows(addresses(rows), np.zeros((2, 20), np.int64)[:, ::2], rows[0]),
        lambda: divide(np.zeros(16, np.float32)[::2], 1.0, np.zeros(1)),
        lambda: to_bfloat16(rows[0], np.zeros(9, np.int16)),
        lambda: from_bfloat16(np.zeros(18, np.uint16)[::2], rows[0]),
    ]
    for call in refused:
        with pytest.raises(TypeError):
            call()
    assert before == compiled()


REPORT = """
import json
from mpidl import kernels
from mpidl.kernels import wire
found = [
    kernels.add_rows, kernels.mean_rows, kernels.divide, wire._round, wire._widen, kernels.to_bfloat16_with_feedback
]
print(json.dumps([[sum(k.stats.cache_hits.values()), sum(k.stats.cache_misses.values())] for k in found]))
"""


@pytest.mark.launches
def test_a_second_process_reads_the_kernels_that_the_first_compiled(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        done = run([sys.executable, "-c", REPORT], env={"NUMBA_CACHE_DIR": str(tmp_path)}).check()
        found.append(json.loads(done.stdout))
    assert found == [[[0, 1]] * len(NAMES), [[1, 0]] * len(NAMES)]


def test_the_package_s_kernels_are_the_files_beside_it() -> None:
    link = Path(__file__).parents[2] / "mpidl" / "kernels"
    assert kernels.__file__ is not None
    assert Path(kernels.__file__).resolve().parent == link.resolve()
