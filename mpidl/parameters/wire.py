"""What travels between nodes: float32 as it is, or rounded to bfloat16. Sums are float32 either way."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels

Float32Array = NDArray[np.float32]
AnyArray = NDArray[Any]


class Wire(Protocol):
    """How float32 values become words, the elements of messages, and values again."""

    dtype: Any
    """Of a word."""
    rounds: bool
    """Whether values lose digits on the way."""

    def add_rows(self, rows: NDArray[np.int64], steps: NDArray[np.int64], words: AnyArray) -> None:
        """Write the sum of rows into a message; `rows` and `steps` as `mpidl.kernels.add_rows` takes them."""
        ...

    def to_words(self, values: Float32Array) -> AnyArray:
        """The words of values; may be the same memory."""
        ...

    def to_values(self, words: AnyArray) -> Float32Array:
        """The values of words; may be the same memory."""
        ...


class Float32Wire:
    """Values travel as they are."""

    dtype: Any = np.float32
    rounds = False

    def add_rows(self, rows: NDArray[np.int64], steps: NDArray[np.int64], words: Float32Array) -> None:  # noqa: D102
        kernels.add_rows(rows, steps, words)

    def to_words(self, values: Float32Array) -> Float32Array:  # noqa: D102
        return values

    def to_values(self, words: Float32Array) -> Float32Array:  # noqa: D102
        return words


class Bfloat16Wire:
    """Values are rounded to the nearest bfloat16, ties to even, and travel as uint16."""

    dtype: Any = np.uint16
    rounds = True

    def add_rows(self, rows: NDArray[np.int64], steps: NDArray[np.int64], words: NDArray[np.uint16]) -> None:  # noqa: D102
        values = np.empty(words.size, np.float32)
        kernels.add_rows(rows, steps, values)
        kernels.to_bfloat16(values, words)

    def to_words(self, values: Float32Array) -> NDArray[np.uint16]:  # noqa: D102
        words = np.empty(values.size, np.uint16)
        kernels.to_bfloat16(values, words)
        return words

    def to_values(self, words: NDArray[np.uint16]) -> Float32Array:  # noqa: D102
        values = np.empty(words.size, np.float32)
        kernels.from_bfloat16(words, values)
        return values


WIRES: dict[str, Wire] = {"float32": Float32Wire(), "bfloat16": Bfloat16Wire()}
