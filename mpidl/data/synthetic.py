"""Random samples of any shape, to measure with: they cost next to nothing to make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpidl.data import memory
from mpidl.data.order import Int64Array
from mpidl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_NUM_PLACES = 1 << 14
_STEP = 7919  # a prime: neighbours begin far from each other, and no place is left out


class SyntheticSource:
    """Samples that are overlapping windows of one block of normally distributed numbers; nothing is kept of them.

    A sample's place in the block follows from its index, and its label from the place, so there is something to learn.

    Attributes:
        targets: int64, (samples,).
    """

    needs_seeds = False

    def __init__(self, shape: Sequence[int], num_classes: int, num_samples: int, seed: int) -> None:
        """Draw the block.

        Args:
            shape: of one sample.
            num_classes: labels are in [0, num_classes).
            num_samples: how many there are.
            seed: of the numbers.
        """
        self._shape = tuple(shape)
        self._size = math.prod(shape)
        num_places = max(_NUM_PLACES, num_classes)
        self._places = (np.arange(num_samples, dtype=np.int64) * _STEP + seed) % num_places
        self.targets: Int64Array = self._places % num_classes
        self._block = np.random.default_rng(seed).standard_normal(self._size + num_places, np.float32)

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Int64Array, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Copy the windows at `indices`: float32, (batch, *shape), and int64 labels; seeds have no effect."""
        import torch

        samples = memory.empty((len(indices), self._size), np.float32)
        for row, place in zip(samples, self._places[indices].tolist(), strict=True):
            row[:] = self._block[place : place + self._size]
        return torch.from_numpy(samples.reshape(-1, *self._shape)), torch.from_numpy(self.targets[indices])


def synthetic(
    *,
    shape: Sequence[int] = (3, 224, 224),
    num_classes: int = 1000,
    num_samples: int = 10_000,
    num_validation: int = 0,
    seed: int = 0,
) -> tuple[SyntheticSource, SyntheticSource | None]:
    """Make random samples, the same ones whenever the arguments are the same.

    Args:
        shape: of one sample, such as channels, height and width.
        num_classes: labels are in [0, num_classes).
        num_samples: in the training set.
        num_validation: in the validation set; 0: there is none.
        seed: of the numbers.

    Raises:
        ConfigError: an argument is not a whole number in its range, or the shape no list of such.
    """
    if not isinstance(shape, list | tuple) or not shape or not all(_is_count(side, 1) for side in shape):
        raise ConfigError(
            f"synthetic: shape is {shape!r}; give a list of integers of at least 1, such as [3, 224, 224]"
        )
    counts = {"num_classes": (num_classes, 1), "num_samples": (num_samples, 1), "num_validation": (num_validation, 0)}
    for name, (value, minimum) in (counts | {"seed": (seed, 0)}).items():
        if not _is_count(value, minimum):
            raise ConfigError(f"synthetic: {name} is {value!r}; give an integer of at least {minimum}")
    train = SyntheticSource(shape, num_classes, num_samples, seed)
    return train, SyntheticSource(shape, num_classes, num_validation, seed) if num_validation else None


def _is_count(value: object, minimum: int) -> bool:
    return type(value) is int and value >= minimum
