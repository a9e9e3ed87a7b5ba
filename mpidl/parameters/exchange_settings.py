"""How gradients and weights are exchanged, as the `ParameterManager`'s arguments say it."""

from __future__ import annotations

import dataclasses

from mpidl.errors import LayoutError
from mpidl.parameters.baselines import BASELINES
from mpidl.parameters.clipping import Clipping
from mpidl.parameters.synchronizer import STRATEGIES
from mpidl.parameters.wire import WIRES


@dataclasses.dataclass(frozen=True)
class ExchangeSettings:
    """The `ParameterManager`'s arguments of these names, the same on all ranks."""

    reduction: str
    wire: str
    error_feedback: bool
    clip_norm: float | None
    clip_value: float | None
    bucket_mb: float | None

    @property
    def clipping(self) -> Clipping:
        """The bounds of the mean gradient."""
        return Clipping(self.clip_norm, self.clip_value)

    def check(self) -> None:
        """Raise LayoutError where one is out of its range, or two do not fit each other."""
        if self.reduction not in STRATEGIES:
            raise LayoutError(f"reduction {self.reduction!r} is not one of {', '.join(STRATEGIES)}")
        if self.wire not in WIRES:
            raise LayoutError(f"wire {self.wire!r} is not one of {', '.join(WIRES)}")
        rounds = WIRES[self.wire].rounds
        if self.reduction in BASELINES and rounds:
            raise LayoutError(f"reduction {self.reduction!r} sends float32 only; leave wire={self.wire!r} out")
        if self.error_feedback and (self.reduction != "ordered" or not rounds):
            raise LayoutError(
                f"error_feedback is for gradients that are rounded, and with reduction={self.reduction!r} and "
                f"wire={self.wire!r} none are; add wire='bfloat16' (with reduction 'ordered'), or leave it out"
            )
        self.clipping.check()
        if self.bucket_mb is not None and not self.bucket_mb > 0:
            raise LayoutError(f"bucket_mb is {self.bucket_mb}; it must be a positive number, or None")
