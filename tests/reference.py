"""The tree over partitions as the design page words it, and steps as the kernels' page words them, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from mpidl.parameters.tree import RowSum

Float32Array = npt.NDArray[np.float32]


def split(start: int, stop: int) -> int:
    """The design's words: start plus the largest power of two smaller than the length."""
    power = 1
    while 2 * power < stop - start:
        power *= 2
    return start + power


def reference_sum(values: Float32Array) -> Float32Array:
    """The recursion over [0, len(values)), in float32."""
    if len(values) == 1:
        first: Float32Array = values[0]
        return first
    mid = split(0, len(values))
    result: Float32Array = reference_sum(values[:mid]) + reference_sum(values[mid:])
    return result


def wide_values(num_partitions: int, seed: int) -> Float32Array:
    """Values of many magnitudes and both signs, so that any other order of addition shows."""
    generator = np.random.default_rng(seed)
    shape = (num_partitions, 16)
    return (generator.standard_normal(shape) * np.exp2(generator.integers(-8, 8, shape))).astype(np.float32)


def cuts_of(data: st.DataObject, stop: int, parts: int) -> list[int]:
    """Any cuts of [0, stop) into contiguous parts, empty ones included: parts + 1 numbers."""
    inner = data.draw(st.lists(st.integers(0, stop), min_size=parts - 1, max_size=parts - 1))
    return [0, *sorted(inner), stop]


KINDS: dict[int, Callable[..., Float32Array]] = {
    1: lambda a: a,
    2: lambda a, b: a + b,
    3: lambda a, b, c: (a + b) + c,
    4: lambda a, b, c, d: (a + b) + (c + d),
    5: lambda a, b, c: a + (b + c),
    8: lambda a, b, c, d, e, f, g, h: ((a + b) + (c + d)) + ((e + f) + (g + h)),
}
"""What a step of each kind computes of its operands."""


def apply_steps(row_sum: RowSum, rows: Sequence[Float32Array]) -> Float32Array:
    """Do what the steps of a sum say, in NumPy's float32."""
    held = {operand: rows[row] for operand, row in enumerate(row_sum.rows)}
    for kind, into, *operands in row_sum.steps:
        held[into] = KINDS[kind](*(held[i] for i in operands))
    return held[row_sum.steps[-1][1]]
