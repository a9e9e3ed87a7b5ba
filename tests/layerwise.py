"""LARS and LAMB after the papers' algorithms, in NumPy float64 and written apart from mpidl: what to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


class LarsReference:
    """Algorithm 1 of arXiv 1708.03888, without its decay of the global rate."""

    def __init__(self, options: dict[str, Any]) -> None:
        defaults = {
            "momentum": 0.9, "trust_coefficient": 0.001, "weight_decay": 0.0, "eps": 1e-8, "adapt": True,
        }  # fmt: skip
        self.options = {**defaults, **options}
        self.velocity: Float64Array | float = 0.0

    def step(self, weights: Float64Array, gradient: Float64Array) -> Float64Array:
        o = self.options
        decay = o["weight_decay"]
        length = np.sqrt(np.sum(weights**2))
        below = np.sqrt(np.sum(gradient**2)) + decay * length + o["eps"]
        local = o["trust_coefficient"] * length / below if o["adapt"] and length > 0 else 1.0
        self.velocity = o["momentum"] * self.velocity + o["lr"] * local * (gradient + decay * weights)
        return weights - self.velocity


class LambReference:
    """Algorithm 2 of arXiv 1904.00962, with phi the identity."""

    def __init__(self, options: dict[str, Any]) -> None:
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "adapt": True}
        self.options = {**defaults, **options}
        self.first: Float64Array | float = 0.0
        self.second: Float64Array | float = 0.0
        self.t = 0

    def step(self, weights: Float64Array, gradient: Float64Array) -> Float64Array:
        o, self.t = self.options, self.t + 1
        one, two = o["betas"]
        self.first = one * self.first + (1 - one) * gradient
        self.second = two * self.second + (1 - two) * gradient**2
        r = self.first / (1 - one**self.t) / (np.sqrt(self.second / (1 - two**self.t)) + o["eps"])
        r = r + o["weight_decay"] * weights
        lengths = np.sqrt(np.sum(weights**2)), np.sqrt(np.sum(r**2))
        ratio: float = lengths[0] / lengths[1] if o["adapt"] and min(lengths) > 0 else 1.0
        moved: Float64Array = weights - o["lr"] * ratio * r
        return moved
