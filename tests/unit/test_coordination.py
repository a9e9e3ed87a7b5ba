"""What coordination takes: summed over blocks, taken group by group."""

from __future__ import annotations

import time

import pytest

from mpidl.scheduling import Coordination


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock to set by hand."""
    times = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: times[0])
    return times


def test_blocks_add_up_and_nothing_else_counts(now: list[float]) -> None:
    coordination = Coordination()
    for seconds in (1.0, 2.0):
        now[0] += 50
        with coordination.timed():
            now[0] += seconds
    assert coordination.end_group(4, 10.0) == 3.0
    assert coordination.end_group(4, 10.0) == 0.0


def test_what_follows_the_end_of_a_group_in_its_block_counts_for_the_next(now: list[float]) -> None:
    coordination = Coordination()
    with coordination.timed():
        now[0] += 1.0
        assert coordination.end_group(4, 10.0) == 1.0
        now[0] += 0.25
    with coordination.timed():
        now[0] += 2.0
    assert coordination.end_group(4, 10.0) == 2.25


def test_a_block_that_raises_counts(now: list[float]) -> None:
    coordination = Coordination()
    with pytest.raises(ValueError, match="away"), coordination.timed():
        now[0] += 1.0
        raise ValueError("away")
    assert coordination.end_group(1, 1.0) == 1.0


def test_the_run_s_share_is_that_of_all_groups_together(now: list[float]) -> None:
    coordination = Coordination()
    assert coordination.describe()["groups"] == 0
    for iterations, seconds in ((1, 3.0), (8, 5.0), (2, 1.0)):
        with coordination.timed():
            now[0] += 0.25
        coordination.end_group(iterations, seconds)
    assert coordination.describe() == {
        "groups": 3, "group_sizes": [1, 8], "coordination_s": 0.75, "coordination_share": 0.75 / 9.75,
    }  # fmt: skip
