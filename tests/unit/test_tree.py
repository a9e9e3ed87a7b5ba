"""The fixed tree over partitions: who holds what, and that the sum has the reference recursion's bits."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.parameters.tree import Range, additions, cover, is_node, merges, middle, num_slots
from tests.reference import cuts_of, reference_sum, split, wide_values

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


def add(rows: list[Any], pairs: list[tuple[int, int]]) -> None:
    for into, other in pairs:
        rows[into] = rows[into] + rows[other]


def test_a_node_splits_after_the_largest_power_of_two_smaller_than_its_length() -> None:
    for start in (0, 3, 64):
        for length in range(2, 140):
            assert middle(start, start + length) == split(start, start + length)


def test_the_nodes_are_those_of_the_recursion_and_no_others() -> None:
    for total in [*range(1, 20), 31, 32, 33, 63, 64, 65, 70]:
        pairs = {(a, b) for a in range(total + 1) for b in range(total + 2)}
        assert {pair for pair in pairs if is_node(total, *pair)} == nodes_under(0, total)


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
        pairs, left = additions(total, ranges)
        add(rows, pairs)
        # What other nodes expect without being told: the maximal nodes of the node's whole span.
        sent = cover(total, starts[first], starts[behind])
        assert len(left) == len(sent)
        assert [ranges[i][0] for i in left] == [row[0] for row in sent]
        for index, row in zip(left, sent, strict=True):
            assert rows[index].tobytes() == reference_sum(values[slice(*row)]).tobytes()
            rows_of_owner.append((row, rows[index]))
    data.draw(st.randoms(use_true_random=False)).shuffle(rows_of_owner)
    at_owner = [row for _, row in rows_of_owner]
    pairs, left = additions(total, [row for row, _ in rows_of_owner])
    add(at_owner, pairs)
    assert len(left) == 1
    assert at_owner[left[0]].tobytes() == reference_sum(values).tobytes()


@settings(max_examples=150)
@given(data=st.data(), total=PARTITIONS)
def test_additions_never_use_a_row_again_that_was_added_to_another(data: st.DataObject, total: int) -> None:
    cuts = cuts_of(data, total, data.draw(st.integers(1, 10)))
    ranges = [row for a, b in itertools.pairwise(cuts) for row in cover(total, a, b)]
    kept = [row for row in ranges if data.draw(st.booleans())]
    pairs, left = additions(total, kept)
    gone: set[int] = set()
    for into, other in pairs:
        assert into != other
        assert not {into, other} & gone
        gone.add(other)
    assert sorted([*left, *gone]) == list(range(len(kept)))
    assert [kept[i] for i in left] == sorted(kept[i] for i in left)


def test_rows_with_a_gap_stay_apart() -> None:
    assert additions(8, [(0, 2), (4, 8)]) == ([], [0, 1])
    assert additions(8, [(3, 4), (6, 8), (0, 2)]) == ([], [2, 0, 1])
    assert additions(8, []) == ([], [])


@pytest.mark.parametrize("totals", ALL_TOTALS)
def test_a_binary_counter_of_rows_ends_with_the_cover_and_stays_within_its_slots(totals: range) -> None:
    for total in totals:
        check_counter(total)


def check_counter(total: int) -> None:
    generator = random.Random(total)
    values = wide_values(total, total)
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
                assert is_node(total, left[0], right[1])
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
