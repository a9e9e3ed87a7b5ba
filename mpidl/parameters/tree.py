"""The fixed tree in which partitions are added up. Pure: plain values in, plain values out.

The tree over partitions [0, P): a range longer than one splits at its start plus the largest power of two smaller
than its length. A *range* here is a pair (start, stop) of partition numbers. A *row* is the sum over one node of the
tree. Whoever holds a contiguous range of partitions holds the maximal nodes inside it, its `cover`; whoever receives
rows adds them by `additions`. Because only nodes of one fixed tree are ever formed, the sum has the same bits however
the partitions were spread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

Range = tuple[int, int]


def middle(start: int, stop: int) -> int:
    """Where the tree node (start, stop), longer than one, splits."""
    length = stop - start
    return start + (1 << ((length - 1).bit_length() - 1))


def is_node(num_partitions: int, start: int, stop: int) -> bool:
    """Whether (start, stop) is a node of the tree over [0, num_partitions)."""
    low, high = 0, num_partitions
    while (low, high) != (start, stop):
        if high - low <= 1 or start < low or stop > high:
            return False
        split = middle(low, high)
        low, high = (low, split) if stop <= split else (split, high)
    return stop > start


@functools.lru_cache(maxsize=4096)
def cover(num_partitions: int, start: int, stop: int) -> tuple[Range, ...]:
    """The maximal tree nodes inside [start, stop), left to right; none for an empty range."""
    found: list[Range] = []

    def visit(low: int, high: int) -> None:
        if high <= start or stop <= low:
            return
        if start <= low and high <= stop:
            found.append((low, high))
            return
        split = middle(low, high)
        visit(low, split)
        visit(split, high)

    visit(0, num_partitions)
    return tuple(found)


def additions(num_partitions: int, rows: Sequence[Range]) -> tuple[list[tuple[int, int]], list[int]]:
    """The (into, from) additions that merge rows as far as the tree allows.

    Args:
        num_partitions: P of the tree.
        rows: disjoint tree nodes in any order; the indices below point into this sequence.

    Returns:
        The additions in an order that respects the tree (children before parents), and the indices of the rows
        that are left, left to right. When the rows cover [0, P), one is left and holds the sum.
    """
    index = {row: i for i, row in enumerate(rows)}
    ordered = sorted(rows)
    pairs: list[tuple[int, int]] = []
    left_over: list[int] = []

    def visit(low: int, high: int, inside: Sequence[Range]) -> int | None:
        if (low, high) in index:
            return index[low, high]
        if not inside or high - low == 1:
            return None
        split = middle(low, high)
        left = visit(low, split, [row for row in inside if row[1] <= split])
        right = visit(split, high, [row for row in inside if row[0] >= split])
        if left is not None and right is not None:
            pairs.append((left, right))
            return left
        left_over.extend(i for i in (left, right) if i is not None)
        return None

    root = visit(0, num_partitions, ordered)
    if root is not None:
        left_over.append(root)
    left_over.sort(key=lambda i: rows[i])
    return pairs, left_over


def merges(num_partitions: int, start: int, partition: int) -> int:
    """How often the holder of [start, ...) may merge its two newest rows once `partition` is done.

    A rank that computes its partitions in order keeps their sums like the digits of a binary counter: a new row for
    each partition, and whenever the two newest rows are the children of one tree node they become one.
    """
    before = list(cover(num_partitions, start, partition))
    after = cover(num_partitions, start, partition + 1)
    return len(before) + 1 - len(after)


@functools.lru_cache(maxsize=4096)
def num_slots(num_partitions: int, start: int, stop: int) -> int:
    """Rows that the holder of [start, stop) needs at the same time, at least one."""
    deepest = max((len(cover(num_partitions, start, p)) + 1 for p in range(start, stop)), default=1)
    return max(deepest, 1)
