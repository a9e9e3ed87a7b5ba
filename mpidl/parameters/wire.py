"""What travels between nodes: float32 as it is, or rounded to bfloat16. Sums are float32 either way."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels

Float32Array = NDArray[np.float32]
AnyArray = NDArray[Any]


class Wire(Protocol):
    """How float32 values become words, the elements of messages, and values again.

    Where values are needed on the way, they are written into `room`, float32, as long as the words; then no more than
    `max_size` words are wanted at a time, so that values stay in cache.
    """

    dtype: Any
    """Of a word."""
    rounds: bool
    """Whether values lose digits on the way."""

    max_size: int | None
    """Words that are made, or read, at a time; None: any number, and there need be no `room`."""

    def add_rows(
        self,
        rows: NDArray[np.int64],
        steps: NDArray[np.int64],
        words: AnyArray,
        room: Float32Array,
        residuals: Float32Array | None,
    ) -> None:
        """Write the sum of rows into a message; `rows` and `steps` as `mpidl.kernels.add_rows` takes them.

        With residuals (float32, as many as words), what they hold is added first, and what is lost is left in them.
        """
        ...

    def write(self, values: Float32Array, words: AnyArray) -> None:
        """Write values into a message."""
        ...

    def read(self, words: AnyArray, values: Float32Array) -> None:
        """Write the values of a message's words."""
        ...

    def values_of(self, words: AnyArray, room: Float32Array) -> Float32Array:
        """The values of words: in `room`, or the words themselves."""
        ...


class Float32Wire:
    """Values travel as they are."""

    dtype: Any = np.float32
    rounds = False
    max_size: int | None = None

    def add_rows(  # noqa: D102
        self,
        rows: NDArray[np.int64],
        steps: NDArray[np.int64],
        words: Float32Array,
        room: Float32Array,
        residuals: Float32Array | None,
    ) -> None:
        kernels.add_rows(rows, steps, words)

    def write(self, values: Float32Array, words: Float32Array) -> None:  # noqa: D102
        words[:] = values

    def read(self, words: Float32Array, values: Float32Array) -> None:  # noqa: D102
        values[:] = words

    def values_of(self, words: Float32Array, room: Float32Array) -> Float32Array:  # noqa: D102
        return words


class Bfloat16Wire:
    """Values are rounded to the nearest bfloat16, ties to even, and travel as uint16."""

    dtype: Any = np.uint16
    rounds = True
    max_size: int | None = 16 * kernels.BLOCK_SIZE

    def add_rows(  # noqa: D102
        self,
        rows: NDArray[np.int64],
        steps: NDArray[np.int64],
        words: NDArray[np.uint16],
        room: Float32Array,
        residuals: Float32Array | None,
    ) -> None:
        kernels.add_rows(rows, steps, room)
        if residuals is None:
            kernels.to_bfloat16(room, words)
        else:
            kernels.to_bfloat16_with_feedback(room, residuals, words)

    def write(self, values: Float32Array, words: NDArray[np.uint16]) -> None:  # noqa: D102
        kernels.to_bfloat16(values, words)

    def read(self, words: NDArray[np.uint16], values: Float32Array) -> None:  # noqa: D102
        kernels.from_bfloat16(words, values)

    def values_of(self, words: NDArray[np.uint16], room: Float32Array) -> Float32Array:  # noqa: D102
        kernels.from_bfloat16(words, room)
        return room


WIRES: dict[str, Wire] = {"float32": Float32Wire(), "bfloat16": Bfloat16Wire()}
