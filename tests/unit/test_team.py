"""Threads that share a kernel's range: every element once, the bits of one thread, nobody kept waiting."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mpidl import kernels
from mpidl.kernels import BLOCK_SIZE
from mpidl.parameters import team as team_module
from mpidl.parameters.assignment import Addends
from mpidl.parameters.layout import blocks_of
from mpidl.parameters.team import Helpers, Team
from mpidl.parameters.wire import WIRES

SIZES = [[], [0], [1], [0, 5, 0], [2 * BLOCK_SIZE], [BLOCK_SIZE, 3 * BLOCK_SIZE, 7 * BLOCK_SIZE + 13]]
LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team_module, "PART_SIZE", BLOCK_SIZE)


@pytest.fixture(params=[1, 2, 3])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    made = Team(Helpers(request.param - 1))
    yield made
    made.helpers.close()
    assert not any(thread.name == "mpidl-kernels" for thread in threading.enumerate())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("max_size", [None, BLOCK_SIZE, 2 * BLOCK_SIZE])
def test_every_element_is_worked_on_once_in_parts_that_begin_at_blocks(
    team: Team, sizes: list[int], max_size: int | None
) -> None:
    counts = [np.zeros(size, np.int64) for size in sizes]
    parts: list[tuple[int, int]] = []

    def work(thread: int, index: int, start: int, stop: int) -> None:
        assert 0 <= thread < team.num_threads
        counts[index][start:stop] += 1
        parts.append((start, stop))

    for _ in range(20):
        team.run(sizes, work, max_size)
    assert all((each == 20).all() for each in counts)
    assert all(start % BLOCK_SIZE == 0 and start < stop for start, stop in parts)
    assert max_size is None or all(stop - start <= max_size for start, stop in parts)


@pytest.mark.parametrize("size", [BLOCK_SIZE - 1, 5 * BLOCK_SIZE, 9 * BLOCK_SIZE + 77])
def test_sums_squares_and_words_have_the_bits_of_one_thread(team: Team, size: int) -> None:
    generator = np.random.default_rng(size)
    rows = [generator.standard_normal(size).astype(np.float32) for _ in range(5)]
    addresses, steps = np.array([row.ctypes.data for row in rows], dtype=np.int64), Addends.of_all(5).steps
    expected, expected_squares = np.empty(size, np.float32), np.empty(-(-size // BLOCK_SIZE))
    kernels.mean_rows(addresses, steps, 3.0, expected, expected_squares)
    total, expected_words = np.empty(size, np.float32), np.empty(size, np.uint16)
    kernels.add_rows(addresses, steps, total)
    expected_residuals = rows[0].copy()
    kernels.to_bfloat16_with_feedback(total, expected_residuals, expected_words)

    out, squares = np.full(size, np.nan, np.float32), np.full(expected_squares.size, np.nan)
    words, residuals = np.zeros(size, np.uint16), rows[0].copy()
    rooms = np.empty((team.num_threads, BLOCK_SIZE), np.float32)

    def mean(thread: int, index: int, a: int, b: int) -> None:
        blocks = blocks_of((a, b), BLOCK_SIZE)
        kernels.mean_rows(addresses + 4 * a, steps, 3.0, out[a:b], squares[blocks.start : blocks.stop])

    def round_(thread: int, index: int, a: int, b: int) -> None:
        room = rooms[thread][: b - a]
        WIRES["bfloat16"].add_rows(addresses + 4 * a, steps, words[a:b], room, residuals[a:b])

    team.run([size], mean)
    team.run([size], round_, BLOCK_SIZE)
    assert out.tobytes() == expected.tobytes()
    assert squares.tobytes() == expected_squares.tobytes()
    assert words.tobytes() == expected_words.tobytes()
    assert residuals.tobytes() == expected_residuals.tobytes()


def test_helpers_take_parts_while_the_caller_is_busy() -> None:
    team, seen, threads = Team(Helpers(2)), threading.Barrier(3), list[int]()

    def work(thread: int, index: int, start: int, stop: int) -> None:
        seen.wait(LIMIT_S)  # three threads have a part at the same time
        threads.append(thread)

    team.run([3 * BLOCK_SIZE], work)
    team.helpers.close()
    assert sorted(threads) == [0, 1, 2]


def test_a_helper_that_is_busy_elsewhere_keeps_nobody_waiting() -> None:
    team = Team(Helpers(1))
    taken, goes_on, threads = threading.Event(), threading.Event(), list[int]()

    def hold(thread: int, index: int, start: int, stop: int) -> None:
        if thread == 1:
            taken.set()
            assert goes_on.wait(LIMIT_S)
        else:
            assert taken.wait(LIMIT_S)  # so the helper gets a part

    other = threading.Thread(target=team.run, args=([4 * BLOCK_SIZE], hold))
    other.start()
    assert taken.wait(LIMIT_S)
    team.run([4 * BLOCK_SIZE], lambda thread, *_: threads.append(thread))
    assert set(threads) == {0}
    assert other.is_alive()
    goes_on.set()
    other.join(LIMIT_S)
    team.helpers.close()


def test_who_may_not_ask_works_alone() -> None:
    team = dataclasses.replace(Team(Helpers(2)), is_free=lambda: False)
    threads: list[threading.Thread] = []
    team.run([9 * BLOCK_SIZE], lambda *_: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]


def test_an_error_of_any_thread_is_raised_when_all_have_ended(team: Team) -> None:
    ended: list[int] = []

    def work(thread: int, index: int, start: int, stop: int) -> None:
        if start == 2 * BLOCK_SIZE:
            raise ArithmeticError("in a part")
        ended.append(start)

    with pytest.raises(ArithmeticError, match="in a part"):
        team.run([6 * BLOCK_SIZE], work, BLOCK_SIZE)
    assert team.num_threads == 1 or len(ended) == 5
    team.run([BLOCK_SIZE] * 3, lambda *_: None)
