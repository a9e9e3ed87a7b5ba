"""Losses for models with more than one output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class WithAuxiliary:
    """A loss of several heads: the first one's, plus a share of each other's.

    A model such as `mpidl.models.googlenet` returns (logits, auxiliary logits, ...) while training and logits alone in
    evaluation mode; what is no tuple goes to the loss as it is. Job files need not name this: a model with an attribute
    `auxiliary_weight` gets it.

    Args:
        loss: of one head's outputs and the targets: a mean, or (sum, weight).
        weight: what the auxiliary heads' losses are multiplied by.

    Example:
        trainer = mpidl.Trainer(models.googlenet(), losses.WithAuxiliary(cross_entropy), ...)
    """

    def __init__(self, loss: Callable[[Any, Any], Any], weight: float = 0.3) -> None:
        self._loss = loss
        self._weight = weight

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """The loss of a head or of several: like the inner one's, a tensor or (sum, weight)."""
        if not isinstance(outputs, tuple):
            return self._loss(outputs, targets)
        main, *others = (self._loss(each, targets) for each in outputs)
        if isinstance(main, tuple):
            total, weight = main
            return total + self._weight * sum(other[0] for other in others), weight
        return main + self._weight * sum(others)
