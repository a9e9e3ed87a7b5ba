"""The tree over partitions as the design page words it, to compare with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st


def split(start: int, stop: int) -> int:
    """The design's words: start plus the largest power of two smaller than the length."""
    power = 1
    while 2 * power < stop - start:
        power *= 2
    return start + power


def reference_sum(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The recursion over [0, len(values)), in float32."""
    if len(values) == 1:
        first: npt.NDArray[np.float32] = values[0]
        return first
    mid = split(0, len(values))
    result: npt.NDArray[np.float32] = reference_sum(values[:mid]) + reference_sum(values[mid:])
    return result


def wide_values(num_partitions: int, seed: int) -> npt.NDArray[np.float32]:
    """Values of many magnitudes and both signs, so that any other order of addition shows."""
    generator = np.random.default_rng(seed)
    shape = (num_partitions, 16)
    return (generator.standard_normal(shape) * np.exp2(generator.integers(-8, 8, shape))).astype(np.float32)


def cuts_of(data: st.DataObject, stop: int, parts: int) -> list[int]:
    """Any cuts of [0, stop) into contiguous parts, empty ones included: parts + 1 numbers."""
    inner = data.draw(st.lists(st.integers(0, stop), min_size=parts - 1, max_size=parts - 1))
    return [0, *sorted(inner), stop]
