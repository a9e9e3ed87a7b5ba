"""Numba kernels: sums of rows and of squares, words of a narrower wire.

Ships as `mpidl.kernels`; nothing else imports Numba.
"""

from mpidl.kernels.norms import segment_squares
from mpidl.kernels.summation import BLOCK_SIZE, MAX_OPERANDS, add_rows, divide, mean_rows
from mpidl.kernels.wire import from_bfloat16, to_bfloat16, to_bfloat16_with_feedback

__all__ = [
    "BLOCK_SIZE",
    "MAX_OPERANDS",
    "add_rows",
    "divide",
    "from_bfloat16",
    "mean_rows",
    "segment_squares",
    "to_bfloat16",
    "to_bfloat16_with_feedback",
]
