"""Adding rows of a vector in one fixed order, at the speed of memory.

`mpidl.parameters.tree` says in which order: steps over operands, of which the first are the rows and the others scratch
space of the kernel's own. All steps are applied to one short chunk of all rows before the next chunk is touched: every
row is read from memory once and never written, what lies between two steps stays in the first cache, and the processor
loads the next chunk while it works on this one (with chunks of 4,096 elements it did not, and 4 rows took 1.6 times as
long). A step adds up to eight operands in one loop. The inner loops run over plain one-dimensional arrays that do not
overlap: two-dimensional indexing cost a factor of four to seven, and LLVM vectorises nothing that may overlap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import carray

from mpidl.kernels._jit import float32_pointer, float64, inlined, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_SIZE = 4096
"""Elements in one block: the unit of square sums and of shard cuts."""

CHUNK_SIZE = 256
"""Elements that all steps are applied to before the next ones are read; as many running sums of squares."""

KINDS = {1: "a", 2: "a + b", 3: "(a + b) + c", 5: "a + (b + c)", 4: "(a + b) + (c + d)", 8: "eight operands in pairs"}
"""What a step computes, by its kind."""

MAX_OPERANDS = 8


@inlined
def _view(address: Any, size: int) -> Any:
    """`size` float32 at an address. Slices would do as well, but count references, which takes as long as a chunk."""
    return carray(float32_pointer(address), (size,))


@inlined
def _address(rows: Any, scratch: int, index: int, first: int) -> Any:
    """Where a row's elements from `first` on are, or a scratch chunk."""
    if index < rows.shape[0]:
        return rows[index] + first * 4
    return scratch + (index - rows.shape[0]) * CHUNK_SIZE * 4


def _make_apply(divides: bool) -> Any:
    """A step on one chunk: the sum of its operands; or that divided, with each quotient's square added to its lane."""

    @inlined
    def finish(total: Any, divisor: Any, squares: Any, i: int) -> Any:
        if not divides:
            return total
        quotient = total / divisor
        # Numba's float() of a float32 is a float32: the products would be rounded, and overflow from 1.8e19 on.
        squares[i] += float64(quotient) * float64(quotient)
        return quotient

    @inlined
    def apply(
        rows: Any, steps: Any, k: int, scratch: int, first: int, size: int, out: Any, divisor: Any, squares: Any
    ) -> None:
        kind = steps[k, 0]
        a = _view(_address(rows, scratch, steps[k, 2], first), size)
        if kind == 1:
            for i in range(size):
                out[i] = finish(a[i], divisor, squares, i)
            return
        b = _view(_address(rows, scratch, steps[k, 3], first), size)
        if kind == 2:
            for i in range(size):
                out[i] = finish(a[i] + b[i], divisor, squares, i)
            return
        c = _view(_address(rows, scratch, steps[k, 4], first), size)
        if kind == 3:
            for i in range(size):
                out[i] = finish((a[i] + b[i]) + c[i], divisor, squares, i)
            return
        if kind == 5:
            for i in range(size):
                out[i] = finish(a[i] + (b[i] + c[i]), divisor, squares, i)
            return
        d = _view(_address(rows, scratch, steps[k, 5], first), size)
        if kind == 4:
            for i in range(size):
                out[i] = finish((a[i] + b[i]) + (c[i] + d[i]), divisor, squares, i)
            return
        e = _view(_address(rows, scratch, steps[k, 6], first), size)
        f = _view(_address(rows, scratch, steps[k, 7], first), size)
        g = _view(_address(rows, scratch, steps[k, 8], first), size)
        h = _view(_address(rows, scratch, steps[k, 9], first), size)
        for i in range(size):
            total = ((a[i] + b[i]) + (c[i] + d[i])) + ((e[i] + f[i]) + (g[i] + h[i]))
            out[i] = finish(total, divisor, squares, i)

    return apply


_add = _make_apply(divides=False)
_add_and_divide = _make_apply(divides=True)


@inlined
def _add_all_but_last(rows: Any, steps: Any, scratch: int, first: int, size: int, lanes: Any) -> None:
    for k in range(steps.shape[0] - 1):
        into = _view(_address(rows, scratch, steps[k, 1], 0), size)
        _add(rows, steps, k, scratch, first, size, into, 1, lanes)


