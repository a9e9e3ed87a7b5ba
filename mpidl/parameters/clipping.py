"""Clipping of the mean gradient, by value and by global norm, as `torch.nn.utils.clip_grad_*` do."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from mpidl import kernels
from mpidl.errors import LayoutError


@dataclasses.dataclass(frozen=True)
class Clipping:
    """The bounds; None: none."""

    norm: float | None = None
    """Of the L2 norm over all parameters of all param groups."""
    value: float | None = None
    """Of each element's magnitude; applied first."""

    def check(self) -> None:
        """Raise LayoutError unless the bounds are positive numbers."""
        for name, bound in (("clip_norm", self.norm), ("clip_value", self.value)):
            if bound is not None and not (math.isfinite(bound) and bound > 0):
                raise LayoutError(f"{name} is {bound}; it must be a positive number, or None for no clipping")

    def clip_values(self, gradient: NDArray[np.float32], squares: NDArray[np.float64]) -> None:
        """Clip each element of a slice in place, and make its blocks' sums of squares anew."""
        if self.value is not None:
            np.clip(gradient, -self.value, self.value, out=gradient)
            kernels.divide(gradient, 1.0, squares)

    def factor(self, norm: float) -> float:
        """What a gradient of this norm is multiplied by; torch's formula."""
        return 1.0 if self.norm is None else min(1.0, self.norm / (norm + 1e-6))
