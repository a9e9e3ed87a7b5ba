"""Claims about mpidl.scheduling.stragglers and what is told of them."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.parameters import Assignment
from mpidl.scheduling.stragglers import Change, Stragglers, by_the_others
from mpidl.summary import describe_straggler

HOSTS = ["node01", "node01", "node02", "node02"]


def paces(slow: float, rank: int = 2) -> np.ndarray:
    found = np.array([1.0, 1.02, 1.0, 0.98])
    found[rank] *= slow
    return found


def test_a_rank_that_is_slow_for_a_minute_is_told_once_and_so_is_its_end() -> None:
    stragglers = Stragglers(4)
    told = [stragglers.observe(paces(1.5), 5.0) for _ in range(40)]
    assert [index for index, changes in enumerate(told) if changes] == [11], "after 60 s of 5 s each"
    (change,) = told[11]
    assert (change.rank, change.is_slow) == (2, True)
    assert change.ratio == pytest.approx(1.5, rel=0.05)
    after = [change for _ in range(40) for change in stragglers.observe(paces(1.0), 5.0)]
    assert [(change.rank, change.is_slow) for change in after] == [(2, False)]


@pytest.mark.parametrize("every", [2, 3, 10])
def test_a_rank_that_is_slow_now_and_then_is_no_straggler(every: int) -> None:
    stragglers = Stragglers(4)
    assert not any(stragglers.observe(paces(3.0 if group % every == 0 else 1.0), 5.0) for group in range(100))


def test_long_groups_have_to_be_several() -> None:
    stragglers = Stragglers(4)
    told = [bool(stragglers.observe(paces(2.0), 100.0)) for _ in range(12)]
    assert told.index(True) == 9


def test_ranks_that_measured_nothing_are_passed_over() -> None:
    assert np.isnan(by_the_others(np.array([np.nan, 1.0]))).all()
    found = by_the_others(np.array([np.nan, 1.0, 2.0]))
    assert found[1:].tolist() == [0.5, 2.0]
    alone = Stragglers(1)
    assert not any(alone.observe(np.array([1.0]), 100.0) for _ in range(20))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 16, 33])
def test_the_others_median_leaves_the_rank_out(num_ranks: int) -> None:
    seconds = np.random.default_rng(num_ranks).uniform(1, 2, num_ranks).round(1)  # some are equal
    expected = [own / np.median(np.delete(seconds, rank)) for rank, own in enumerate(seconds)]
    assert by_the_others(seconds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("starts", "balances", "drops", "text"),
    [
        ((0, 2, 4, 6, 8), False, False, "nothing is done about it, as balance is off here"),
        ((0, 2, 5, 6, 8), True, False, "balance has left it 1 of 8 partitions"),
        ((0, 1, 2, 3, 4), True, False, "its one partition cannot be taken from it"),
        ((0, 2, 4, 6, 8), True, True, "it keeps 2 of 8 partitions, as no move saves enough; more and smaller ones "
                                      "could; what is late may be dropped"),
    ],
)  # fmt: skip
def test_a_straggler_is_named_with_what_is_done_about_it(
    starts: tuple[int, ...], balances: bool, drops: bool, text: str
) -> None:
    told = describe_straggler(
        Change(2, True, 1.52), HOSTS, Assignment(starts[-1], starts), balances=balances, drops=drops
    )
    assert told["message"].startswith("rank 2 (node02) is slow for good, 1.52 times the others' time a sample: ")
    assert text in told["message"]


def test_one_that_has_recovered_is_told() -> None:
    even = Assignment.even(8, 4)
    told = describe_straggler(Change(2, False, 1.01), HOSTS, even, balances=True, drops=False)
    assert told["message"] == "rank 2 (node02) is no longer slow: 1.01 times the others' time a sample"
