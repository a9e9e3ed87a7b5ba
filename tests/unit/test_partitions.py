"""How an epoch is cut into batches and a batch into partitions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.parameters import Assignment
from mpidl.scheduling.partitions import (
    assignment_for,
    batch_span,
    last_partitions,
    num_iterations,
    num_partitions,
    partition_span,
)
from tests.reference import cuts_of


def batches_of(num_samples: int, batch_size: int) -> list[tuple[int, int]]:
    return [batch_span(num_samples, batch_size, i) for i in range(num_iterations(num_samples, batch_size))]


@given(num_samples=st.integers(1, 3000), batch_size=st.integers(1, 300))
def test_an_epochs_batches_hold_every_sample_once(num_samples: int, batch_size: int) -> None:
    spans = batches_of(num_samples, batch_size)
    assert spans[0][0] == 0
    assert spans[-1][1] == num_samples
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    sizes = [stop - start for start, stop in spans]
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size + 1


@given(num_samples=st.integers(1, 3000), batch_size=st.integers(1, 300), partitions=st.integers(1, 40))
def test_no_batch_has_fewer_partitions_than_the_last(num_samples: int, batch_size: int, partitions: int) -> None:
    batch_size = max(batch_size, partitions)
    found = [num_partitions(b - a, batch_size, partitions) for a, b in batches_of(num_samples, batch_size)]
    assert found[-1] == min(found) == last_partitions(num_samples, batch_size, partitions)


@given(batches=st.integers(1, 50), batch_size=st.integers(2, 300))
def test_a_single_sample_that_is_left_over_joins_the_batch_before_it(batches: int, batch_size: int) -> None:
    spans = batches_of(batches * batch_size + 1, batch_size)
    assert len(spans) == batches
    assert spans[-1][1] - spans[-1][0] == batch_size + 1


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "sizes"),
    [
        (1, 8, [1]),
        (7, 8, [7]),
        (8, 8, [8]),
        (9, 8, [9]),
        (10, 8, [8, 2]),
        (17, 8, [8, 9]),
        (3, 1, [1, 1, 1]),
        (10**12 + 3, 10**12, [10**12, 3]),
    ],
)
def test_batches_by_hand(num_samples: int, batch_size: int, sizes: list[int]) -> None:
    assert [stop - start for start, stop in batches_of(num_samples, batch_size)] == sizes


@given(start=st.integers(0, 10**12), size=st.integers(1, 5000), partitions=st.integers(1, 100))
def test_partitions_tile_the_batch_and_differ_by_one_sample(start: int, size: int, partitions: int) -> None:
    spans = [partition_span((start, start + size), partitions, p) for p in range(partitions)]
    assert (spans[0][0], spans[-1][1]) == (start, start + size)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    sizes = [stop - first for first, stop in spans]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("partitions", [1, 2, 3, 8, 31, 70])
@pytest.mark.parametrize("samples_each", [1, 1.5, 2, 2.9, 3])
def test_a_shortened_batch_gives_no_partition_fewer_samples_than_it_needs(partitions: int, samples_each: float) -> None:
    batch_size = int(partitions * samples_each)
    for batch in range(1, batch_size + 2):
        check_shortened(batch, batch_size, partitions)


def check_shortened(batch: int, batch_size: int, partitions: int) -> None:
    cut = num_partitions(batch, batch_size, partitions)
    sizes = [b - a for a, b in (partition_span((0, batch), cut, p) for p in range(cut))]
    assert 1 <= cut <= partitions
    assert min(sizes) >= min(2, batch_size // partitions, batch)
    if cut < partitions:  # only as few as that takes
        assert batch // (cut + 1) < min(2, batch_size // partitions)


@given(extra=st.integers(0, 200), partitions=st.integers(1, 70))
def test_a_full_batch_and_one_with_the_sample_left_over_have_all_partitions(extra: int, partitions: int) -> None:
    batch_size = partitions + extra
    assert num_partitions(batch_size, batch_size, partitions) == partitions
    assert num_partitions(batch_size + 1, batch_size, partitions) == partitions


@settings(max_examples=60)
@given(data=st.data(), full=st.integers(1, 70), ranks=st.integers(1, 12), is_even=st.booleans())
def test_fewer_partitions_stay_in_order_and_never_need_more_rows_than_were_made(
    data: st.DataObject, full: int, ranks: int, is_even: bool
) -> None:
    # Rows are made for a full batch; a shortened one must do with them.
    planned = Assignment.even(full, ranks) if is_even else Assignment(full, tuple(cuts_of(data, full, ranks)))
    assert assignment_for(planned, full) == planned
    for fewer in range(1, full):
        shortened = assignment_for(planned, fewer)
        assert shortened.num_partitions == fewer
        assert [p for rank in range(ranks) for p in range(*shortened.range_of(rank))] == list(range(fewer))
        for rank in range(ranks):
            assert shortened.num_slots(rank) <= planned.num_slots(rank), (fewer, rank)
