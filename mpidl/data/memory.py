"""Where batches lie: aligned as torch aligns its own tensors.

The bits of a matrix product may depend on how its operands are aligned (MKL's do), and memory of NumPy's is aligned by
chance: a batch in it could give other weights from one run to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def empty(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Make a contiguous array of any numbers that starts at a multiple of 64 bytes, without filling it."""
    import torch

    size = math.prod(shape) * np.dtype(dtype).itemsize
    return torch.empty(size, dtype=torch.uint8).numpy().view(dtype).reshape(shape)


def copy(values: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Copy values, as numbers of that type, into memory made by `empty`, in the order of their indices."""
    copied = empty(values.shape, dtype)
    copied[...] = values
    return copied
