"""Where tensors lie in the flat vector, and how it is cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidl.parameters.layout import (
    ALIGNMENT,
    MAX_CELLS,
    MIN_CELL_SIZE,
    FlatLayout,
    Shards,
    clip,
    merge_pieces,
    shards,
)
from mpidl.parameters.model import padded_runs

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=12)
BLOCK_SIZES = st.sampled_from([1, 7, 64, 4096])


def layout_of(shapes: list[tuple[int, ...]]) -> FlatLayout:
    return FlatLayout.of((f"tensor{i}", shape) for i, shape in enumerate(shapes))


@given(shapes=SHAPES)
def test_tensors_are_aligned_in_order_and_do_not_overlap(shapes: list[tuple[int, ...]]) -> None:
    layout = layout_of(shapes)
    assert [slot.shape for slot in layout.slots] == shapes
    assert [slot.size for slot in layout.slots] == [int(np.prod(shape)) for shape in shapes]
    assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
    assert layout.size % ALIGNMENT == 0
    ends = [0, *(slot.stop for slot in layout.slots)]
    begins = [*(slot.offset for slot in layout.slots), layout.size]
    assert all(0 <= begin - end < ALIGNMENT for end, begin in zip(ends, begins, strict=True))
    assert layout.num_elements == sum(math.prod(shape) for shape in shapes)


def test_a_tensor_of_no_dimension_has_one_element() -> None:
    assert layout_of([()]).slots[0].size == 1
    assert layout_of([]).size == 0


@given(shapes=SHAPES, cuts=st.lists(st.integers(0, 20000), max_size=6))
def test_unpadded_pieces_of_any_cuts_join_to_the_vector_without_gaps(
    shapes: list[tuple[int, ...]], cuts: list[int]
) -> None:
    layout = layout_of(shapes)
    padded = np.full(layout.size, -1)
    without_gaps = np.arange(layout.num_elements)
    first = 0
    for slot in layout.slots:
        padded[slot.offset : slot.stop] = without_gaps[first : first + slot.size]
        first += slot.size
    bounds = sorted([0, layout.size, *(min(cut, layout.size) for cut in cuts)])
    joined: list[int] = []
    for piece in itertools.pairwise(bounds):
        start, stop = layout.unpadded(piece)
        held = padded[slice(*piece)]
        assert held[held >= 0].tolist() == list(range(start, stop))
        tensors = list(layout.tensors_in(piece))
        assert all(slot.offset <= a < b <= slot.stop and piece[0] <= a and b <= piece[1] for slot, a, b in tensors)
        assert [i for _, a, b in tensors for i in padded[a:b]] == list(range(start, stop))
        joined += range(start, stop)
    assert joined == list(range(layout.num_elements))


@given(data=st.data(), shapes=SHAPES.filter(bool))
def test_padded_runs_of_groups_tile_the_vector_gaps_included(
    data: st.DataObject, shapes: list[tuple[int, ...]]
) -> None:
    layout = layout_of(shapes)
    in_first = {slot.name for slot in layout.slots if data.draw(st.booleans())}
    others = [slot.name for slot in layout.slots if slot.name not in in_first]
    runs = sorted([*padded_runs(layout, in_first), *padded_runs(layout, others)])
    covered = [i for run in runs for i in range(*run)]
    assert covered == list(range(layout.size))
    # In the layout's order, whatever the order of the names: pieces are joined where they touch.
    assert padded_runs(layout, reversed(others)) == sorted(padded_runs(layout, others))


@pytest.mark.parametrize(
    "change",
    [
        [("a", (2, 3)), ("b", (5,))],
        [("a", (3, 2)), ("c", (5,))],
        [("a", (3, 2)), ("b", (4,))],
        [("a", (3, 2))],
        [("b", (5,)), ("a", (3, 2))],
        [("a", (6,)), ("b", (5,))],
    ],
    ids=["shape", "name", "size", "fewer", "order", "dimensions"],
)
def test_the_digest_changes_with_names_shapes_and_order(change: list[tuple[str, tuple[int, ...]]]) -> None:
    tensors = [("a", (3, 2)), ("b", (5,))]
    assert FlatLayout.of(tensors).digest() == FlatLayout.of([(n, list(s)) for n, s in tensors]).digest()
    assert FlatLayout.of(tensors).digest() != FlatLayout.of(change).digest()


@settings(max_examples=300)
@given(size=st.integers(0, 400_000), world_size=st.integers(1, 70), block_size=BLOCK_SIZES)
def test_shards_tile_the_vector_at_block_multiples_and_differ_by_one_block(
    size: int, world_size: int, block_size: int
) -> None:
    pieces = shards(size, world_size, block_size)
    assert len(pieces) == world_size
    assert pieces[0][0] == 0
    assert pieces[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert all(cut % block_size == 0 or cut == size for piece in pieces for cut in piece)
    blocks = [-(-(stop - start) // block_size) for start, stop in pieces]
    assert max(blocks) - min(blocks) <= 1
    num_blocks = -(-size // block_size)
    assert sum(count == 0 for count in blocks) == max(0, world_size - num_blocks)


# --- cells ------------------------------------------------------------------------------------------------------------

MANY_CELLS = 200 * MIN_CELL_SIZE
DEALT = st.builds(
    Shards.of,
    st.integers(0, 400_000) | st.integers(0, MANY_CELLS),
    st.integers(1, 70),
    st.sampled_from([64, 4096]),
    num_cells=st.none() | st.integers(1, 40),
)
"""Vectors of less than a block to more than the most cells, dealt out to any number of ranks."""


def pieces_in_order(dealt: Shards) -> list[tuple[int, int]]:
    """All ranks' pieces, cell by cell."""
    return [pieces[cell] for cell in range(len(dealt.cells)) for pieces in dealt.pieces]


