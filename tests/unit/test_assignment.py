"""Who computes which partitions, and that all ranks expect what the others send."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.parameters import tree
from mpidl.parameters.assignment import Addends, Assignment, row_plan
from tests.reference import apply_steps, cuts_of, reference_sum, wide_values


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 16, 33, 70])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 64])
def test_even_ranges_tile_the_partitions_and_differ_by_one(total: int, world_size: int) -> None:
    assignment = Assignment.even(total, world_size)
    ranges = [assignment.range_of(rank) for rank in range(world_size)]
    assert [p for span in ranges for p in range(*span)] == list(range(total))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
    if total >= world_size:
        assert min(sizes) >= 1


def test_aligned_ranks_need_the_slots_of_their_subtree_only() -> None:
    assignment = Assignment.even(8, 4)
    assert [assignment.num_slots(rank) for rank in range(4)] == [2, 2, 2, 2]
    assert [Assignment.even(8, 8).num_slots(rank) for rank in range(8)] == [1] * 8
    assert Assignment.even(1, 3).num_slots(0) == 1  # holds nothing, keeps one row to send zeros from


@st.composite
def topologies(draw: Any) -> tuple[Assignment, tuple[int, ...]]:
    """Any contiguous assignment, ranks without partitions included, to ranks on any nodes."""
    node_sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    total = draw(st.integers(1, 40))
    node_of = tuple(node for node, size in enumerate(node_sizes) for _ in range(size))
    inner = draw(st.lists(st.integers(0, total), min_size=len(node_of) - 1, max_size=len(node_of) - 1))
    return Assignment(total, (0, *sorted(inner), total)), node_of


@settings(max_examples=100)
@given(topology=topologies())
def test_all_ranks_agree_on_what_each_node_sends(topology: tuple[Assignment, tuple[int, ...]]) -> None:
    assignment, node_of = topology
    plans = [row_plan(assignment, node_of, rank) for rank in range(len(node_of))]
    assert len({(plan.rows_of_node, plan.partitions_of_node) for plan in plans}) == 1
    for rank, plan in enumerate(plans):
        # What it sends is what others expect of its node.
        assert len(plan.sent) == plan.rows_of_node[node_of[rank]]
        first = node_of.index(node_of[rank])
        held = [p for r, node in enumerate(node_of) if node == node_of[rank] for p in range(*assignment.range_of(r))]
        assert held == list(range(*plan.partitions_of_node[node_of[rank]]))
        same_node = plans[first]
        assert plan.local == same_node.local
        assert [as_row_sum(each) for each in plan.sent] == [as_row_sum(each) for each in same_node.sent]
        assert as_row_sum(plan.total) == as_row_sum(same_node.total)
        slots = [(assignment.num_slots(first + local), slot) for local, slot in plan.local]
        assert all(slot < limit for limit, slot in slots)


def as_row_sum(addends: Addends) -> tree.RowSum:
    """The kernel's array of steps as a list again."""
    steps = [tuple(line[: 2 + OPERANDS[line[0]]]) for line in addends.steps.tolist()]
    assert addends.steps.dtype == np.int64
    assert addends.steps.flags.c_contiguous
    assert all(not any(line[len(step) :]) for line, step in zip(addends.steps.tolist(), steps, strict=True))
    return tree.RowSum(addends.rows, tuple(steps))


OPERANDS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 8: 8}
"""How many operands a step of each kind has."""


@settings(max_examples=60)
@given(topology=topologies())
def test_a_rank_s_rows_are_those_of_its_counter_with_the_last_partition_apart(
    topology: tuple[Assignment, tuple[int, ...]],
) -> None:
    assignment, node_of = topology
    for rank in range(len(node_of)):
        start, stop = assignment.range_of(rank)
        stack: list[tuple[int, int]] = []
        for partition in range(start, stop):
            stack.append((partition, partition + 1))
            for _ in range(tree.merges(assignment.num_partitions, start, partition) if partition < stop - 1 else 0):
                last = stack.pop()
                stack[-1] = (stack[-1][0], last[1])
        assert assignment.rows_of(rank) == tuple(stack)
        assert len(stack) <= assignment.num_slots(rank)


@settings(max_examples=100)
@given(topology=topologies(), seed=st.integers(0, 999))
def test_every_owner_on_every_node_gets_the_bits_of_the_recursion(
    topology: tuple[Assignment, tuple[int, ...]], seed: int
) -> None:
    assignment, node_of = topology
    total = assignment.num_partitions
    values = wide_values(total, seed)
    expected = reference_sum(values).tobytes()
    plans = {node: row_plan(assignment, node_of, node_of.index(node)) for node in set(node_of)}
    rows_of_rank = [
        [reference_sum(values[slice(*row)]) for row in assignment.rows_of(rank)] for rank in range(len(node_of))
    ]
    local, sent = {}, {}
    for node, plan in plans.items():
        first = node_of.index(node)
        local[node] = [rows_of_rank[first + local_rank][slot] for local_rank, slot in plan.local]
        sent[node] = [apply_steps(as_row_sum(each), local[node]) for each in plan.sent]
    for node, plan in plans.items():
        received = [row for other in sorted(plans) if other != node for row in sent[other]]
        assert apply_steps(as_row_sum(plan.total), [*local[node], *received]).tobytes() == expected


@settings(max_examples=50)
@given(data=st.data(), total=st.integers(1, 70), ranks=st.integers(1, 10))
def test_one_node_sends_nothing_it_has_not_merged(data: st.DataObject, total: int, ranks: int) -> None:
    assignment = Assignment(total, tuple(cuts_of(data, total, ranks)))
    plan = row_plan(assignment, (0,) * ranks, 0)
    assert plan.rows_of_node == (1,)
    assert len(plan.sent) == 1
    assert plan.total.rows == tuple(range(len(plan.local)))
    assert as_row_sum(plan.sent[0]) == as_row_sum(plan.total)
