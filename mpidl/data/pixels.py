"""Images of one size, kept as bytes, as a source of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpidl.data import memory
from mpidl.data.order import Int64Array

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]


class ImageSource:
    """Images kept as bytes and normalised when they are read: a quarter of the memory of float32.

    A batch is (images, labels): float32, (batch, channels, height, width), (pixel / 255 - mean) / deviation; int64.

    Attributes:
        targets: int64, (samples,).
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Int64Array,
        mean: float | Sequence[float],
        deviation: float | Sequence[float],
        shift: int = 0,
    ) -> None:
        """Keep the arrays.

        Args:
            pixels: uint8, (samples, height, width) or (samples, channels, height, width).
            labels: int64, (samples,).
            mean: of pixels from 0 to 1, one for all channels or one for each; what becomes 0.
            deviation: of pixels from 0 to 1, likewise; what becomes 1.
            shift: where above 0, each sample is moved by up to so many pixels up or down and to the left or right,
                with black where nothing is left, and half of them are mirrored: by the sample's seed.
        """
        self.needs_seeds = shift > 0
        self.targets = labels
        self._pixels = pixels if pixels.ndim == 4 else pixels[:, np.newaxis]
        self._shift_size = shift
        self._scale, self._shift = scale_and_shift(mean, deviation)

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Int64Array, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Copy and normalise the images at `indices`; seeds say how each is moved and mirrored."""
        import torch

        pixels = self._pixels.take(indices, axis=0)
        if seeds is not None and self._shift_size:
            pixels = moved(pixels, seeds, self._shift_size)
        images = memory.copy(pixels, np.float32)
        images *= self._scale
        images += self._shift
        return torch.from_numpy(images), torch.from_numpy(self.targets[indices])


def scale_and_shift(
    mean: float | Sequence[float], deviation: float | Sequence[float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What bytes are multiplied by, then added to: float32, (channels or 1, 1, 1) each."""
    means, deviations = (np.atleast_1d(np.asarray(value, np.float64))[:, None, None] for value in (mean, deviation))
    return (1 / (255 * deviations)).astype(np.float32), (-means / deviations).astype(np.float32)


def moved(pixels: Pixels, seeds: Sequence[int], shift: int) -> Pixels:
    """Move and mirror images as their seeds say.

    Args:
        pixels: uint8, (batch, channels, height, width).
        seeds: of each image, 64 random bits.
        shift: the most pixels that an image is moved by, in each direction.

    Returns:
        A new array of the same shape.
    """
    height, width = pixels.shape[2:]
    result = np.zeros_like(pixels)
    for image, target, seed in zip(pixels, result, seeds, strict=True):
        down, right = ((seed >> bits) % (2 * shift + 1) - shift for bits in (1, 32))
        if seed & 1:
            image = image[:, :, ::-1]
        rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
        from_rows = slice(max(-down, 0), height + min(-down, 0))
        from_columns = slice(max(-right, 0), width + min(-right, 0))
        target[:, rows, columns] = image[:, from_rows, from_columns]
    return result
