"""Adding rows of a vector in one fixed order, cache block by cache block.

A list of (into, from) additions comes from `mpidl.parameters.tree`. It is applied to one block of all rows before the
next block is touched, so that every row is read from memory once. The inner loops run over plain one-dimensional
arrays: two-dimensional indexing there cost a factor of four to seven.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import carray

from mpidl.kernels._jit import float32_pointer, float64, inlined, kernel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_SIZE = 4096
"""Elements in one block: the unit of cache blocking, of square sums, and of shard cuts."""


@inlined
def _block(address: Any, first: int, size: int) -> Any:
    """View `size` float32 that begin `first` elements behind an address."""
    return carray(float32_pointer(address + first * 4), (size,))


@inlined
def _add_block(rows: Any, additions: Any, first: int, size: int) -> None:
    for k in range(additions.shape[0]):
        into = _block(rows[additions[k, 0]], first, size)
        other = _block(rows[additions[k, 1]], first, size)
        for i in range(size):
            into[i] += other[i]


@inlined
def _square_sum(values: Any) -> Any:
    # Numba's float() of a float32 is a float32: the products would be rounded, and overflow from 1.8e19 on.
    size = values.shape[0]
    whole = size - size % 8
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    for i in range(0, whole, 8):
        s0 += float64(values[i]) * float64(values[i])
        s1 += float64(values[i + 1]) * float64(values[i + 1])
        s2 += float64(values[i + 2]) * float64(values[i + 2])
        s3 += float64(values[i + 3]) * float64(values[i + 3])
        s4 += float64(values[i + 4]) * float64(values[i + 4])
        s5 += float64(values[i + 5]) * float64(values[i + 5])
        s6 += float64(values[i + 6]) * float64(values[i + 6])
        s7 += float64(values[i + 7]) * float64(values[i + 7])
    for i in range(whole, size):
        s0 += float64(values[i]) * float64(values[i])
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))


@kernel("void(int64[::1], int64[:, ::1], int64)")
def add_rows(rows: NDArray[np.int64], additions: NDArray[np.int64], num_elements: int) -> None:
    """Apply additions to rows, in place.

    Args:
        rows: int64, (num_rows,); addresses of float32 rows of `num_elements` elements; rows named first in an
            addition are overwritten.
        additions: int64, (num_additions, 2), C-contiguous; (into, from) indices of rows, in the order to apply.
        num_elements: elements in every row.
    """
    for first in range(0, num_elements, BLOCK_SIZE):
        _add_block(rows, additions, first, min(BLOCK_SIZE, num_elements - first))


@kernel("void(int64[::1], int64[:, ::1], float32, float32[::1], float64[::1])")
def sum_rows(
    rows: NDArray[np.int64],
    additions: NDArray[np.int64],
    divisor: float,
    out: NDArray[np.float32],
    squares: NDArray[np.float64],
) -> None:
    """Apply additions, divide the first row by `divisor` into `out`, and add up squares block by block.

    Args:
        rows: int64, (num_rows,); addresses of float32 rows as long as `out`; overwritten as in `add_rows`.
        additions: int64, (num_additions, 2), C-contiguous; they must end with the whole sum in row 0.
        divisor: what the sum is divided by (a true division: x / 3 is not x * (1 / 3)).
        out: float32, (num_elements,); overwritten.
        squares: float64, (ceil(num_elements / BLOCK_SIZE),); overwritten with each block's sum of squares. Eight
            running sums in a fixed arrangement: as fast as memory, and the same bits on every rank count.
    """
    num_elements = out.shape[0]
    block = 0
    for first in range(0, num_elements, BLOCK_SIZE):
        size = min(BLOCK_SIZE, num_elements - first)
        _add_block(rows, additions, first, size)
        total = _block(rows[0], first, size)
        for i in range(size):
            out[first + i] = total[i] / divisor
        squares[block] = _square_sum(out[first : first + size])
        block += 1
