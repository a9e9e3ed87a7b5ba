"""The handwritten digits that come with the package; DIGITS.md beside this file names their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mpidl.data.files import open_npz

ImageSet: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

_LARGEST = 16  # of a pixel: the count of black points in a square of 4 by 4


def digits() -> tuple[ImageSet, ImageSet]:
    """Give the digits as a training and a validation set.

    The samples in order of their labels, and of the file among equal ones: each fifth of them, from the first
    on, is held out for validation. That leaves 1437 samples to train with and 360 held out, 34 to 37 of each
    digit; both parts are in the file's order. The same people wrote both.

    Returns:
        (images, labels) twice: float32, (samples, 1, 8, 8), from 0 (white) to 1; int64, (samples,), 0 to 9.
    """
    pixels, labels = open_npz(Path(__file__).with_name("digits.npz"))
    images = (pixels[:, np.newaxis] / np.float32(_LARGEST)).astype(np.float32)
    is_held_out = np.zeros(len(labels), np.bool_)
    is_held_out[np.argsort(labels, kind="stable")[::5]] = True
    train, validation = (_subset(images, labels, mask) for mask in (~is_held_out, is_held_out))
    return train, validation


def _subset(images: npt.NDArray[np.float32], labels: npt.NDArray[Any], mask: npt.NDArray[np.bool_]) -> ImageSet:
    return images[mask], labels[mask].astype(np.int64)
