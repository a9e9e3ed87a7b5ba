"""The number of iterations in a group over a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidl.scheduling import GroupSize
from mpidl.scheduling.group_size import LARGEST_AUTO, TARGET_S

SECONDS = st.floats(0, 1e6, allow_nan=False)


@given(size=st.integers(1, 10_000), observed=st.lists(st.tuples(st.integers(1, 500), SECONDS), max_size=5))
def test_a_number_stays_what_it_is(size: int, observed: list[tuple[int, float]]) -> None:
    group_size = GroupSize(size)
    for iterations, seconds in observed:
        group_size.observe(iterations, seconds)
        assert group_size.value == size
    assert group_size.largest == size


@given(observed=st.lists(st.tuples(st.integers(0, 500), SECONDS), max_size=30))
def test_auto_stays_within_what_plans_have_room_for_and_at_most_doubles(observed: list[tuple[int, float]]) -> None:
    group_size = GroupSize("auto")
    assert group_size.value == 1
    for iterations, seconds in observed:
        before = group_size.value
        group_size.observe(iterations, seconds)
        assert type(group_size.value) is int
        assert 1 <= group_size.value <= min(2 * before, group_size.largest, LARGEST_AUTO)


@pytest.mark.parametrize("iteration_s", [0.003, 0.02, 0.11, 0.6, 5.0])
def test_auto_comes_to_groups_of_the_target_time(iteration_s: float) -> None:
    group_size = GroupSize("auto")
    for _ in range(12):
        group_size.observe(group_size.value, group_size.value * iteration_s)
    expected = min(LARGEST_AUTO, max(1, int(TARGET_S / iteration_s)))
    assert abs(group_size.value - expected) <= 1


def test_auto_comes_down_at_once_when_iterations_become_slow() -> None:
    group_size = GroupSize("auto")
    for _ in range(12):
        group_size.observe(group_size.value, group_size.value * 0.001)
    assert group_size.value == LARGEST_AUTO
    group_size.observe(LARGEST_AUTO, LARGEST_AUTO * 0.5)
    assert group_size.value == 2


def test_a_group_of_nothing_teaches_nothing() -> None:
    group_size = GroupSize("auto")
    group_size.observe(0, 3.0)
    assert group_size.value == 1