@settings(max_examples=100)
@given(dealt=DEALT)
def test_cells_tile_the_vector_and_pieces_tile_the_cells(dealt: Shards) -> None:
    size = dealt.cells[-1][1]
    assert dealt.cells[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(dealt.cells))
    assert all(len(pieces) == len(dealt.cells) for pieces in dealt.pieces)
    for cell, (start, stop) in enumerate(dealt.cells):
        pieces = [of_rank[cell] for of_rank in dealt.pieces]
        assert (pieces[0][0], pieces[-1][1]) == (start, stop)
        assert all(a[1] == b[0] and a[0] <= a[1] for a, b in itertools.pairwise(pieces))
    assert sum(dealt.size_of(rank) for rank in range(len(dealt.pieces))) == size


@settings(max_examples=100)
@given(
    size=st.integers(0, 400_000) | st.integers(0, MANY_CELLS),
    world_size=st.integers(1, 70),
    block_size=BLOCK_SIZES,
    num_cells=st.none() | st.integers(1, 40),
)
def test_all_cuts_are_block_multiples_and_ranks_get_alike_of_all_cells_but_the_last(
    size: int, world_size: int, block_size: int, num_cells: int | None
) -> None:
    dealt = Shards.of(size, world_size, block_size, num_cells=num_cells)
    assert dealt.cells[-1][1] == size
    assert all(cut % block_size == 0 or cut == size for piece in pieces_in_order(dealt) for cut in piece)
    full = [{stop - start for start, stop in pieces[:-1]} for pieces in dealt.pieces]
    assert all(len(sizes) <= 1 for sizes in full)  # a rank's pieces are as long in every cell
    blocks = [(stop - start) // block_size for sizes in dealt.pieces for start, stop in sizes[:-1]]
    assert not blocks or max(blocks) - min(blocks) <= 1
    if num_cells is None:
        assert not blocks or max(blocks) == min(blocks) >= 1
        assert all(stop - start >= min(MIN_CELL_SIZE, size) for start, stop in dealt.cells[:-1])
        assert len(dealt.cells) <= MAX_CELLS
    else:
        assert len(dealt.cells) <= num_cells


def test_large_vectors_have_as_many_cells_as_there_may_be_and_small_ones_one() -> None:
    assert len(Shards.of(4 * MAX_CELLS * MIN_CELL_SIZE, 4, 4096).cells) == MAX_CELLS
    assert len(Shards.of(5 * MIN_CELL_SIZE + 16, 4, 4096).cells) == 6
    assert Shards.of(MIN_CELL_SIZE, 4, 4096).cells == ((0, MIN_CELL_SIZE),)
    assert Shards.of(0, 3, 4096).cells == ((0, 0),)
    assert Shards.of(3 * MIN_CELL_SIZE, 4, 4096, num_cells=1).pieces == tuple(
        (piece,) for piece in shards(3 * MIN_CELL_SIZE, 4, 4096)
    )


@settings(max_examples=100)
@given(dealt=DEALT, slice_blocks=st.integers(1, 70))
def test_slices_stand_one_behind_the_other_in_the_shard_and_never_leave_a_cell(
    dealt: Shards, slice_blocks: int
) -> None:
    most = 4096 * slice_blocks
    for rank in {0, len(dealt.pieces) // 2, len(dealt.pieces) - 1}:
        slices = dealt.slices(rank, most)
        assert [each.offset for each in slices] == [0, *itertools.accumulate(each.size for each in slices)][:-1]
        assert sum(each.size for each in slices) == dealt.size_of(rank)
        assert all(0 < each.size <= most for each in slices)
        assert all(each.own == slice(each.offset, each.offset + each.stop - each.start) for each in slices)
        for start, stop in dealt.pieces[rank]:
            inside = [each for each in slices if start <= each.start < stop]
            cuts = [each.start for each in inside] + [stop]
            assert cuts == [*range(start, stop, most), stop]
            assert all(each.stop == cut for each, cut in zip(inside, cuts[1:], strict=True))
        assert merge_pieces((each.start, each.stop) for each in slices) == dealt.runs(rank)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=12),
)
def test_merged_pieces_hold_the_same_elements_and_do_not_touch(lengths: list[tuple[int, int]]) -> None:
    pieces, position = [], 0
    for gap, length in lengths:
        pieces.append((position + gap, position + gap + length))
        position += gap + length
    merged = merge_pieces(pieces)
    assert [i for piece in merged for i in range(*piece)] == [i for piece in pieces for i in range(*piece)]
    assert all(start < stop for start, stop in merged)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))


@given(st.tuples(*[st.integers(0, 30)] * 4))
def test_a_clipped_piece_holds_what_is_in_both(numbers: tuple[int, int, int, int]) -> None:
    piece, bounds = (min(numbers[:2]), max(numbers[:2])), (min(numbers[2:]), max(numbers[2:]))
    start, stop = clip(piece, bounds)
    assert bounds[0] <= start <= stop <= bounds[1]
    assert set(range(start, stop)) == set(range(*piece)) & set(range(*bounds))
