"""Numba kernels: the local sums. Ships as `mpidl.kernels`; nothing else in the project imports Numba."""

from mpidl.kernels.summation import BLOCK_SIZE, add_rows, sum_rows

__all__ = ["BLOCK_SIZE", "add_rows", "sum_rows"]
