"""The fixed tree in which partitions are added up. Pure: plain values in, plain values out.

The tree over partitions [0, P): a range longer than one splits at its start plus the largest power of two smaller
than its length. A *range* here is a pair (start, stop) of partition numbers. A *row* is the sum over one node of the
tree. Whoever holds a contiguous range of partitions holds the maximal nodes inside it, its `cover`; whoever receives
rows adds them by `sums`. Because only nodes of one fixed tree are ever formed, the sum has the same bits however
the partitions were spread.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

Range = tuple[int, int]


def middle(start: int, stop: int) -> int:
    """Where the tree node (start, stop), longer than one, splits."""
    length = stop - start
    return start + (1 << ((length - 1).bit_length() - 1))


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


@dataclasses.dataclass(frozen=True)
class RowSum:
    """How the rows under one tree node are added up."""

    rows: tuple[int, ...]
    """Which rows, left to right."""
    steps: tuple[tuple[int, ...], ...]
    """(kind, into, operands...) as `mpidl.kernels.add_rows` takes them: operand i < len(rows) is rows[i]."""


Expression = int | tuple["Expression", "Expression"]
"""A row, or the sum of two expressions."""


def sums(num_partitions: int, rows: Sequence[Range]) -> list[RowSum]:
    """How to add rows up as far as the tree allows: one sum for each row that is left, left to right.

    Args:
        num_partitions: P of the tree.
        rows: disjoint tree nodes in any order; `RowSum.rows` points into this sequence. When they cover [0, P), one
            sum is left, that of all.
    """
    index = {row: i for i, row in enumerate(rows)}
    left_over: list[tuple[Range, Expression]] = []

    def visit(low: int, high: int, inside: Sequence[Range]) -> Expression | None:
        if (low, high) in index:
            return index[low, high]
        if not inside or high - low == 1:
            return None
        split = middle(low, high)
        left = visit(low, split, [row for row in inside if row[1] <= split])
        right = visit(split, high, [row for row in inside if row[0] >= split])
        if left is not None and right is not None:
            return left, right
        left_over.extend(
            ((start, stop), part)
            for start, stop, part in ((low, split, left), (split, high, right))
            if part is not None
        )
        return None

    whole = visit(0, num_partitions, rows)
    if whole is not None:
        left_over.append(((0, num_partitions), whole))
    return [_compile(expression) for _, expression in sorted(left_over, key=lambda entry: entry[0])]


def _rows_of(expression: Expression) -> tuple[int, ...]:
    if isinstance(expression, int):
        return (expression,)
    return _rows_of(expression[0]) + _rows_of(expression[1])


def _compile(expression: Expression) -> RowSum:
    """Steps for an expression, each over as many operands as one of the kernel's loops takes."""
    rows = _rows_of(expression)
    operand = {row: i for i, row in enumerate(rows)}
    steps: list[tuple[int, ...]] = []
    free: list[int] = []
    num_scratch = 0

    def emit(part: Expression) -> int:
        """Append the steps that compute a part; returns the operand that holds it."""
        nonlocal num_scratch
        if isinstance(part, int):
            return operand[part]
        kind, parts = _kind_of(part)
        operands = [emit(each) for each in parts]
        if not free:
            free.append(len(rows) + num_scratch)
            num_scratch += 1
        into = free.pop()
        # Only now: a step must not write what it reads.
        free.extend(i for i in operands if i >= len(rows))
        steps.append((kind, into, *operands))
        return into

    if isinstance(expression, int):
        steps.append((1, len(rows), 0))
    else:
        emit(expression)
    return RowSum(rows, tuple(steps))


def _kind_of(part: tuple[Expression, Expression]) -> tuple[int, tuple[Expression, ...]]:
    """The largest of the kernel's loops that fits the top of an expression, and its operands."""
    left, right = part
    if isinstance(left, int) and isinstance(right, int):
        return 2, part
    if isinstance(left, int):
        return 5, (left, *right)  # type: ignore[misc]  # right is a pair
    if isinstance(right, int):
        return 3, (*left, right)
    quarters = (*left, *right)
    if all(isinstance(quarter, tuple) for quarter in quarters):
        return 8, tuple(each for quarter in quarters for each in quarter)  # type: ignore[union-attr]
    return 4, quarters


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
