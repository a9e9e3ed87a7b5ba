"""Sums of squares over segments of a vector, in float64: what norms of whole tensors are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpidl.kernels._jit import float64, kernel
from mpidl.kernels.summation import CHUNK_SIZE, _total, _view

if TYPE_CHECKING:
    from numpy.typing import NDArray


@kernel("void(float32[::1], int64[::1], float64[::1])")
def segment_squares(values: NDArray[np.float32], cuts: NDArray[np.int64], squares: NDArray[np.float64]) -> None:
    """Add up the squares of each segment, in an order that depends on the segment's length only.

    Args:
        values: float32, (num_elements,); read only.
        cuts: int64, (num_segments + 1,), ascending, none past num_elements: segment i is values[cuts[i] : cuts[i + 1]].
        squares: float64, (num_segments,); overwritten.
    """
    lanes = np.empty(CHUNK_SIZE, np.float64)
    for segment in range(squares.shape[0]):
        lanes[:] = 0.0
        for first in range(cuts[segment], cuts[segment + 1], CHUNK_SIZE):
            chunk = _view(values.ctypes.data + first * 4, min(CHUNK_SIZE, cuts[segment + 1] - first))
            for i in range(chunk.shape[0]):
                lanes[i] += float64(chunk[i]) * float64(chunk[i])
        squares[segment] = _total(lanes)
