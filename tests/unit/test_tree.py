"""The fixed tree over partitions: who holds what, and that the sum has the reference recursion's bits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.parameters.tree import Range, RowSum, cover, merges, middle, num_slots, sums
from tests.reference import KINDS, apply_steps, cuts_of, reference_sum, split, wide_values

MAX_PARTITIONS = 70
ALL_TOTALS = [range(1, 36), range(36, MAX_PARTITIONS + 1)]
PARTITIONS = st.integers(1, MAX_PARTITIONS)


def nodes_under(start: int, stop: int) -> set[Range]:
    if stop - start == 1:
        return {(start, stop)}
    mid = split(start, stop)
    return {(start, stop)} | nodes_under(start, mid) | nodes_under(mid, stop)


def any_range(generator: random.Random, total: int) -> Range:
    start, stop = sorted(generator.choices(range(total + 1), k=2))
    return start, stop


def test_a_node_splits_after_the_largest_power_of_two_smaller_than_its_length() -> None:
    for start in (0, 3, 64):
        for length in range(2, 140):
            assert middle(start, start + length) == split(start, start + length)


@pytest.mark.parametrize("totals", ALL_TOTALS)
def test_rows_tile_a_range_and_are_maximal(totals: range) -> None:
    for total in totals:
        check_cover(total)


def check_cover(total: int) -> None:
    nodes, generator = nodes_under(0, total), random.Random(total)
    ranges = [(0, total), (0, total - 1), (1, total), (total // 2, total // 2)]
    ranges += [any_range(generator, total) for _ in range(30)]
    for start, stop in ranges:
        rows = cover(total, start, stop)
        assert [p for row in rows for p in range(*row)] == list(range(start, stop))
        assert set(rows) <= nodes
        for row in rows:
            larger = [node for node in nodes if node[0] <= row[0] and row[1] <= node[1] and node != row]
            assert not any(start <= node[0] and node[1] <= stop for node in larger)


@pytest.mark.parametrize("total", [1, 2, 4, 8, 16, 32, 64])
def test_aligned_ranges_have_one_row(total: int) -> None:
    for ranks in (1, 2, 4, total):
        if total % ranks == 0:
            size = total // ranks
            assert all(cover(total, size * r, size * (r + 1)) == ((size * r, size * (r + 1)),) for r in range(ranks))


def test_another_order_of_addition_gives_other_bits() -> None:
    # Else the tests below could not fail.
    values = wide_values(37, 0)
    one_by_one = values[0]
    for value in values[1:]:
        one_by_one = one_by_one + value
    reversed_pairs = reference_sum(values[::-1])
    assert (one_by_one != reference_sum(values)).any()
    assert (reversed_pairs != reference_sum(values)).any()


@settings(max_examples=120)
@given(data=st.data(), total=PARTITIONS, ranks=st.integers(1, 12), nodes=st.integers(1, 5), seed=st.integers(0, 999))
def test_node_first_then_owner_gives_the_bits_of_the_recursion(
    data: st.DataObject, total: int, ranks: int, nodes: int, seed: int
) -> None:
    values = wide_values(total, seed)
    starts = cuts_of(data, total, ranks)
    node_cuts = cuts_of(data, ranks, nodes)
    rows_of_owner: list[tuple[Range, Any]] = []
    for first, behind in itertools.pairwise(node_cuts):
        ranges = [row for rank in range(first, behind) for row in cover(total, starts[rank], starts[rank + 1])]
        rows = [reference_sum(values[slice(*row)]) for row in ranges]
        left = sums(total, ranges)
        # What other nodes expect without being told: the maximal nodes of the node's whole span.
        sent = cover(total, starts[first], starts[behind])
        assert len(left) == len(sent)
        for row_sum, row in zip(left, sent, strict=True):
            added = apply_steps(row_sum, rows)
            assert added.tobytes() == reference_sum(values[slice(*row)]).tobytes()
            rows_of_owner.append((row, added))
    data.draw(st.randoms(use_true_random=False)).shuffle(rows_of_owner)
    (whole,) = sums(total, [row for row, _ in rows_of_owner])
    assert apply_steps(whole, [row for _, row in rows_of_owner]).tobytes() == reference_sum(values).tobytes()


@settings(max_examples=150)
@given(data=st.data(), total=PARTITIONS)
def test_every_row_is_added_once_and_sums_stand_left_to_right(data: st.DataObject, total: int) -> None:
    cuts = cuts_of(data, total, data.draw(st.integers(1, 10)))
    ranges = [row for a, b in itertools.pairwise(cuts) for row in cover(total, a, b)]
    kept = [row for row in ranges if data.draw(st.booleans())]
    left = sums(total, kept)
    assert sorted(row for row_sum in left for row in row_sum.rows) == list(range(len(kept)))
    spans = []
    for row_sum in left:
        rows = [kept[i] for i in row_sum.rows]
        assert all(one[1] == other[0] for one, other in itertools.pairwise(rows))
        spans.append((rows[0][0], rows[-1][1]))
        check_steps(row_sum)
    assert nodes_under(0, total).issuperset(spans)
    assert spans == sorted(spans)


def check_steps(row_sum: RowSum) -> None:
    """Nothing is read before it is written or after it is used, nothing is written that is still wanted."""
    num_rows = len(row_sum.rows)
    wanted = set(range(num_rows))
    for kind, into, *operands in row_sum.steps:
        assert len(operands) == KINDS[kind].__code__.co_argcount
        assert len(set(operands)) == len(operands)
        assert set(operands) <= wanted
        assert into not in wanted  # so it is no operand of its own step either
        assert into >= num_rows  # rows are read only
        wanted = wanted - set(operands) | {into}
    assert len(wanted) == 1
    # The kernel has as many scratch rows as steps.
    assert all(into < num_rows + len(row_sum.steps) for _, into, *_ in row_sum.steps)


def covers(total: int) -> Iterator[tuple[list[Range], list[RowSum]]]:
    """Rows of many spreads of the partitions that cover them all, and how they are added."""
    generator = random.Random(total)
    for parts in (total, 1, 2, 3, 4, generator.randint(1, total), generator.randint(1, total)):
        starts = [0, *sorted(generator.choices(range(total + 1), k=parts - 1)), total]
        if parts == total:
            starts = list(range(total + 1))
        rows = [row for a, b in itertools.pairwise(starts) for row in cover(total, a, b)]
        yield rows, sums(total, rows)


@pytest.mark.parametrize("totals", ALL_TOTALS)
def test_the_steps_of_any_spread_give_the_bits_of_the_recursion(totals: range) -> None:
    for total in totals:
        values = wide_values(total, total)
        for rows, (whole,) in covers(total):
            check_steps(whole)
            added = apply_steps(whole, [reference_sum(values[slice(*row)]) for row in rows])
            assert added.tobytes() == reference_sum(values).tobytes()


def test_every_kind_of_step_occurs_and_scratch_is_used_again() -> None:
    found = [whole for total in range(1, MAX_PARTITIONS + 1) for _, (whole,) in covers(total)]
    assert {step[0] for row_sum in found for step in row_sum.steps} == set(KINDS)
    scratch = [len({step[1] for step in row_sum.steps}) for row_sum in found]
    assert any(count < len(row_sum.steps) for count, row_sum in zip(scratch, found, strict=True))


def test_eight_rows_are_one_step_and_one_row_is_a_copy() -> None:
    assert sums(8, [(i, i + 1) for i in range(8)])[0].steps == ((8, 8, 0, 1, 2, 3, 4, 5, 6, 7),)
    assert sums(8, [(0, 8)])[0].steps == ((1, 1, 0),)


def test_rows_with_a_gap_stay_apart() -> None:
    assert [row_sum.rows for row_sum in sums(8, [(0, 2), (4, 8)])] == [(0,), (1,)]
    assert [row_sum.rows for row_sum in sums(8, [(3, 4), (6, 8), (0, 2)])] == [(2,), (0,), (1,)]
    assert sums(8, []) == []


@pytest.mark.parametrize("totals", ALL_TOTALS)
def test_a_binary_counter_of_rows_ends_with_the_cover_and_stays_within_its_slots(totals: range) -> None:
    for total in totals:
        check_counter(total)


def check_counter(total: int) -> None:
    generator = random.Random(total)
    values, nodes = wide_values(total, total), nodes_under(0, total)
    ranges = [(0, total), *(any_range(generator, total) for _ in range(8))]
    for start, stop in ranges:
        stack: list[tuple[Range, Any]] = []
        most = 0
        for partition in range(start, stop):
            stack.append(((partition, partition + 1), values[partition]))
            most = max(most, len(stack))
            for _ in range(merges(total, start, partition)):
                (right, right_row), (left, left_row) = stack.pop(), stack.pop()
                assert left[1] == right[0]
                assert (left[0], right[1]) in nodes
                stack.append(((left[0], right[1]), left_row + right_row))
        assert tuple(row for row, _ in stack) == cover(total, start, stop)
        assert num_slots(total, start, stop) == max(most, 1)
        for row, held in stack:
            assert held.tobytes() == reference_sum(values[slice(*row)]).tobytes()


@settings(max_examples=200)
@given(data=st.data(), total=st.integers(1, 5000))
def test_slots_grow_with_the_logarithm_of_the_partitions(data: st.DataObject, total: int) -> None:
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, min(total, start + 64)))
    assert 1 <= num_slots(total, start, stop) <= 2 * (stop - start).bit_length()
    assert len(cover(total, start, stop)) <= 2 * total.bit_length()
