"""Float32 to bfloat16 and back: the words that travel when a wire of 16 bits was asked for.

A bfloat16 is the upper half of a float32. Rounding is to nearest, ties to even (IEEE 754); values that round past the
largest become infinite, and what is not a number stays so. MPI has no sums of 16-bit floats to rely on: words travel as
uint16 and are added as float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.kernels._jit import inlined, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray


@inlined
def _rounded(value: Any) -> Any:
    """The word of a float32's bits."""
    # Half a word, less one where the word before is even: a carry reaches the exponent as it should.
    rounded = np.uint32(value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (value >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (value & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(quiet if is_nan else rounded)


@kernel("void(uint32[::1], uint16[::1])")
def _round(bits: NDArray[np.uint32], words: NDArray[np.uint16]) -> None:
    for i in range(bits.shape[0]):
        words[i] = _rounded(bits[i])


@kernel("void(uint16[::1], uint32[::1])")
def _widen(words: NDArray[np.uint16], bits: NDArray[np.uint32]) -> None:
    for i in range(words.shape[0]):
        bits[i] = np.uint32(words[i]) << np.uint32(16)


def to_bfloat16(values: NDArray[np.float32], words: NDArray[np.uint16]) -> None:
    """Round to bfloat16.

    Args:
        values: float32, (num_elements,), C-contiguous; read only.
        words: uint16, (num_elements,); overwritten.
    """
    _round(values.view(np.uint32), words)


def from_bfloat16(words: NDArray[np.uint16], values: NDArray[np.float32]) -> None:
    """Widen to float32, exactly.

    Args:
        words: uint16, (num_elements,), C-contiguous; read only.
        values: float32, (num_elements,); overwritten.
    """
    _widen(words, values.view(np.uint32))


@kernel("void(float32[::1], float32[::1], uint16[::1])")
def to_bfloat16_with_feedback(
    values: NDArray[np.float32], residuals: NDArray[np.float32], words: NDArray[np.uint16]
) -> None:
    """Round the values with what rounding has taken from earlier ones, and keep what it takes now.

    Args:
        values: float32, (num_elements,), C-contiguous; read only.
        residuals: float32, (num_elements,): added to the values first, in float32; overwritten with what the words are
            short of that, which is exact. 0 where a word is not finite: infinity less infinity is no number.
        words: uint16, (num_elements,); overwritten.
    """
    for i in range(words.shape[0]):
        value = np.float32(values[i] + residuals[i])
        word = _rounded(value.view(np.uint32))
        rest = value - np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)
        is_finite = (word & np.uint16(0x7F80)) != np.uint16(0x7F80)
        residuals[i] = rest if is_finite else np.float32(0)
        words[i] = word