@inlined
def _total(lanes: Any) -> Any:
    """Add the lanes by halves."""
    half = CHUNK_SIZE // 2
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[half + i]
        half //= 2
    return lanes[0]


@kernel("void(int64[::1], int64[:, ::1], float32[::1])")
def add_rows(rows: NDArray[np.int64], steps: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Add rows up.

    Args:
        rows: int64, (num_rows,), at least one; addresses of float32 rows as long as `out`; read only.
        steps: int64, (num_steps, 2 + MAX_OPERANDS), C-contiguous, at least one: (kind, into, operands...), in the order
            to add. An operand below num_rows is a row, the others are scratch; `into` is scratch and none of the
            step's operands. Unused operands are 0.
        out: float32, (num_elements,); overwritten with the last step's result; it overlaps no row.
    """
    num_elements = out.shape[0]
    scratch = np.empty(steps.shape[0] * CHUNK_SIZE, np.float32)
    lanes = np.empty(0, np.float64)
    last = steps.shape[0] - 1
    for first in range(0, num_elements, CHUNK_SIZE):
        size = min(CHUNK_SIZE, num_elements - first)
        _add_all_but_last(rows, steps, scratch.ctypes.data, first, size, lanes)
        into = _view(out.ctypes.data + first * 4, size)
        _add(rows, steps, last, scratch.ctypes.data, first, size, into, 1, lanes)


@kernel("void(int64[::1], int64[:, ::1], float32, float32[::1], float64[::1])")
def mean_rows(
    rows: NDArray[np.int64],
    steps: NDArray[np.int64],
    divisor: float,
    out: NDArray[np.float32],
    squares: NDArray[np.float64],
) -> None:
    """Add rows up, divide the sum, and add up the squares of the quotients block by block.

    Args:
        rows: as in `add_rows`.
        steps: as in `add_rows`.
        divisor: what the sum is divided by (a true division: x / 3 is not x * (1 / 3)).
        out: float32, (num_elements,); overwritten; it is one of the rows (as it was before), or overlaps none.
        squares: float64, (ceil(num_elements / BLOCK_SIZE),); overwritten with each block's sum of squares, the
            same bits on every rank count, and finite exactly if all of the block's elements are.
    """
    num_elements = out.shape[0]
    scratch = np.empty(steps.shape[0] * CHUNK_SIZE, np.float32)
    lanes = np.empty(CHUNK_SIZE, np.float64)
    last = steps.shape[0] - 1
    is_row = False
    for row in rows:
        is_row |= row == out.ctypes.data
    for block in range(squares.shape[0]):
        lanes[:] = 0.0
        stop = min((block + 1) * BLOCK_SIZE, num_elements)
        for first in range(block * BLOCK_SIZE, stop, CHUNK_SIZE):
            size = min(CHUNK_SIZE, stop - first)
            _add_all_but_last(rows, steps, scratch.ctypes.data, first, size, lanes)
            target = _view(out.ctypes.data + first * 4, size)
            # A loop that reads and writes the same row would not be vectorised.
            into = _view(scratch.ctypes.data + last * CHUNK_SIZE * 4, size) if is_row else target
            _add_and_divide(rows, steps, last, scratch.ctypes.data, first, size, into, divisor, lanes)
            if is_row:
                for i in range(size):
                    target[i] = into[i]
        squares[block] = _total(lanes)


@kernel("void(float32[::1], float32, float64[::1])")
def divide(values: NDArray[np.float32], divisor: float, squares: NDArray[np.float64]) -> None:
    """The second half of `mean_rows`, in place, where the sum was made before the divisor was known.

    Args:
        values: float32, (num_elements,); overwritten.
        divisor: as in `mean_rows`.
        squares: as in `mean_rows`.
    """
    num_elements = values.shape[0]
    lanes = np.empty(CHUNK_SIZE, np.float64)
    for block in range(squares.shape[0]):
        lanes[:] = 0.0
        stop = min((block + 1) * BLOCK_SIZE, num_elements)
        for first in range(block * BLOCK_SIZE, stop, CHUNK_SIZE):
            part = _view(values.ctypes.data + first * 4, min(CHUNK_SIZE, stop - first))
            for i in range(part.shape[0]):
                quotient = part[i] / divisor
                part[i] = quotient
                lanes[i] += float64(quotient) * float64(quotient)
        squares[block] = _total(lanes)
