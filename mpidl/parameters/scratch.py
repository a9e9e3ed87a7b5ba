"""Message buffers that are used again and again.

Memory fresh from the system costs a page fault for every 4 KiB, more than a copy of it: with new buffers for every
bucket, an exchange of 10 million float32 between two nodes took 30 to 70 ms more of a rank's core.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Scratch:
    """Memory that is borrowed and given back; as much is kept as was borrowed at the same time. For one thread."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self.num_bytes = 0
        """What is kept, and what is out."""

    @contextlib.contextmanager
    def borrow(self, size: int, dtype: Any) -> Iterator[NDArray[Any]]:
        """An array of (size,) with arbitrary content, until the block ends."""
        num_bytes = size * np.dtype(dtype).itemsize
        fitting = [each for each in self._free if each.size >= num_bytes]
        taken = min(fitting, key=lambda each: each.size, default=None)
        if taken is None:  # a larger one takes the place of the largest there is
            taken = max(self._free, key=lambda each: each.size, default=None)
        if taken is not None:
            self._free = [each for each in self._free if each is not taken]
        if taken is None or taken.size < num_bytes:
            self.num_bytes += num_bytes - (0 if taken is None else taken.size)
            taken = np.empty(num_bytes, np.uint8)
        try:
            yield taken[:num_bytes].view(dtype)
        finally:
            self._free.append(taken)
