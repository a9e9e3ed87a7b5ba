"""Learning an iteration's budget."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.scheduling import DropBudget, most_dropped


@pytest.mark.parametrize(
    ("share", "partitions", "expected"), [(0.0, 8, 0), (0.1, 8, 0), (0.125, 8, 1), (0.3, 10, 3), (0.99, 4, 3)]
)
def test_a_share_is_a_whole_number_of_partitions_and_never_more(share: float, partitions: int, expected: int) -> None:
    assert most_dropped(share, partitions) == expected


def test_a_given_budget_holds_from_the_beginning() -> None:
    budget = DropBudget(0.25, 1.5, 10)
    budget.observe(np.arange(8.0))
    assert budget.value == 1.5


def test_a_learned_budget_would_have_kept_nineteen_of_twenty_iterations_within_the_share() -> None:
    random = np.random.default_rng(1)
    iterations = random.exponential(size=(200, 16))
    budget = DropBudget(0.125, None, 200)
    budget.observe(np.full(16, 1e6))  # the first of the run does not count
    for started in iterations:
        assert budget.value == 0
        budget.observe(started)
    dropped = (iterations > budget.value).sum(axis=1)
    assert np.mean(dropped > 2) == pytest.approx(0.05, abs=0.006)
    assert dropped.mean() > 0.3
    learned = budget.value
    budget.observe(np.full(16, 1e6))
    assert budget.value == learned


def test_one_late_rank_of_four_is_what_is_dropped() -> None:
    budget = DropBudget(2 / 16, None, 5)
    started = np.array([0, 1, 2, 3] * 3 + [0, 2, 4, 6], dtype=np.float64)
    for _ in range(6):
        budget.observe(started)
    assert 3 <= budget.value < 4
