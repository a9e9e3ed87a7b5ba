"""The rules by which partitions move, against simulated ranks of known speed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.parameters import Assignment
from mpidl.scheduling.balance import Balancer, Costs, Move, best_counts, most_rows
from mpidl.scheduling.pace import Estimates, Pace

Speed = Callable[[int, int], float]
"""Seconds per partition, from (rank, group)."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """A simulated run: plans are two groups ahead of the reports."""

    partitions: int
    ranks: int
    speed: Speed
    groups: int = 12
    iterations: int = 10
    noise: float = 0.0
    drift: float = 0.0
    """Of whole groups."""
    seed: int = 0
    node_of: tuple[int, ...] = ()
    local_sum_s: float = 0.0

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        even = Assignment.even(self.partitions, self.ranks)
        self.balancer = Balancer(even, self.node_of or (0,) * self.ranks)
        self.plans = [even, even]
        self.moves: list[tuple[int, Move]] = []
        self.slowest_s: list[float] = []
        for group in range(self.groups):
            ran = self.plans[group]
            counts = np.diff(ran.starts)
            seconds = np.array([self.speed(rank, group) for rank in range(self.ranks)])
            seconds *= np.exp(self.drift * random.standard_normal(self.ranks))
            self.slowest_s.append(float((counts * seconds).max()))
            measured = seconds * np.exp(self.noise * random.standard_normal((self.iterations, self.ranks)))
            median = np.median(measured, axis=0)
            deviation = np.median(np.abs(measured - median), axis=0)
            reports = np.stack([median, deviation, np.full(self.ranks, self.iterations)], axis=1)
            move = self.balancer.observe(ran, reports, local_sum_s=self.local_sum_s)
            if move is not None:
                self.moves.append((group, move))
            self.plans.append(self.balancer.assignment)

    def counts(self, group: int) -> list[int]:
        return [int(count) for count in np.diff(self.plans[group].starts)]


def slow(*ranks: int, by: float = 2.0) -> Speed:
    return lambda rank, group: by if rank in ranks else 1.0


@pytest.mark.parametrize("iterations", [5, 10, 50])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.08])
def test_a_rank_that_is_slow_from_the_start_has_fewer_partitions_in_the_third_group(
    iterations: int, noise: float
) -> None:
    run = Run(partitions=16, ranks=4, speed=slow(2), iterations=iterations, noise=noise)
    assert run.counts(1) == [4, 4, 4, 4]
    assert run.counts(2)[2] == 2
    assert run.slowest_s[2:] == pytest.approx([5 * run.speed(0, 0)] * 10)
    assert len(run.moves) == 1


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_short_groups_take_a_few_more(iterations: int) -> None:
    run = Run(partitions=16, ranks=4, speed=slow(2), iterations=iterations, noise=0.05)
    assert run.counts(6)[2] == 2
    assert len(run.moves) == 1


@pytest.mark.parametrize("factor", [1.3, 1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("per_rank", [4, 8, 13])
def test_the_time_is_within_1_15_of_the_best_for_these_speeds(ranks: int, factor: float, per_rank: int) -> None:
    partitions = per_rank * ranks + ranks // 2
    run = Run(partitions=partitions, ranks=ranks, speed=slow(ranks - 1, by=factor), noise=0.03, groups=10)
    seconds = [run.speed(rank, 0) for rank in range(ranks)]
    best_s = max(n * s for n, s in zip(best_counts(seconds, partitions), seconds, strict=True))
    for group, slowest_s in enumerate(run.slowest_s[5:], 5):
        assert slowest_s <= 1.15 * best_s, (group, run.counts(group))


def test_slow_for_a_while_moves_within_three_groups_there_and_back_to_even() -> None:
    def speed(rank: int, group: int) -> float:
        return 2.0 if rank == 1 and 10 <= group < 20 else 1.0

    run = Run(partitions=16, ranks=4, speed=speed, noise=0.05, groups=40)
    assert [group for group, _ in run.moves] == [11, 21]
    assert run.counts(13)[1] == 2
    assert run.counts(23) == [4, 4, 4, 4]
    first, second = (move for _, move in run.moves)
    assert (first.rank, second.rank) == (1, 1)
    assert first.speed == pytest.approx(0.5, abs=0.05)
    assert second.speed == pytest.approx(1, abs=0.08)
    assert first.gain == pytest.approx(3 / 8, abs=0.05)


def test_one_odd_group_moves_nothing() -> None:
    run = Run(partitions=16, ranks=4, speed=lambda r, g: 3.0 if r == 1 and g == 6 else 1.0, noise=0.03, groups=20)
    assert run.moves == []


def test_nodes_of_different_speed_share_by_it() -> None:
    node_of = (0, 0, 0, 1, 1, 1)
    run = Run(partitions=48, ranks=6, node_of=node_of, speed=lambda r, g: (1.0, 2.0)[node_of[r]], noise=0.03)
    counts = run.counts(3)
    assert sum(counts[:3]) == pytest.approx(32, abs=1)
    assert max(counts[:3]) <= 11
    assert max(counts[3:]) <= 6


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(2, 16),
    per_rank=st.sampled_from([1, 2, 3, 4, 8, 16]),
    iterations=st.sampled_from([1, 2, 4, 10, 40]),
    noise=st.sampled_from([0.02, 0.1, 0.2]),
    drift=st.sampled_from([0.0, 0.02, 0.04]),
    seed=st.integers(0, 10),
)
def test_noise_alone_moves_nothing(
    ranks: int, per_rank: int, iterations: int, noise: float, drift: float, seed: int
) -> None:
    run = Run(
        partitions=ranks * per_rank, ranks=ranks, speed=slow(), groups=60, iterations=iterations, noise=noise,
        drift=drift, seed=seed,
    )  # fmt: skip
    assert run.moves == []


def test_what_comes_and_goes_is_not_run_after() -> None:
    run = Run(partitions=16, ranks=4, speed=lambda r, g: 2.0 if r == 1 and g // 4 % 2 else 1.0, groups=200)
    unguarded = 200 // 4  # changes of speed, each good for a move
    assert 0 < len(run.moves) < unguarded / 4


def test_a_rank_keeps_a_partition_however_slow_it_is() -> None:
    run = Run(partitions=8, ranks=4, speed=slow(3, by=100.0))
    assert run.counts(11)[3] == 1


def test_as_many_partitions_as_ranks_never_move() -> None:
    assert Run(partitions=4, ranks=4, speed=slow(3, by=9.0)).moves == []


def test_where_rows_cost_much_cuts_are_made_that_need_fewer() -> None:
    cheap = Run(partitions=100, ranks=4, speed=slow(1, 3, by=1.5), noise=0.01)
    dear = Run(partitions=100, ranks=4, speed=slow(1, 3, by=1.5), noise=0.01, local_sum_s=40.0)
    cheaps, dears = (most_rows(run.plans[-1], (0,) * 4) for run in (cheap, dear))
    assert dears < cheaps
    assert dear.slowest_s[0] > dear.slowest_s[-1] > cheap.slowest_s[-1]


@pytest.mark.parametrize(("reduce_scatter_s", "expected"), [(0.0, (0, 9, 16)), (1.0, (0, 8, 16))])
def test_rows_sent_between_nodes_are_weighed_against_the_gain(
    reduce_scatter_s: float, expected: tuple[int, ...]
) -> None:
    even = Assignment.even(16, 2)  # sends one row; another cut three
    balancer = Balancer(even, (0, 1))
    for _ in range(5):
        balancer.observe(even, np.array([[1.0, 0.0, 1e3], [1.25, 0.0, 1e3]]), reduce_scatter_s=reduce_scatter_s)
    assert balancer.assignment.starts == expected


def test_what_does_not_fit_into_memory_stays_and_less_is_taken() -> None:
    even = Assignment.even(16, 4)
    balancer = Balancer(even, (0,) * 4)
    pace = np.array([[1.0, 0.0, 20.0], [1.0, 0.0, 20.0], [2.0, 0.0, 20.0], [1.0, 0.0, 20.0]])
    assert balancer.observe(even, pace) is not None
    balancer.confine(even)
    assert balancer.assignment == even
    balancer.observe(even, pace)
    for rank in range(4):
        assert balancer.assignment.num_slots(rank) <= even.num_slots(rank)


@given(
    seconds=st.lists(st.floats(0.5, 4), min_size=1, max_size=4),
    more=st.integers(0, 6),
)
def test_counts_are_the_best_there_are(seconds: list[float], more: int) -> None:
    partitions = len(seconds) + more
    counts = best_counts(seconds, partitions)
    assert sum(counts) == partitions
    assert min(counts) >= 1
    every = (c for c in itertools.product(range(1, more + 2), repeat=len(seconds)) if sum(c) == partitions)
    best = min(max(n * s for n, s in zip(c, seconds, strict=True)) for c in every)
    assert max(n * s for n, s in zip(counts, seconds, strict=True)) == pytest.approx(best)


def test_costs_are_those_of_the_slowest_rank_and_the_fullest_node() -> None:
    assignment = Assignment(16, (0, 5, 10, 12, 16))
    costs = Costs((1.0, 1.0, 2.0, 1.0), (0, 0, 1, 1), row_s=0.1, sent_row_s=0.01)
    # Rows of the first node: 0-3, 4 and 5, 6-7, 8, 9; it sends 0-7 and 8-9, the second 10-11 and 12-15.
    assert costs.seconds(assignment) == pytest.approx(5 + 0.1 * 6 + 0.01 * 2)
    assert costs.busiest(Assignment(16, (0, 4, 8, 12, 16))) == 2


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.integers(2, 12),
    per_rank=st.integers(1, 9),
    seed=st.integers(0, 1000),
    nodes=st.integers(1, 3),
    local_sum_s=st.sampled_from([0.0, 0.5, 20.0]),
)
def test_whatever_is_proposed_is_an_assignment_of_all_partitions(
    ranks: int, per_rank: int, seed: int, nodes: int, local_sum_s: float
) -> None:
    random = np.random.default_rng(seed)
    partitions = ranks * per_rank + seed % ranks
    even = Assignment.even(partitions, ranks)
    balancer = Balancer(even, tuple(sorted(random.integers(min(nodes, ranks), size=ranks).tolist())))
    balancer._node_of = tuple(np.unique(balancer._node_of, return_inverse=True)[1].tolist())
    paces = np.stack([random.uniform(0.2, 5, ranks), np.zeros(ranks), np.full(ranks, 50.0)], axis=1)
    move = balancer.observe(even, paces, local_sum_s=local_sum_s, reduce_scatter_s=local_sum_s)
    found = balancer.assignment
    assert found.num_partitions == found.starts[-1] == partitions
    assert found.starts[0] == 0
    assert np.diff(found.starts).min() >= 1
    if move is not None:
        before, after = (np.diff(a.starts) * paces[:, 0] for a in (move.before, move.after))
        assert move.gain > 0
        if not local_sum_s:
            assert after.max() < before.max()


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_first_iteration_of_a_run_and_those_that_do_not_count_are_left_out() -> None:
    pace = Pace()
    for seconds, counts in ((100.0, True), (2.0, True), (4.0, True), (50.0, False), (9.0, True)):
        pace.add(seconds, 2)
        pace.add(seconds, 2)
        pace.end_iteration(counts=counts)
    np.testing.assert_array_equal(pace.take(), [2.0, 1.0, 3])
    np.testing.assert_array_equal(pace.take(), [np.nan, np.nan, 0])
    pace.add(3.0, 1)
    pace.end_iteration(counts=True)
    np.testing.assert_array_equal(pace.take(), [3.0, 0.0, 1])


def test_a_rank_that_had_no_part_in_a_group_is_as_fast_as_before() -> None:
    estimates = Estimates(2)
    estimates.learn(np.array([[1.0, 0.0, 5.0], [np.nan, np.nan, 0.0]]))
    assert not estimates.are_complete
    estimates.learn(np.array([[1.0, 0.0, 5.0], [3.0, 0.0, 5.0]]))
    estimates.learn(np.array([[1.0, 0.0, 5.0], [np.nan, np.nan, 0.0]]))
    estimates.learn(np.full((2, 3), [np.nan, np.nan, 0.0]))
    estimates.learn(np.array([[1.0, 0.0, 5.0], [np.nan, np.nan, 0.0]]))
    np.testing.assert_array_equal(estimates.seconds_per_sample, [1.0, 3.0])
    assert np.all(np.isfinite(estimates.errors))
