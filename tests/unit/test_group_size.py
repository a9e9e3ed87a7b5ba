"""The number of iterations in a group over a run."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidl.scheduling import GroupSize
from mpidl.scheduling.group_size import FACTOR, LARGEST_AUTO, LOWER_SHARE, MAX_GROUP_S, SHORTEST_AUTO, UPPER_SHARE

SECONDS = st.floats(0, 1e6, allow_nan=False)
OBSERVED = st.tuples(st.integers(0, 500), SECONDS, SECONDS)


def run(group_size: GroupSize, groups: int, iteration_s: float, group_s: float, planned_s: float = 0.0) -> list[int]:
    """So many groups whose coordination takes `group_s` and `planned_s` an iteration; returns the sizes they had.

    As in a training, the report of a group shapes the group after the next.
    """
    sizes, following = [], group_size.value
    for _ in range(groups):
        size, following = following, group_size.value
        group_size.observe(size, size * iteration_s, group_s + size * planned_s)
        sizes.append(size)
    return sizes


@given(size=st.integers(1, 10_000), observed=st.lists(OBSERVED, max_size=5))
def test_a_number_stays_what_it_is(size: int, observed: list[tuple[int, float, float]]) -> None:
    group_size = GroupSize(size)
    for each in observed:
        group_size.observe(*each)
        assert group_size.value == size
    assert group_size.largest == size


@given(observed=st.lists(OBSERVED, max_size=30), limit_s=st.floats(1e-3, 1e3))
def test_auto_stays_within_what_plans_have_room_for_and_grows_by_the_factor_at_most(
    observed: list[tuple[int, float, float]], limit_s: float
) -> None:
    group_size = GroupSize("auto", limit_s)
    assert group_size.value == 1
    for each in observed:
        before = group_size.value
        group_size.observe(*each)
        assert type(group_size.value) is int
        assert 1 <= group_size.value <= min(FACTOR * before, group_size.largest, LARGEST_AUTO)


@pytest.mark.parametrize("group_s", [1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("iteration_s", [0.001, 0.003, 0.02, 0.1])
def test_the_share_comes_between_its_bounds_and_stays_there(iteration_s: float, group_s: float) -> None:
    group_size = GroupSize("auto", max_group_seconds=1e9)
    run(group_size, 30, iteration_s, group_s)
    for size in run(group_size, 300, iteration_s, group_s):
        share = group_s / (group_s + size * iteration_s)
        # Where the shortest group is long enough already, the share may be less.
        assert share <= UPPER_SHARE
        assert share >= LOWER_SHARE or size == SHORTEST_AUTO
    assert LOWER_SHARE <= (group_size.share or 0) <= UPPER_SHARE or group_size.value == SHORTEST_AUTO


def test_what_planning_takes_for_each_iteration_does_not_make_groups_grow_past_the_bound() -> None:
    group_size = GroupSize("auto")
    sizes = run(group_size, 60, 0.01, 5e-3, planned_s=1e-5)
    assert max(sizes) <= 16, "5 ms in 5 % of the time: 10 iterations, and once more the factor at most"
    assert (group_size.share or 1) <= UPPER_SHARE


def test_groups_shrink_by_steps_where_coordination_has_become_cheap() -> None:
    group_size = GroupSize("auto")
    assert run(group_size, 30, 0.002, 2e-3)[-1] >= 20
    sizes = run(group_size, 60, 0.002, 1e-4)
    assert all(-1 <= after - before <= 0 for before, after in itertools.pairwise(sizes))
    assert 1e-4 / (1e-4 + sizes[-1] * 0.002) >= LOWER_SHARE


def test_groups_grow_within_a_few_reports_where_coordination_has_become_dear() -> None:
    group_size = GroupSize("auto")
    small = run(group_size, 30, 0.01, 5e-4)[-1]
    sizes = run(group_size, 12, 0.01, 5e-3)
    assert small <= 2
    assert 5e-3 / (5e-3 + sizes[-1] * 0.01) <= UPPER_SHARE


@pytest.mark.parametrize(("limit_s", "iteration_s"), [(MAX_GROUP_S, 0.1), (0.5, 0.1), (2.0, 0.7), (0.1, 5.0)])
def test_no_group_is_meant_to_take_longer_than_the_limit(limit_s: float, iteration_s: float) -> None:
    group_size = GroupSize("auto", limit_s)
    sizes = run(group_size, 40, iteration_s, group_s=10 * iteration_s)  # the share alone would want the largest
    assert max(sizes) == max(1, int(limit_s / iteration_s))


def test_groups_become_short_at_once_when_iterations_become_slow() -> None:
    group_size = GroupSize("auto")
    run(group_size, 20, 0.001, 0.1)
    assert group_size.value == LARGEST_AUTO
    group_size.observe(LARGEST_AUTO, LARGEST_AUTO * 0.5, 0.1)
    assert group_size.value == MAX_GROUP_S / 0.5


def test_groups_that_triggers_cut_short_do_not_make_the_size_grow() -> None:
    group_size = GroupSize("auto")
    for _ in range(40):
        size = min(group_size.value, 3)  # an epoch of three iterations
        group_size.observe(size, size * 0.001, 0.001)
    assert group_size.value <= 32, "1 ms in 5 % of the time: 19 iterations, although no group ever has more than 3"


def test_the_first_group_teaches_nothing() -> None:
    slow_start, none = GroupSize("auto"), GroupSize("auto")
    slow_start.observe(1, 30.0, 5.0)
    assert slow_start.share is None
    none.observe(1, 0.01, 0.001)
    for group_size in (slow_start, none):
        run(group_size, 9, 0.01, 0.001)
    assert slow_start.value == none.value
    assert slow_start.share == none.share


def test_a_group_of_nothing_teaches_nothing() -> None:
    group_size = GroupSize("auto")
    for _ in range(3):
        group_size.observe(0, 3.0, 1.0)
    assert (group_size.value, group_size.share) == (1, None)


def test_the_share_of_a_fixed_size_is_known_too() -> None:
    group_size = GroupSize(10)
    run(group_size, 5, 0.01, 0.001)
    assert group_size.share == pytest.approx(0.001 / 0.101)
